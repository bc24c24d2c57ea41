"""Where stage 1 may begin: at the directions in which the gradients of many people point. [Ours, beyond the paper]

The gradient of a layer's weights is a sum over tokens of g xᵀ, so its rows lie where the inputs lie that tell people apart. Were Mid and Up
free, an adapter with these rows' leading right singular vectors as Down would lose least of the gradients of all people together.
No gradient of W is ever made: with Down zero, which changes nothing, Mid the identity and a random Up, that of Down is Upᵀ · g xᵀ, a
sketch of it [after the randomised range finder of arXiv 0909.4061, section 4], and singular vectors are kept up to date person by person.

The first of them is next to nothing but the mean input, along which inputs are ten times as large as along others. Adam's steps are of one
size whatever the input, so that with rows of unit length what a person learns first and most is a constant. `balanced` rows undo that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import attach, find_targets
from .base import Base
from .cache import TrainingSet
from .config import AdapterConfig, MetaConfig
from .flat import end_to_end
from .train import Clock, Gradients, Share, StepReport, draw, loss_of, sum_over_processes

DRAWS = 32  # of a picture, noise and noise level, for each person, in batches as stage 1 has them
KEPT = 2  # times the rank: directions that are kept on the way, so that few are lost
WEIGHED_ON = 64  # people on whose pictures rows are balanced, at most, a batch each


def leading_directions(
    base: Base, people: Sequence[int], bucket: Callable[[Sequence[int]], TrainingSet], shape: AdapterConfig, config: MetaConfig, clock: Clock, share: Share
) -> Generator[StepReport, None, dict[str, Tensor]]:  # fmt: skip
    """Down of every layer, (r_m, d_in): the leading right singular vectors of these people's gradients, of unit length or balanced.

    Yields a report a person. Several processes share every batch.
    """
    generator, rank = torch.Generator().manual_seed(config.seed), shape.meta_rank
    nothing = {name: torch.zeros(rank, layer.in_features) for name, layer in find_targets(base.transformer, shape.targets).items()}
    leading = {name: t.to(base.device) for name, t in nothing.items()}
    with attach(base.transformer, nothing, replace(shape, rank=rank, mid_start="identity")) as adapter, base.resident("transformer"):
        adapter.start(generator)
        for p in adapter.heads():
            p.requires_grad_(False)
        adapter.train_down(True)
        down = end_to_end(adapter.downs())
        for person in people:
            data = bucket([person]).to(base.device, base.dtype)
            for layer in adapter.layers.values():
                layer.up.data = torch.randn(layer.up.shape, generator=generator).to(layer.up)
            sketches = torch.zeros_like(down)
            with Gradients(base, adapter, data, [down]) as gradients:
                for _ in range(max(1, DRAWS // config.batch_size)):
                    rows = torch.randint(len(data), (config.batch_size,), generator=generator)
                    loss = gradients(draw(data, rows, generator, config.flow, share))
                    if share.world > 1:
                        loss = sum_over_processes([down], loss)
                    sketches += down.grad
            of_layers = sketches.split([layer.down.numel() for layer in adapter.layers.values()])
            for (name, layer), sketch in zip(adapter.layers.items(), of_layers):
                leading[name] = _leading(torch.cat([leading[name], sketch.view_as(layer.down)]), KEPT * rank)
            yield clock.tick(loss.item())
    downs = {name: F.normalize(_leading(rows, rank), dim=1) for name, rows in leading.items()}
    if config.balanced:
        _balance(base, downs, (bucket([person]).to(base.device, base.dtype) for person in people[:WEIGHED_ON]), config, share, generator)
    return {name: rows.cpu() for name, rows in downs.items()}


@torch.no_grad()
def _balance(base: Base, downs: dict[str, Tensor], people: Iterator[TrainingSet], config: MetaConfig, share: Share, generator: torch.Generator) -> None:
    """Scale the rows (r_m, d_in) in place until a layer's inputs are as large along each, in the root mean square, as along a direction drawn at random."""
    sizes = {name: rows.new_zeros(len(rows) + 1) for name, rows in downs.items()}  # sums of squares along each row, and of all

    def see(name: str, layer: nn.Module, given: tuple[Tensor]) -> None:
        x = given[0].flatten(0, -2).to(downs[name])
        sizes[name] += torch.cat([(x @ downs[name].T).square().sum(0), x.square().sum()[None]])

    hooks = [base.transformer.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in downs]
    try:
        with base.resident("transformer"):
            for data in people:
                rows = torch.randint(len(data), (config.batch_size,), generator=generator)
                loss_of(base, data, draw(data, rows, generator, config.flow, share))
    finally:
        for hook in hooks:
            hook.remove()
    for name, rows in downs.items():
        if share.world > 1:
            dist.all_reduce(sizes[name])
        *along, whole = sizes[name]
        rows *= (whole / rows.shape[1] / torch.stack(along).clamp(min=1e-12)).sqrt()[:, None]


def _leading(rows: Tensor, count: int) -> Tensor:
    """The `count` leading right singular vectors of (n, d), each as long as its singular value, the greatest first."""
    _, vectors = torch.linalg.eigh((rows @ rows.T).double())
    return vectors.flip(1)[:, :count].T.to(rows) @ rows
