"""The factors of all layers as one: a training step does with all of them together what would else be a few small operations for each.

There are hundreds of layers. Casting Mid and Up, Mid · Down, the same on the way back and the optimiser's step are thousands of operations then,
so small that a GPU takes longer to launch them than to do them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .adapter import Adapter, Ready, ThreeFactorLinear


class Whole(nn.Parameter):
    """Parameters end to end, (n,); they and their gradients are views of it and its."""

    parts: list[nn.Parameter]


def end_to_end(parameters: Sequence[nn.Parameter]) -> Whole:
    """One parameter that holds these.

    What is done with all of them, clipping, a step, an average, is then done with one tensor, however many layers there are. The gradient
    stays where it is: clear it in place, and do not move the parameters to another device.
    """
    whole = Whole(torch.cat([p.detach().flatten() for p in parameters]))
    whole.parts, whole.grad = list(parameters), torch.zeros_like(whole, requires_grad=False)
    sizes = [p.numel() for p in parameters]
    for p, value, grad in zip(parameters, whole.detach().split(sizes), whole.grad.split(sizes)):
        p.data, p.grad = value.view_as(p), grad.view_as(p)
    return whole


class AtOnce:
    """Makes every layer's factors ready for a step.

    The gradient goes to `wholes`, of which what learns is part; the rest of the factors is held. It is for one training: a Down that is held does not change.
    """

    def __init__(self, adapter: Adapter, wholes: Sequence[Whole], dtype: torch.dtype):
        self.adapter, self.wholes, self.dtype = adapter, wholes, dtype
        self.alike: dict[torch.Size, list[ThreeFactorLinear]] = {}  # layers whose Downs have the same shape
        for layer in adapter.layers.values():
            self.alike.setdefault(layer.down.shape, []).append(layer)
        self.held = {shape: self._downs(layers) for shape, layers in self.alike.items() if not layers[0].down.requires_grad}

    def _downs(self, layers: Sequence[ThreeFactorLinear], now: Mapping[nn.Parameter, Tensor] = {}) -> Tensor:
        return torch.stack([now.get(layer.down, layer.down).to(self.dtype) for layer in layers])  # (layers, r_m, d_in)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The layers are ready inside, for the rows that the adapter is to use."""
        now: dict[nn.Parameter, Tensor] = {}
        for whole in self.wholes:
            values = whole.to(self.dtype).split([p.numel() for p in whole.parts])
            now |= {p: value.view_as(p) for p, value in zip(whole.parts, values)}
        try:
            for layers in self.alike.values():
                self._make(layers, now)
            yield
        finally:
            for layer in self.adapter.layers.values():
                layer.ready = None

    def _make(self, layers: Sequence[ThreeFactorLinear], now: Mapping[nn.Parameter, Tensor]) -> None:
        of, keeps_input = layers[0].route.of, layers[0].keeps_input
        downs = self._downs(layers, now) if layers[0].down.requires_grad else self.held[layers[0].down.shape]
        mids, ups = ([now.get(p, p).to(self.dtype) for p in factors] for factors in zip(*((layer.mid, layer.up) for layer in layers)))
        mids, ups = layers[0].scale * of(torch.stack(mids), dim=1), map(of, ups)  # mids: (layers, n, r, r_m)
        a = torch.bmm((mids if keeps_input else mids.detach()).flatten(1, 2), downs).unflatten(1, mids.shape[1:3])
        for layer, *ready in zip(layers, a, ups) if keeps_input else zip(layers, a, ups, mids, downs):
            layer.ready = Ready(*ready)
