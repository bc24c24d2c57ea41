"""The portrait world: people and scenes by their seeds, what captions say of them, and what is drawn."""

from __future__ import annotations

import metalora  # noqa: F401  before torch: it sets how threads wait
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from metalora.data import load_dataset
from metalora.miniature import captions, dataset, people
from metalora.miniature.__main__ import main
from metalora.miniature.attribute_check import named
from metalora.miniature.backdrop import PLACES, backdrop
from metalora.miniature.base import PREVIEW_PROMPTS
from metalora.miniature.fused import Fused
from metalora.miniature.pipeline import MiniatureConfig, clip_tokenizer, t5_tokenizer
from metalora.miniature.raster import rasterize
from metalora.miniature.render import render
from metalora.miniature.shards import load_shards
from metalora.prompts import fill

WORDS = set(captions.vocabulary())
SEEDS = st.integers(0, 2_000_000)
SIZE = 48


def words(text: str) -> list[str]:
    """Words and commas."""
    return re.findall(r"[^\s,]+|,", text)


@pytest.fixture(scope="module")
def tokenizers():
    config = MiniatureConfig()
    return [(clip_tokenizer(WORDS, config.clip_tokens), config.clip_tokens), (t5_tokenizer(WORDS, config.max_sequence_length), config.max_sequence_length)]


# People and scenes


@given(SEEDS, st.integers(0, 10_000))
def test_a_seed_is_always_the_same_person_and_picture(seed: int, number: int):
    who = people.person(seed)
    assert who == people.person(seed)
    view, again = people.scene(who, number), people.scene(people.person(seed), number)
    assert view == again and view.attributes == again.attributes


def test_people_differ_and_are_of_both_sexes_and_all_ages():
    crowd = [people.person(seed) for seed in range(300)]
    assert len({who.shape for who in crowd}) == 300
    assert {who.sex for who in crowd} == {"woman", "man"} and {who.age_word for who in crowd} == set(captions.AGES)
    assert {who.skin_word for who in crowd} == set(captions.SKINS)
    assert 110 < sum(who.sex == "woman" for who in crowd) < 190


def test_drawing_people_leaves_the_global_random_state():
    before = random.getstate()
    people.scene(people.person(1), 2)
    assert random.getstate() == before


@given(SEEDS, st.integers(0, 10_000))
def test_a_picture_is_said_to_show_only_what_can_be_seen(seed: int, number: int):
    who = people.person(seed)
    view = people.scene(who, number)
    seen = view.attributes
    assert (seen["hat_colour"] is None) == (seen["hat"] is None or view.style in ("pencil", "bw"))
    assert seen["hair"] in (None, view.hair) and seen["glasses"] == view.glasses and seen["sex"] == who.sex
    assert seen["hair"] is not None or view.hat is not None
    assert {"left": view.yaw < 0, "right": view.yaw > 0, None: True}[seen["turn"]]
    json.dumps(seen)


VOCABULARY = {"sex": {"woman", "man"}, "age": set(captions.AGES), "skin": {None, *captions.SKINS}, "beard": {None, *captions.BEARDS},
              "hair": {None, *captions.HAIR_WORDS}, "hair_colour": {None, *captions.HAIR_COLOURS}, "glasses": {None, "round", "square", "oval"},
              "hat": {None, *captions.HATS}, "hat_colour": {None, *captions.CLOTH_COLOURS}, "top": set(captions.TOPS),
              "top_colour": {None, *captions.CLOTH_COLOURS}, "expression": set(captions.EXPRESSIONS), "turn": {None, "left", "right"},
              "background": {None, *PLACES}, "light": set(people.LIGHTS), "style": set(people.STYLES)}


@given(SEEDS, st.integers(0, 10_000), st.sampled_from(list(people.STYLES)))
def test_a_record_uses_the_vocabulary_and_names_no_colour_where_there_is_none(seed: int, number: int, style: str):
    who = people.person(seed)
    view = dataclasses.replace(people.scene(who, number), style=style)
    seen = people._visible(who, view)
    assert seen.keys() == VOCABULARY.keys() and all(value in VOCABULARY[key] for key, value in seen.items())
    coloured = style in ("photo", "oil")
    assert all((seen[key] is not None) == coloured for key in ("skin", "top_colour"))
    assert coloured or seen["hat_colour"] is seen["hair_colour"] is None
    assert (seen["background"] is None) == (not coloured and view.background in ("grey", "blue"))
    assert view.light in people.PLACE_LIGHTS[view.background]


# Captions


@given(SEEDS, st.integers(0, 10_000), st.integers(), st.sampled_from([None, "sks woman", "sks man"]))
@settings(max_examples=300, deadline=None)
def test_captions_are_short_of_known_words_and_fit_the_text_encoders(tokenizers, seed: int, number: int, luck: int, stand_in: str | None):
    view = people.scene(people.person(seed), number)
    text = captions.caption(view.attributes, random.Random(luck), stand_in)
    assert set(words(text)) <= WORDS
    assert len(words(text)) <= captions.MAX_WORDS
    assert ", ," not in text and not text.endswith(",") and text == text.strip()
    assert " a a" not in text.replace(" a an", "") and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
    for tokenizer, length in tokenizers:
        assert len(tokenizer(text).input_ids) <= length
    if stand_in:
        assert stand_in in text and not any(f" {age} " in text for age in captions.AGES)


@given(SEEDS, st.integers(0, 10_000), st.integers())
@settings(max_examples=200, deadline=None)
def test_captions_say_nothing_that_the_picture_does_not_show(seed: int, number: int, luck: int):
    seen = people.scene(people.person(seed), number).attributes
    text = captions.caption(seen, random.Random(luck))
    assert ("glasses" not in text) or seen["glasses"]
    assert not any(f" {hat}" in text and seen["hat"] != hat for hat in captions.HATS)
    said = {key for key, phrases in captions.BACKGROUNDS.items() if any(f", {p}," in f", {text}," for p in phrases)}
    assert said <= {seen["background"]}
    said = {key for key, phrases in captions.EXPRESSIONS.items() if any(f", {p}," in f", {text}," for p in phrases)}
    assert said <= {seen["expression"]}


@given(seed=SEEDS, number=st.integers(0, 10**6), luck=st.integers(0, 2**30))
@settings(max_examples=150, deadline=None)
def test_what_a_caption_names_can_be_read_out_of_it_again(seed: int, number: int, luck: int):
    who = people.person(seed)
    record = people.scene(who, number).attributes
    text = captions.caption(record, random.Random(luck))
    asked = named(text)
    assert asked.items() <= {**record, "glasses": record["glasses"] and "glasses"}.items()
    parts = text.split(", ")[1:]
    things = [thing for part in parts for thing in re.sub("^(wearing|in) ", "", part).split(" and ")]
    assert ("glasses" in asked) == ("glasses" in things)
    for name, phrases in (("background", captions.BACKGROUNDS), ("expression", captions.EXPRESSIONS)):
        assert (name in asked) == any(part in several for part in parts for several in phrases.values())
    for name, kinds in (("hat", captions.HATS), ("top", captions.TOPS)):
        assert (name in asked) == any(thing.endswith(f" {kind}") for thing in things for kind in kinds.values())


def test_prompts_of_the_benchmark_name_what_a_classifier_can_look_for():
    asked = [named(prompt.replace("{person}", "a woman")) for prompt in dataset.PROMPTS + dataset.MORE_PROMPTS]
    assert asked[0] == {"style": "photo", "sex": "woman", "hat": "cap", "hat_colour": "red", "background": "park"}
    assert asked[3] == {"style": "pencil", "sex": "woman", "top": "t-shirt", "expression": "surprised"}
    assert all(len(each) >= 4 for each in asked)


def test_captions_of_one_picture_vary():
    view = people.scene(people.person(3), 4)
    assert len({captions.caption(view.attributes, random.Random(luck)) for luck in range(50)}) > 20


def test_all_prompts_of_the_project_are_made_of_known_words():
    prompts = [fill(prompt, "sks woman") for prompt in dataset.PROMPTS + dataset.MORE_PROMPTS]
    phrases = [phrase for group in captions.caption_phrases() + captions.asked_phrases() + captions.prompt_phrases() for phrase in group]
    for text in [*prompts, *PREVIEW_PROMPTS, *phrases]:
        assert set(words(text)) <= WORDS, text
        assert len(words(text)) <= captions.MAX_WORDS, text


# Pictures


PAIRS = [(seed, number) for seed, number in ((1, 0), (2, 3), (people.HELD_OUT, 1))]


@pytest.fixture(scope="module")
def drawn():
    return render([(people.person(seed), people.scene(people.person(seed), number)) for seed, number in PAIRS], SIZE)


def test_a_picture_is_drawn_the_same_again_and_in_other_company(drawn):
    images, boxes, points = drawn
    who = people.person(PAIRS[1][0])
    again, box, point = render([(who, people.scene(who, PAIRS[1][1]))], SIZE)
    twice = render([(who, people.scene(who, PAIRS[1][1]))], SIZE)[0]
    assert torch.equal(again, twice)
    assert (again[0].int() - images[1].int()).abs().float().mean() < 0.05
    assert torch.allclose(box[0], boxes[1], atol=1e-3) and torch.allclose(point[0], points[1], atol=1e-3)


@pytest.mark.parametrize("style", people.STYLES)
def test_every_style_is_drawn_the_same_in_any_company_and_with_or_without_colour(style: str):
    who = people.person(4)
    view = dataclasses.replace(people.scene(who, 2), style=style)
    other = dataclasses.replace(people.scene(who, 5), style=style)
    alone, among = render([(who, view)], SIZE)[0][0].int(), render([(who, other), (who, view)], SIZE)[0][1].int()
    assert (alone - among).abs().float().mean() < 0.05
    spread = (alone.amax(0) - alone.amin(0)).float().mean()  # between red, green and blue
    assert spread > 15 if style in ("photo", "oil") else spread < 8
    assert alone.float().std() > 20


@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_drawn_anew_by_every_seed_and_the_same_again(place: str):
    first, again, other = (backdrop(place, SIZE, seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (SIZE, SIZE, 3) and first.isfinite().all() and first.amin() >= 0


def test_keypoints_lie_in_the_face_box_and_in_order(drawn):
    images, boxes, points = drawn
    assert images.shape == (3, 3, SIZE, SIZE) and images.dtype == torch.uint8
    assert boxes.shape == (3, 4) and points.shape == (3, 5, 2)
    for box, (eye, other_eye, nose, mouth, other_mouth) in zip(boxes, points, strict=True):
        inside = torch.stack([eye, other_eye, nose, mouth, other_mouth])
        assert (inside >= box[:2]).all() and (inside <= box[2:]).all()
        assert eye[0] < other_eye[0] and mouth[0] < other_mouth[0]  # as seen, from left to right
        assert max(eye[1], other_eye[1]) < nose[1] < min(mouth[1], other_mouth[1])
        assert (box[2:] - box[:2]).min() > 0.3 * SIZE


def test_keypoints_of_many_people_are_found_where_they_were_drawn():
    """The eyes are the brightest or darkest spots of a face; at least they are nothing like plain skin."""
    pairs = [(who := people.person(seed), dataset.reference(who, 0)) for seed in (11, 12)]
    images, boxes, points = render(pairs, 96)
    for image, box, marks in zip(images.float(), boxes, points, strict=True):
        x0, y0, x1, y1 = box.int().tolist()
        face = image[:, y0:y1, x0:x1].mean(dim=(1, 2))
        x, y = marks[0].round().int().tolist()
        assert (image[:, y - 2:y + 3, x - 3:x + 4] - face[:, None, None]).abs().amax() > 25


def test_the_compiled_renderer_finds_the_same_triangles_and_draws_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch):
    pairs = [(who := people.person(seed), people.scene(who, seed)) for seed in (3, 4)]
    triangles = torch.randn(60, 3, 3, generator=torch.Generator().manual_seed(0)).abs() * 20, torch.arange(60) % 2, 2, 32, torch.ones(60, dtype=torch.bool)
    plain, found = render(pairs, 48)[0], rasterize(*triangles)
    monkeypatch.setattr(Fused, "compiling", True)
    compiled = render(pairs, 48)[0]
    assert all(torch.equal(one, other) for one, other in zip(found, rasterize(*triangles), strict=True))
    assert (compiled.int() - plain.int()).abs().float().mean() < 0.5


# Commands


def test_a_sheet_has_a_row_for_each_person_and_is_a_picture(tmp_path: Path, capsys):
    for name, kind in (("sheet.jpg", "JPEG"), ("sheet.png", "PNG")):
        assert main(["sheet", "--output", str(tmp_path / name), "--people", "7:9", "--scenes", "3", "--size", "32"]) == 0
        with Image.open(tmp_path / name) as sheet:
            assert (sheet.format, sheet.size) == (kind, (96, 64))
    with pytest.raises(SystemExit):
        main(["sheet", "--output", str(tmp_path / "sheet.txt")])
    assert "end the name in .jpg or .png" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 2


def test_the_dataset_command_writes_what_the_reader_of_datasets_reads(tmp_path: Path):
    assert main(["dataset", "--output", str(tmp_path), "--people", f"{people.HELD_OUT},7", "--others", "1", "--size", "32", "--all-prompts"]) == 0
    read = load_dataset(tmp_path)
    assert [subject.identity for subject in read.subjects] == [str(people.HELD_OUT), "7"]
    assert read.prompts == [*dataset.PROMPTS, *dataset.MORE_PROMPTS]
    for subject in read.subjects:
        assert subject.domain == people.person(int(subject.identity)).sex
        assert len(subject.references) == len(subject.others) == 1
        for item in subject.items:
            assert item.path.is_file() and set(words(fill(item.text, "sks woman"))) <= WORDS


def test_a_reference_photo_is_calm_bare_headed_and_nearly_from_the_front():
    for seed in range(40):
        view = dataset.reference(people.person(seed), 0)
        assert view.hat is None and view.hair == people.person(seed).hair and abs(view.yaw) < 13
        assert view.attributes["hat"] is None and view.attributes["expression"] == view.expression in ("neutral", "smile")


@pytest.mark.parametrize("photo", dataset.PHOTOS[1:])
def test_a_reference_photo_can_be_worse_in_one_respect_and_is_else_the_same(photo: str):
    who = people.person(3)
    plain, worse = (dataclasses.asdict(dataset.reference(who, 0, kind)) for kind in ("plain", photo))
    changed = {key for key in plain if plain[key] != worse[key]} - {"attributes"}
    assert changed == {"yaw" if photo == "side" else photo}
    assert worse["attributes"]["turn" if photo == "side" else photo] and not plain["attributes"]["turn" if photo == "side" else photo]


def test_the_render_command_writes_shards_and_goes_on_where_it_stopped(tmp_path: Path, capsys):
    command = ["render", "--output", str(tmp_path), "--people", "24:26", "--scenes", "1", "--size", "32", "--device", "cpu"]
    assert main(command) == 0
    part, = tmp_path.glob("part-*.safetensors")
    before = part.stat().st_mtime_ns
    assert main(command) == 0 and part.stat().st_mtime_ns == before
    for option, value in (("--people", "24:27"), ("--scenes", "2"), ("--size", "16")):
        assert main([value if name == option else argument for name, argument in zip(["", *command], command)]) == 2
    assert "choose another folder" in capsys.readouterr().err and part.stat().st_mtime_ns == before
    shards = load_shards(tmp_path)
    assert shards.persons.tolist() == [24, 25] and torch.equal(shards.images, load_file(part)["images"])
    assert shards.records[0]["attributes"] == people.scene(people.person(24), 0).attributes
    training, validation = shards.split()
    assert training.persons.tolist() == [25] and validation.persons.tolist() == [24]


@pytest.mark.parametrize("command", [["render", "--people", "0-3"], ["sheet", "--people", "a:b"], ["dataset", "--mugs", "1;2"]])
def test_a_mistyped_range_of_seeds_is_one_sentence(command, tmp_path: Path, capsys):
    assert main([*command, "--output", str(tmp_path / "there.png")]) == 2
    assert "is no range of seeds; write it like 0:6" in capsys.readouterr().err


def test_a_machine_without_a_compiler_is_told_to_leave_it(tmp_path: Path):
    command = [sys.executable, "-m", "metalora.miniature", "render", "--output", str(tmp_path / "data"), "--people", "24:25", "--scenes", "1", "--size", "32", "--compiled"]
    surroundings = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--device", "cpu"], env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith("install one, or leave out --compiled.\n")
    assert not list((tmp_path / "data").iterdir())
