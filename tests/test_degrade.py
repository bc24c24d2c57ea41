"""Photos made worse: strength 0 is the photo, more is further away, and the seed decides what is left to chance."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from metalora import MetaLoraError
from metalora.degrade import KINDS, Degradation, degrade

BOX = (20.0, 16.0, 60.0, 66.0)
STRENGTHS = {"blur": (1, 3, 9), "noise": (0.05, 0.2, 0.6), "dark": (0.2, 0.5, 0.9), "lowres": (0.4, 0.7, 0.9), "jpeg": (0.5, 0.85, 0.97), "occlusion": (0.1, 0.3, 0.9)}


def photo(size: tuple[int, int] = (80, 96)) -> Image.Image:
    """Something with edges of every scale."""
    return Image.effect_noise(size, 90).filter(ImageFilter.GaussianBlur(1.5)).convert("RGB")


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_is_the_photo_and_more_is_further(kind):
    image = photo()
    before = image.tobytes()
    assert degrade(image, kind, 0.0, BOX).tobytes() == before
    worse = [degrade(image, kind, strength, BOX, seed=3) for strength in STRENGTHS[kind]]
    assert all(w.size == image.size and w.mode == "RGB" for w in worse) and image.tobytes() == before
    distances = [0.0, *(distance(image, w) for w in worse)]
    assert distances == sorted(distances) and len(set(distances)) == 4
    assert degrade(image, kind, STRENGTHS[kind][1], BOX, seed=3).tobytes() == worse[1].tobytes()


def test_the_block_lies_in_the_face_grows_and_moves_with_the_seed():
    image = Image.new("RGB", (80, 96), "white")
    masks = [np.asarray(degrade(image, "occlusion", s, BOX, seed=5))[..., 0] == 128 for s in (0.1, 0.25, 0.5)]
    for share, mask in zip((0.1, 0.25, 0.5), masks):
        assert mask[16:66, 20:60].sum() == mask.sum() == pytest.approx(share * 40 * 50, rel=0.1)
    assert not (masks[0] & ~masks[1]).any() and not (masks[1] & ~masks[2]).any()
    others = {degrade(image, "occlusion", 0.25, BOX, seed=s).tobytes() for s in range(4)}
    assert len(others) == 4


def test_blur_means_the_same_at_every_size():
    """A photo of twice the side, blurred and halved, is the photo blurred."""
    large = photo((160, 160)).filter(ImageFilter.GaussianBlur(4))
    small = large.resize((80, 80), Image.Resampling.BOX)
    one = degrade(large, "blur", 4, BOX).resize((80, 80), Image.Resampling.BOX)
    assert distance(one, degrade(small, "blur", 4, BOX)) < 0.1 * distance(one, small)


def test_degradations_are_read_from_words():
    assert Degradation.parse("blur=2") == Degradation("blur", 2.0) and str(Degradation.parse("dark=0.50")) == "dark=0.5"
    for text in ("fog=1", "blur", "blur=", "blur=-1", "blur=1e3", "=2"):
        with pytest.raises(MetaLoraError, match="write it like blur=2; known are blur, noise"):
            Degradation.parse(text)
    for text in ("blur=0", "dark=1", "occlusion=1.5"):
        with pytest.raises(MetaLoraError, match="more than 0 and less than"):
            Degradation.parse(text)
