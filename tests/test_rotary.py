"""Norm and rotary embedding in one operation: what diffusers' own give, there and back, and nothing of it left afterwards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalora.rotary import TurnedNorm, _Turned, turned_norms

from .conftest import learnt

pytestmark = pytest.mark.one_family  # it is of FLUX.1


@pytest.fixture
def uneven(base):
    """The base with norms whose weights are not all one."""
    norms = [m for m in base.transformer.modules() if isinstance(m, torch.nn.RMSNorm)]
    before = [norm.weight.detach().clone() for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    yield base
    with torch.no_grad():
        for norm, weight in zip(norms, before):
            norm.weight.copy_(weight)


def test_in_16_bits_the_result_alone_is_rounded():
    g = torch.Generator().manual_seed(0)
    x, along = (torch.randn(2, 7, 3, 16, generator=g).bfloat16() for _ in range(2))
    angles = 6 * torch.rand(7, 8, generator=g)
    turns, (cos, sin) = torch.polar(torch.ones_like(angles), angles)[:, None], (f(angles).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))

    def there_and_back(x, turned):
        leaf = x.clone().requires_grad_()
        y = turned(leaf)
        y.backward(along.to(x.dtype))
        return y.detach(), leaf.grad

    ours = there_and_back(x, lambda x: _Turned.apply(x, turns))
    for one, other in zip(ours, there_and_back(x.float(), lambda x: apply_rotary_emb(x, (cos, sin), sequence_dim=1))):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])  # older cards have the latter alone, whose gradients lie otherwise in memory
def test_in_16_bits_the_output_is_that_of_diffusers_and_no_gradient_further_from_the_truth(uneven, photo, meta_down, monkeypatch, backend):
    truth = learnt(uneven, photo, meta_down)
    data = replace(photo, mean=photo.mean.bfloat16(), text=photo.text.to(uneven.device, torch.bfloat16))
    monkeypatch.setattr(uneven.pipeline, "transformer", copy.deepcopy(uneven.transformer).to(torch.bfloat16))
    with sdpa_kernel(backend):
        theirs = learnt(uneven, data, meta_down)
        with turned_norms(uneven.transformer):
            ours = learnt(uneven, data, meta_down)
    far = [torch.cat([(g - t).flatten() for g, t in zip(found, truth, strict=True)]).norm() for found in (ours, theirs)]
    assert torch.equal(ours[0], theirs[0]) and 0 < far[0] < 1.2 * far[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_diffusers(uneven, photo, meta_down, checkpointing):
    wanted = learnt(uneven, photo, meta_down)
    if checkpointing:
        uneven.transformer.enable_gradient_checkpointing()
    try:
        with turned_norms(uneven.transformer):
            got = learnt(uneven, photo, meta_down)
    finally:
        uneven.transformer.disable_gradient_checkpointing()
    assert all(g.abs().max() > 0 for g in wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_positions_that_change_are_worked_out_anew(base, photo):
    def forward(ids):
        with torch.no_grad():
            return base.velocity(photo.mean[:1], torch.full((1,), 0.5), photo.text.rows(photo.caption[:1]), ids, 1.0)

    ways = photo.image_ids, 3 * photo.image_ids, photo.image_ids
    wanted = [forward(ids) for ids in ways]
    with turned_norms(base.transformer):
        got = [forward(ids) for ids in ways]
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-3)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_afterwards_all_is_as_it_was(base):
    before = dict(base.transformer.named_modules())
    with pytest.raises(KeyError), turned_norms(base.transformer), turned_norms(base.transformer):
        assert sum(isinstance(m, TurnedNorm) for m in base.transformer.modules()) == sum(isinstance(m, torch.nn.RMSNorm) for m in before.values())
        raise KeyError
    assert dict(base.transformer.named_modules()) == before
