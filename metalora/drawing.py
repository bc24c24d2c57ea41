"""How fast pictures of a learnt person are drawn: against the bare base, and against diffusers' own way with a LoRA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .base import Base
from .generate import Person, render, unload_people, use_people
from .standin import Case, random_person, random_text

WAYS: dict[str, bool | None] = {"the base, nobody": None, "a person, folded in": True, "a person, loaded by diffusers": False}  # whether the plan folds
SWITCHES = 10  # from one person to the other


def measure(base: Base, case: Case, warmup: int, pictures: int, guidance: float | None = None) -> list[dict[str, Any]]:
    """Seconds a picture (median), over those of the bare base, and seconds to switch to another person, of every way.

    The ways take turns, picture by picture, so that what else the machine does hits all of them alike.
    """
    settings = base.settings
    guidance = settings.guidance if guidance is None else guidance
    text = random_text(base, case.text_tokens, len(base.family.prompts_of_a_picture(base.pipeline, "", guidance)))
    people = [random_person(base, case.rank, seed) for seed in range(2)]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(warmup + pictures):
        for way, folds in WAYS.items():
            with held(base, folds, people):
                begin = time.perf_counter()
                render(base, text, case.resolution, case.resolution, settings.inference_steps, guidance, turn)
                seconds[way].append(time.perf_counter() - begin)
    bare = statistics.median(next(iter(seconds.values()))[warmup:])
    return [
        {"way": way, "seconds a picture": (median := statistics.median(seconds[way][warmup:])), "over the base": median / bare,
         **({} if folds is None else {"seconds to switch": _switch(base, folds, people)})}
        for way, folds in WAYS.items()
    ]  # fmt: skip


@contextmanager
def held(base: Base, folds: bool | None, people: Sequence[Person]) -> Iterator[None]:
    """The first of the people is in the base meanwhile, in that way; nobody for None."""
    before, base.plan = base.plan, replace(base.plan, folds=bool(folds))
    try:
        if folds is not None:
            use_people(base, people[:1])
        yield
    finally:
        unload_people(base)
        base.plan = before


def _switch(base: Base, folds: bool, people: Sequence[Person]) -> float:
    """Median seconds from one person to the other, both of whom have been there before."""
    times = []
    with held(base, folds, people):
        use_people(base, people[1:])
        for turn in range(SWITCHES):
            _wait(base)
            begin = time.perf_counter()
            use_people(base, [people[turn % 2]])
            _wait(base)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
