"""Queries and keys of FLUX.1 normed and turned in few operations.

For the rotary embedding diffusers calls eight operations there and eight back, most of them on numbers in float32: at 512 px a GPU moves 0.9 GB in
every block of FLUX.1-dev for it. On a CPU, where a small transformer's step is for the most part the calling of operations, PyTorch calls
a dozen more for the root-mean-square norm before it. Here the turn is a product of complex numbers, and on a CPU norm and turn are one
operation. A compiler does as much, so what is compiled on a GPU is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OF_TEXT = ("norm_added_q", "norm_added_k")
NORMS = ("norm_q", "norm_k", *OF_TEXT)


class _NormedAndTurned(torch.autograd.Function):
    """x (batch, tokens, heads, d) over its root mean square, times `weight` (d,), which is frozen, pairs of neighbours turned by `turns` (tokens, 1, d/2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
        rate = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, turns, rate)
        return _turned((x * rate).mul_(weight), turns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns, rate = ctx.saved_tensors
        grad = _turned(grad.contiguous(), turns.conj()).mul_(weight)
        along = torch.linalg.vecdot(grad, x).div_(-x.shape[-1]).unsqueeze(-1).mul_(rate * rate)
        return grad.addcmul_(x, along).mul_(rate), None, None, None


class _Turned(torch.autograd.Function):
    """x (batch, tokens, heads, d), pairs of neighbours turned by `turns` (tokens, 1, d/2), in float32 as diffusers does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return _turned(x.float(), turns).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (turns,) = ctx.saved_tensors
        return _turned(grad.float().contiguous(), turns.conj()).to(grad.dtype), None


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class Turns(nn.Module):
    """In place of the transformer's position embedding: tells the transformer of none, and keeps it for the norms.

    On a CPU it is worked out anew for other positions only; a GPU, of which that cannot be asked without waiting for it, does so every time.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding, self._ids = embedding, torch.empty(0)

    def forward(self, ids: Tensor) -> None:
        if ids.device.type != "cpu" or not torch.equal(ids, self._ids):
            cos, sin = self.embedding(ids)  # (tokens, d), each number twice
            self._ids, self.now = ids, torch.complex(cos[:, None, ::2], sin[:, None, ::2])  # (tokens, 1, d/2)


class TurnedNorm(nn.Module):
    """In place of a norm of queries or keys. Texts come before pictures in the sequence."""

    def __init__(self, norm: nn.RMSNorm, turns: Turns, of_text: bool):
        super().__init__()
        self.norm, self.of_text, self._turns = norm, of_text, (turns,)  # in a tuple, so that it is no module of this one too

    def forward(self, x: Tensor) -> Tensor:
        count, turns = x.shape[1], self._turns[0].now
        turns = turns[:count] if self.of_text else turns[-count:]
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _NormedAndTurned.apply(x, self.norm.weight, turns, self.norm.eps)
        return _Turned.apply(self.norm(x), turns)


@contextmanager
def turned_norms(transformer: nn.Module) -> Iterator[None]:
    """A FluxTransformer2DModel norms and turns in few operations inside, with the same result to rounding; its norms must be frozen."""
    if isinstance(transformer.pos_embed, Turns):  # it does already
        yield
        return
    norms = {name: m for name, m in transformer.named_modules() if name.rpartition(".")[2] in NORMS}
    turns = Turns(transformer.pos_embed)
    transformer.pos_embed = turns
    for name, norm in norms.items():
        transformer.set_submodule(name, TurnedNorm(norm, turns, name.endswith(OF_TEXT)))
    try:
        yield
    finally:
        transformer.pos_embed = turns.embedding
        for name, norm in norms.items():
            transformer.set_submodule(name, norm)
