"""The sample people of the page, from assets/people: a dataset folder as everywhere else."""

from __future__ import annotations

from pathlib import Path

from .data import load_dataset
from .handlers import Sample

PEOPLE = Path(__file__).parents[1] / "assets" / "people"


def sample_people(folder: Path = PEOPLE) -> tuple[list[Sample], list[str]]:
    """The people and the sample prompts; none where the folder is not there."""
    if not folder.is_dir():
        return [], []
    found = load_dataset(folder)
    people = [Sample(str(s.references[0].path), s.domain, [str(i.path) for i in s.others]) for s in found.subjects]
    return people, found.prompts
