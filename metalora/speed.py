"""How fast a person is learnt, against ordinary LoRA training and against what the device could do at best.

    python -m metalora.speed [--base flux-dev] [--script] [--json FILE]

Speed and memory do not depend on what the weights say, so `flux-dev` and `klein-4b` are transformers of the size of FLUX.1-dev and
FLUX.2-klein-4B with random ones; any other base is opened as it is. All ways of training take turns in one process, on the same pictures, layers and draws.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import metalora  # noqa: F401  before torch: it sets how threads wait
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import peer
from .adapter import attach, find_targets, random_downs, trainable
from .base import Base
from .cache import TrainingSet
from .config import DEFAULT_BASE, BaseSettings, FlowConfig
from .doctor import machine
from .errors import MetaLoraError
from .families import KNOWN
from .family import Family, Text
from .generate import unload_people
from .plan import GIB, Choice, Model, Plan, Work
from .train import draw_rows, fit, flow_loss, optimizer

FULL_SIZE = {"flux-dev": KNOWN["black-forest-labs/FLUX.1-dev"], "klein-4b": KNOWN["black-forest-labs/FLUX.2-klein-4B"]}
PEER_RANK = 16  # what people train today
PICTURES = 8  # of the training set


@dataclass(frozen=True)
class Case:
    """What a training step works on."""

    resolution: int  # px
    text_tokens: int
    batch: int = 1


def random_base(name: str, family: Family, place: torch.device) -> Base:
    """The transformer and VAE of the family's known base in bfloat16 with diffusers' own random weights; texts are never encoded here.

    Its weights are drawn as for training, never zeros: those make a GPU draw less power and run faster.
    """
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with place:
            parts = {part: getattr(diffusers, family.networks[part]).from_config(family.configs[part]) for part in ("transformer", "vae")}
    finally:
        torch.set_default_dtype(before)
    parts = {part: network.eval().requires_grad_(False) for part, network in parts.items()}
    absent = dict.fromkeys([*family.text_encoders, *(part.replace("text_encoder", "tokenizer") for part in family.text_encoders)])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = getattr(diffusers, family.pipeline)(scheduler=scheduler, **parts, **absent)
    plan = Plan("resident", "bf16", ("transformer", "vae"))
    choice = Choice(plan, Model(family, family.configs).needs(Work.of(BaseSettings())), {})
    return Base(pipeline, family, BaseSettings(), name, "random", place, Path(), choice, plan)


def random_pictures(base: Base, case: Case) -> TrainingSet:
    """Latents and embeddings of the case's sizes, drawn at random."""
    side, config = case.resolution // 16, base.transformer.config
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(base.device)

    return TrainingSet(
        mean=draw(PICTURES, side**2, config.in_channels), std=0.1 * draw(PICTURES, side**2, config.in_channels).abs(),
        image_ids=base.family.image_ids(side, side).to(base.device),
        text=Text(draw(1, *shape).to(base.dtype) for shape in base.family.text_shapes(base.transformer, case.text_tokens)),
        caption=torch.zeros(PICTURES, dtype=torch.int64, device=base.device), subject=torch.zeros(PICTURES, dtype=torch.int64, device=base.device),
    )  # fmt: skip


@contextmanager
def meta_lora(base: Base, data: TrainingSet, case: Case, checkpointing: bool) -> Iterator[Iterator[float]]:
    """Stage 2 as `adapt` does it: an endless iterator of losses, a step each."""
    shape, generator = base.settings.adapter, torch.Generator().manual_seed(0)
    with _checkpointing(base.transformer, checkpointing), attach(base.transformer, random_downs(base.transformer, shape, generator), shape) as adapter:
        adapter.start(generator)
        yield fit(
            base, adapter, data, [optimizer(list(trainable(adapter)), base.settings.adapt.learning_rate)], steps=sys.maxsize,
            batch_size=case.batch, generator=torch.Generator().manual_seed(1), flow_config=FlowConfig(), max_grad_norm=1.0,
        )  # fmt: skip


@contextmanager
def peft_lora(base: Base, data: TrainingSet, case: Case, checkpointing: bool) -> Iterator[Iterator[float]]:
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
            loss = flow_loss(base, data, rows.to(base.device), generator, FlowConfig())
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


WAYS: dict[str, tuple[Callable[..., Any], bool]] = {
    "Meta-LoRA": (meta_lora, False), "Meta-LoRA, checkpointing": (meta_lora, True),
    f"PEFT LoRA of rank {PEER_RANK}": (peft_lora, False), f"PEFT LoRA of rank {PEER_RANK}, checkpointing": (peft_lora, True),
}  # fmt: skip


def measure(base: Base, case: Case, way: str, warmup: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step (median and 9th decile), peak GPU memory beyond the weights, operations of a step, the first loss."""
    train, checkpointing = WAYS[way]
    data, gpu = random_pictures(base, case), base.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(base.device)
        held = torch.cuda.memory_allocated(base.device)
    with train(base, data, case, checkpointing) as losses:
        with FlopCounterMode(display=False) as counter:
            first = next(losses)
        for _ in range(warmup):
            next(losses)
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            next(losses)  # it reads the loss, so the device has done its work
            times.append(1000 * (time.perf_counter() - begin))
        losses.close()
    found = {"way": way, "ms a step": statistics.median(times), "9th decile": sorted(times)[int(0.9 * (len(times) - 1))], "first loss": first,
             "tera-operations a step": counter.get_total_flops() / 1e12}  # fmt: skip
    return found | ({"peak GiB beyond the weights": (torch.cuda.max_memory_allocated(base.device) - held) / GIB} if gpu else {})


def measure_script(base: Base, case: Case, steps: int) -> dict[str, Any]:
    """The same of diffusers' own script, run as it is on a made-up photo, in processes of its own."""
    photo = Image.effect_noise((case.resolution, case.resolution), 64).convert("RGB")
    seconds = peer.seconds_a_step(base.folder, [photo], case.resolution, case.text_tokens, peer.PeerConfig(PEER_RANK, steps, batch_size=case.batch))
    return {"way": f"diffusers' script, rank {PEER_RANK}", "ms a step": 1000 * seconds}


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


def compare(base: Base, cases: Sequence[Case], ways: Sequence[str], warmup: int, steps: int, script_steps: int = 0) -> dict[str, Any]:
    """All ways on all cases, with their share of the roofline: the time that Meta-LoRA's operations take at the matrix rate.

    With `script_steps`, diffusers' own script too, over so many steps.
    """
    rate, rows = matrix_rate(base.device, base.dtype), []
    for case in cases:
        found = [row for way in ways if (row := _measured(base, case, way, warmup, steps))]
        least = 1000 * min((row["tera-operations a step"] for row in found), default=0) * 1e12 / rate
        found += [measure_script(base, case, script_steps)] if script_steps else []
        for row in found:
            rows.append({"resolution": case.resolution, "text tokens": case.text_tokens, "batch": case.batch, **row, "share of roofline": least / row["ms a step"]})
            print(_line(rows[-1]), flush=True)
    return {"base": base.name, "dtype": str(base.dtype), "matrix tera-operations a second": rate / 1e12, "steps": rows}


def _measured(base: Base, case: Case, way: str, warmup: int, steps: int) -> dict[str, Any] | None:
    """What `measure` finds; None, and a line that says so, where the memory does not do for it."""
    try:
        return measure(base, case, way, warmup, steps)
    except (MetaLoraError, torch.OutOfMemoryError):
        print(f"{way} at {case.resolution} px does not fit this GPU's memory", flush=True)
        return None


def _line(row: dict[str, Any]) -> str:
    memory = f"{row['peak GiB beyond the weights']:6.2f} GiB" if "peak GiB beyond the weights" in row else ""
    size = f"{row['resolution']} px, {row['text tokens']} text tokens, batch {row['batch']}"
    return f"{size:40} {row['way']:34} {row['ms a step']:8.1f} ms  {row['share of roofline']:5.0%} of roofline  {memory}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m metalora.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE, help=f"{' or '.join(FULL_SIZE)} (random weights), miniature, a Hub id or a folder (%(default)s)")
    parser.add_argument("--resolution", type=int, action="append", help="px, repeatable; the base's own when not given")
    parser.add_argument("--text", type=int, action="append", help="text tokens, repeatable; the base's own when not given")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; 1 when not given")
    parser.add_argument("--meta-rank", type=int, help="of Meta-Down; the base's own when not given")
    parser.add_argument("--way", action="append", choices=list(WAYS), metavar="WAY", help=f"one of {', '.join(WAYS)}; repeatable; all when not given")
    parser.add_argument("--script", type=int, nargs="?", const=100, default=0, metavar="STEPS", help="also diffusers' own training script, which is fetched, over so many steps (%(const)s)")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if given.script and given.base in FULL_SIZE:
        sys.exit("diffusers' script reads its base from a folder; leave out --script, or choose another --base.")
    try:
        full_size = FULL_SIZE.get(given.base)
        base = random_base(given.base, full_size, torch.device(given.device)) if full_size else Base.open(given.base, given.device)
        if given.script:
            peer.check(base)
    except MetaLoraError as error:
        sys.exit(str(error))
    if given.meta_rank:
        base.settings = replace(base.settings, adapter=replace(base.settings.adapter, meta_rank=given.meta_rank))
    s = base.settings
    cases = [Case(r, t, b) for r in given.resolution or [s.train_resolution] for t in given.text or [s.max_sequence_length] for b in given.batch or [1]]
    with nullcontext() if given.base in FULL_SIZE else base.resident("transformer"):
        found = compare(base, cases, given.way or list(WAYS), given.warmup, given.steps, given.script)
    if given.json:
        given.json.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
