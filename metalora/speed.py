"""How fast a person is learnt and drawn, against ordinary LoRA training and against what the device could do at best.

    python -m metalora.speed [--base flux-dev] [--draw] [--growth] [--script] [--json FILE]

`flux-dev` and `klein-4b` are transformers of the size of FLUX.1-dev and FLUX.2-klein-4B with random weights; any other base is opened
as it is. All ways take turns in one process, on the same pictures, layers and draws.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import metalora  # noqa: F401  before torch: it sets how threads wait
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from . import drawing, growth, peer
from .adapter import attach, find_targets, random_downs, trainable
from .base import Base
from .cache import TrainingSet
from .config import DEFAULT_BASE, FlowConfig
from .doctor import machine
from .errors import MetaLoraError
from .generate import unload_people
from .plan import GIB, PACKAGES
from .standin import FULL_SIZE, Case, random_base, random_pictures
from .train import draw_rows, fit, flow_loss, optimizer

PEER_RANK = 16  # what people train today
OF_PACKED = {torch.ops.mkldnn._linear_pointwise: lambda x, *more, out_shape, **others: 2 * math.prod(out_shape) * x[-1]}  # packed.py
SCRIPT = f"diffusers' script, rank {PEER_RANK}"


@contextmanager
def meta_lora(base: Base, data: TrainingSet, case: Case, checkpointing: bool = False, recorded: bool = False) -> Iterator[Iterator[float]]:
    """Stage 2 as `adapt` does it, or of several people at a time as stage 1 does: an endless iterator of losses, a step each."""
    shape, generator = replace(base.settings.adapter, rank=case.rank, meta_rank=case.meta_rank), torch.Generator().manual_seed(0)
    downs = random_downs(base.transformer, shape, generator)
    with _checkpointing(base.transformer, checkpointing), attach(base.transformer, downs, shape, case.people) as adapter:
        adapter.start(generator)
        yield fit(
            base, adapter, data, [optimizer([(list(trainable(adapter)), base.settings.adapt.learning_rate)])], steps=sys.maxsize,
            batch_size=case.batch, generator=torch.Generator().manual_seed(1), flow_config=FlowConfig(), max_grad_norm=1.0,
            recorded=recorded,
        )  # fmt: skip


@contextmanager
def peft_lora(base: Base, data: TrainingSet, case: Case, checkpointing: bool = False) -> Iterator[Iterator[float]]:
    """Ordinary LoRA training as diffusers' DreamBooth scripts do it: PEFT's layers in float32 under autocast."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    transformer = base.transformer
    layers = list(find_targets(transformer, base.settings.adapter.targets))
    config = LoraConfig(r=PEER_RANK, lora_alpha=PEER_RANK, init_lora_weights="gaussian", target_modules=layers)
    with _checkpointing(transformer, checkpointing):
        transformer.add_adapter(config, adapter_name="peer")
        cast_training_params([transformer], dtype=torch.float32)
        try:
            yield _peft_steps(base, data, case, [p for p in transformer.parameters() if p.requires_grad])
        finally:
            unload_people(base)
            transformer.requires_grad_(False)


def _peft_steps(base: Base, data: TrainingSet, case: Case, parameters: list[nn.Parameter]) -> Iterator[float]:
    adamw = torch.optim.AdamW(parameters, lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    for rows in draw_rows(data, case.batch, generator):
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            loss = flow_loss(base, data, rows, generator, FlowConfig())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()
        yield loss.item()


@contextmanager
def _checkpointing(transformer: Any, on: bool) -> Iterator[None]:
    before = transformer.is_gradient_checkpointing
    (transformer.enable_gradient_checkpointing if on else transformer.disable_gradient_checkpointing)()
    try:
        yield
    finally:
        (transformer.enable_gradient_checkpointing if before else transformer.disable_gradient_checkpointing)()


class Way(NamedTuple):
    """A way of training: what trains and how, and whether the blocks are compiled."""

    train: Callable[..., Any]
    how: dict[str, bool] = {}
    compiled: bool = False

    @property
    def anywhere(self) -> bool:
        """Whether it is measured on a CPU without being asked for."""
        return not self.compiled and "recorded" not in self.how


CHECKPOINTING, RECORDED = {"checkpointing": True}, {"recorded": True}
PEFT = f"PEFT LoRA of rank {PEER_RANK}"
WAYS = {
    "Meta-LoRA": Way(meta_lora), "Meta-LoRA, checkpointing": Way(meta_lora, CHECKPOINTING), "Meta-LoRA, compiled": Way(meta_lora, compiled=True),
    "Meta-LoRA, recorded": Way(meta_lora, RECORDED), "Meta-LoRA, compiled and recorded": Way(meta_lora, RECORDED, compiled=True),
    PEFT: Way(peft_lora), f"{PEFT}, checkpointing": Way(peft_lora, CHECKPOINTING),
}  # fmt: skip


def measure(base: Base, case: Case, way: str, warmup: int, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Milliseconds of every step; beside it peak GPU memory and what autograd keeps beyond the weights, operations of a step, the first and the last loss."""
    train, how, compiled = WAYS[way]
    data, gpu = random_pictures(base, case), base.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(base.device)
    with train(base, data, case, **how) as losses:  # not compiled: what runs under a counter once is never compiled again
        next(losses)  # what the first step makes for all is not of a step
        with FlopCounterMode(display=False, custom_mapping=OF_PACKED) as counter, Launches() as launches, _kept() as kept:
            next(losses)
        losses.close()
    if gpu:
        torch.cuda.reset_peak_memory_stats(base.device)  # the counter holds on to what goes into every module
    start = time.perf_counter()
    with base.compiled() if compiled else nullcontext(), train(base, data, case, **how) as losses:
        begin = time.perf_counter()
        first = next(losses)
        to_first = time.perf_counter() - begin
        for _ in range(warmup):
            next(losses)
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            last = next(losses)  # it reads a loss, on a GPU that of the step before: the device is never further ahead than one step
            times.append(1000 * (time.perf_counter() - begin))
        in_all = time.perf_counter() - start
        losses.close()
    found = {"first loss": first, "last loss": last, "s to the first step": to_first, "s in all": in_all, "tera-operations a step": counter.get_total_flops() / 1e12, "launches a step": launches.count, "MiB kept for the way back": sum(kept.values()) / 2**20}
    if gpu:
        peak = torch.cuda.max_memory_allocated(base.device)
        found |= {"peak GiB": peak / GIB, "peak GiB beyond the weights": (peak - held) / GIB}
    return times, found


class Launches(TorchDispatchMode):
    """Counts operations that do something: neither views nor what only takes memory. On a GPU each is a kernel or more, which it costs some microseconds to launch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info]
        view = func.__name__.startswith("_unsafe_view") or aliases and not any(alias.is_write for alias in aliases)
        self.count += not view and "empty" not in func.__name__
        return func(*args, **kwargs or {})


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Bytes of every tensor that autograd keeps meanwhile, by its place, but for parameters; the same on every device."""
    places: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            places[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        yield places


def measure_script(base: Base, case: Case, steps: int) -> float:
    """Milliseconds a step of diffusers' own script, run as it is on a made-up photo, in processes of its own."""
    photo = Image.effect_noise((case.resolution, case.resolution), 64).convert("RGB")
    config = peer.PeerConfig(PEER_RANK, steps, batch_size=case.batch)
    return 1000 * peer.seconds_a_step(base.folder, [photo], case.resolution, case.text_tokens, config)


def matrix_rate(place: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device: what no training step can pass."""
    side = 8192 if place.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=place, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def compare(base: Base, cases: Sequence[Case], ways: Sequence[str], warmup: int, steps: int, script_steps: int = 0, rounds: int = 1) -> dict[str, Any]:
    """All ways on all cases, with their share of the roofline: the time that Meta-LoRA's operations take at the matrix rate.

    The ways take turns for `rounds` rounds of so many steps each, so that what else the machine does hits all of them alike.
    With `script_steps`, diffusers' own script too, over so many steps a round.
    """
    rate, rows = matrix_rate(base.device, base.dtype), []
    for case in cases:
        times: dict[str, list[float]] = {}
        more: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for way in ways:
                if found := _measured(base, case, way, warmup, steps):
                    times.setdefault(way, []).extend(found[0])
                    more.setdefault(way, found[1])
            if script_steps:
                times.setdefault(SCRIPT, []).append(measure_script(base, case, script_steps))
        least = 1000 * min((row["tera-operations a step"] for row in more.values()), default=0) * 1e12 / rate
        for way, each in times.items():
            median = statistics.median(each)
            figures = {"way": way, "ms a step": median, "9th decile": sorted(each)[int(0.9 * (len(each) - 1))], "share of roofline": least / median}
            rows.append({**asdict(case), **figures, **more.get(way, {})})
            print(_line(rows[-1]), flush=True)
    return {"base": base.name, "dtype": str(base.dtype), "weights": base.plan.precision, "matrix tera-operations a second": rate / 1e12, "steps": rows}


def _measured(base: Base, case: Case, way: str, warmup: int, steps: int) -> tuple[list[float], dict[str, Any]] | None:
    """What `measure` finds; None, and a line that says so, where this device or its memory does not do for it: the other ways go on."""
    try:
        return measure(base, case, way, warmup, steps)
    except (MetaLoraError, RuntimeError) as error:
        print(f"{way} at {case.resolution} px cannot be done here: {str(error).splitlines()[0]}", flush=True)
        return None


def draw(base: Base, cases: Sequence[Case], warmup: int, pictures: int, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All ways of drawing, or those named, on all cases, printed as they come."""
    rows = []
    for case in dict.fromkeys(replace(case, batch=1, people=1) for case in cases):
        for row in drawing.measure(base, case, warmup, pictures, only=only):
            rows.append({"resolution": case.resolution, "text_tokens": case.text_tokens, "rank": case.rank, **row})
            switch = f"  {1000 * row['seconds to switch']:.0f} ms to switch to another" if "seconds to switch" in row else ""
            over = f"  {row['over the base']:6.1%} of the base's" if "over the base" in row else ""
            print(f"{_size(case):60} {row['way']:50} {row['seconds a picture']:8.3f} s{over}{switch}", flush=True)
    return rows


def _size(case: Case) -> str:
    people = f" of {case.people} people" if case.people > 1 else ""
    return f"{case.resolution} px, {case.text_tokens} text tokens, batch {case.batch}{people}, rank {case.rank} of {case.meta_rank}"


def _line(row: dict[str, Any]) -> str:
    memory = f"{row['MiB kept for the way back']:6.0f} MiB kept" if "MiB kept for the way back" in row else ""
    memory += f"  {row['peak GiB beyond the weights']:6.2f} of {row['peak GiB']:5.1f} GiB" if "peak GiB beyond the weights" in row else ""
    size = _size(Case(**{field.name: row[field.name] for field in fields(Case)}))
    return f"{size:60} {row['way']:34} {row['ms a step']:8.1f} ms  {row['share of roofline']:5.0%} of roofline  {memory}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m metalora.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE, help=f"{' or '.join(FULL_SIZE)} (random weights), miniature, a Hub id or a folder (%(default)s)")
    parser.add_argument("--weights", choices=["bf16", *PACKAGES], default="bf16", help=f"their precision, for {' or '.join(FULL_SIZE)}; for what can learn and draw with them (%(default)s)")
    parser.add_argument("--resolution", type=int, action="append", help="px, repeatable; the base's own when not given")
    parser.add_argument("--text", type=int, action="append", help="text tokens, repeatable; the base's own when not given")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; 1 when not given")
    parser.add_argument("--rank", type=int, action="append", help="of a person, repeatable; the base's own when not given")
    parser.add_argument("--meta-rank", type=int, action="append", help="of Meta-Down, repeatable; the base's own when not given")
    parser.add_argument("--growth", action="store_true", help="also cases of which each differs in one respect: size, text, batch, ranks, people at a time")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --growth: a figure of it, .svg or .png")
    parser.add_argument("--draw", type=int, nargs="?", const=10, default=0, metavar="PICTURES", help="also pictures, so many in every way (%(const)s)")
    parser.add_argument("--draw-way", action="append", choices=list(drawing.WAYS), metavar="WAY", help=f"one of: {'; '.join(drawing.WAYS)}; repeatable; all that can be had when not given")
    parser.add_argument("--way", action="append", choices=list(WAYS), metavar="WAY", help=f"one of: {'; '.join(WAYS)}; repeatable; all when not given, on a CPU those that can be had there")
    parser.add_argument("--script", type=int, nargs="?", const=100, default=0, metavar="STEPS", help="also diffusers' own training script, which is fetched, over so many steps (%(const)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before, in every round (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of every way in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="in which the ways take turns (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if given.plot and (not given.growth or given.plot.suffix not in (".svg", ".png")):
        sys.exit("--plot wants --growth beside it, and a file that ends in .svg or .png.")
    if given.script and given.base in FULL_SIZE:
        sys.exit("diffusers' script reads its base from a folder; leave out --script, or choose another --base.")
    if given.weights != "bf16" and given.base not in FULL_SIZE:
        sys.exit(f"--weights goes with --base {' or --base '.join(FULL_SIZE)}; any other base is opened as the plan for this machine has it.")
    try:
        full_size = FULL_SIZE.get(given.base)
        base = random_base(given.base, full_size, torch.device(given.device), given.weights) if full_size else Base.open(given.base, given.device)
        if given.script:
            peer.check(base)
    except MetaLoraError as error:
        sys.exit(str(error))
    s = base.settings
    asked = [given.resolution or [s.train_resolution], given.text or [s.text_tokens], given.batch or [1]]
    cases = [Case(*sizes) for sizes in product(*asked, given.rank or [s.adapter.rank], given.meta_rank or [s.adapter.meta_rank])]
    cases = [each for case in cases for each in growth.cases(case)] if given.growth else cases
    possible = [name for name, way in WAYS.items() if way.train is meta_lora or given.weights == "bf16"]
    ways = given.way or [name for name in possible if WAYS[name].anywhere or base.device.type == "cuda"]
    with nullcontext() if given.base in FULL_SIZE else base.resident("transformer", "vae"):
        found = {**compare(base, cases, ways, given.warmup, given.steps, given.script, given.rounds), "pictures": [], "machine": machine()}
        _write(found, given.json)  # what there is, whatever becomes of the pictures
        if given.draw:
            found["pictures"] = draw(base, cases[:1], min(2, given.warmup), given.draw, given.draw_way)
            _write(found, given.json)
    if given.plot:
        growth.figure(found["steps"], cases[0]).savefig(given.plot)


def _write(found: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
