"""The three-factor adapter of Meta-LoRA (arXiv 2503.22352) on the linear layers of a transformer.

    y = W x + s · Up · Mid · Down · x        Down (r_m, d_in)   Mid (r, r_m)   Up (d_out, r)

One layer serves both stages. Mid and Up are stacked over identities, so that one forward pass may use another identity in
every row of the batch (stage 1); a single identity (stage 2) takes a shorter way. Down is one for all: learnt in stage 1,
frozen in stage 2. It is for training alone: `collapse` turns an identity into an ordinary LoRA of rank r, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AdapterConfig
from .errors import MetaLoraError
from .packed import Packed, PackedLinear

Factors = dict[str, tuple[Tensor, Tensor]]  # layer name → Mid (r, r_m), Up (d_out, r)


def collapse(mid: Tensor, up: Tensor, down: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The ordinary LoRA that equals the three factors: A = Mid·Down (r, d_in) and B = s·Up (d_out, r)."""
    return mid @ down, scale * up


def find_targets(transformer: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """The linear layers whose name the regular expression finds, in the model's order.

    Raises MetaLoraError where it finds none.
    """
    found = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, name)}
    if not found:
        raise MetaLoraError(f"The base has no linear layer that matches {pattern}; this adapter is for another kind of model.")
    assert not any("base_layer" in name or "lora_" in name for name in found), "unload every LoRA before attaching an adapter"
    return found


def random_downs(transformer: nn.Module, config: AdapterConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Start values of Down for every target layer: normal with variance 1/d_in, so that Down·x is of the size of x."""
    layers = find_targets(transformer, config.targets)
    return {
        name: torch.randn(config.meta_rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        for name, layer in layers.items()
    }


def without_first(transformer: nn.Module, config: AdapterConfig, share: float) -> AdapterConfig:
    """The same shape without this share of the transformer's blocks, counted from the input; the last block always stays."""
    if share == 0:
        return config
    blocks = list(dict.fromkeys(_block(name) for name in find_targets(transformer, config.targets)))
    kept = "|".join(re.escape(block) for block in blocks[min(round(share * len(blocks)), len(blocks) - 1) :])
    return replace(config, targets=rf"^(?=(?:{kept})\.).*?(?:{config.targets})")


def _block(name: str) -> str:
    """transformer_blocks.3.attn.to_q → transformer_blocks.3"""
    return ".".join(name.split(".")[:2])


@dataclass
class Route:
    """Which identity each row of the coming batch uses; all layers of an adapter share one."""

    rows: Tensor | None = None  # (batch,) int64; None: identity 0 for all
    closed: bool = False  # nobody: the layers are as they are without the adapter

    def of(self, factor: Tensor, dim: int = 0) -> Tensor:
        """Those that the batch uses of the identities that lie along `dim`."""
        if self.rows is not None:
            return factor.index_select(dim, self.rows)
        return factor.narrow(dim, 0, 1) if factor.shape[dim] > 1 else factor


class _Sum(torch.autograd.Function):
    """y + Up · A · x, (..., d_out), where A = s · Mid · Down, and y is given or, with `weight` (d_out, d_in), is W · x + bias, frozen.

    A (n, r, d_in) and Up (n, d_out, r) are those of n equal parts of x (..., d_in), one after the other. Written out because autograd would
    go over y once more, make the gradient of x twice and add the two up, and run a third more of operations; what it would keep
    is x, too. What is kept here for the gradient of A is x; or, where `mid` (n, r, r_m) and `down` (r_m, d_in) are given, for that of
    s · Mid, which then goes there and not to A, Down · x, (..., r_m). The former is faster, since A costs r·r_m·d_in once and Down · x costs
    r_m·d_in for every token, and only so can Down learn. The latter saves a third of a training step's memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, a: Tensor, up: Tensor, mid: Tensor | None, down: Tensor | None, packed: Packed | None) -> Tensor:  # fmt: skip
        low, right = x.reshape(len(up), -1, x.shape[-1]), a
        if down is not None:
            low, right = F.linear(low, down), mid  # (n, tokens, r_m)
        inner = torch.bmm(low, right.transpose(1, 2))  # (n, tokens, r)
        ctx.save_for_backward(low, weight, a, up, inner)
        ctx.of_mid, ctx.packed = down is not None, packed
        whole = y if y is not None else F.linear(x, weight, bias) if packed is None else packed.product(x, bias)
        parts = whole.reshape(len(up), -1, whole.shape[-1])
        add = parts.baddbmm_ if y is None else parts.baddbmm
        return add(inner, up.transpose(1, 2)).view(whole.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, weight, a, up, inner = ctx.saved_tensors
        parts = grad.reshape(len(up), -1, grad.shape[-1])
        d_up, d_inner = torch.bmm(parts.transpose(1, 2), inner), torch.bmm(parts, up)  # (n, d_out, r), (n, tokens, r)
        d_right = torch.bmm(d_inner.transpose(1, 2), low)
        d_a, d_mid = (None, d_right) if ctx.of_mid else (d_right, None)
        d_x = None
        if ctx.needs_input_grad[0]:
            of_weight = None if weight is None else parts @ weight if ctx.packed is None else ctx.packed.gradient(parts)
            d_x = torch.bmm(d_inner, a) if of_weight is None else of_weight.baddbmm_(d_inner, a)
            d_x = d_x.view(*grad.shape[:-1], a.shape[-1])
        return d_x, grad if ctx.needs_input_grad[1] else None, None, None, d_a, d_up, d_mid, None, None


class Ready(NamedTuple):
    """What a layer computes with, in its input's precision; for each of n parts of the batch."""

    a: Tensor  # (n, r, d_in), s · Mid · Down
    up: Tensor  # (n, d_out, r)
    mid: Tensor | None = None  # (n, r, r_m), s · Mid, where the gradient goes there and not to A; see _Sum
    down: Tensor | None = None  # (r_m, d_in), then


class ThreeFactorLinear(nn.Module):
    """A frozen linear layer plus the three factors. `base` is kept as it is and never written to."""

    ready: Ready | None = None  # made for all layers at once (flat.py), or else by each when it is called

    def __init__(self, base: nn.Linear, down: Tensor, count: int, config: AdapterConfig, route: Route):
        super().__init__()
        device = base.weight.device
        self.route, self.scale = route, config.scale
        self.base = base
        self.down = nn.Parameter(down.to(device, torch.float32), requires_grad=False)  # (r_m, d_in)
        self.mid = nn.Parameter(torch.zeros(count, config.rank, len(down), device=device))  # (n, r, r_m)
        self.up = nn.Parameter(torch.zeros(count, base.out_features, config.rank, device=device))  # (n, d_out, r)

    @property
    def keeps_input(self) -> bool:
        """Whether the input is kept for the way back, and not Down · x."""
        return self.down.requires_grad or self.down.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        if self.route.closed:
            return self.base(x)
        ready = self.ready
        if ready is None:
            mid, up, down = (factor.to(x.dtype) for factor in (self.scale * self.route.of(self.mid), self.route.of(self.up), self.down))
            ready = Ready(mid @ down, up) if self.keeps_input else Ready(mid.detach() @ down, up, mid, down)
        packed = Packed.of(self.base) if type(self.base) is PackedLinear else None
        y, weight, bias = (None, self.base.weight, self.base.bias) if packed or type(self.base) is nn.Linear else (self.base(x), None, None)
        return _Sum.apply(x, y, weight, bias, *ready, packed)


class Adapter:
    """The layers attached to one transformer. A context manager: leaving it detaches, and the base is as it was, bit for bit."""

    def __init__(self, transformer: nn.Module, layers: dict[str, ThreeFactorLinear], config: AdapterConfig, route: Route):
        self.layers, self.config = layers, config
        self._route = route
        self._join(transformer)
        for p in self.heads():
            p.requires_grad_(True)

    def _join(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self._flags = {name: p.requires_grad for name, p in transformer.named_parameters()}
        transformer.requires_grad_(False)
        for name, layer in self.layers.items():
            transformer.set_submodule(name, layer)

    def move_to(self, transformer: nn.Module) -> None:
        """Go over to the same transformer in another precision, with all that was learnt."""
        for name, layer in self.layers.items():
            layer.base = transformer.get_submodule(name)
        self._join(transformer)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def count(self) -> int:
        """Number of identities resident."""
        return len(next(iter(self.layers.values())).mid)

    def heads(self) -> list[nn.Parameter]:
        """Mid and Up of every layer."""
        return [p for layer in self.layers.values() for p in (layer.mid, layer.up)]

    def downs(self) -> list[nn.Parameter]:
        """Down of every layer."""
        return [layer.down for layer in self.layers.values()]

    def train_down(self, on: bool) -> None:
        """Let gradients reach Down, or hold it."""
        for p in self.downs():
            p.requires_grad_(on)

    def ups(self) -> list[nn.Parameter]:
        """Up of every layer."""
        return [layer.up for layer in self.layers.values()]

    def use_rows(self, rows: Tensor | None) -> None:
        """Row b of the coming batches uses identity rows[b]; None uses identity 0 for every row."""
        self._route.rows = rows

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """The transformer is meanwhile as it is without the adapter."""
        self._route.closed = True
        try:
            yield
        finally:
            self._route.closed = False

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Give every identity its start values: Up zero, so that nothing changes yet; Mid as the configuration says."""
        for layer in self.layers.values():
            n, r, m = layer.mid.shape
            if self.config.mid_start == "identity":
                layer.mid.copy_(torch.eye(r, m).expand(n, r, m))
            else:
                layer.mid.copy_(torch.randn(n, r, m, generator=generator) * m**-0.5)
            layer.up.zero_()

    @torch.no_grad()
    def start_at(self, factors: Mapping[str, tuple[Tensor, Tensor]], mid: float = 1.0, up: float = 1.0) -> None:
        """Move every identity's Mid and Up towards `factors`, if there are any, by these shares of the way: 0 stays, 1 is there, exactly."""
        for name in self.layers if factors else ():
            layer = self.layers[name]
            for factor, wanted, share in zip((layer.mid, layer.up), factors[name], (mid, up)):
                factor.lerp_(wanted.to(factor).expand_as(factor), share)

    @torch.no_grad()
    def factors(self, identity: int = 0) -> Factors:
        """Copies, on the CPU, of Mid and Up of one identity."""
        return {name: (_copy(layer.mid[identity]), _copy(layer.up[identity])) for name, layer in self.layers.items()}

    @torch.no_grad()
    def load_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]], identity: int = 0) -> None:
        """Put Mid and Up of one identity in place."""
        for name, layer in self.layers.items():
            mid, up = factors[name]
            layer.mid[identity].copy_(mid)
            layer.up[identity].copy_(up)

    def down_tensors(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of Down of every layer."""
        return {name: _copy(layer.down) for name, layer in self.layers.items()}

    def lora(self, identity: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """The ordinary LoRA (A, B) of one identity, layer by layer."""
        downs = self.down_tensors()
        return {n: collapse(mid, up, downs[n], self.config.scale) for n, (mid, up) in self.factors(identity).items()}

    def detach(self) -> None:
        """Take the layers out again; the transformer is as it was. A second call does nothing."""
        for name, layer in self.layers.items():
            self.transformer.set_submodule(name, layer.base)
        self.layers = {}
        for name, p in self.transformer.named_parameters():
            p.requires_grad_(self._flags.get(name, p.requires_grad))


def attach(transformer: nn.Module, downs: Mapping[str, Tensor], config: AdapterConfig, count: int = 1) -> Adapter:
    """Put the three factors on every layer that `downs` names, with `count` identities resident (Mid and Up zero: call `start`).

    Raises MetaLoraError where `downs` does not fit the transformer.
    """
    targets = find_targets(transformer, config.targets)
    _check_fit(targets, downs, config)
    route = Route()
    layers = {name: ThreeFactorLinear(base, downs[name], count, config, route) for name, base in targets.items()}
    return Adapter(transformer, layers, config, route)


def attach_plain(transformer: nn.Module, config: AdapterConfig, generator: torch.Generator) -> Adapter:
    """The baseline, an ordinary LoRA of rank r: Down is its A, trainable, and Mid is the identity, held."""
    plain = AdapterConfig(config.rank, config.rank, config.scale, config.targets, mid_start="identity")
    adapter = attach(transformer, random_downs(transformer, plain, generator), plain)
    adapter.start(generator)
    adapter.train_down(True)
    for layer in adapter.layers.values():
        layer.mid.requires_grad_(False)
    return adapter


def trainable(adapter: Adapter) -> Iterator[nn.Parameter]:
    """The parameters that gradients reach now."""
    return (p for p in [*adapter.heads(), *adapter.downs()] if p.requires_grad)


def _check_fit(targets: Mapping[str, nn.Linear], downs: Mapping[str, Tensor], config: AdapterConfig) -> None:
    for name in [*targets, *downs]:
        if name not in downs or name not in targets:
            raise MetaLoraError(f"This Meta-Down does not fit the base: layer {name} stands in one of them only.")
        want = (config.meta_rank, targets[name].in_features)
        if tuple(downs[name].shape) != want:
            raise MetaLoraError(f"This Meta-Down does not fit the base: {name} is {tuple(downs[name].shape)}, the base needs {want}.")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
