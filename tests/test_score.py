"""Scores: bounds, invariances, hand-checked values, and the scorer on real parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metalora import MetaLoraError
from metalora.clip import Clip
from metalora.dino import Dino
from metalora.face import FaceFinder
from metalora.prompts import Captioner
from metalora.score import Scorer, copying, gallery_entry, identification, interval, nearest, r_facesim, similarity

from .parts import COLOURS, GREY, build_small_dino, portrait

NOBODY = np.full((1, 8), np.nan, np.float32)


def unit(n: int, seed: int, d: int = 8) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def scorer(tiny_base) -> Scorer:
    return Scorer(FaceFinder(tiny_base.parent / "face", 32), Clip(tiny_base.parent / "clip"))


# ---- pure functions


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_likeness_is_a_mean_of_cosines(n, m, seed):
    faces, photos, others = unit(n, seed), unit(m, seed + 1), unit(3, seed + 2)
    got = similarity(faces, photos)
    assert got.shape == (n,) and (abs(got) <= 1 + 1e-9).all()
    assert np.allclose(got, [np.mean([a @ b for b in photos]) for a in faces])
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0]
    assert np.allclose(similarity(faces @ turn, photos @ turn), got)
    assert np.allclose(copying(faces, photos, others), got - r_facesim(faces, others))
    assert np.allclose(similarity(faces, np.vstack([photos, NOBODY])), got)


def test_a_copy_of_the_photo_is_told_from_the_person():
    photo, others = unit(1, 0), unit(4, 1)
    assert np.isclose(similarity(photo, photo)[0], 1) and copying(photo, photo, others)[0] > 0.3
    assert abs(copying(others[:1], others, others)[0]) < 1e-12


def test_no_face_has_no_likeness_and_is_nobody():
    assert np.isnan(similarity(NOBODY, unit(2, 0))).all() and np.isnan(r_facesim(unit(2, 0), NOBODY)).all()
    assert np.isnan(r_facesim(unit(2, 0), np.zeros((0, 8)))).all()
    assert nearest(NOBODY, unit(3, 0)).tolist() == [-1]
    assert np.isnan(gallery_entry(NOBODY)).all()


@given(st.integers(2, 9), st.integers(0, 99))
def test_the_nearest_is_who_it_is(people, seed):
    gallery = unit(people, seed)
    own = np.arange(people)
    assert identification(gallery, own, gallery).all()
    assert not identification(gallery, (own + 1) % people, gallery).any()
    order = np.random.default_rng(seed).permutation(people)
    assert np.array_equal(order[nearest(gallery, gallery[order])], own)
    hidden = np.where(own[:, None] == 0, np.nan, gallery)
    assert nearest(gallery, hidden)[0] != 0


def test_a_person_stands_in_the_gallery_as_the_mean_of_the_others():
    others = unit(3, 5)
    entry = gallery_entry(np.vstack([others, NOBODY]))
    assert np.allclose(entry, others.mean(0) / np.linalg.norm(others.mean(0)), atol=1e-6)


def test_chance_is_one_in_the_gallery():
    hits = identification(unit(4000, 1), np.arange(4000) % 10, unit(10, 2))
    assert abs(hits.mean() - 0.1) < 0.03


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=8))
def test_an_interval_holds_its_mean_and_repeats(groups):
    arrays = [np.array(g) for g in groups]
    mean, low, high = interval(arrays, draws=200)
    assert low - 1e-9 <= high and np.isclose(mean, np.concatenate(arrays).mean())
    assert (mean, low, high) == interval(arrays, draws=200)
    assert interval([*arrays, np.array([np.nan])], draws=200)[0] == mean


def test_intervals_are_those_of_the_textbook():
    groups = [np.array([v]) for v in np.random.default_rng(0).normal(0.5, 0.1, size=400)]
    mean, low, high = interval(groups)
    assert abs((high - low) / 2 - 1.96 * 0.1 / 20) < 0.0015 and low < mean < high
    # Pictures of one person say the same thing four times; they must not make the interval narrower.
    repeated = interval([np.repeat(g, 4) for g in groups])
    assert np.allclose(repeated, (mean, low, high))
    assert all(np.isnan(v) for v in interval([np.array([np.nan])])) and all(np.isnan(v) for v in interval([]))


# ---- with a face pack and a CLIP


def test_pictures_are_scored_in_one_go(scorer):
    ann, bea = (portrait(COLOURS[n]) for n in ("ann", "bea"))
    rows = scorer.score([ann, bea, Image.new("RGB", (32, 32), GREY)], [ann], [portrait(COLOURS["ann"], (8, 16))], ["a red cap"] * 3)
    assert [r["face"] for r in rows] == [True, True, False]
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-5) and rows[0]["clip_i"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["r_facesim"] > 0.5 > rows[1]["r_facesim"]
    assert rows[2]["similarity"] is None and rows[2]["r_facesim"] is None and rows[2]["clip_t"] is not None
    assert rows[0]["copying"] == pytest.approx(rows[0]["similarity"] - rows[0]["r_facesim"])
    alone = scorer.score([ann], [ann])[0]
    assert alone["r_facesim"] is None and alone["clip_t"] is None


def test_clip_scores_are_those_of_transformers(scorer):
    import torch

    images, texts = [portrait(c) for c in list(COLOURS.values())[:2]], ["a photo of a woman", "a red cap in the green park, smiling"]
    model, processor = scorer.clip._parts
    with torch.no_grad():
        logits = model(**processor(text=texts, images=images, return_tensors="pt", padding=True)).logits_per_image
    want = (logits / model.logit_scale.exp()).detach().numpy().diagonal()
    assert np.allclose(scorer.clip_t(images, texts), want, atol=1e-5)


def test_a_long_prompt_is_cut_off(scorer):
    assert scorer.clip.texts(["a red cap " * 200]).shape == (1, 32)


def test_the_captioner_takes_the_phrase_that_is_closest(scorer):
    groups = [["smiling", "in the park"], ["red cap", "green cap"]]
    image = portrait(COLOURS["ann"])
    text = Captioner(scorer.clip, groups).caption(image, "sks woman", "woman")
    start, *chosen = str(text).split(", ")
    assert start == "a photo of sks woman"
    for group, phrase in zip(groups, chosen):
        scores = scorer.clip_t([image] * 2, [f"a photo of a woman, {p}" for p in group])
        assert phrase == group[int(scores.argmax())]


def test_dino_scores_are_those_of_transformers(scorer, tmp_path):
    import torch
    from transformers import BitImageProcessorPil, Dinov2Model

    folder = build_small_dino(tmp_path)
    images = [portrait(c, at) for c, at in zip(COLOURS.values(), ((8, 8), (16, 16), (24, 16)))]
    with torch.no_grad():
        want = Dinov2Model.from_pretrained(folder)(**BitImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")).pooler_output
    want = torch.nn.functional.normalize(want, dim=-1).numpy()
    got = replace(scorer, dino=Dino(folder)).dino_i(images, images[:2])
    assert np.allclose(got, (want @ want[:2].T).mean(axis=1), atol=1e-5) and got[0] > got[2]


def test_what_is_no_dino_is_one_sentence(scorer, tmp_path):
    with pytest.raises(MetaLoraError, match="is a clip, not a DINO; give"):
        Dino(scorer.clip.place)
    with pytest.raises(MetaLoraError, match="cannot be read"):
        Dino(tmp_path)
    folder = build_small_dino(tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(MetaLoraError, match="cannot be read"):
        Dino(folder)


def test_a_missing_clip_is_one_sentence(tmp_path):
    with pytest.raises(MetaLoraError, match="cannot be read"):
        Clip(tmp_path).texts(["a"])
