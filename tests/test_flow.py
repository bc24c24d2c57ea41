"""Rectified flow against diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from metalora import flow
from metalora.config import FlowConfig

def test_noise_levels_are_those_of_an_unshifted_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    drawn = flow.sample_sigmas(512, torch.Generator().manual_seed(0))
    assert torch.isin(drawn, scheduler.sigmas.float()).all()
    noisy = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    x, noise, index = torch.randn(1, 4, 8), torch.randn(1, 4, 8), 300
    sigma = scheduler.sigmas[index : index + 1]
    expected = noisy.scale_noise(x, noisy.timesteps[index : index + 1], noise)
    torch.testing.assert_close(flow.interpolate(x, noise, sigma), expected)


@pytest.mark.parametrize(("mean", "expected"), [(0.0, 0.5), (1.0, 0.303), (-1.0, 0.697)])
def test_a_positive_mean_means_less_noise(mean, expected):
    drawn = torch.cat([flow.sample_sigmas(4, torch.Generator().manual_seed(s), FlowConfig(mean)) for s in range(500)])
    assert drawn.mean().item() == pytest.approx(expected, abs=0.005)
    assert drawn.min() >= 0.001 and drawn.max() <= 1


def test_following_the_target_leads_from_noise_to_the_latent():
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    sigma = torch.tensor([0.25, 0.8])
    back = flow.interpolate(x, noise, sigma) - sigma.reshape(2, 1, 1) * flow.target(x, noise)
    torch.testing.assert_close(back, x)
