"""Domains of things, in whose photos there is no face: whole pictures from stage 1 to the scores, and faces where they were."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from metalora import MetaLoraError, Personalizer
from metalora.adapt import crops
from metalora.cli import main
from metalora.config import SETTINGS_FILE, AdaptConfig, BaseSettings, MetaConfig
from metalora.data import load_dataset
from metalora.dino import Dino
from metalora.evaluate import evaluate
from metalora.generate import unload_people
from metalora.handlers import Handlers
from metalora.meta import learn_domain
from metalora.metadown import MetaDown, model_card
from metalora.report import SETTINGS, TRUE_PHOTOS, read_rows
from metalora.studio import Order, StopFlag, Studio
from metalora.subject import PictureFinder, finder_for

from .conftest import make_meta_down, run
from .parts import build_small_dino, write_people

SIZE = (48, 36)
ROLES = ("reference", "other", "other")


def picture(number: int, variant: int = 0) -> Image.Image:
    """Grey stripes, by whose width and slant one thing is told from another. No face is found in them."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    stripes = np.sin((x * np.cos(number) + y * np.sin(number)) * (0.3 + 0.1 * number))
    return Image.fromarray((128 + (100 - 20 * variant) * stripes).astype(np.uint8)).convert("RGB")


def write_things(folder: Path, count: int = 3, domain: str = "mug") -> Path:
    """A dataset of things: a reference and two others each."""
    folder.mkdir(parents=True)
    rows = []
    for number, (variant, role) in ((n, each) for n in range(count) for each in enumerate(ROLES)):
        picture(number, variant).save(folder / f"{number}-{variant}.png")
        rows.append({"file_name": f"{number}-{variant}.png", "text": "a photo of {person}", "identity": f"{domain}-{number}", "domain": domain, "role": role})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("a photo of {person} in the green park\n")
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Dino:
    return Dino(build_small_dino(tmp_path_factory.mktemp("dino")))


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    return write_things(tmp_path_factory.mktemp("data") / "things")


@pytest.fixture(scope="module")
def without_faces(base, dino):
    """The tiny base with a DINO, with settings that are of faces' photos only, and without anything that could find a face."""
    adapt = replace(AdaptConfig(), steps=2, batch_size=2, learning_rate=0.05, background=0.1, prior_pictures=2)
    meta = replace(base.settings.meta, rounds=1, background=0.1)
    phrases = (("in a red cap", "smiling"),)
    opened = replace(base, settings=replace(base.settings, dino=str(dino.folder), face_pack="./nowhere", adapt=adapt, plain=adapt, meta=meta, caption_phrases=phrases))
    yield opened
    unload_people(opened)


@pytest.fixture(scope="module")
def mug(base) -> MetaDown:
    return replace(make_meta_down(base, base.settings.adapter), domain="mug", subject="picture")


@pytest.fixture(scope="module")
def both(base, mug, tmp_path_factory) -> Path:
    """A folder of Meta-Downs: one for mugs, one for women."""
    folder = tmp_path_factory.mktemp("meta-down")
    for each in (mug, make_meta_down(base, base.settings.adapter)):
        each.save(folder / each.domain)
    return folder


# ---- finding


def test_the_finder_of_pictures_takes_the_square_in_the_middle(dino):
    finder, image = PictureFinder(dino), picture(1)
    (found,) = finder.detect(image)
    assert found.box == (6, 0, 42, 36) and found.number == 1
    np.testing.assert_array_equal(found.embedding, dino.images([image])[0])
    np.testing.assert_array_equal(finder.embed(image), finder.pick(image, 1).embedding)
    assert finder.embed_all([image] * 2).shape == (2, 32) and finder.embed_all([]).shape == (0, 32)
    upright, mirrored = crops(image, found.box, 36, AdaptConfig(crops=1))
    assert upright.tobytes() == image.crop((6, 0, 42, 36)).tobytes() != mirrored.tobytes()
    assert [cut.tobytes() for cut in crops(image, found.box, 36, AdaptConfig(crops=1), mirror=False)] == [upright.tobytes()]


@pytest.mark.parametrize("face", [0, 2])
def test_a_whole_picture_has_no_other_face(dino, face):
    with pytest.raises(MetaLoraError, match=f"no face {face}; leave --face out"):
        PictureFinder(dino).pick(picture(0), face)


def test_a_subject_is_one_of_two(tmp_path):
    with pytest.raises(MetaLoraError, match="face or picture, not dog"):
        MetaConfig(subject="dog")
    (tmp_path / SETTINGS_FILE).write_text('{"meta": {"subject": "dog"}}')
    with pytest.raises(MetaLoraError, match="face or picture, not dog"):
        BaseSettings.load(tmp_path)
    assert "subject" not in repr(MetaConfig())  # so that checkpoints of faces from before there were others are gone on with


def test_the_dino_of_a_base_may_lie_beside_it(dino, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / SETTINGS_FILE).write_text('{"dino": "../dino"}')
    shutil.copytree(dino.folder, tmp_path / "dino")
    finder = finder_for(BaseSettings.load(tmp_path / "base"), "picture")
    assert isinstance(finder, PictureFinder) and finder.dino.sha256 == dino.sha256


# ---- stage 1


def test_a_meta_down_of_things_says_so(without_faces, things, tmp_path):
    found = run(learn_domain(without_faces, load_dataset(things).subjects, "mug", "t", tmp_path, {"subject": "picture"}))[1]
    even = replace(without_faces, settings=replace(without_faces.settings, meta=replace(without_faces.settings.meta, background=1.0, subject="picture")))
    assert found.sha256 == run(learn_domain(even, load_dataset(things).subjects, "mug", "t", tmp_path / "even"))[1].sha256  # nothing is background
    again = MetaDown.load(found.save(tmp_path / "down"))
    assert again.subject == found.subject == "picture" and "subject of its photos: the whole picture" in (tmp_path / "down" / "README.md").read_text()
    path = tmp_path / "down" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in said.items() if key != "subject"}))
    assert MetaDown.load(tmp_path / "down").subject == "face"  # as those from before
    path.write_text(json.dumps(said | {"subject": "voice"}))
    with pytest.raises(MetaLoraError, match="not known here .voice.; update"):
        MetaDown.load(tmp_path / "down")


@pytest.mark.one_family
def test_a_start_is_told_from_the_whole_picture(without_faces, dino, tmp_path):
    folder = write_things(tmp_path / "ten", 10)
    meta = replace(without_faces.settings.meta, bucket_size=5, predict_rank=1, predict_steps=2, subject="picture")
    opened = replace(without_faces, settings=replace(without_faces.settings, meta=meta))
    found = run(learn_domain(opened, load_dataset(folder).subjects, "mug", "t", tmp_path / "out"))[1]
    assert found.training["people predicted from"] == 10 and found.predictor.weight.shape == (1, dino.width)
    assert Personalizer(opened, found).adapt(picture(3), "mug").steps == 2


# ---- stage 2


def test_a_thing_is_learnt_from_the_whole_photo(without_faces, base, mug):
    personalizer, photo = Personalizer(without_faces, mug), picture(0)
    data = personalizer.encode([photo], "mug")
    assert len(data) == 1 and data.weight is None and torch.equal(data.text.embeds, base.encode_prompts(["a photo of sks mug"]).embeds)
    config = without_faces.settings.adapt
    one, other = (run(personalizer.adapt_meta_steps(photo, "mug", each))[1] for each in (config, replace(config, prior_pictures=0, background=1.0, crops=3)))
    assert one.sha256 == other.sha256  # what these settings are for has no meaning here
    with pytest.raises(MetaLoraError, match="no face 2"):
        personalizer.adapt(photo, "mug", face=2)


def test_a_thing_is_learnt_by_both_kinds_of_adapter_and_a_face_as_ever(without_faces, base, both):
    personalizer, photo = Personalizer(without_faces, str(both)), picture(0)
    meta = personalizer.adapt(photo, "mug")
    _, plain = run(personalizer.adapt_plain_steps(photo, "mug", 1, without_faces.settings.plain))
    assert meta.domain == plain.domain == "mug" and plain.is_plain and not meta.is_plain
    assert personalizer.adapt(photo, "mug").sha256 == meta.sha256 != personalizer.adapt(picture(1), "mug").sha256
    of_faces = Personalizer(replace(base, settings=replace(without_faces.settings, face_pack=base.settings.face_pack)), str(both))
    assert [of_faces.subject_of(domain) for domain in ("mug", "woman", "man")] == ["picture", "face", "face"]
    for domain in ("woman", "man"):  # of a domain without a Meta-Down nothing is known
        with pytest.raises(MetaLoraError, match="No face was found"):
            run(of_faces.adapt_plain_steps(photo, domain, 1, without_faces.settings.plain))


def test_a_domain_has_settings_of_its_own(without_faces, mug, tmp_path):
    own = MetaDown.load(replace(mug, adapt={"steps": 3, "flow": {"logit_std": 0.5}}).save(tmp_path))
    assert own.adapt == {"steps": 3, "flow": {"logit_std": 0.5}} and own.sha256 == mug.sha256
    assert 'suit it: {"steps": 3' in (tmp_path / "README.md").read_text() and "suit it" not in model_card(mug)
    personalizer, usual = Personalizer(without_faces, own), without_faces.settings.adapt
    assert personalizer.adapt_config("mug") == replace(usual, steps=3, flow=replace(usual.flow, logit_std=0.5))
    assert Personalizer(without_faces, mug).adapt_config("mug") == usual
    assert personalizer.adapt(picture(0), "mug").steps == 3 and personalizer.adapt(picture(0), "mug", steps=1).steps == 1
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"adapt": {"pace": 2}}))
    with pytest.raises(MetaLoraError, match="config.json has no setting named pace"):
        MetaDown.load(tmp_path)


@pytest.mark.one_family
def test_domains_that_are_learnt_in_other_ways_are_evaluated_apart(without_faces, mug, things, tmp_path):
    for domain, steps in (("mug", 1), ("jug", 2)):
        replace(mug, domain=domain, adapt={"steps": steps}).save(tmp_path / "downs" / domain)
    personalizer = Personalizer(without_faces, str(tmp_path / "downs"))
    _, summary = run(evaluate(personalizer, things, ["meta-lora"], tmp_path / "out"))
    assert summary["methods"]["meta-lora"]["steps"] == 1
    rows = (things / "metadata.jsonl").read_text().splitlines(keepends=True)
    mixed = shutil.copytree(things, tmp_path / "mixed")
    (mixed / "metadata.jsonl").write_text("".join(row.replace('"domain": "mug"', '"domain": "jug"') if "mug-0" in row else row for row in rows))
    with pytest.raises(MetaLoraError, match="jug, mug ask for settings of their own.*dataset of its own"):
        run(evaluate(personalizer, mixed, ["meta-lora"], tmp_path / "none"))


@pytest.mark.one_family
def test_things_have_phrases_of_their_own(without_faces, base, mug):
    told = replace(without_faces, settings=replace(without_faces.settings, thing_phrases=(("in the green park",),)))
    data = Personalizer(told, mug).encode([picture(0)], "mug")
    assert torch.equal(data.text.embeds, base.encode_prompts(["a photo of sks mug, in the green park"]).embeds)


# ---- scores


def test_things_are_compared_by_their_whole_pictures(without_faces, mug, dino, things, tmp_path):
    methods = ["base", "meta-lora", "lora-r1@1"]
    _, summary = run(evaluate(Personalizer(without_faces, mug), things, methods, tmp_path / "out", degrade=["occlusion=0.3"]))
    assert summary["left_out"] == {} and all(m["people"] == 3 and m["faces_found"]["mean"] == 1 for m in summary["methods"].values())
    assert summary["methods"][TRUE_PHOTOS]["identification"]["mean"] == 1
    photo, *others = dino.images([picture(1, variant) for variant in range(3)])
    first, second = read_rows(tmp_path / "out" / TRUE_PHOTOS)["001-mug-1"]
    assert first["r_facesim"] == second["r_facesim"] == pytest.approx(others[0] @ others[1], abs=1e-5)
    assert [first["similarity"], second["similarity"]] == pytest.approx([float(other @ photo) for other in others], abs=1e-5)
    (row,) = read_rows(tmp_path / "out" / "meta-lora")["001-mug-1"]
    (made,) = dino.images([Image.open(tmp_path / "out" / row["picture"])])
    assert row["r_facesim"] == pytest.approx(np.mean([made @ other for other in others]), abs=1e-5)
    said = json.loads((tmp_path / "out" / "base" / SETTINGS).read_text())
    assert said["subject"] == summary["subject"] == "picture" and said["seen_by"] == dino.sha256
    assert "the whole picture as a DINO model sees it" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.one_family
def test_people_and_things_are_evaluated_apart(base, dino, both, things, tmp_path):
    personalizer = Personalizer(replace(base, settings=replace(base.settings, dino=str(dino.folder))), str(both))
    people = write_people(tmp_path / "people", {"ann": "woman", "bea": "woman"})
    run(evaluate(personalizer, people, ["base"], tmp_path / "out"))
    assert "subject" not in json.loads((tmp_path / "out" / "base" / SETTINGS).read_text())
    as_things = Personalizer(personalizer.base, replace(make_meta_down(base, base.settings.adapter), subject="picture"))
    run(evaluate(as_things, people, ["base"], tmp_path / "whole"))
    for other, folder in ((as_things, "out"), (personalizer, "whole")):
        with pytest.raises(MetaLoraError, match="other settings .*subject"):
            run(evaluate(other, people, ["base"], tmp_path / folder))
    mixed = shutil.copytree(things, tmp_path / "mixed")
    shutil.copytree(people, mixed, dirs_exist_ok=True)
    (mixed / "metadata.jsonl").write_text("".join((folder / "metadata.jsonl").read_text() for folder in (things, people)))
    with pytest.raises(MetaLoraError, match=r"people \(woman\) with domains of things \(mug\).*evaluate each in a dataset of its own"):
        run(evaluate(personalizer, mixed, ["base"], tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# ---- the commands and the page


@pytest.fixture(scope="module")
def opened_by_name(tiny_base, dino, tmp_path_factory) -> Path:
    """A copy of the tiny base whose own settings name the DINO, and no face pack that is there."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("copy") / "base")
    said = json.loads((folder / SETTINGS_FILE).read_text()) | {"dino": str(dino.folder), "face_pack": "./nowhere", "clip": str(tiny_base.parent / "clip")}
    (folder / SETTINGS_FILE).write_text(json.dumps(said))
    return folder


@pytest.mark.one_family
def test_the_commands_take_things(opened_by_name, things, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("METALORA_BASE", str(opened_by_name))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        return end.value.code or 0, *capsys.readouterr()

    assert call("meta-train", things, "--domain", "mug", "--subject", "picture", "--rounds", 1, "--adapt", "steps=3", "--output", "downs/mug")[0] == 0
    assert MetaDown.load("downs/mug").subject == "picture" and MetaDown.load("downs/mug").adapt == {"steps": 3}
    code, _, err = call("meta-train", things, "--domain", "mug", "--adapt", "pace=3", "--output", "none")
    assert code == 2 and "--adapt has no setting named pace" in err
    monkeypatch.setenv("METALORA_META_DOWN", "downs")
    assert call("doctor", "--json")[1].count('"DINO": {"ok": true') == 1
    photo, other = things / "0-0.png", things / "0-1.png"
    code, out, _ = call("adapt", photo, "--domain", "mug", "--held-out", other, "-o", "mug.safetensors", "--steps", 2, "--json")
    assert code == 0 and json.loads(out)["scores"]["r_facesim"] is not None and json.loads(out)["scores"]["face"] == 1
    code, _, err = call("adapt", photo, "--domain", "mug", "--face", 2, "-o", "two.safetensors")
    assert code == 2 and "leave --face out" in err
    for steps in ([], ["--steps", 3]):  # as many as the Meta-Down says, so that the second finds all there
        code, out, _ = call("adapt-all", things, "--domain", "mug", "--output", "all", *steps, "--json")
        assert code == 0 and len(json.loads(out)["people"]) == 3
    code, out, _ = call("score", photo, things / "2-0.png", "--against", other, "--subject", "picture", "--json")
    one, two = json.loads(out)["pictures"]
    assert code == 0 and one["r_facesim"] > two["r_facesim"]
    code, _, err = call("score", photo, "--against", other, "--subject", "voice")
    assert code == 2 and "--subject" in err


@pytest.mark.one_family
def test_the_page_learns_things_too(without_faces, mug, things, tmp_path):
    opened = Future()
    opened.set_result(Personalizer(without_faces, mug))
    studio, stop, photo = Studio("tiny", _opened=opened), StopFlag.of("things"), str(things / "0-0.png")
    held_out = [str(things / "0-1.png")]
    _, learnt = run(studio.learn(photo, "mug", face=2, steps=2, seed=0, held_out=held_out, stop=stop, preview_every=0))  # a face chosen before the domain
    assert studio.portrait(photo, "mug", 2).size == SIZE
    (made,) = studio.generate(learnt, Order("in the green park", 1, 0, 2, 1.0, (32, 32), 1.0), tmp_path, stop)
    wanted = studio.personalizer.finder_of("mug").dino.images([made.image, picture(0, 0), picture(0, 1)])
    assert [made.similarity, made.r_facesim] == pytest.approx([float(wanted[0] @ wanted[1]), float(wanted[0] @ wanted[2])], abs=1e-5)


@pytest.mark.one_family
def test_the_page_says_what_is_learnt_in_how_many_steps(without_faces, mug, both, tmp_path):
    downs = shutil.copytree(both, tmp_path / "downs")
    replace(mug, adapt={"steps": 7}).save(downs / "mug")
    opened = Future()
    opened.set_result(Personalizer(without_faces, str(downs)))
    page, usual = Handlers(Studio("tiny", _opened=opened), []), without_faces.settings.adapt.steps
    steps, learn = page.choose_domain("mug", usual)
    assert steps.value == 7 and learn.value == "Learn this mug"
    steps, learn = page.choose_domain("woman", 7)
    assert steps.value == usual and learn.value == "Learn this person"
    kept, _ = page.choose_domain("mug", 50)  # of the user's own choice
    assert not isinstance(kept, gr.Slider)
