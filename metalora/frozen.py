"""Linear layers in float8 that a gradient passes through: torchao's weights, which do not learn and keep nothing for the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenLinear(nn.Linear):
    """A layer whose weights were quantised by torchao.

    torchao's own way keeps a 16-bit copy of the weights, and where it quantises the input as well it knows no gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


def freeze(module: nn.Module) -> None:
    """Make a FrozenLinear of every layer in there that torchao has quantised, adapted or not: a gradient meets them all."""
    for layer in module.modules():
        if type(layer) is nn.Linear and type(layer.weight).__module__.startswith("torchao"):
            layer.__class__ = FrozenLinear  # the weights stay where they are


class _Product(torch.autograd.Function):
    """What the layer makes of x, and the gradient of x; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.weight
        if getattr(weight, "act_quant_kwargs", None) is None:
            return grad @ weight.dequantize().to(grad.dtype), None
        return fp8_gradient(grad, weight.qdata, weight.scale), None


def fp8_gradient(grad: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """grad @ (scale · data) as a product of float8 numbers, for weights `data` (d_out, d_in) with a scale (d_out, 1) for every row.

    grad: (..., d_out), returned: (..., d_in). The weights' scales lie along what is summed over, so grad takes them up
    before it is rounded, to e4m3 with a scale of its own for every row. The kernel wants the second matrix column by column,
    so the weights are turned, which moves a byte for each where making them anew in 16 bits would move four.
    """
    scaled = grad.flatten(0, -2).float() * scale.T
    rows = scaled.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / torch.finfo(data.dtype).max  # (tokens, 1)
    columns = scale.new_ones(1, data.shape[1], dtype=torch.float32)
    turned = data.T.contiguous().T
    product = torch._scaled_mm((scaled / rows).to(data.dtype), turned, scale_a=rows, scale_b=columns, out_dtype=grad.dtype)
    return product.view(*grad.shape[:-1], data.shape[1])
