"""Rectified flow as the base models are trained with it: pure functions, no model.

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
