"""sRGB and linear light, and the soft edges that pictures are blended with."""

from functools import lru_cache

import torch
from torch import Tensor

GAMMA = 2.2


@lru_cache(maxsize=None)
def linear(srgb: tuple[int, int, int]) -> Tensor:
    """An sRGB colour 0..255 as linear light (3,), on the CPU."""
    return (torch.tensor(srgb, dtype=torch.float32) / 255) ** GAMMA


def display(light: Tensor) -> Tensor:
    """Linear light to display values 0..1: a shoulder that keeps fair skin from burning out, then gamma."""
    knee = 0.6
    over = (light - knee).clamp(min=0)
    rolled = torch.where(light > knee, knee + (1 - knee) * over / (over + (1 - knee)), light)
    return rolled.clamp(0, 1) ** (1 / GAMMA)


def step(low: float | Tensor, high: float | Tensor, x: Tensor) -> Tensor:
    """0 at `low`, 1 at `high` and beyond, smooth between; `low` may be the larger."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
