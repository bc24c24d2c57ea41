"""Whatever picture comes in, load_photo gives an upright RGB picture with the right colours, or one plain sentence."""

from __future__ import annotations

import builtins
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from metalora.errors import MetaLoraError
from metalora.photo import load_photo

ORIENTATION = 0x0112


@pytest.fixture
def picture() -> Image.Image:
    """48x32 px whose four quarters differ: red, green above, blue, yellow below."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste("lime", (24, 0, 48, 16))
    image.paste("blue", (0, 16, 24, 32))
    image.paste("yellow", (24, 16, 48, 32))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    w, h = image.size
    return [image.getpixel(p) for p in ((3, 3), (w - 4, 3), (3, h - 4), (w - 4, h - 4))]


def near(a, b, tolerance=6) -> bool:
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= tolerance


def sentence(source) -> str:
    """The message of the refusal; it must be one sentence."""
    with pytest.raises(MetaLoraError) as caught:
        load_photo(source)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and "Error" not in text
    return text


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "jpg", "ppm", "avif"])
def test_every_way_to_hand_in_a_picture_gives_the_same(picture, tmp_path, suffix):
    options = {"quality": 98, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    path = saved(picture, tmp_path / f"Zoë и 王.{suffix}", **options)
    ways = [path, str(path), path.read_bytes(), Image.open(path)]
    first, *others = [load_photo(way) for way in ways]
    assert first.mode == "RGB" and first.size == picture.size and near(corners(first), corners(picture), 12)
    assert all(other.tobytes() == first.tobytes() for other in others)


def test_an_array_is_a_picture(picture):
    pixels = np.asarray(picture)
    for values in (pixels, pixels.astype(np.float32) / 255, pixels.astype(np.uint16) * 257, np.dstack([pixels, np.full((32, 48), 255, np.uint8)])):
        assert load_photo(values).tobytes() == picture.tobytes()
    assert load_photo(pixels[..., 0]).tobytes() == load_photo(pixels[..., :1]).tobytes()
    assert "array" in sentence(np.zeros((3, 3, 7))) and "array" in sentence(np.zeros((40, 40), complex)) and "array" in sentence(np.zeros((0, 4, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_rotation_is_undone(picture, tmp_path, orientation, suffix):
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    turned = picture.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else picture
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 98} if suffix == "jpg" else {}
    upright = load_photo(saved(turned, tmp_path / f"p.{suffix}", exif=exif, **options))
    assert upright.size == picture.size and near(corners(upright), corners(picture), 12)


def test_damaged_exif_does_not_cost_the_photo(picture, tmp_path):
    path = saved(picture, tmp_path / "p.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff" * 3)
    assert load_photo(path).size == picture.size


def test_cmyk(picture, tmp_path):
    loaded = load_photo(saved(picture.convert("CMYK"), tmp_path / "p.jpg", quality=98))
    assert loaded.mode == "RGB" and near(corners(loaded), corners(picture), 12)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=16))
@settings(max_examples=40, deadline=None)
def test_16_bits_are_scaled_not_clipped(values):
    grey = np.tile(np.resize(np.array(values, np.uint16), 16), (16, 1))
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, kind)
        loaded = np.asarray(load_photo(buffer.getvalue()))
        assert np.abs(loaded - (grey / 257)[..., None]).max() <= 0.5


def test_16_bit_colour(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">3H", 0x1234, 0x8080, 0xFFFF) * 20 for _ in range(20))
    chunks = [(b"IHDR", struct.pack(">2I5B", 20, 20, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    assert near(load_photo(data).getpixel((5, 5)), (0x12, 0x80, 0xFF), 1)


def test_float_tiff(tmp_path):
    ramp = np.linspace(0, 1, 32, dtype=np.float32)[None].repeat(32, 0)
    unit, byte = (load_photo(saved(Image.fromarray(r), tmp_path / "p.tiff")) for r in (ramp, ramp * 255))
    assert unit.tobytes() == byte.tobytes() and unit.getpixel((0, 0)) == (0, 0, 0) and unit.getpixel((31, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (20, 20), (200, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 0, 20, 20))
    options = {}
    if mode == "RGB":
        image, options = Image.composite(Image.new("RGB", image.size, "black"), Image.new("RGB", image.size, "red"), image.getchannel("A")), {"transparency": (255, 0, 0)}
    loaded = load_photo(saved(image if mode in ("RGBA", "RGB") else image.convert(mode), tmp_path / "p.png", **options))
    assert loaded.getpixel((2, 2)) == (255, 255, 255) and loaded.getpixel((15, 2)) == (0, 0, 0)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame_of_an_animation(picture, tmp_path, suffix):
    path = saved(picture, tmp_path / f"p.{suffix}", save_all=True, append_images=[Image.new("RGB", picture.size, "white")] * 2, duration=50)
    later = Image.open(path)
    later.seek(1)
    assert near(corners(load_photo(path)), corners(picture), 20) and near(corners(load_photo(later)), corners(picture), 20)


def test_a_colour_profile_is_applied(picture, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert near(corners(load_photo(saved(picture, tmp_path / "s.png", icc_profile=srgb))), corners(picture), 1)
    assert near(corners(load_photo(saved(picture, tmp_path / "b.png", icc_profile=b"no profile" * 20))), corners(picture), 1)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert near(corners(load_photo(saved(picture, tmp_path / "l.png", icc_profile=lab))), corners(picture), 1)


def test_heic(picture, tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    path = saved(picture.resize((96, 64), 0), tmp_path / "p.heic", quality=95)
    assert near(corners(load_photo(path)), corners(picture), 30)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pillow-heif" in sentence(path)


def test_not_a_picture(tmp_path):
    (tmp_path / "notes.txt").write_text("hello, this is not a picture")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\nshowpage\n")
    (tmp_path / "empty.jpg").touch()
    assert "not a picture" in sentence(tmp_path / "notes.txt") and "notes.txt" in sentence(tmp_path / "notes.txt")
    assert "not a picture" in sentence(tmp_path / "script.eps")  # Pillow would start Ghostscript on it
    assert "empty" in sentence(tmp_path / "empty.jpg") and "empty" in sentence(b"")
    assert "no picture" in sentence(tmp_path / "nothing.jpg") and "folder" in sentence(tmp_path)
    assert "no picture" in sentence(None) and "no picture" in sentence(3.5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_cut_off_or_changed_files_give_a_sentence_or_a_picture(kind, data):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    cut = data.draw(st.integers(1, len(whole)))
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    for damaged in (whole[:cut], whole[:at] + bytes([value]) + whole[at + 1 :]):
        try:
            assert load_photo(damaged).mode == "RGB"
        except MetaLoraError as error:
            assert str(error).endswith(".")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_half_a_file_is_refused(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))
    path = saved(noise, tmp_path / f"whole.{suffix}")
    half = tmp_path / f"half.{suffix}"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cut off" in sentence(half) and f"half.{suffix}" in sentence(half)


def test_one_pixel(tmp_path):
    assert "1x1" in sentence(saved(Image.new("RGB", (1, 1)), tmp_path / "p.png"))
    assert "1x900" in sentence(Image.new("RGB", (1, 900))) and "too small" in sentence(np.zeros((1, 1, 3), np.uint8))


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in few bytes."""
    squeezed = zlib.compressobj(9)
    row = b"\0" * (1 + side // 8)
    body = b"".join(squeezed.compress(row) for _ in range(side)) + squeezed.flush()
    chunks = [(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_decompression_bomb_is_not_decoded(side):
    data = bomb(side)
    tracemalloc.start()
    text = sentence(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "too large" in text and peak < 5 * len(data) + 2**20


def test_a_large_photo_is_scaled_down(tmp_path):
    path = saved(Image.linear_gradient("L").resize((6000, 3000)).convert("RGB"), tmp_path / "p.jpg")
    assert load_photo(path).size == (4096, 2048) or load_photo(path).size == (3000, 1500)
    assert load_photo(Image.new("RGB", (8000, 500))).size == (4096, 256)
    with pytest.raises(MetaLoraError, match="20000x70 px, too long and thin"):
        load_photo(Image.new("RGB", (20000, 70)))
