"""Photos made worse on purpose, to see how much of a person is still learnt: one effect at a time, as strong as one says.

Strength 0 is the photo itself, and more strength takes it further away. What is drawn by chance (the noise, the place of the
block) depends on the seed alone, so a stronger effect is the same one grown.
"""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from .errors import MetaLoraError

Box = Sequence[float]  # left, top, right, bottom, px


def blur(image: Image.Image, strength: float, box: Box, seed: int) -> Image.Image:
    """Out of focus: a Gaussian of this deviation, in hundredths of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(strength / 100 * min(image.size)))


def noise(image: Image.Image, strength: float, box: Box, seed: int) -> Image.Image:
    """Grain: normal noise of this deviation on every colour of every pixel; 1 is from black to white."""
    pixels = np.asarray(image, np.float32)
    grain = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(np.rint(pixels + 255 * strength * grain), 0, 255).astype(np.uint8))


def dark(image: Image.Image, strength: float, box: Box, seed: int) -> Image.Image:
    """Too little light: this share of the brightness is missing."""
    return ImageEnhance.Brightness(image).enhance(1 - strength)


def lowres(image: Image.Image, strength: float, box: Box, seed: int) -> Image.Image:
    """Few pixels: this share of each side is lost, and the picture is scaled up again."""
    small = [max(1, round((1 - strength) * side)) for side in image.size]
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, strength: float, box: Box, seed: int) -> Image.Image:
    """Saved too small: JPEG of quality 100 · (1 - strength)."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=max(1, round(100 * (1 - strength))))
    with Image.open(buffer) as saved:
        return saved.convert("RGB")


def occlusion(image: Image.Image, strength: float, box: Box, seed: int) -> Image.Image:
    """Something in front: a grey block over this share of the face's box; where in the box, the seed says."""
    draws, side = random.Random(seed), math.sqrt(strength)
    width, height = side * (box[2] - box[0]), side * (box[3] - box[1])
    left, top = (low + draws.random() * (1 - side) * (high - low) for low, high in ((box[0], box[2]), (box[1], box[3])))
    changed = image.copy()
    if min(width, height) >= 1:
        ImageDraw.Draw(changed).rectangle((round(left), round(top), round(left + width) - 1, round(top + height) - 1), fill=(128, 128, 128))
    return changed


KINDS: dict[str, tuple[Callable[[Image.Image, float, Box, int], Image.Image], float]] = {  # name → effect, strength that it stays below
    "blur": (blur, 100), "noise": (noise, 10), "dark": (dark, 1), "lowres": (lowres, 1), "jpeg": (jpeg, 1), "occlusion": (occlusion, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Degradation:
    """A kind of effect and its strength."""

    kind: str
    strength: float

    @classmethod
    def parse(cls, text: str) -> Degradation:
        """"blur=2". MetaLoraError for an unknown kind or a strength out of its range."""
        found = re.fullmatch(r"([a-z]+)=(\d{1,3}(?:\.\d{1,4})?)", text)
        if not found or found[1] not in KINDS:
            raise MetaLoraError(f"A photo cannot be degraded by {text}; write it like blur=2; known are {', '.join(KINDS)}.")
        kind, strength = found[1], float(found[2])
        if not 0 < strength < KINDS[kind][1]:
            raise MetaLoraError(f"The strength of {kind} is more than 0 and less than {KINDS[kind][1]}, not {found[2]}.")
        return cls(kind, strength)

    def __str__(self) -> str:
        return f"{self.kind}={self.strength:g}"

    def apply(self, image: Image.Image, box: Box, seed: int) -> Image.Image:
        """The RGB picture made worse; `box` is its face."""
        return degrade(image, self.kind, self.strength, box, seed)


def degrade(image: Image.Image, kind: str, strength: float, box: Box, seed: int = 0) -> Image.Image:
    """An RGB picture with one of KINDS; at strength 0 it is itself, pixel for pixel."""
    effect = partial(KINDS[kind][0], image, strength, box, seed)
    return effect() if strength > 0 else image.copy()
