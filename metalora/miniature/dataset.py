"""People of the portrait world, or mugs, as an image folder in the layout that `evaluate` and `meta-train` read."""

import argparse
import dataclasses
import json
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from metalora.miniature import captions, mugs
from metalora.miniature.people import GLASSES, HELD_OUT, Person, Scene, _visible, person, scene, seeds
from metalora.miniature.render import render

PROMPTS = ("a photo of {person}, in a red cap, in a green park", "a photo of {person}, wearing a blue turtleneck, smiling, at the beach",
           "a photo of {person}, wearing a black suit, in a library, with a calm face",
           "a pencil drawing of {person}, in a t-shirt, looking surprised")
MORE_PROMPTS = ("a photo of {person}, wearing a yellow beanie, laughing, in the city at night",
                "a photo of {person}, looking angry, wearing a green striped shirt, in front of a brick wall",
                "an oil painting of {person}, wearing glasses and an orange v-neck sweater, in the snow",
                "a black-and-white photo of {person}, with a sad face, in a shirt, in an office")
PHOTOS = ("plain", "side", "glasses", "hat")  # what the photo that a person is learnt from is like
SIDE_YAW = 30.0  # degrees; the world's people turn by up to 32


def reference(who: Person, number: int, photo: str = "plain") -> Scene:
    """A picture such as one would hand in: the usual looks, no hat, calm, nearly from the front, in soft light; or that in one respect worse."""
    drawn, rng = scene(who, 10_000 + number, usual_looks=1.0), random.Random(who.seed)
    calm = dataclasses.replace(drawn, hat=None, expression=rng.choice(("neutral", "smile")), light="soft", style="photo",
                               yaw=drawn.yaw / 3, pitch=drawn.pitch / 2, gaze=(0.0, 0.0))
    worse = {"plain": {}, "side": {"yaw": rng.choice((-SIDE_YAW, SIDE_YAW))}, "glasses": {"glasses": rng.choice(GLASSES)},
             "hat": {"hat": rng.choice(list(captions.HATS))}}
    made = dataclasses.replace(calm, **worse[photo])
    return dataclasses.replace(made, attributes=_visible(who, made))


class Subject(NamedTuple):
    """The pictures of one person or thing."""

    domain: str
    images: torch.Tensor  # (n, 3, size, size) uint8: those to learn from, then the others
    texts: list[str]


def of_person(seed: int, references: int, others: int, size: int, photo: str = PHOTOS[0]) -> Subject:
    """A person; the others are as varied as the world is, hair and glasses included, and the same for every `photo`."""
    who = person(seed)
    views = [reference(who, k, photo) for k in range(references)] + [scene(who, k) for k in range(others)]
    images, _, _ = render([(who, view) for view in views], size)
    return Subject(who.sex, images, [captions.caption(v.attributes, random.Random(f"{seed} {k}"), "{person}") for k, v in enumerate(views)])


def of_mug(seed: int, references: int, others: int, size: int) -> Subject:
    """A mug."""
    thing = mugs.mug(seed)
    views = [mugs.reference(thing, k) for k in range(references)] + [mugs.view(thing, k) for k in range(others)]
    images = mugs.render([(thing, view) for view in views], size)
    return Subject(mugs.DOMAIN, images, [mugs.caption(v, random.Random(f"{seed} {k}"), "{person}") for k, v in enumerate(views)])


def write_dataset(output: Path, seeds: list[int], references: int, others: int, size: int, prompts: tuple[str, ...], drawn: Callable[..., Subject] = of_person) -> None:
    """Writes images, metadata.jsonl and prompts.txt of the subjects of these seeds."""
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in seeds:
        subject = drawn(seed, references, others, size)
        for number, (image, text) in enumerate(zip(subject.images, subject.texts)):
            role = "reference" if number < references else "other"
            name = f"{seed}-{number}-{role}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(output / name)
            lines.append(json.dumps({"file_name": name, "text": text, "identity": str(seed), "domain": subject.domain, "role": role}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n")


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature dataset`: see --help."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature dataset", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    for kind in ("people", "mugs"):
        which.add_argument(f"--{kind}", metavar="FIRST:END or SEED,SEED,...", help=f"seeds of {kind}; from {HELD_OUT} on they are held out from all training")
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--photo", choices=PHOTOS, default=PHOTOS[0], help="what the references of people are like: taken from the side, with glasses on, with a hat on")
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--all-prompts", action="store_true", help="eight prompts of people instead of the four of the benchmark")
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    which = given.people or given.mugs
    chosen = [int(seed) for seed in which.split(",")] if re.fullmatch(r"\d+(,\d+)*", which) else list(seeds(which))
    of_people = PROMPTS + (MORE_PROMPTS if given.all_prompts else ())
    drawn, prompts = (partial(of_person, photo=given.photo), of_people) if given.people else (of_mug, mugs.PROMPTS)
    write_dataset(given.output, chosen, given.references, given.others, given.size, prompts, drawn)
