"""What judges the portrait world and the pictures drawn of it: the attribute classifier, attribute-check, world-check, sheet."""

from __future__ import annotations

import metalora  # noqa: F401  before torch: it sets how threads wait
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metalora.base import Base
from metalora.dino import Dino
from metalora.errors import MetaLoraError
from metalora.miniature import assemble, attribute_check, attributes, likeness, world_check
from metalora.miniature.__main__ import main
from metalora.miniature.attributes import HEADS, NONE, UNSEEN, AttributeTask, Classifier, label, labels, train_attributes
from metalora.miniature.facepack import kernel_distance, separation
from metalora.miniature.people import HELD_OUT, person, scene
from metalora.miniature.pipeline import MiniatureConfig
from metalora.miniature.render import render
from metalora.miniature.shards import Shards
from metalora.miniature.training import Job, read_figures, write_result
from tests.conftest import TINY

SIZE = 32
TOY = dataclasses.replace(TINY, size=SIZE)


def world(people: list[int], scenes: int) -> Shards:
    """Plain pictures, red of women and blue of men, with true records."""
    views = [(person(p), scene(person(p), s)) for p in people for s in range(scenes)]
    images = torch.full((len(views), 3, SIZE, SIZE), 40, dtype=torch.uint8)
    for image, (who, _) in zip(images, views, strict=True):
        image[0 if who.sex == "woman" else 2] = 220
    return Shards(images, [{"person": who.seed, "domain": who.sex, "box": [0, 0, 1, 1], "keypoints": [[0, 0]] * 5, "attributes": view.attributes}
                           for who, view in views])


# The classifier


@given(st.integers(0, 2_000_000), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_a_class_says_what_the_record_says(seed: int, number: int):
    record = scene(person(seed), number).attributes
    for head, classes in HEADS.items():
        found = label(record, head)
        shown = classes[found] if found != UNSEEN else None
        if head == "glasses":
            assert shown == ("glasses" if record[head] else NONE)
        else:
            assert shown == (record[head] or (NONE if head in attributes.WORN else None))


def test_in_a_mirror_only_the_turn_changes():
    shards = world([0, 1, 2, 3], 6)
    straight, mirrored = labels(shards)
    turn = list(HEADS).index("turn")
    names = [[HEADS["turn"][k] for k in each[:, turn]] for each in (straight, mirrored)]
    assert {*zip(*names, strict=True)} == {(NONE, NONE), ("left", "right"), ("right", "left")}
    assert torch.equal(straight[:, :turn], mirrored[:, :turn]) and torch.equal(straight[:, turn + 1 :], mirrored[:, turn + 1 :])


def test_what_no_picture_shows_is_not_learnt():
    shards = world(list(range(12)), 8)
    grey = [k for k, record in enumerate(shards.records) if record["attributes"]["style"] in ("pencil", "bw")]
    shards = shards.select(torch.isin(torch.arange(len(shards)), torch.tensor(grey)))
    torch.manual_seed(0)
    classifier = Classifier(SIZE)
    task = AttributeTask(classifier, shards, labels(shards), 8)
    loss = task.loss(task.draw(torch.Generator().manual_seed(0)))
    loss.backward()
    of = dict(zip(HEADS, classifier.heads.bias.grad.split([len(classes) for classes in HEADS.values()]), strict=True))
    assert loss.isfinite() and all(not of[head].any() for head in ("skin", "hair_colour", "hat_colour", "top_colour"))
    assert all(of[head].any() for head in ("sex", "style", "top"))


def test_the_classifier_learns_what_can_be_seen_and_comes_back_as_trained(tmp_path: Path, monkeypatch):
    shards = world([*range(8), 24, 49], 4)
    monkeypatch.setattr(attributes, "load_shards", lambda *folders: shards)
    job = Job(data=(tmp_path,), work=tmp_path, minutes=1, steps=40, batch_size=16, model=TOY)
    figures = train_attributes(job)
    assert figures["right"]["sex"] == 1.0 and figures["right"].keys() == HEADS.keys()
    assert figures["mean_right"] == pytest.approx(sum(figures["right"].values()) / len(HEADS), abs=1e-4)
    found = attributes.trained_classifier(job).read_off(shards.images)
    assert torch.equal(found[:, 0], labels(shards)[0][:, 0])


# The likeness of things


def write_things(folder: Path, things: range, pictures: int = 3) -> None:
    """A dataset of squares: a thing is an outer and an inner colour, its scenes are places on grey grounds."""
    folder.mkdir()
    lines = []
    for thing in things:
        colours = np.random.default_rng(thing).integers(0, 256, (2, 3))
        for k in range(pictures):
            rng = np.random.default_rng([thing, k])
            image = np.empty((SIZE, SIZE, 3), np.uint8)
            image[:], (y, x) = rng.integers(0, 256), rng.integers(0, SIZE - 20, 2)
            image[y : y + 20, x : x + 20], image[y + 5 : y + 15, x + 5 : x + 15] = colours
            Image.fromarray(image).save(folder / f"{thing}-{k}.png")
            row = {"file_name": f"{thing}-{k}.png", "text": "a photo of {person}", "identity": str(thing), "domain": "square"}
            lines.append(json.dumps(row | {"role": "other" if k else "reference"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def test_likeness_is_learnt_goes_on_and_is_read_as_any_dino(tmp_path: Path, monkeypatch, capsys):
    for name, small in {"WIDTH": 64, "LAYERS": 2, "PATCH": 8}.items():
        monkeypatch.setattr(likeness, name, small)
    write_things(tmp_path / "one", range(60))
    write_things(tmp_path / "two", range(60, 120))
    command = ["likeness", "--work", str(tmp_path), "--threads", "1", "--device", "cpu", "--batch-size", "32", "--config", json.dumps(dataclasses.asdict(TOY))]
    command += [word for name in ("one", "two") for word in ("--data", str(tmp_path / name))]
    assert main([*command, "--steps", "20"]) == 0 and main([*command, "--steps", "80"]) == 0
    assert "likeness: goes on at step 20" in capsys.readouterr().err
    figures = read_figures(tmp_path / "likeness")
    assert (figures["steps"], figures["things"], figures["pictures"], figures["unseen_things"]["gallery"]) == (80, 116, 348, 4)

    assemble.write_dino(assemble.Parts(tmp_path, "likeness", {"likeness": figures}), tmp_path / "dino")
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    assert {path.name for path in (tmp_path / "dino").iterdir()} == names
    assert assemble.megabytes(tmp_path / "dino") < 2.5
    write_things(tmp_path / "new", range(500, 520))  # of which it was neither taught nor judged
    things = np.repeat(np.arange(500, 520), 3)
    images = [Image.open(tmp_path / "new" / f"{thing}-{k}.png") for thing in range(500, 520) for k in range(3)]
    trained, shipped = Dino(tmp_path / "likeness").images(images), Dino(tmp_path / "dino").images(images)
    assert (trained * shipped).sum(axis=1).min() > 0.999
    found = separation(shipped, things)
    assert found["auc"] > 0.8 and found["same"] > found["different"] + 0.2


def test_another_look_at_a_picture_keeps_its_colours():
    images = torch.tensor([200, 60, 20], dtype=torch.uint8).view(1, 3, 1, 1).expand(50, 3, SIZE, SIZE)
    seen = likeness.seen_anew(images, torch.Generator().manual_seed(0))
    assert seen.shape == images.shape and seen.abs().max() <= 1 and torch.equal(seen, likeness.seen_anew(images, torch.Generator().manual_seed(0)))
    colours = (seen.mean(dim=(2, 3)) + 1) * 127.5
    assert (colours - images[:, :, 0, 0]).abs().max() < 70 and (colours.diff(dim=1) < 0).all()


def test_a_dataset_too_small_to_judge_by_is_refused(tmp_path: Path, capsys):
    write_things(tmp_path / "few", range(30))
    assert main(["likeness", "--data", str(tmp_path / "few"), "--work", str(tmp_path)]) == 2
    assert "30 things are too few to train and validate on; render 50 or more" in capsys.readouterr().err


# attribute-check


@pytest.mark.parametrize("text, asked", [
    ("a photo of a woman, in blue", {}), ("a photo of a woman, wearing jeans", {}), ("a photo of a woman, ", {}), ("a photo of a woman, in", {}),
    ("a photo of a woman, wearing a turquoise t-shirt", {"top": "t-shirt"}), ("a photo of a woman, wearing a sweatshirt", {}),
    ("a photo of a woman, in a green striped shirt and a red cap", {"top": "striped", "top_colour": "green", "hat": "cap", "hat_colour": "red"})])
def test_words_that_captions_do_not_use_name_nothing(text: str, asked: dict[str, str]):
    found = attribute_check.named(text)
    assert found == {"style": "photo", "sex": "woman"} | asked
    assert all(label(found, head) != UNSEEN for head in found)


class Reader:
    """Reads the record whose number is a picture's first pixel."""

    def __init__(self, records: list[dict]):
        self.classes = torch.tensor([[label(record, head) for head in HEADS] for record in records])

    def read_off(self, images: torch.Tensor) -> torch.Tensor:
        return self.classes[images[:, 0, 0, 0].long()]


RECORD = {**dict.fromkeys(HEADS), "sex": "woman", "style": "photo", "hat": "cap", "hat_colour": "red", "background": "park"}
RECORDS = [RECORD, RECORD | {"hat": None, "hat_colour": None}]


def test_shares_and_their_intervals():
    images = torch.tensor([0] * 8 + [1] * 2, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    found = attribute_check.agreement(Reader(RECORDS).read_off(images), ["a photo of a woman, in a red cap, in a park"] * 10)
    assert found.keys() == {"sex", "style", "hat", "hat_colour", "background", "all"}
    assert found["hat"] == {"asked": 10, "found": 0.8, "low": 0.4902, "high": 0.9433}  # Wilson's interval of 8 of 10, as tables have it
    assert found["background"]["found"] == 1.0 and found["all"] == found["all"] | {"asked": 50, "found": 0.92}


def test_looks_are_compared_with_the_photo_where_the_prompt_leaves_them_be():
    records = [RECORD | {"hair": "curly", "hair_colour": "red", "skin": "dark"}, RECORD | {"hair": "curly", "hair_colour": "black", "skin": "dark"}]
    photos, pictures = (Reader(records).read_off(torch.full((4, 3, 4, 4), number, dtype=torch.uint8)) for number in (0, 1))
    texts = ["a photo of a woman, smiling", "a photo of a woman with black hair", "a photo of a woman, in a red cap", "a pencil drawing of a woman"]
    found = attribute_check.looks(pictures, photos, texts)["looks"]
    assert (found["asked"], found["found"]) == (5, 0.8)  # hair, its colour and skin of the first, hair and skin of the second
    assert attribute_check.looks(pictures[2:], photos[2:], texts[2:]) == {}


def test_the_pictures_of_an_evaluation_are_read_method_by_method(tmp_path: Path):
    for method, number in (("good", 0), ("bad", 1)):
        (tmp_path / method).mkdir()
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / method / "0.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
        row = {"method": method, "domain": "woman", "prompt": "a photo of {person}, in a red cap", "reference": "photo.png"}
        rows = [row | {"picture": f"{method}/0.png"}, row | {"picture": None, "failed": "no face"}]
        (tmp_path / method / "someone.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = attribute_check.check_evaluation(Reader(RECORDS), SIZE, tmp_path)
    assert {method: (each["hat"]["asked"], each["hat"]["found"]) for method, each in found.items()} == {"good": (1, 1.0), "bad": (1, 0.0)}
    with pytest.raises(MetaLoraError, match="no pictures of an evaluation"):
        attribute_check.check_evaluation(Reader(RECORDS), SIZE, tmp_path / "good")


def test_a_classifier_of_another_size_than_the_base_is_refused(tmp_path: Path, capsys, monkeypatch):
    class Other:
        settings = type("Settings", (), {"resolution": 2 * SIZE})

    monkeypatch.setattr(attribute_check.Base, "open", lambda name: Other)
    write_result(tmp_path / attributes.NAME, Classifier(SIZE), {"model": dataclasses.asdict(TOY)})
    assert main(["attribute-check", "--work", str(tmp_path)]) == 2
    assert f"draws at {2 * SIZE} px" in capsys.readouterr().err


def test_faces_of_one_world_are_near_and_those_of_another_far():
    rng = np.random.default_rng(0)
    sets = [rng.normal(shift, 1, (400, 16)) for shift in (0, 0, 1)]
    one, same, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in sets)
    assert abs(kernel_distance(one, same)) < 0.02 < 0.5 < kernel_distance(one, other)


def test_what_the_miniature_draws_is_shown_below_true_renders(tmp_path: Path, capsys):
    size = Base.open("miniature").settings.resolution
    write_result(tmp_path / attributes.NAME, Classifier(size), {"model": dataclasses.asdict(MiniatureConfig())})
    files = ["--json", str(tmp_path / "found.json"), "--sheet", str(tmp_path / "sheet.png")]
    assert main(["attribute-check", "--work", str(tmp_path), "--pictures", "3", *files]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0 < found["faces"]["found"] <= 1 and abs(found["faces"]["kernel_distance"]) < 2 and found["faces"]["of_true_halves"] is None
    assert found["generated"]["style"]["asked"] == found["true renders"]["style"]["asked"] > 0 and "all" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "sheet.png")
    true, _, _ = render([(who := person(HELD_OUT + 5000 + k), scene(who, k)) for k in range(3)], size)
    shown = np.asarray(sheet.crop((0, 0, 3 * size, size)))
    assert sheet.size == (3 * size, 2 * size) and (shown == np.concatenate([image.permute(1, 2, 0).numpy() for image in true], axis=1)).all()


# world-check and sheet


class Blank:
    """As the tools, with an embedding that is told: of picture k."""

    def __init__(self, embeddings: list[np.ndarray | None]):
        self.left = list(embeddings)

    def embed(self, picture: Image.Image) -> np.ndarray | None:
        return self.left.pop(0)


@pytest.mark.parametrize("embeddings, found, auc, rank_1", [
    ([[0], [0.1], [5], [5.1]], 1.0, 1.0, 1.0), ([[0], [5], [0.1], [5.1]], 1.0, 0.25, 0.5), ([[0], [0], [0], [0]], 1.0, 0.5, 0.5),
    ([[0], [0.1], [5], None], 0.75, 1.0, 1.0)])
def test_what_recognises_people_is_told_from_what_does_not(monkeypatch, embeddings: list, found: float, auc: float, rank_1: float):
    tools = Blank([e and np.array(e, float) for e in embeddings])
    monkeypatch.setattr(world_check, "render", lambda pairs, size: (torch.zeros(len(pairs), 3, size, size, dtype=torch.uint8),))
    figures = world_check.check(tools, range(2), 2, SIZE)
    assert (figures["found"], figures["auc"], figures["rank_1"]) == (found, auc, rank_1) and figures["pictures"] == 4


def test_a_world_check_changes_what_people_usually_wear():
    drawn = [world_check.shuffled(person(seed), k) for seed in range(40) for k in range(3)]
    assert {view.style for _, view in drawn} == {"photo"}
    assert sum(view.hair == who.hair for who, view in drawn) < 60  # of 120; two in three of a person's own scenes have the hair


def test_the_face_pack_of_the_assets_tells_apart_people_it_never_saw(capsys):
    assert main(["world-check", "--pack", str(Path(__file__).parents[1] / "assets" / "face"), "--people", f"{HELD_OUT + 300}:{HELD_OUT + 303}", "--scenes", "2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["pictures"] == 6 and figures["found"] == 1 and figures["auc"] > 0.9
    assert figures["nearest_is_the_same"] == 1 and figures["distance"]["others"] > 1 and figures["distance"]["same"] < figures["distance"]["others"] - 0.2


def test_a_world_check_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dlib", None)
    assert main(["world-check", "--people", "0:1"]) == 2
    assert "pip install --no-deps facenet-pytorch" in capsys.readouterr().err


def test_a_sheet_has_a_row_for_each_person(tmp_path: Path):
    main(["sheet", "--output", str(tmp_path / "s.png"), "--people", "3:5", "--scenes", "3", "--size", str(SIZE)])
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.size == (3 * SIZE, 2 * SIZE)
    second = render([(person(4), scene(person(4), k)) for k in range(3)], SIZE)[0]
    assert np.array_equal(np.asarray(sheet.crop((SIZE, SIZE, 2 * SIZE, 2 * SIZE))), second[1].permute(1, 2, 0))
