"""The start that a face tells: the fit finds what is there, travels with the Meta-Down, and people begin where it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metalora import MetaLoraError, Personalizer
from metalora.adapt import adapt
from metalora.cache import encode
from metalora.config import MetaConfig
from metalora.data import load_dataset
from metalora.files import PREDICTOR, is_complete
from metalora.hub import META_DOWN_FILES
from metalora.meta import learn_domain, meta_train
from metalora.metadown import MetaDown
from metalora.predict import FOLDS, fit_predictor

from .conftest import run
from .parts import COLOURS, portrait, write_people

META = MetaConfig(
    rounds=2, bucket_size=4, bucket_steps=3, warmup_steps=1, batch_size=3, learning_rate=0.05, down_learning_rate=0.05, start_rate=0.5,
    predict_rank=2, predict_steps=3, validation_people=0,
)  # fmt: skip
SHAPES = {"a": ((1, 4), (6, 1)), "b": ((1, 4), (3, 1))}  # Mid, Up of two layers


def made_up(people: int, noise: float, photos: tuple[int, ...] = (2,), seed: int = 0):
    """Heads that are a mean, two directions that faces tell, and noise."""
    draw = torch.Generator().manual_seed(seed)
    faces = [torch.randn(1, 8, generator=draw).expand(photos[i % len(photos)], -1) for i in range(people)]
    basis = {name: tuple(torch.randn(3, *shape, generator=draw) for shape in pair) for name, pair in SHAPES.items()}
    heads = []
    for face in faces:
        along = torch.cat([torch.ones(1), face[0, :2]])
        heads.append({n: tuple(torch.tensordot(along, t, 1) + noise * torch.randn(t.shape[1:], generator=draw) for t in pair) for n, pair in basis.items()})
    return heads, faces


def distance(one, other) -> float:
    return math.sqrt(sum((x - y).square().sum() for n in one for x, y in zip(one[n], other[n])))


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, y) for k in one for x, y in zip(one[k], other[k]))


def test_what_faces_tell_is_found():
    heads, faces = made_up(65, noise=0.0, photos=(1, 2, 5))
    predictor, explained = fit_predictor(heads[:60], faces[:60], 2)
    assert explained > 0.99
    for person, face in zip(heads[60:], faces[60:]):
        assert distance(predictor.start(face[0]), person) < 0.1 * distance(predictor.start(torch.zeros(8)), person)


def test_what_faces_do_not_tell_is_not_made_up():
    heads, faces = made_up(60, noise=0.0)
    _, explained = fit_predictor(heads, list(reversed(faces)), 2)
    assert -0.1 < explained < 0.2
    noisy, faces = made_up(60, noise=1.0)
    predictor, explained = fit_predictor(noisy, faces, 20)
    assert explained < 0.9 and len(predictor.weight) == 20


@given(people=st.integers(2 * FOLDS, 24), rank=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_a_predictor_of_any_size_gives_the_mean_for_the_mean_face_and_fits_its_file(people, rank):
    heads, faces = made_up(people, noise=0.1)
    predictor, _ = fit_predictor(heads, faces, rank)
    assert len(predictor.weight) == min(rank, people - 1) or len(predictor.weight) < rank  # no more directions than people vary in
    mean = {n: tuple(torch.stack([h[n][i] for h in heads]).mean(0) for i in (0, 1)) for n in SHAPES}
    assert distance(predictor.start(torch.cat(faces)[::2].mean(0)), mean) < 1e-3
    again = type(predictor).of(predictor.tensors(), list(SHAPES))
    assert equal(again.start(faces[0][0]), predictor.start(faces[0][0]))


def test_too_few_people_and_other_faces_are_sentences():
    heads, faces = made_up(2 * FOLDS, noise=0.1)
    with pytest.raises(MetaLoraError, match="9 people are too few to fit a predictor on; 10 is the least"):
        fit_predictor(heads[1:], faces[1:], 2)
    with pytest.raises(MetaLoraError, match="embeddings of 8 numbers, and this face has 512"):
        fit_predictor(heads, faces, 2)[0].start(torch.zeros(512))


@pytest.fixture(scope="module")
def many(base):
    """Twelve subjects with two pictures of noise each, and their faces."""
    draw = torch.Generator().manual_seed(5)
    data = encode(base, torch.rand(24, 3, 32, 32, generator=draw) * 2 - 1, ["a photo of sks woman"] * 24, [i // 2 for i in range(24)])
    return data.select, [torch.nn.functional.normalize(torch.randn(2, 512, generator=draw), dim=-1) for _ in range(12)]


@pytest.fixture(scope="module")
def told(base, many):
    bucket, faces = many
    reports, found = run(meta_train(base, 12, bucket, "woman", META, name="t", faces=lambda: faces))
    return reports, found


def test_stage_one_leaves_a_predictor_behind_and_is_else_what_it_was(base, many, told):
    reports, found = told
    assert [r.step for r in reports] == list(range(1, 2 * 3 + 3 * 3 + 1)) and reports[-1].steps == 15
    without = run(meta_train(base, 12, many[0], "woman", replace(META, predict_rank=0), name="t"))[1]
    assert found.sha256 == without.sha256 and equal(found.start, without.start) and without.predictor is None
    assert found.training["people predicted from"] == 12 and found.training["variance of others explained"] < 0.5  # faces of noise tell nothing
    assert len(found.predictor.weight) == 2
    with pytest.raises(MetaLoraError, match="fitted on faces, and none are given"):
        next(meta_train(base, 12, many[0], "woman", META, name="t"))


@pytest.mark.parametrize("stop", [5, 8, 13])
def test_a_killed_stage_one_goes_on_exactly(base, many, told, tmp_path, stop):
    bucket, faces = many
    broken = meta_train(base, 12, bucket, "woman", META, name="t", folder=tmp_path, faces=lambda: faces)
    for _ in range(stop):
        next(broken)
    broken.close()
    reports, again = run(meta_train(base, 12, bucket, "woman", META, name="t", folder=tmp_path, faces=lambda: faces))
    assert again.stamp == told[1].stamp and 0 < len(reports) <= 15 - 3 * (stop // 3 - 1)


def test_who_shows_no_face_is_left_out_of_the_fit(base, many, told):
    bucket, faces = many
    some = [face[:0] if s == 7 else face for s, face in enumerate(faces)]
    found = run(meta_train(base, 12, bucket, "woman", META, name="t", faces=lambda: some))[1]
    assert found.training["people predicted from"] == 11 and found.stamp != told[1].stamp


def test_it_travels_with_the_folder(told, tmp_path):
    found = told[1]
    again = MetaDown.load(found.save(tmp_path))
    face = torch.randn(512, generator=torch.Generator().manual_seed(1))
    assert again.stamp == found.stamp and equal(again.start_for(face, 1.0), found.start_for(face, 1.0))
    assert PREDICTOR in META_DOWN_FILES and is_complete(tmp_path) and found.more[PREDICTOR][1] in (tmp_path / "README.md").read_text()
    tensors = found.predictor.tensors()
    replace(found, predictor=replace(found.predictor, bias=tensors["bias"] + 1)).save(tmp_path / "other")
    (tmp_path / "other" / PREDICTOR).replace(tmp_path / PREDICTOR)
    with pytest.raises(MetaLoraError, match="damaged: predictor.safetensors"):
        MetaDown.load(tmp_path)
    (tmp_path / PREDICTOR).unlink()
    assert not is_complete(tmp_path)


def test_a_person_begins_where_the_face_says_as_far_as_is_asked(base, photo, told, config):
    found, face = told[1], torch.randn(512, generator=torch.Generator().manual_seed(2))
    still = replace(config, steps=1, learning_rate=1e-30)

    def begins(share, face=face, meta_down=found):
        return run(adapt(base, meta_down, photo, replace(still, start_face=share), face=face))[1].factors

    own, common = found.predictor.start(face), found.start
    for name in common:
        for part in (0, 1):
            torch.testing.assert_close(begins(1.0)[name][part], own[name][part])
            torch.testing.assert_close(begins(0.5)[name][part], (own[name][part] + common[name][part]) / 2)
    assert equal(begins(0.0), begins(1.0, face=None)) and equal(begins(0.0), begins(1.0, meta_down=replace(found, predictor=None)))
    alone = replace(found, start={})
    assert equal(begins(1.0, meta_down=alone), begins(1.0))


@pytest.mark.one_family
def test_the_face_is_that_of_the_photos(base, meta_down, told, monkeypatch):
    seen = []
    monkeypatch.setattr(MetaDown, "start_for", lambda self, face, share: seen.append(face) or self.start)
    personalizer = Personalizer(base, told[1])
    one, two = (portrait(COLOURS[name], side=96) for name in ("ann", "bea"))
    for photos in ([one], [one, two], [one]):
        personalizer.adapt(photos, "woman", steps=1)
    faces = [personalizer.pick(photo, "woman").embedding for photo in (one, two)]
    mean = (faces[0] + faces[1]) / np.linalg.norm(faces[0] + faces[1])
    for got, wanted in zip(seen, (faces[0], mean, faces[0])):
        np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)


@pytest.mark.one_family
def test_a_dataset_gives_its_faces(base, tmp_path):
    colours = {f"p{i}": (255 * (i % 2), 25 * i, 255 - 25 * i) for i in range(10)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.parts.COLOURS", colours)
        folder = write_people(tmp_path / "people", dict.fromkeys(colours, "woman"))
    Image.new("RGB", (96, 96), "grey").save(folder / "p3-1.png")  # nobody there
    other = replace(base, settings=replace(base.settings, meta=META))
    found = run(learn_domain(other, load_dataset(folder).subjects, "woman", "t", tmp_path / "out"))[1]
    assert found.training["people predicted from"] == 10
