"""Faces: found, counted from the left, chosen or asked about, cut out; on a pack whose answers are known, and on the embedded one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metalora import MetaLoraError, face
from metalora.data import load_dataset
from metalora.face import FaceFinder, crop, thumbnails

from .parts import COLOURS, GREY, SIDE, build_pack, portrait

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return build_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def finder(pack) -> FaceFinder:
    return FaceFinder(pack, 96)


def group(*names: str, size: tuple[int, int] = (96, 96), at=((24, 64), (72, 64), (48, 16))) -> Image.Image:
    """Several people in one picture."""
    image = Image.new("RGB", size, GREY)
    for name, (x, y) in zip(names, at):
        image.paste(COLOURS[name], (x - SIDE // 2, y - SIDE // 2, x + SIDE // 2, y + SIDE // 2))
    return image


def centre(face) -> tuple[float, float]:
    return (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2


# ---- a pack whose answers are known


@pytest.mark.parametrize("at", [(48, 48), (16, 24), (80, 72)])
def test_a_face_is_found_where_it_is(finder, at):
    face = finder.pick(portrait(COLOURS["ann"], at, 96))
    assert centre(face) == pytest.approx(at, abs=0.5) and 0.5 < face.score <= 1 and face.number == 1
    assert np.linalg.norm(face.embedding) == pytest.approx(1, abs=1e-5) and face.embedding.shape == (512,)
    assert (face.keypoints >= np.array(at) - SIDE).all() and (face.keypoints <= np.array(at) + SIDE).all()
    assert face.keypoints[0, 0] < face.keypoints[1, 0] and face.area == pytest.approx(24**2, rel=0.01)


def test_people_are_told_apart(finder):
    faces = np.stack([finder.embed(portrait(colour, (48, 48), 96)) for colour in COLOURS.values()])
    again = np.stack([finder.embed(portrait(colour, (24, 56), 96)) for colour in COLOURS.values()])
    cosines = faces @ again.T
    assert (cosines.argmax(axis=1) == np.arange(len(faces))).all() and cosines.diagonal().min() > 0.9


def test_the_face_that_is_boxed_is_the_one_that_is_embedded(finder):
    for face, name in zip(sorted(finder.detect(group("ann", "bea")), key=lambda f: f.number), ("ann", "bea")):
        assert face.embedding @ finder.embed(portrait(COLOURS[name], (48, 48), 96)) > 0.95


def test_faces_are_numbered_from_the_left(finder):
    faces = finder.detect(group("ann", "bea", "cleo"))
    assert len(faces) == 3
    by_number = sorted(faces, key=lambda f: f.number)
    assert [f.number for f in by_number] == [1, 2, 3] and [round(centre(f)[0]) for f in by_number] == [24, 48, 72]
    assert [f.area for f in faces] == sorted((f.area for f in faces), reverse=True)


def test_several_faces_are_asked_about_in_the_order_of_their_numbers(finder):
    image = group("ann", "bea")
    with pytest.raises(MetaLoraError, match=r"2 faces; cut it to one, or say to adapt which with --face K, from left to right: 1 at \(24, 64\), 2 at \(72, 64\)"):
        finder.pick(image)
    assert centre(finder.pick(image, 2)) == pytest.approx((72, 64), abs=0.5)
    with pytest.raises(MetaLoraError, match="no face 3; the photo shows 2 faces, so --face is 1 to 2"):
        finder.pick(image, 3)
    with pytest.raises(MetaLoraError, match="--face can only be 1"):
        finder.pick(portrait(COLOURS["ann"], (48, 48), 96), 0)


def test_no_face_is_said_and_not_an_index_error(finder):
    empty = Image.new("RGB", (96, 96), GREY)
    assert finder.detect(empty) == [] and finder.embed(empty) is None
    with pytest.raises(MetaLoraError, match="No face was found"):
        finder.pick(empty)


def test_a_close_up_is_found_with_room_added_round_it(pack):
    finder = FaceFinder(pack, 32)
    full = Image.new("RGB", (64, 64), COLOURS["ann"])
    assert finder._look(np.asarray(full)[..., ::-1], 0.0) == []
    face = finder.pick(full)
    assert face.box == pytest.approx((0, 0, 64, 64), abs=0.5)
    assert face.embedding @ finder.embed(portrait(COLOURS["ann"])) > 0.9


@pytest.mark.parametrize("size", [(96, 96), (960, 960), (96, 48), (48, 96), (2000, 20), (20, 2000), (17, 16)])
def test_boxes_lie_inside_pictures_of_any_shape(finder, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for image in (Image.fromarray(noise), Image.new("RGB", size, COLOURS["bea"])):
        for face in finder.detect(image):
            left, top, right, bottom = face.box
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_larger_pictures_give_larger_boxes(finder):
    small, large = portrait(COLOURS["ann"], (40, 48), 96), portrait(COLOURS["ann"], (40, 48), 96).resize((480, 480), Image.Resampling.NEAREST)
    one, other = finder.pick(small), finder.pick(large)
    assert np.allclose(np.array(one.box) * 5, other.box, atol=5) and one.embedding @ other.embedding > 0.99


def test_a_crop_is_a_square_round_the_face_with_white_outside(finder):
    image = portrait(COLOURS["ann"], (16, 16), 96)
    face = finder.pick(image)
    cut = crop(image, face, 64)
    assert cut.size == (64, 64) and cut.getpixel((32, 32)) == COLOURS["ann"]
    wide = crop(image, face, 64, margin=3.0)
    assert wide.getpixel((0, 0)) == (255, 255, 255) and wide.getpixel((32, 32)) == COLOURS["ann"]


def test_thumbnails_come_from_left_to_right(finder):
    image = group("ann", "bea", "cleo")
    shown = thumbnails(image, finder.detect(image), 32)
    assert [t.getpixel((16, 16)) for t in shown] == [COLOURS[n] for n in ("ann", "cleo", "bea")]  # cleo stands between them


# ---- packs that will not do


def test_a_pack_that_lacks_or_is_damaged_is_one_sentence(pack, tmp_path, capsys):
    with pytest.raises(MetaLoraError, match="is not there"):
        FaceFinder(tmp_path / "nowhere")
    with pytest.raises(MetaLoraError, match="incomplete or damaged"):
        FaceFinder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "home"))
        half = tmp_path / "home" / ".insightface" / "models" / "half"  # as a fetching that was killed leaves it
        half.mkdir(parents=True)
        (half / "det.onnx").write_bytes(b"half")
        patch.setattr(face, "INSIGHTFACE", half.parent)
        with pytest.raises(MetaLoraError, match=f"incomplete or damaged; remove {half} and start again"):
            FaceFinder("half")
    for missing in ("det.onnx", "rec.onnx"):
        part = Path(shutil.copytree(pack, tmp_path / f"without-{missing}"))
        (part / missing).unlink()
        with pytest.raises(MetaLoraError, match="afresh"):
            FaceFinder(part)
    broken = Path(shutil.copytree(pack, tmp_path / "broken"))
    (broken / "rec.onnx").write_bytes(b"nothing of use")
    with pytest.raises(MetaLoraError, match="damaged"):
        FaceFinder(broken)
    assert capsys.readouterr().out == ""  # stdout is for results


# ---- the embedded pack


@pytest.fixture(scope="module")
def embedded() -> FaceFinder:
    return FaceFinder(ASSETS / "face", 128)


def test_the_embedded_pack_finds_every_sample_person_and_knows_them(embedded):
    people = load_dataset(ASSETS / "people").subjects
    photos = [Image.open(subject.references[0].path) for subject in people]
    faces = np.stack([embedded.pick(photo).embedding for photo in photos])
    others = [(i, embedded.embed(Image.open(item.path))) for i, subject in enumerate(people) for item in subject.others]
    found = [(i, face) for i, face in others if face is not None]
    assert len(found) >= 0.9 * len(others)
    right = np.mean([(faces @ face).argmax() == i for i, face in found])
    assert right >= 0.6, f"{right:.0%} of the other photos are closest to their own person's reference"


def test_the_embedded_pack_copes_with_close_ups_groups_and_empty_pictures(embedded):
    people = [Image.open(subject.references[0].path).convert("RGB") for subject in load_dataset(ASSETS / "people").subjects[:2]]
    face = embedded.pick(people[0])
    close = people[0].crop(tuple(round(v) for v in face.box))
    assert embedded.detect(close), "a close-up without any margin"
    both = Image.new("RGB", (people[0].width * 2, people[0].height), GREY)
    both.paste(people[0], (0, 0))
    both.paste(people[1], (people[0].width, 0))
    with pytest.raises(MetaLoraError, match="2 faces"):
        embedded.pick(both)
    assert embedded.pick(both, 1).embedding @ face.embedding > 0.6
    assert embedded.detect(Image.new("RGB", (128, 128), GREY)) == []
