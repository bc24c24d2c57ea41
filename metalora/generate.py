"""Prompts and people → pictures. A person is an ordinary LoRA here: in the weights where the plan folds, else loaded,
weighted and switched by diffusers' own calls."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .base import Base
from .errors import MetaLoraError
from .files import write_atomically
from .fold import Lora
from .prompts import fill

MAKER = "Meta-LoRA"
NOTE = "AI-generated"
KEPT_LOADED = 8  # people that stay loaded, so that switching costs nothing; who came first leaves first


@dataclass(frozen=True, eq=False)
class Person:
    """An ordinary LoRA under diffusers' names, the words that call it, and how strongly it counts."""

    lora: Lora
    words: str  # "sks woman"
    sha256: str
    weight: float = 1.0

    @property
    def adapter_name(self) -> str:
        """Its name among the pipeline's adapters (PEFT allows no dot there)."""
        return f"person_{self.sha256[:16]}"


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate; None stands for the base's own setting."""

    count: int = 1  # pictures per prompt; picture i has seed + i
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None  # width, height, px


def use_people(base: Base, people: Sequence[Person]) -> None:
    """Make exactly these people active, each with its weight; nobody means the base alone. Who comes twice counts twice."""
    active: dict[str, tuple[Lora, float]] = {}
    for person in people:
        active[person.adapter_name] = person.lora, person.weight + active.get(person.adapter_name, (None, 0.0))[1]
    if base.plan.folds:
        return base.fold.put(base.transformer, active)
    weights = {name: weight for name, (_, weight) in active.items()}
    loaded = list(getattr(base.transformer, "peft_config", {}))
    for name, (lora, _) in active.items():
        if name not in loaded:
            with warnings.catch_warnings():  # PEFT warns about the second adapter, which is what we want
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                base.transformer.load_lora_adapter(dict(lora), adapter_name=name)
    others = [name for name in loaded if name not in weights]
    spare = others[: max(0, len(others) + len(weights) - KEPT_LOADED)]
    if spare:
        base.playing.forget()
        base.transformer.delete_adapters(spare)
    if weights:
        base.transformer.enable_lora()
        base.transformer.set_adapters(list(weights), list(weights.values()))
    elif others:
        base.transformer.disable_lora()


def unload_people(base: Base) -> None:
    """Take every person out; the transformer is a bare one again."""
    base.playing.forget()  # who is loaded again has their numbers elsewhere
    base.fold.take_out(base.transformer)
    base.pipeline.unload_lora_weights()


def generate(
    base: Base, prompts: Sequence[str], people: Sequence[Person] = (), config: GenerateConfig = GenerateConfig(),
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Image.Image]:  # fmt: skip
    """Yield `config.count` pictures for each prompt, with what made them in `image.info`.

    Picture i of a prompt depends on its prompt and on seed + i alone, so it is the same in whatever company it is made.
    `on_step(done, all)` is called after each denoising step of all; raise Cancelled in it to stop.
    Raises MetaLoraError for an empty prompt, a size that the base cannot do, or a setting out of range.
    """
    width, height, steps, guidance = _resolve(base, config)
    filled = [fill(prompt, " and ".join(p.words for p in people if p.words)) for prompt in prompts]
    use_people(base, people)
    every, done = steps * len(filled) * config.count, 0

    def count_step(pipeline: object, step: int, timestep: object, values: dict) -> dict:
        nonlocal done
        done += 1
        if on_step:
            on_step(done, every)
        return values

    def draw(text: Any, seed: int, before: int) -> Image.Image:
        nonlocal done
        done = before
        there = None if base.plan.folds else [(person.sha256, person.weight) for person in people]
        with base.resident("transformer", "vae"), base.played(there):
            return render(base, text, width, height, steps, guidance, seed, count_step)

    for prompt in filled:
        text = base.encode_for_picture(prompt, guidance)
        for seed in range(config.seed, config.seed + config.count):
            image = base.persevere(partial(draw, text, seed, done), lambda: use_people(base, people))
            image.info.update(describe(base, prompt, people, seed, steps, guidance))
            yield image


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """What a picture of that seed draws from: a generator for the noise it begins with, and meanwhile torch's own for schedulers that add noise on the way.

    The former is on the CPU, so that a picture begins with the same noise on every device. Afterwards torch's own is as it was.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed ^ 2**62)  # another stream than the generator's
        yield torch.Generator().manual_seed(seed)


@torch.no_grad()
def render(base: Base, text: Any, width: int, height: int, steps: int, guidance: float, seed: int, callback: Any = None) -> Image.Image:
    """One picture of the transformer as it stands, whatever is attached to it."""
    with seeded(seed, base.device) as generator, base.hastened():
        return base.pipeline(
            **base.family.arguments(text),
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=base.settings.max_sequence_length,
            generator=generator,
            callback_on_step_end=callback,
        ).images[0]


def _resolve(base: Base, config: GenerateConfig) -> tuple[int, int, int, float]:
    s = base.settings
    width, height = config.size or (s.resolution, s.resolution)
    steps = s.inference_steps if config.steps is None else config.steps
    guidance = s.guidance if config.guidance is None else config.guidance
    grid = 2 * base.pipeline.vae_scale_factor
    if width % grid or height % grid or min(width, height) < grid or max(width, height) > 4096:
        raise MetaLoraError(f"A picture of {width}x{height} cannot be made; width and height must be multiples of {grid}, {grid} to 4096.")
    if not 1 <= steps <= 1000 or not 0 <= guidance <= 100:
        raise MetaLoraError(f"Steps must be 1 to 1000 and guidance 0 to 100, not {steps} and {guidance}.")
    if not 1 <= config.count <= 1000 or not 0 <= config.seed < 2**63 - config.count:
        raise MetaLoraError(f"Count must be 1 to 1000 and the seed a whole number from 0, not {config.count} and {config.seed}.")
    return width, height, steps, guidance


def describe(base: Base, prompt: str, people: Sequence[Person], seed: int, steps: int, guidance: float) -> dict[str, str]:
    """What stands in a picture's metadata."""
    person: dict[str, float] = {}
    for p in people:
        person[p.sha256] = person.get(p.sha256, 0.0) + p.weight
    return {
        "Software": MAKER,
        "Comment": NOTE,
        "AI-generated": "true",
        "prompt": prompt,
        "seed": str(seed),
        "steps": str(steps),
        "guidance": str(guidance),
        "base": f"{base.name} {base.fingerprint}",
        "identity": json.dumps(person),
    }


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG with the picture's `info` as its metadata; the file is complete or absent."""
    info = PngInfo()
    for key, value in image.info.items():
        if isinstance(value, str):
            info.add_itxt(key, value)
    return write_atomically(path, lambda beside: image.save(beside, format="PNG", pnginfo=info))
