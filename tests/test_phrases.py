"""The base itself says what of a photo the caption is to name."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch

from metalora import Cancelled, Personalizer, phrases
from metalora.cache import captioned, encode, to_tensor
from metalora.face import Face, FaceFinder
from metalora.generate import use_people
from metalora.miniature.captions import EXPRESSIONS, asked_phrases
from metalora.miniature.dataset import reference
from metalora.miniature.people import _visible, person
from metalora.miniature.render import render
from metalora.phrases import LITTLE_NOISE, truest
from metalora.photo import load_photo
from metalora.train import flow_loss

from .conftest import run, state_hash
from .parts import write_people
from .test_generate import person_of

PHRASES = ("in a park", "smiling", "in a red cap", "a red park", "with the green cap")


@pytest.fixture
def asking(base, meta_down, monkeypatch) -> Personalizer:
    """A personalizer whose base is asked for PHRASES, and to whom every photo shows one face."""
    monkeypatch.setattr(FaceFinder, "detect", lambda self, image: [Face((8.0, 8.0, 24.0, 24.0), np.zeros((5, 2)), 1.0, np.eye(1, 512, dtype=np.float32)[0])])
    settings = replace(base.settings, asked_phrases=(PHRASES,))
    return Personalizer(replace(base, settings=settings), meta_down)


@pytest.mark.parametrize("seed", range(2))
def test_of_two_phrases_the_truer_one_predicts_the_noise_better(base, photo, seed):
    """Told by the loss of the trainings, over more draws than are asked for."""

    def loss(phrase: str) -> float:
        told = captioned(base, photo, [[f"a photo of sks woman, {phrase}"]] * len(photo))
        rows = torch.arange(600) % len(photo)
        with torch.no_grad():
            return flow_loss(base, told, rows, torch.Generator().manual_seed(seed), LITTLE_NOISE).item()

    best, worst = min(PHRASES, key=loss), max(PHRASES, key=loss)
    assert truest(base, photo, "a photo of sks woman", [worst, best], 240, 40, seed) == best
    assert truest(base, photo, "a photo of sks woman", [best, worst], 240, 40, seed) == best


def test_captions_change_and_pictures_do_not(base, photo):
    words = ["smiling", "in a park", "smiling"]
    told = captioned(base, photo, [(own, "a cap") for own in words])
    assert told.mean is photo.mean and told.captions.tolist() == [[0, 1], [2, 1], [0, 1]] and len(told.text[0]) == 3
    images = torch.zeros(3, 3, 32, 32)
    assert all(torch.equal(one, other) for one, other in zip(encode(base, images, words).text, captioned(base, photo, [[word] for word in words]).text))


def test_what_the_base_says_stands_in_the_caption(asking, base, config, tmp_path, monkeypatch):
    picture = write_people(tmp_path, {"ann": "woman"}) / "ann-0.png"
    said, own = [], base.encode_prompts
    monkeypatch.setattr(type(base), "encode_prompts", lambda self, prompts, length=None: said.append(list(prompts)) or own(prompts, length))
    config = replace(config, crops=2)
    asking.encode([picture], "woman", config)
    assert all(phrase not in text for texts in said for text in texts for phrase in PHRASES)  # not asked unless the settings say so
    before = state_hash(base.transformer)
    asking.encode([picture], "woman", replace(config, asked_draws=6))
    assert said[-2] == [f"{said[0][0]}, {phrase}" for phrase in PHRASES] and said[-1][0] in said[-2] and state_hash(base.transformer) == before


def test_nobody_is_in_the_base_that_is_asked(asking, base, meta_down, config, tmp_path, monkeypatch):
    picture, seen, bare = write_people(tmp_path, {"ann": "woman"}) / "ann-0.png", [], state_hash(base.transformer)
    monkeypatch.setattr(phrases, "truest", lambda base, *_, **__: seen.append(state_hash(base.transformer)) or PHRASES[0])
    use_people(base, [person_of(base, meta_down)])
    asking.encode([picture], "woman", replace(config, crops=1, asked_draws=6))
    assert seen == [bare]


def test_what_comes_before_the_first_step_can_be_stopped_anywhere(asking, base, config, tmp_path):
    picture = write_people(tmp_path, {"ann": "woman"}) / "ann-0.png"
    config = replace(config, crops=2, asked_draws=6, prior_pictures=2)
    calls, before = [], state_hash(base.transformer)
    _, whole = run(asking.adapt_meta_steps(picture, "woman", config, pause=lambda: calls.append(1)))
    assert len(calls) > 2 * base.settings.inference_steps  # a pause a step of the two pictures, and those of the photo
    for last in range(1, len(calls) + 1):
        again, left = Personalizer(asking.base, asking.meta_down("woman")), iter(range(last - 1))

        def pause() -> None:
            if next(left, None) is None:
                raise Cancelled

        with pytest.raises(Cancelled):
            next(again.adapt_meta_steps(picture, "woman", config, pause=pause))
        assert state_hash(base.transformer) == before
    assert run(again.adapt_meta_steps(picture, "woman", config))[1].sha256 == whole.sha256


@pytest.mark.parametrize("draws", [0, 6])
def test_a_photo_is_reworded_in_what_its_caption_says(asking, base, config, tmp_path, monkeypatch, draws):
    picture = write_people(tmp_path, {"ann": "woman"}) / "ann-0.png"
    said, own = [], base.encode_prompts
    monkeypatch.setattr(type(base), "encode_prompts", lambda self, prompts, length=None: said.append(list(prompts)) or own(prompts, length))
    config = replace(config, crops=2, asked_draws=draws)
    plain = asking.encode([picture], "woman", config)
    caption = said[-1][0]
    data = asking.encode([picture], "woman", replace(config, reworded=0.5))
    assert torch.equal(plain.mean, data.mean) and plain.captions.shape == (4, 1)
    groups = [(phrase, others) for phrase, others in zip(caption.split(", ")[1:], (*asking.base.settings.caption_phrases, PHRASES))]
    told = said[-1] if len(said[-1]) > 1 else [caption]
    assert told[0] == caption and sorted(told[1:]) == sorted(caption.replace(phrase, other) for phrase, group in groups for other in group if other != phrase)
    assert data.captions.tolist() == [list(range(len(told)))] * 4


@pytest.mark.one_family
def test_the_miniature_knows_a_face_that_laughs_from_one_that_is_surprised():
    """Of eight people who are held out, drawn with either, six at least."""
    personalizer, right = Personalizer.open(), 0
    for seed in range(1003000, 1003008):
        who, expression = person(seed), ("laugh", "surprised")[seed % 2]
        scene = dataclasses.replace(reference(who, 0), expression=expression)
        image = render([(who, dataclasses.replace(scene, attributes=_visible(who, scene)))], 128)[0][0]
        data = encode(personalizer.base, to_tensor([load_photo(image.permute(1, 2, 0).numpy())]), ["a photo"])
        right += truest(personalizer.base, data, f"a photo of a {who.sex}", asked_phrases()[0], 24, 4) == EXPRESSIONS[expression][0]
    assert right >= 6
