"""`python -m metalora.miniature sheet`: a contact sheet of the portrait world, a row for each person."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from metalora.miniature.people import person, scene, seeds
from metalora.miniature.render import render


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature sheet`: see --help."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature sheet", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a picture file")
    parser.add_argument("--people", default="0:6", metavar="FIRST:END", help="seeds (%(default)s)")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    given = parser.parse_args(arguments)
    rows = [render([(who := person(seed), scene(who, k)) for k in range(given.scenes)], given.size)[0] for seed in seeds(given.people)]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)  # (3, people * size, scenes * size)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(given.output, quality=92)  # where it is a JPEG
