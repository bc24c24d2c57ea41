"""The samples of the page, from assets/people and assets/mugs: dataset folders as everywhere else."""

from __future__ import annotations

from pathlib import Path

from .data import load_dataset
from .handlers import Sample

ASSETS = Path(__file__).parents[1] / "assets"
FOLDERS = {ASSETS / "people": 6, ASSETS / "mugs": 2}  # and how many of each one's prompts the page shows


def read_samples() -> tuple[list[Sample], list[str]]:
    """The people and things, people first, and the sample prompts; none of a folder that is not there."""
    samples: list[Sample] = []
    prompts: list[str] = []
    for folder, count in FOLDERS.items():
        if folder.is_dir():
            found = load_dataset(folder)
            samples += [Sample(str(s.references[0].path), s.domain, [str(i.path) for i in s.others]) for s in found.subjects]
            prompts += found.prompts[:count]
    return samples, prompts
