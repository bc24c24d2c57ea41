"""Bases, pictures, texts and people made up at random. Speed and memory do not depend on what the numbers say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter import find_targets
from .base import Base
from .cache import TrainingSet
from .config import BaseSettings
from .families import KNOWN
from .family import Family, Text
from .frozen import freeze
from .generate import Person
from .plan import Choice, Model, Plan, Precision, Work, numbered
from .quantise import configs_for, quantise

FULL_SIZE = {"flux-dev": KNOWN["black-forest-labs/FLUX.1-dev"], "klein-4b": KNOWN["black-forest-labs/FLUX.2-klein-4B"]}
PICTURES = 8  # of a training set, at least


@dataclass(frozen=True)
class Case:
    """What a training step or a picture works on."""

    resolution: int  # px
    text_tokens: int
    batch: int = 1
    rank: int = 1  # r, of a person
    meta_rank: int = 16  # r_m, of Meta-Down
    people: int = 1  # that are learnt at a time, each row of a batch another's


def random_base(name: str, family: Family, place: torch.device, precision: Precision = "bf16") -> Base:
    """The transformer and VAE of the family's known base in bfloat16 with diffusers' own random weights; texts are never encoded here.

    Its weights are drawn as for training, never zeros: those make a GPU draw less power and run faster. `precision` is the
    transformer's, any but float32. Raises MetaLoraError where the library for it is missing.
    """
    configs, place = configs_for(precision, torch.bfloat16, family), numbered(place)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # recordings are of the current one
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with place:
            parts = {part: getattr(diffusers, family.networks[part]).from_config(family.configs[part]) for part in ("transformer", "vae")}
    finally:
        torch.set_default_dtype(before)
    parts = {part: network.eval().requires_grad_(False) for part, network in parts.items()}
    if configs:
        quantise(parts["transformer"], configs["transformer"])
        freeze(parts["transformer"])
    family.prepare(parts["transformer"])
    absent = dict.fromkeys([*family.text_encoders, *(part.replace("text_encoder", "tokenizer") for part in family.text_encoders)])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = getattr(diffusers, family.pipeline)(scheduler=scheduler, **parts, **absent)
    pipeline.set_progress_bar_config(disable=True)
    plan = Plan("resident", precision, ("transformer", "vae"))
    choice = Choice(plan, Model(family, family.configs).needs(Work.of(BaseSettings())), {})
    return Base(pipeline, family, BaseSettings(), name, "random", place, Path(), choice, plan, precision)


def random_pictures(base: Base, case: Case) -> TrainingSet:
    """Latents and embeddings of the case's sizes, drawn at random."""
    side, config, count = case.resolution // 16, base.transformer.config, max(PICTURES, case.people)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(base.device)

    return TrainingSet(
        mean=draw(count, side**2, config.in_channels), std=0.1 * draw(count, side**2, config.in_channels).abs(),
        image_ids=base.family.image_ids(side, side).to(base.device),
        text=random_text(base, case.text_tokens, 1), captions=torch.zeros(count, 1, dtype=torch.int64, device=base.device),
        subject=torch.arange(count, device=base.device) % case.people,
    )  # fmt: skip


def random_text(base: Base, tokens: int, count: int) -> Text:
    """Embeddings of `count` prompts of so many tokens, drawn at random."""
    generator = torch.Generator().manual_seed(2)
    shapes = base.family.text_shapes(base.transformer, tokens)
    return Text(torch.randn((count, *shape), generator=generator).to(base.device, base.dtype) for shape in shapes)


def random_person(base: Base, rank: int, seed: int) -> Person:
    """Somebody of that rank on all layers that the base adapts, of a size at which a picture changes."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for name, layer in find_targets(base.transformer, base.settings.adapter.targets).items():
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.02
    return Person(lora, "", hashlib.sha256(str(seed).encode()).hexdigest())
