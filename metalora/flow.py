"""Rectified flow as FLUX is trained with it: pure functions, no model.

A latent x and noise n are joined by the straight line (1 − σ)·x + σ·n; the model learns its velocity n − x. Noise levels
follow diffusers' DreamBooth LoRA script: a logit-normal draw that indexes the 1000 *descending*, unshifted timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import FlowConfig

TIMESTEPS = 1000


def sample_sigmas(count: int, generator: torch.Generator, config: FlowConfig = FlowConfig()) -> Tensor:
    """Draw `count` noise levels in [0.001, 1], float32 on the CPU (bfloat16 keeps only half of the 1000 values).

    The draws are stratified, one from each 1/count of the distribution in random order: the same distribution for each,
    but a batch covers it evenly, which makes the gradient steadier.
    """
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    normal = torch.special.ndtri((strata / count).clamp(1e-6, 1 - 1e-6))
    u = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    index = (u * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
    return (TIMESTEPS - index).float() / TIMESTEPS  # (count,)


def interpolate(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at noise level `sigma` (batch,) on the way from `x` to `noise` (batch, ...)."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (1 - s) * x + s * noise


def target(x: Tensor, noise: Tensor) -> Tensor:
    """The velocity of that way, which the model is to predict."""
    return noise - x


def pack(latents: Tensor) -> Tensor:
    """(batch, c, h, w) → (batch, h/2 · w/2, 4c): FLUX's tokens, each a 2×2 patch with its channels outermost."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width in latent pixels."""
    b, _, d = tokens.shape
    return tokens.reshape(b, height // 2, width // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, height, width)


def image_ids(height: int, width: int) -> Tensor:
    """Positions of the tokens of an (height, width) latent for the rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()  # (tokens, 3)
