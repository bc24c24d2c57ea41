"""The one training loop of all the small models: a wall-clock budget, moving averages, and exact resumption."""

import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from metalora.errors import MetaLoraError, compiling
from metalora.miniature.optimizer import Optimizer
from metalora.miniature.pipeline import MiniatureConfig
from metalora.train import Averages, sum_over_processes

READ_EVERY = 16  # steps whose losses are read off a GPU at once: who reads one waits until the GPU has done all that it was given


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run.

    Args:
        minutes: time to train for; the learning rate is annealed over it. Time before a restart counts.
        steps: if set, the budget is this many steps instead, and a run is the same each time.
        anneal_from: share of the budget after which the rate falls to zero along a cosine; 0 is a plain cosine,
            1 a constant rate.
        ema: decay of the moving average of the weights, which is what a training returns.
        save_every: seconds between checkpoints.
    """

    learning_rate: float
    batch_size: int
    minutes: float = 10.0
    steps: int | None = None
    warmup_steps: int = 100
    anneal_from: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_every: float = 60.0
    print_every: float = 5.0
    tasks_every: float = 180.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What every training is told on the command line.

    Args:
        data: folders of rendered shards; image folders for what learns from a dataset.
        work: folder outside the source tree; a training called NAME keeps all its files in work/NAME.
        model: sizes of the miniature, the same for all trainings of one work folder.
        device: where the weights lie. Which pictures and captions a step has is the same for every device; noise is drawn where it is used.
        learning_rate, batch_size: replace a training's own choice where they are not None.
        arguments: the command as it was given, for the model card.
    """

    data: tuple[Path, ...]
    work: Path
    minutes: float
    seed: int = 0
    threads: int = 1
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    device: str = "cpu"
    model: MiniatureConfig = MiniatureConfig()
    arguments: tuple[str, ...] = ()

    def training(self, **defaults: Any) -> TrainingConfig:
        """The run's settings: the training's defaults under what the command line says."""
        asked = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        defaults |= {name: value for name, value in asked.items() if value is not None}
        return TrainingConfig(minutes=self.minutes, steps=self.steps, seed=self.seed, **defaults)

    def figures(self, result: "TrainingResult", config: TrainingConfig) -> dict[str, Any]:
        """The part of a result.json that is the same for all trainings."""
        return {"command": _command_line(self.arguments), "seed": self.seed,
                "training": dataclasses.asdict(config), "model": dataclasses.asdict(self.model),
                "steps": result.steps, "samples": result.samples, "minutes": round(result.seconds / 60, 1),
                "loss": round(result.loss, 5), "torch": torch.__version__,
                "device": "a CPU" if self.device == "cpu" else torch.cuda.get_device_name()} | ({"earlier": result.earlier} if result.earlier else {})


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run took: optimizer steps, samples seen, seconds (over all restarts), the last smoothed loss.

    Args:
        earlier: samples and minutes of the runs whose result this one began from.
    """

    steps: int
    samples: int
    seconds: float
    loss: float
    earlier: dict[str, float] = dataclasses.field(default_factory=dict)


def _command_line(arguments: Sequence[str]) -> str:
    """The command as a model card shows it: with names for the folders of the machine that ran it."""
    names = {"--data": "DATA", "--work": "WORK"}
    parts = [part for argument in arguments for part in (argument.split("=", 1) if argument.split("=")[0] in names else [argument])]
    shown = [names.get(before, part) for before, part in zip(["", *parts], parts, strict=False)]
    processes = PartialState(cpu=True).num_processes
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    return shlex.join([*launcher, "-m", "metalora.miniature", *shown])


def products(device: torch.device) -> torch.autocast:
    """The precision of products in a step: bfloat16 on a GPU and on a CPU with instructions for it, float32 on all others.

    Measured on a CPU with AVX-512 alone: products of bfloat16 take 1.8 times as long as those of float32 there. With AVX-512 BF16
    (AMD EPYC, Zen 5) a step of the base takes 0.67 of the time that it takes in float32, one of the recogniser 0.48.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device))


def in_bfloat16(device: torch.device) -> bool:
    """Whether `products` are of bfloat16 there."""
    can = torch.cpu.get_capabilities()
    return device.type != "cpu" or bool(can.get("amx_bf16") or can.get("avx512_bf16"))


def compile_options(device: torch.device) -> dict[str, Any] | None:
    """What `torch.compile` is to be told for trainings.

    On a CPU with AMX vectors are of 256 bits: in those of 512, PyTorch 2.13's code for bfloat16 makes the gradients of queries and keys NaN.
    """
    return {"cpp.simdlen": 256} if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") else None


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """What draws on the device: on a CPU the generator itself, on a GPU one that it seeds."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


class Draws:
    """What `draw` makes for one step after the other; `ahead`, a thread makes the next step's while this one's is used."""

    def __init__(self, draw: Callable[[int], Any], ahead: bool):
        self.draw, self.pool = draw, ThreadPoolExecutor(1) if ahead else None
        self.coming: Future | None = None

    def of(self, step: int) -> Any:
        """The step's. Each step is asked for once, in order."""
        if self.pool is None:
            return self.draw(step)
        drawn = (self.coming or self.pool.submit(self.draw, step)).result()
        self.coming = self.pool.submit(self.draw, step + 1)
        return drawn

    def close(self) -> None:
        """Ends the thread."""
        if self.pool is not None:
            self.pool.shutdown()


class Trainer:
    """Trains a module on `loss(draw(generator)) -> scalar` until the budget is used up.

    Each step draws its batch with a generator seeded by the step, so that a killed run goes on from its checkpoint of
    weights, averages, optimizer and counts as if nothing had happened. Where only a result is left, as `disassemble` leaves
    it, a new run begins from its weights. Under `torchrun` every process draws its own batch
    and gradients are averaged; the first one keeps the clock, writes and prints.

    Args:
        name: shown in the progress lines; the checkpoint is `folder`/checkpoint.pt.
        module: holds the weights that train and are the result.
        helper: trains along and is thrown away in the end.
        afresh: begins from the module as it is, also where a result is left.
    """

    def __init__(self, name: str, module: nn.Module, folder: Path, config: TrainingConfig, helper: nn.Module | None = None, afresh: bool = False):
        self.name, self.module, self.folder, self.config = name, module, Path(folder), config
        self.all = module if helper is None else nn.ModuleList([module, helper])
        parameters = [parameter for parameter in self.all.parameters() if parameter.requires_grad]
        self.optimizer = Optimizer(self.all, config)
        self.parameters = parameters
        self.averages = Averages(parameters, config.ema)
        self.device = parameters[0].device
        self.processes = PartialState(cpu=True)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.unread: list[torch.Tensor] = []  # losses of the last steps
        self.earlier: dict[str, float] = {}
        self._resume(afresh)

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1 and over."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        return self.seconds / (60 * self.config.minutes)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.processes.is_main_process

    @property
    def samples_a_step(self) -> int:
        """Over all processes."""
        return self.config.batch_size * self.processes.num_processes

    def learning_rate(self) -> float:
        falling = (self.progress - self.config.anneal_from) / max(1 - self.config.anneal_from, 1e-9)
        anneal = 0.5 * (1 + math.cos(math.pi * min(max(falling, 0.0), 1.0)))
        return self.config.learning_rate * anneal * min(1.0, (self.step + 1) / max(self.config.warmup_steps, 1))

    def run(self, loss: Callable[[Any], torch.Tensor], watch: Callable[["Trainer"], None] | None = None,
            draw: Callable[[torch.Generator], Any] = lambda generator: generator) -> TrainingResult:
        """Trains to the end of the budget and leaves the averaged weights in the module.

        `watch` is called every `tasks_every` seconds with the averaged weights in place, for figures and previews.
        `draw` makes what `loss` takes, on a GPU while the step before is computed; without it `loss` takes the generator.
        """
        torch.set_flush_denormal(True)  # tiny moments of the optimizer are slow numbers; the setting is the process's
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)  # for the reason that `Flux.prepare` tells; the process's too
        draws = Draws(lambda step: draw(self._generator(step)), ahead=self.device.type != "cpu")
        try:
            with compiling("train on a machine with a GPU"):
                return self._run(loss, watch, draws)
        finally:
            draws.close()
            torch.backends.cuda.enable_cudnn_sdp(before)
            torch.set_flush_denormal(False)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.config.seed, step, self.processes.process_index)) % 2**63)

    def _run(self, loss: Callable[[Any], torch.Tensor], watch: Callable[["Trainer"], None] | None, draws: Draws) -> TrainingResult:
        self.module.train()
        begun = printed = saved = watched = time.monotonic()
        printed_step, before = self.step, self.seconds
        while self.progress < 1:
            self._train_step(loss, draws.of(self.step))
            now = time.monotonic()
            self.seconds = self._shared_clock(before + now - begun)
            if not self.is_first:
                continue
            if now - printed > self.config.print_every:
                self._print((self.step - printed_step) * self.samples_a_step / (now - printed))
                printed, printed_step = now, self.step
            if now - saved > self.config.save_every:
                self.save()
                saved = time.monotonic()
            if watch is not None and now - watched > self.config.tasks_every:
                self.watch(watch)
                watched = time.monotonic()
        self._read_losses()
        if self.is_first:
            self.save()
        self.averages.swap()
        self.module.eval()
        return TrainingResult(self.step, self.step * self.samples_a_step, self.seconds, self.loss, self.earlier)

    def watch(self, watch: Callable[["Trainer"], None]) -> None:
        self._read_losses()
        self.module.eval()
        with torch.no_grad(), self.averages.used():
            watch(self)
        self.module.train()

    def _train_step(self, loss: Callable[[Any], torch.Tensor], drawn: Any) -> None:
        value = loss(drawn)
        value.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step(self.learning_rate())
        self.step += 1
        self.averages.update(self.step)
        self.unread.append(value.detach())
        if len(self.unread) == (1 if self.device.type == "cpu" else READ_EVERY):
            self._read_losses()

    def _read_losses(self) -> None:
        """Counts the losses of the last steps into the smoothed one."""
        numbers = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        for step, number in enumerate(numbers, self.step - len(numbers) + 1):
            if not math.isfinite(number):
                raise FloatingPointError(f"{self.name}: the loss of step {step} is {number}; lower the learning rate")
            self.loss = number if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * number

    def _average_gradients(self) -> None:
        """Mean over the processes, in one message."""
        if self.processes.num_processes > 1:
            sum_over_processes(self.parameters)
            torch._foreach_div_([parameter.grad for parameter in self.parameters], self.processes.num_processes)

    def _shared_clock(self, seconds: float) -> float:
        """The first process's seconds: all use up the budget at the same step."""
        if self.processes.num_processes > 1:
            clock = torch.tensor(seconds, dtype=torch.float64)
            dist.broadcast(clock, src=0)
            return clock.item()
        return seconds

    def _print(self, samples_per_second: float) -> None:
        self._read_losses()
        left = (1 - self.progress) * self.seconds / max(self.progress, 1e-9) / 60
        print(f"{self.name}: step {self.step}, loss {self.loss:.4f}, {samples_per_second:.1f} samples/s, "
              f"{left:.1f} min left", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Writes the checkpoint beside and renames it, so that a kill leaves the last whole one."""
        self._read_losses()
        state = {"module": self.all.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "averages": self.averages.values,
                 "step": self.step, "seconds": self.seconds, "loss": self.loss, "earlier": self.earlier}
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / "checkpoint.tmp"
        torch.save(state, beside)
        os.replace(beside, self.folder / "checkpoint.pt")

    def _resume(self, afresh: bool) -> None:
        path, result = self.folder / "checkpoint.pt", self.folder / "model.safetensors"
        if not path.exists():
            if result.exists() and not afresh:
                self._load(self.module, load_file(result), result)
                self.averages = Averages(self.parameters, self.config.ema)
                before = read_figures(self.folder)
                self.earlier = {key: before[key] + before.get("earlier", {}).get(key, 0) for key in ("samples", "minutes")}
                print(f"{self.name}: begins from {result}", file=sys.stderr, flush=True)
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        self._load(self.all, state["module"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        for value, saved in zip(self.averages.values, state["averages"], strict=True):
            value.copy_(saved)
        self.step, self.seconds, self.loss, self.earlier = (state[key] for key in ("step", "seconds", "loss", "earlier"))
        print(f"{self.name}: goes on at step {self.step}", file=sys.stderr, flush=True)

    def _load(self, module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise MetaLoraError(f"{path} is of a model of other sizes or of other people; remove it to begin anew.") from error


def write_result(folder: Path, weights: nn.Module | dict[str, torch.Tensor] | None, figures: dict[str, Any]) -> None:
    """Writes what a training leaves: model.safetensors, where there are weights, and result.json, from which an asset's card is made.

    Of several processes the first one writes.
    """
    if not PartialState(cpu=True).is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        state = weights.state_dict() if isinstance(weights, nn.Module) else weights
        state = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        save_file(state, folder / "model.safetensors")
    (folder / "result.json").write_text(json.dumps(figures, indent=1) + "\n")


def read_figures(folder: Path) -> dict[str, Any]:
    """The result.json of a training.

    Raises:
        MetaLoraError: the training has not finished yet.
    """
    if not (folder / "result.json").exists():
        raise MetaLoraError(f"{folder} has no result yet; run that training to its end first.")
    return json.loads((folder / "result.json").read_text())


def read_result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and figures of a training; MetaLoraError where it has not finished yet."""
    figures = read_figures(folder)
    return load_file(folder / "model.safetensors"), figures
