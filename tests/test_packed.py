"""Products by oneDNN: the same numbers there and back, of the weights as they are now, and nothing of it left afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metalora import packed
from metalora.packed import Packed, PackedLinear, packed_products

from .conftest import learnt

pytestmark = [pytest.mark.one_family, pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")]


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_the_layer(shape, bias):
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    along = torch.randn(*shape[:-1], 40).transpose(0, -2).contiguous().transpose(0, -2)  # a gradient that lies otherwise in memory
    wanted = layer(x)
    (gradient,) = torch.autograd.grad(wanted, x, along)
    with packed_products(layer):
        assert type(layer) is PackedLinear
        got = layer(x)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.autograd.grad(got, x, along)[0], gradient)
    assert type(layer) is nn.Linear


def test_weights_that_change_are_packed_anew():
    layer, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(3, 8)
    with packed_products(layer):
        before = Packed.of(layer)
        layer(x)
        assert Packed.of(layer) is before
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_an_adapter_learns_the_same(base, photo, meta_down):
    wanted, kinds = learnt(base, photo, meta_down), [type(m) for m in base.transformer.modules()]
    with base.hastened():
        got = learnt(base, photo, meta_down)
        assert sum(type(m) is PackedLinear for m in base.transformer.modules()) == kinds.count(nn.Linear)
    assert [type(m) for m in base.transformer.modules()] == kinds
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_large_is_not_copied(monkeypatch):
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    monkeypatch.setattr(packed, "MOST", 2 * 4 * 16 - 1)
    with packed_products(layers):
        assert [type(layer) for layer in layers] == [nn.Linear] * 2
    monkeypatch.setattr(packed, "MOST", 2 * 4 * 16)
    with packed_products(layers):
        assert [type(layer) for layer in layers] == [PackedLinear] * 2


def test_only_float32_on_a_cpu_is_packed():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, device="meta"), type("Other", (nn.Linear,), {})(4, 4)])
    with packed_products(layers):
        assert [type(layer) is PackedLinear for layer in layers] == [True, False, False, False]
        with packed_products(layers):
            pass
        assert type(layers[0]) is PackedLinear
