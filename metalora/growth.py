"""How a training step grows: with pictures, prompts, batch, ranks and people, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .standin import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "resolution": "resolution, px", "text_tokens": "text tokens", "batch": "batch", "rank": "rank of a person",
    "meta_rank": "rank of Meta-Down", "people": "people at a time, batch 4",
}  # fmt: skip
SCORES = {"ms a step": "ms a step", "MiB kept for the way back": "MiB that autograd keeps"}


def cases(usual: Case) -> list[Case]:
    """The usual case, and cases that differ from it in one respect."""
    values = {
        "resolution": [usual.resolution * part // 64 * 16 for part in (2, 4, 6, 8)], "text_tokens": [usual.text_tokens * part // 4 for part in (1, 2, 4)],
        "batch": [1, 2, 4, 8], "rank": [1, 4, 16], "meta_rank": [4, 16, 64],
    }  # fmt: skip
    several = [replace(usual, **{name: value}) for name, choices in values.items() for value in choices]
    return list(dict.fromkeys([usual, *several, *(replace(usual, batch=4, people=people) for people in (1, 4, 16))]))


def figure(rows: Sequence[dict[str, Any]], usual: Case) -> Figure:
    """A column for each respect and a row for each score, with a line for each way of training."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(16, 5.5), layout="constrained")
    panels = drawn.subplots(len(SCORES), len(AXES), sharey="row")
    for column, (name, head) in enumerate(AXES.items()):
        fixed = asdict(replace(usual, batch=4) if name == "people" else usual)
        along = [row for row in rows if all(row[key] == value for key, value in fixed.items() if key != name)]
        for line, (score, title) in enumerate(SCORES.items()):
            axes = panels[line][column]
            for way in dict.fromkeys(row["way"] for row in along if score in row):
                points = sorted((row[name], row[score]) for row in along if row["way"] == way)
                axes.plot(*zip(*points), marker="o", markersize=3, label=way)
            axes.set_xlabel(head, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(title, fontsize=9)
    for first, *_ in panels:  # a row shares its scale, and must be whole before that is set
        first.set_ylim(bottom=0)
    drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return drawn
