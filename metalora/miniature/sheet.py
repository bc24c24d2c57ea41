"""`python -m metalora.miniature sheet`: a contact sheet of the portrait world, a row for each person."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from metalora.files import write_atomically
from metalora.miniature.people import person, scene, seeds
from metalora.miniature.render import render


def sheet_file(name: str) -> Path:
    """The argument of a command that writes a sheet."""
    if Path(name).suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise argparse.ArgumentTypeError(f"{name} is no picture file; end the name in .jpg or .png")
    return Path(name)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes the file whole or not at all; a JPEG keeps the colours of small pictures. MetaLoraError where it cannot be written."""
    kind, how = ("PNG", {}) if path.suffix.lower() == ".png" else ("JPEG", {"quality": 92, "subsampling": 0})
    write_atomically(path, lambda beside: sheet.save(beside, format=kind, **how))


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature sheet`: see --help."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature sheet", description=__doc__)
    parser.add_argument("--output", type=sheet_file, required=True, metavar="FILE", help="a picture")
    parser.add_argument("--people", default="0:6", metavar="FIRST:END", help="seeds (%(default)s)")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    given = parser.parse_args(arguments)
    rows = [render([(who := person(seed), scene(who, k)) for k in range(given.scenes)], given.size)[0] for seed in seeds(given.people)]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)  # (3, people * size, scenes * size)
    save_sheet(Image.fromarray(sheet.permute(1, 2, 0).numpy()), given.output)
