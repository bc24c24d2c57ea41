"""Linear layers in float8 that a gradient passes through: torchao's numbers, which do not learn and keep nothing for the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


class FrozenLinear(nn.Linear):
    """A layer whose weights were quantised by torchao, with a scale for every row.

    torchao's own way keeps a 16-bit copy of the weights, knows no gradient where it quantises the input as well, and is of a kind of
    tensor which the compiler takes in part only. So the numbers are plain tensors here: `weight` (d_out, d_in) uint8, which PEFT and
    diffusers leave alone where they would cast float8 numbers, or cast others to them, and `scale` (d_out, 1) float32.
    """

    compute_dtype: torch.dtype  # the name by which PEFT asks for it
    multiplies: bool  # whether the input is quantised too

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.scale, self.bias, self.multiplies)

    def dequantised(self) -> Tensor:
        """The weights (d_out, d_in) in 16 bits."""
        return _dequantised(self.weight, self.scale, self.compute_dtype)


def freeze(module: nn.Module) -> None:
    """Make a FrozenLinear of every layer in there that torchao has quantised, adapted or not: a gradient meets them all."""
    for layer in module.modules():
        if type(layer) is nn.Linear and type(layer.weight).__module__.startswith("torchao"):
            quantised, layer.__class__ = layer.weight, FrozenLinear
            layer.weight = nn.Parameter(quantised.qdata.view(torch.uint8), requires_grad=False)
            layer.register_buffer("scale", quantised.scale, persistent=False)
            layer.compute_dtype, layer.multiplies = quantised.dtype, quantised.act_quant_kwargs is not None


class _Product(torch.autograd.Function):
    """What the layer makes of x (..., d_in), and the gradient of x; of what depends on x nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, multiplies: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.multiplies = multiplies
        if not multiplies:
            return F.linear(x, _dequantised(weight, scale, x.dtype), bias)
        rows, by = _in_float8(x.flatten(0, -2))
        product = torch._scaled_mm(rows, weight.view(FLOAT8).T, scale_a=by, scale_b=scale.T, bias=bias, out_dtype=x.dtype, use_fast_accum=True)
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        d_x = fp8_gradient(grad, weight.view(FLOAT8), scale) if ctx.multiplies else grad @ _dequantised(weight, scale, grad.dtype)
        return d_x, None, None, None, None


def fp8_gradient(grad: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """grad @ (scale · data) as a product of float8 numbers, for weights `data` (d_out, d_in) with a scale (d_out, 1) for every row.

    grad: (..., d_out), returned: (..., d_in). The weights' scales lie along what is summed over, so grad takes them up
    before it is rounded, to e4m3 with a scale of its own for every row. The kernel wants the second matrix column by column,
    so the weights are turned, which moves a byte for each where making them anew in 16 bits would move four.
    """
    rows, by = _in_float8(grad.flatten(0, -2).float() * scale.T)
    columns = scale.new_ones(1, data.shape[1], dtype=torch.float32)
    product = torch._scaled_mm(rows, data.T.contiguous().T, scale_a=by, scale_b=columns, out_dtype=grad.dtype)
    return product.view(*grad.shape[:-1], data.shape[1])


def _in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x (n, d) in float8, and the scale (n, 1) of each, float32."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(FLOAT8), scale


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.view(FLOAT8).float() * scale).to(dtype)
