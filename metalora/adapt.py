"""Stage 2: one new person from one photo or a few. Meta-Down stays as it is; Mid and Up of the person are trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .adapter import Adapter, attach, attach_plain, find_targets, without_first
from .base import Base
from .cache import TrainingSet, mirrored
from .config import AdaptConfig, AdapterConfig
from .identity import Identity
from .metadown import MetaDown
from .train import Averages, Clock, StepReport, fit, two_rates, warmup, wholes

Preview = Callable[[], Image.Image | None]  # none where there is no memory for one


def crops(image: Image.Image, box: Sequence[float], size: int, config: AdaptConfig, seed: int = 0, mirror: bool = True) -> list[Image.Image]:
    """Square crops round the face at `box` (left, top, right, bottom, px), `size` px wide; then, with `mirror`, the same in a mirror.

    The first is the largest square that holds the face; the others leave between margin[0] and margin[1] face heights of
    room in all and put the face at different places. Every crop lies inside the picture and holds the whole face, as far
    as the picture is large enough. [paper: crops and flips; the ranges are ours]
    """
    rng = random.Random(seed)
    face = max(box[2] - box[0], box[3] - box[1])
    most = min(image.size)
    squares = [_square(image.size, box, most, 0.5, 0.5)]
    for i in range(config.crops - 1):
        along = (i + rng.random()) / (config.crops - 1)  # spread evenly between tight and wide
        side = face * (1 + config.margin[0] + along * (config.margin[1] - config.margin[0]))
        squares.append(_square(image.size, box, min(most, side), rng.random(), rng.random()))
    upright = [image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=square) for square in squares]
    return mirrored(upright) if mirror else upright


def _square(picture: tuple[int, int], box: Sequence[float], side: float, x: float, y: float) -> tuple[float, float, float, float]:
    """A square that holds the box with the share x, y of the spare room left of and above it, moved into the picture."""
    left = min(max(box[0] - x * (side - (box[2] - box[0])), 0.0), picture[0] - side)
    top = min(max(box[1] - y * (side - (box[3] - box[1])), 0.0), picture[1] - side)
    return left, top, left + side, top + side


def adapt(
    base: Base,
    meta_down: MetaDown,
    data: TrainingSet,
    config: AdaptConfig,
    *,
    preview: Preview | None = None,
    preview_every: int = 0,
    face: Tensor | None = None,
) -> Generator[StepReport, None, Identity]:
    """Train one person on the encoded crops `data`; yields a report a step and returns the identity.

    Stopping early (close the generator, or throw into it) leaves the base as it was and keeps nothing. `preview` is called
    while the adapter is attached, every `preview_every` steps and after the last. `face` (d,) is the person's embedding, from which the
    Meta-Down may tell where to begin.
    """
    meta_down.check_base(base.name, base.fingerprint)
    generator = torch.Generator().manual_seed(config.seed)
    whole = meta_down.adapter
    rank, rows = config.ranks(whole)
    shape = replace(_shape(base, whole, config), rank=rank, meta_rank=rows)
    start = meta_down.start_for(face, config.start_face) if (rank, rows) == (whole.rank, whole.meta_rank) else {}
    adapted = find_targets(base.transformer, shape.targets) if config.skip_blocks else meta_down.tensors
    downs = {name: meta_down.tensors[name][:rows] for name in adapted}
    with attach(base.transformer, downs, shape) as adapter, base.resident("transformer"):
        adapter.start(generator)
        adapter.start_at(start, config.start_mid, config.start_up)
        learnt = partial(_identity, base, adapter, config, meta_down.domain, meta_down=meta_down.name, meta_down_sha256=meta_down.sha256)
        return (yield from _steps(base, adapter, data, config, generator, learnt, preview, preview_every))


def adapt_plain(
    base: Base,
    shape: AdapterConfig,
    domain: str,
    data: TrainingSet,
    config: AdaptConfig,
    *,
    preview: Preview | None = None,
    preview_every: int = 0,
) -> Generator[StepReport, None, Identity]:
    """The same without a stage 1 before it: an ordinary LoRA of rank `shape.rank` on the layers that `shape` names."""
    generator = torch.Generator().manual_seed(config.seed)
    with attach_plain(base.transformer, _shape(base, shape, config), generator) as adapter, base.resident("transformer"):
        learnt = partial(_identity, base, adapter, config, domain, meta_down="", meta_down_sha256="")
        return (yield from _steps(base, adapter, data, config, generator, learnt, preview, preview_every))


def _shape(base: Base, shape: AdapterConfig, config: AdaptConfig) -> AdapterConfig:
    """The adapter's shape as these settings want it."""
    return replace(without_first(base.transformer, shape, config.skip_blocks), scale=config.scale * shape.scale)


def _identity(base: Base, adapter: Adapter, config: AdaptConfig, domain: str, steps: int, **more: Any) -> Identity:
    """The person as the adapter has them now, after so many steps."""
    shape, downs = adapter.config, {} if more["meta_down_sha256"] else adapter.down_tensors()
    return Identity(
        adapter.factors(), base.name, base.fingerprint, rank=shape.rank, meta_rank=shape.meta_rank, scale=shape.scale,
        domain=domain, noun=domain, trigger=base.settings.trigger, steps=steps, seed=config.seed, downs=downs, **more,
    )  # fmt: skip


def _steps(
    base: Base, adapter: Adapter, data: TrainingSet, config: AdaptConfig, generator: torch.Generator, learnt: Callable[[int], Identity],
    preview: Preview | None = None, preview_every: int = 0,
) -> Generator[StepReport, None, Identity]:  # fmt: skip
    adamw = two_rates(adapter, config.learning_rate, config.weight_decay, config.up_rate)
    clock, averages = Clock(config.steps), Averages(wholes([adamw]), config.ema)
    kept, shown = averages.used()(learnt), averages.used()(preview) if preview else None  # of the averages, not of the last step
    if config.compiled and shown:
        shown = torch.compiler.set_stance("force_eager")(shown)  # for one picture now and then its sizes are not worth compiling for
    losses = fit(
        base,
        adapter,
        data.to(base.device, base.dtype),
        [adamw],
        steps=config.steps,
        batch_size=config.batch_size,
        generator=generator,
        flow_config=config.flow,
        max_grad_norm=config.max_grad_norm,
        rate=warmup(config.warmup_steps),
        reworded=config.reworded,
        recorded=True,
    )
    with base.compiled() if config.compiled else nullcontext(), closing(losses):
        for loss in losses:
            step = clock.done + 1
            averages.update(step)
            due = preview_every > 0 and (step % preview_every == 0 or step == config.steps)
            yield replace(clock.tick(loss, shown() if shown and due else None), learnt=partial(kept, step))
    return kept(config.steps)
