"""The world of mugs: what a seed is, what is drawn of it, and the datasets of both worlds."""

from __future__ import annotations

import metalora  # noqa: F401  before torch: it sets how threads wait
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metalora.data import load_dataset
from metalora.miniature import captions, mugs, people
from metalora.miniature.__main__ import main
from metalora.miniature.colour import display, linear

SEEDS = st.integers(0, 2_000_000)
FRONT = replace(mugs.reference(mugs.mug(0), 0), yaw=0.0, elevation=15.0, background="grey", table=2, shift=(0.0, 0.0), zoom=1.0)


@given(SEEDS, st.integers(0, 20_000))
def test_a_seed_is_always_the_same_mug_and_picture_and_words_are_known(seed: int, number: int):
    thing = mugs.mug(seed)
    seen = mugs.view(thing, number)
    assert thing == mugs.mug(seed) and seen == mugs.view(thing, number) and mugs.reference(thing, 0).style == "photo"
    text = mugs.caption(seen, random.Random(number), "a person")  # both words are of the tokenizers
    assert set(re.findall(r"[^\s,]+|,", text)) <= set(captions.vocabulary())
    named = [place for place, phrases in captions.BACKGROUNDS.items() if any(text.endswith(f", {phrase}") for phrase in phrases)]
    assert named in ([], [seen.background])
    said = [style for style, openings in captions.OPENINGS.items() if any(text.startswith(f"{opening} a person") for opening in openings)]
    assert said in ([], [seen.style])


def test_mugs_differ():
    shelf = [mugs.mug(seed) for seed in range(200)]
    assert len({(thing.radii, thing.body) for thing in shelf}) == 200 and {thing.pattern for thing in shelf} == set(mugs.PATTERNS)


def test_a_plain_mug_shows_its_colour_and_the_handle_its_side():
    thing = replace(mugs.mug(0), pattern="plain", body=(30, 60, 190), handle_second=False, gloss=0.1)
    images = mugs.render([(thing, replace(FRONT, yaw=yaw)) for yaw in (0.0, 180.0)], 64).float()
    right, left = images
    middle = right[:, 30:40, 28:36].mean((1, 2))
    assert middle[2] > 1.8 * middle[0] and middle[2] > 1.5 * middle[1], "blue, as the glaze is"
    blue = [(image[2] - image[0] > 40).float() for image in (right, left)]
    assert blue[0][:, 44:].sum() > blue[0][:, :20].sum() + 20 and blue[1][:, :20].sum() > blue[1][:, 44:].sum() + 20
    assert torch.equal(mugs.render([(thing, FRONT)], 64)[0], right.byte()), "a picture does not depend on those beside it"


@pytest.mark.parametrize("pattern", mugs.PATTERNS[1:])
def test_patterns_bring_the_second_colour(pattern: str):
    white, black = (240, 240, 240), (10, 10, 10)
    thing = replace(mugs.mug(0), pattern=pattern, body=white, second=black, inside=white, handle_second=False, count=3)
    kinds = [replace(thing, pattern="plain"), thing, replace(thing, pattern="plain", body=black)]
    plain, patterned, dark = mugs.render([(kind, FRONT) for kind in kinds], 64).float().mean(1)
    darker = plain - patterned > 60
    assert 0.05 < darker.sum() / (plain - dark > 60).sum() < 0.8
    assert not darker[:, :8].any(), "the wall behind is the same"


def test_light_of_a_place_falls_on_mug_and_table():
    thing = mugs.mug(1)
    sunset, snow = (replace(FRONT, light=name) for name in ("warm", "snow"))
    warm, cool = mugs.render([(thing, sunset), (thing, snow)], 64).float()[:, :, 52:, 4:20].mean((2, 3))  # a piece of the white table
    assert warm[0] / warm[2] > 1.08 * cool[0] / cool[2]
    assert display(linear(mugs.TABLES[2])).min() > 0.8


def test_the_dataset_command_writes_mugs(tmp_path: Path):
    assert main(["dataset", "--output", str(tmp_path / "mugs"), "--mugs", f"{people.HELD_OUT},7", "--others", "2", "--size", "32"]) == 0
    read = load_dataset(tmp_path / "mugs", need_prompts=True, need_others=True, open_pictures=True)
    assert [(s.identity, s.domain, len(s.others)) for s in read.subjects] == [(str(people.HELD_OUT), "mug", 2), ("7", "mug", 2)]
    assert read.prompts == list(mugs.PROMPTS) and all("{person}" in item.text for s in read.subjects for item in s.items)
    with pytest.raises(SystemExit):
        main(["dataset", "--output", str(tmp_path / "both"), "--mugs", "0:1", "--people", "0:1"])
