"""The training loop of both stages: the base model's own loss on cached latents, only the transformer in the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import flow
from .adapter import Adapter, trainable
from .base import Base
from .cache import TrainingSet
from .config import FlowConfig
from .errors import MetaLoraError
from .flat import AtOnce, Whole, end_to_end
from .graph import Recorded

if TYPE_CHECKING:
    from PIL.Image import Image

    from .identity import Identity


@dataclass(frozen=True)
class StepReport:
    """One step of a training, for whoever shows it."""

    step: int  # 1 … steps
    steps: int
    loss: float
    steps_per_second: float
    seconds_left: float
    preview: Image | None = None  # a small picture of the person, every now and then
    validation: float | None = None  # loss on people that were kept out, every now and then
    learnt: Callable[[], Identity] | None = None  # the person as far as they are learnt, until the next step is asked for


class Clock:
    """Turns steps into reports with the speed so far and the time left."""

    def __init__(self, steps: int, done: int = 0):
        self.steps, self.done = steps, done
        self._before, self._start = done, time.perf_counter()

    def tick(self, loss: float, preview: Image | None = None, validation: float | None = None) -> StepReport:
        """Count one step."""
        self.done += 1
        speed = (self.done - self._before) / max(time.perf_counter() - self._start, 1e-9)
        return StepReport(self.done, self.steps, loss, speed, (self.steps - self.done) / speed, preview, validation)

    def skip(self, steps: int) -> None:
        """Count steps that were done in an earlier run; they say nothing about the speed."""
        self.done, self._before = self.done + steps, self._before + steps


class Averages:
    """Exponential moving average of parameters, short at first so that the start is soon forgotten. At decay 0 it is the parameters as they are."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def update(self, step: int) -> None:
        """Count in what the parameters are after this step, 1, 2, …"""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters; twice restores."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The parameters are the averages inside."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def optimizer(groups: Sequence[tuple[Sequence[nn.Parameter], float]], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over groups of parameters with their learning rates, the parameters of each group end to end."""
    return torch.optim.AdamW([{"params": [end_to_end(group)], "lr": rate} for group, rate in groups if group], weight_decay=weight_decay, fused=True)


def wholes(optimizers: Sequence[torch.optim.Optimizer]) -> list[Whole]:
    """What these optimisers step, a tensor a group."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def two_rates(adapter: Adapter, learning_rate: float, weight_decay: float, up_rate: float) -> torch.optim.AdamW:
    """AdamW over all of the adapter's open factors, Up at `up_rate` times the rate of the others [LoRA+, arXiv 2402.12354]."""
    ups = {id(p) for p in adapter.ups()}
    split = [[p for p in trainable(adapter) if (id(p) in ups) == up] for up in (False, True)]
    return optimizer([(split[0], learning_rate), (split[1], up_rate * learning_rate)], weight_decay)


def warmup(steps: int) -> Callable[[int], float]:
    """Learning-rate factor of step 0, 1, …: it rises linearly over `steps` steps, then stays 1."""
    return lambda step: min(1.0, (step + 1) / max(1, steps))


def draw_rows(data: TrainingSet, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of picture numbers (batch,) that mix subjects: each subject once before one comes again."""
    of_subject = [(data.subject.cpu() == s).nonzero().flatten() for s in range(data.subjects)]
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(len(of_subject), generator=generator).tolist()
        chosen, queue = queue[:batch_size], queue[batch_size:]
        picks = [items[torch.randint(len(items), (), generator=generator)] for items in (of_subject[s] for s in chosen)]
        yield torch.stack(picks)


class Share(NamedTuple):
    """Which rows of a batch are this process's: every `world`-th from `rank` on."""

    rank: int = 0
    world: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Those of (batch, ...)."""
        return rows[self.rank :: self.world]


class Drawn(NamedTuple):
    """What a step reads: which pictures, and all that is random in it, on the device. Of several processes each holds its share."""

    whole: Tensor  # (batch,) picture numbers of all processes
    rows: Tensor  # (share,) those of this one
    spread: Tensor  # (share, tokens, channels), where in its latents' distribution each picture is taken
    noise: Tensor  # (share, tokens, channels)
    sigma: Tensor  # (share,)
    reworded: Tensor  # (n,) int64, of the first n of the share: which of its captions each is learnt under


def draw(
    data: TrainingSet, rows: Tensor, generator: torch.Generator, config: FlowConfig, share: Share = Share(), reworded: float = 0.0
) -> Drawn:  # fmt: skip
    """The draws for the pictures `rows` (batch,), made for the whole batch and on the CPU: they are the same on every device and for every share."""
    spread, noise = torch.randn((2, len(rows), *data.mean.shape[1:]), generator=generator)
    sigma = flow.sample_sigmas(len(rows), generator, config)
    own = (share.of(t) for t in (rows, spread, noise, sigma, _reword(data.captions.shape[1], len(rows), reworded, generator)))
    return Drawn(*(send(t, data.mean.device) for t in (rows, *own)))


def _reword(captions: int, batch: int, part: float, generator: torch.Generator) -> Tensor:
    """Which of its captions each of the first pictures of a batch is learnt under, (n,), so that on average this part of the batch is under another than its own.

    n is the same for every batch, since a recording (graph.py) wants fixed shapes; some draw their own, 0, where it is more than that part.
    """
    n = math.ceil(part * batch) if captions > 1 else 0
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    return torch.randint(1, captions, (n,), generator=generator) * (torch.rand(n, generator=generator) < part * batch / n)


def loss_of(base: Base, data: TrainingSet, drawn: Drawn, adapter: Adapter | None = None) -> Tensor:
    """Rectified-flow loss () of what was drawn. Where tokens have weights it is the weighted mean; the losses of all shares add up to that of the batch.

    Pictures under other captions than their own are to be what the base makes of them, for which its `adapter`, if it has one, is passed over.
    """
    whole, rows, spread, noise, sigma, reworded = drawn
    x = data.mean[rows] + data.std[rows] * spread
    noisy, wanted, caption = flow.interpolate(x, noise, sigma).to(base.dtype), flow.target(x, noise), data.caption[rows]
    if n := len(reworded):
        own, caption = caption[:n], torch.cat([data.captions[rows[:n], reworded], caption[n:]])
        at: slice | Tensor = slice(n)
        if base.device.type == "cpu" and not base.is_compiled:  # else shapes are to be the same at every step
            at = (caption[:n] != own).nonzero().flatten()  # whose caption is their own change nothing
        if len(own[at]):
            with torch.no_grad(), adapter.passed_over() if adapter else nullcontext():
                wanted[at] += _change(base, data, noisy[at], sigma[at], own[at], caption[at])
    predicted = base.velocity(noisy, sigma, data.text.rows(caption), data.image_ids, base.settings.train_guidance)
    if data.weight is None:
        return F.mse_loss(predicted.float(), wanted) * (len(rows) / len(whole))
    error = F.mse_loss(predicted.float(), wanted, reduction="none").mean(-1)  # (share, tokens)
    return (error * data.weight[rows]).sum() / data.weight[whole].sum()


def _change(base: Base, data: TrainingSet, noisy: Tensor, sigma: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """What `other` (n,) captions change in the base's velocities (n, tokens, channels) against their `own`, at the guidance that pictures are drawn with.

    At that of the training there is next to nothing of an expression in it.
    """
    both = base.velocity(noisy.repeat(2, 1, 1), sigma.repeat(2), data.text.rows(torch.cat([other, own])), data.image_ids, base.settings.guidance).float()
    return both[: len(own)] - both[len(own) :]


def flow_loss(base: Base, data: TrainingSet, rows: Tensor, generator: torch.Generator, config: FlowConfig, share: Share = Share()) -> Tensor:
    """The loss () of the pictures `rows` (batch,), with latent sample, noise and noise level drawn from `generator`."""
    return loss_of(base, data, draw(data, rows, generator, config, share))


def fit(
    base: Base,
    adapter: Adapter,
    data: TrainingSet,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    flow_config: FlowConfig,
    max_grad_norm: float,
    rate: Callable[[int], float] = lambda step: 1.0,
    share: Share = Share(),
    reworded: float = 0.0,
    late: bool | None = None,
    recorded: bool = False,
) -> Iterator[float]:
    """Train the adapter's open factors for `steps` steps and yield the loss of each.

    Where it is `late`, as on a GPU, what comes from the second step on is the loss of the step before: it is read when the next
    step has been sent off already, so that the device never waits for it. Where it is `recorded`, which only a GPU can, steps are
    played from a recording (graph.py), five times as fast at batch 1; with checkpointing, which looks at the GPU's random state, they are not.

    `rate` multiplies every optimiser's own learning rate. Every draw comes from `generator`, which lives on the CPU.
    The part `reworded` of every batch is learnt under other captions than its own (AdaptConfig).
    With a `share` every process works on its rows of each batch, and gradients are summed: all take the same steps.
    Raises MetaLoraError where the loss is no longer a number.
    """
    base.playing.forget()  # the memory is needed now
    parameters = wholes(optimizers)
    full = [group["lr"] for o in optimizers for group in o.param_groups]
    batches = draw_rows(data, batch_size, generator)
    gradients = Gradients(base, adapter, data, parameters, recorded and base.device.type == "cuda")
    late, unread = base.device.type == "cuda" if late is None else late, None
    try:
        with gradients:
            for step in range(steps):
                value = gradients(draw(data, next(batches), generator, flow_config, share, reworded))
                if share.world > 1:
                    value = sum_over_processes(parameters, value)
                loss = None if late else _read(value)
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                for group, lr in zip((g for o in optimizers for g in o.param_groups), full):
                    group["lr"] = lr * rate(step)
                for o in optimizers:
                    o.step()
                yield _read(value if unread is None else unread) if loss is None else loss
                unread = value
            if late and unread is not None:
                _read(unread)
    finally:
        adapter.use_rows(None)
        for group, lr in zip((g for o in optimizers for g in o.param_groups), full):
            group["lr"] = lr


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU is not waited for, which it would be for memory that the system may move."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _read(loss: Tensor) -> float:
    """The loss as a number. MetaLoraError where it is none."""
    value = loss.item()
    if not math.isfinite(value):
        raise MetaLoraError("The training went astray (the loss is not a number); lower the learning rate and start again.")
    return value


def sum_over_processes(parameters: Sequence[nn.Parameter], loss: Tensor | None = None) -> Tensor:
    """Sum the gradients, in place, and the loss (), which is returned; in one message."""
    gradients = [p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_zeros(1) if loss is None else loss.to(gradients[0]).view(1)])
    dist.all_reduce(flat)
    *parts, total = flat.split([*(g.numel() for g in gradients), 1])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])
    return total[0]


class Gradients:
    """The loss () of a step, its gradients left with the parameters; a step that the memory does not do for is done again.

    A context manager: the transformer is hastened meanwhile, whichever it is (Base.hastened).
    """

    def __init__(self, base: Base, adapter: Adapter, data: TrainingSet, parameters: Sequence[Whole], recorded: bool = False):
        self.base, self.adapter, self.data, self.parameters = base, adapter, data, parameters
        self.at_once = AtOnce(adapter, parameters, base.dtype)
        self.recorded = Recorded(self._work) if recorded else None
        self._hastened = ExitStack()

    def __enter__(self) -> Gradients:
        self._hastened.enter_context(self.base.hastened())
        return self

    def __exit__(self, *_: object) -> None:
        self._hastened.close()

    def __call__(self, drawn: Drawn) -> Tensor:
        return self.base.persevere(partial(self._step, drawn), self._again)

    def _step(self, drawn: Drawn) -> Tensor:
        return self.recorded(drawn) if self.recorded and not self.base.transformer.is_gradient_checkpointing else self._work(drawn)

    def _work(self, inputs: Sequence[Tensor]) -> Tensor:
        drawn = Drawn(*inputs)
        for p in self.parameters:
            p.grad.zero_()
        self.adapter.use_rows(self.data.subject[drawn.rows] if self.adapter.count > 1 else None)
        with _repeatable(self.base.device), self.at_once():
            loss = loss_of(self.base, self.data, drawn, self.adapter)
            loss.backward()
        return loss.detach()

    def _again(self) -> None:
        if self.recorded:
            self.recorded.forget()
        if self.base.transformer is not self.adapter.transformer:
            self.adapter.move_to(self.base.transformer)
            self._hastened.close()
            self._hastened.enter_context(self.base.hastened())


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, choose the kernels whose result does not change from run to run where there are such; a CPU's do not anyway."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it writes every new tensor once more; nothing here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
