"""Products with frozen weights in half the time, for CPUs.

In float32 PyTorch gives them to MKL, which leaves half the width of AMD's processors unused: on one with AVX-512 oneDNN, which PyTorch
carries too, is twice as fast. It wants the weights in an order of its own, which is worth making where they are used again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


MOST = 2**30  # bytes of weights, of which there are two copies more then


class Packed(NamedTuple):
    """A weight (d_out, d_in) in oneDNN's order, there and back."""

    source: nn.Parameter  # what it was made of, held so that no other takes its place in memory
    version: tuple[int, int]  # of that
    weight: Tensor
    turned: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Packed:
        """The layer's, made anew where its weight has changed."""
        weight = layer.weight.detach()
        found, version = _OF_LAYER.get(layer), (weight.data_ptr(), layer.weight._version)
        if found is None or found.source is not layer.weight or found.version != version:
            found = _OF_LAYER[layer] = cls(layer.weight, version, *(torch.ops.mkldnn._reorder_linear_weight(w.contiguous()) for w in (weight, weight.T)))
        return found

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W · x + bias (..., d_out) of x (..., d_in)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")

    def gradient(self, grad: Tensor) -> Tensor:
        """That of x (..., d_in), of that of the product (..., d_out)."""
        return torch.ops.mkldnn._linear_pointwise(grad.contiguous(), self.turned, None, "none", [], "")


_OF_LAYER: WeakKeyDictionary[nn.Linear, Packed] = WeakKeyDictionary()  # not in the layers, of which copies may be made


class PackedLinear(nn.Linear):
    """A linear layer whose weight is frozen, while `packed_products` lasts."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, Packed.of(self), self.bias)


class _Product(torch.autograd.Function):
    """What the layer makes of x, and the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return packed.product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.packed.gradient(grad), None, None


@contextmanager
def packed_products(network: nn.Module) -> Iterator[None]:
    """The linear layers of a network on a CPU in float32 multiply so meanwhile; no gradient reaches their weights. Where oneDNN is not to be had, or they are large, they stay as they are."""
    layers = [m for m in network.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    if not torch.backends.mkldnn.is_available() or sum(layer.weight.nbytes for layer in layers) > MOST:
        layers = []
    for layer in layers:
        layer.__class__ = PackedLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
