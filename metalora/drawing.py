"""How fast pictures of a learnt person are drawn: against the bare base, and against diffusers' own way with a LoRA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .base import Base
from .generate import Person, render, unload_people, use_people
from .graph import Playing
from .plan import PACKAGES
from .standin import Case, random_person, random_text


class Way(NamedTuple):
    """A way of drawing."""

    folds: bool | None  # None: nobody is in
    compiled: bool = False
    recorded: bool = False

    @property
    def anywhere(self) -> bool:
        """Whether it is for a CPU too."""
        return not self.compiled and not self.recorded


WAYS = {
    "the base, nobody": Way(None), "a person, folded in": Way(True), "a person, loaded by diffusers": Way(False),
    "the base, recorded": Way(None, recorded=True), "a person, folded in, recorded": Way(True, recorded=True),
    "a person, loaded by diffusers, recorded": Way(False, recorded=True), "the base, compiled and recorded": Way(None, True, True),
    "a person, folded in, compiled and recorded": Way(True, True, True), "a person, loaded by diffusers, compiled and recorded": Way(False, True, True),
}  # fmt: skip
SWITCHES = 10  # from one person to the other


def measure(base: Base, case: Case, warmup: int, pictures: int, guidance: float | None = None, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Seconds a picture (median), over those of the bare base, and seconds to switch to another person, of the ways named or all that this device has.

    The ways take turns, picture by picture, so that what else the machine does hits all of them alike.
    """
    settings = base.settings
    guidance = settings.guidance if guidance is None else guidance
    text = random_text(base, case.text_tokens, len(base.family.prompts_of_a_picture(base.pipeline, "", guidance)))
    people = [random_person(base, case.rank, seed) for seed in range(2)]
    quantised = base.plan.precision in PACKAGES  # such weights take nobody in
    ways = {name: way for name, way in WAYS.items() if (not only or name in only) and not (quantised and way.folds) and (way.anywhere or base.device.type == "cuda")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    playing = {name: Playing() for name, way in ways.items() if way.recorded}

    def drawn(seed: int) -> float:
        begin = time.perf_counter()
        render(base, text, case.resolution, case.resolution, settings.inference_steps, guidance, seed)
        return time.perf_counter() - begin

    for turn in range(warmup + pictures):
        for name, way in ways.items():
            recorded = playing[name].of(base.transformer, None) if way.recorded else nullcontext()
            anew = way.recorded and way.folds is False  # who is loaded anew is recorded anew, which is not measured
            with held(base, way.folds, people), base.compiled() if way.compiled else nullcontext(), recorded:
                if anew:
                    drawn(turn)
                seconds[name].append(drawn(turn))
            if anew:
                playing[name].forget()
    medians = {name: statistics.median(times[warmup:]) for name, times in seconds.items()}
    bare = {way[1:]: medians[name] for name, way in ways.items() if way.folds is None}
    return [
        {"way": name, "seconds a picture": medians[name], **({"over the base": medians[name] / bare[way[1:]]} if way[1:] in bare else {}),
         **({} if way.folds is None else {"seconds to switch": _switch(base, way.folds, people)})}
        for name, way in ways.items()
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
