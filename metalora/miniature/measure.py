"""`python -m metalora.miniature measure`: what `assets/evaluation` holds of learnt people and mugs, with one command.

For every table it renders the dataset, has `metalora evaluate` compare the methods, in as many processes as there are cores, lets the
judge of attributes read the pictures, and writes TABLE.json, with the sheet and the curves of a table that has them. The rows are
printed as the documents have them. It can be killed and given again: what is done is left out.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from metalora.config import FACE
from metalora.errors import MetaLoraError
from metalora.files import save_json
from metalora.methods import Method
from metalora.miniature.attribute_check import check_evaluation, trained_judge
from metalora.miniature.attributes import Classifier
from metalora.miniature.launch import side_by_side
from metalora.miniature.make import DOMAINS
from metalora.miniature.sheet import save_sheet
from metalora.report import SETTINGS, TRUE_PHOTOS, contact_sheet, differences, folder_of, read_rows

UNSEEN = "1000100:1000200"
DATASETS = {"people": ("--people", UNSEEN), "others": ("--people", "1002000:1002024"), "mugs": ("--mugs", UNSEEN)} | {
    photo: ("--people", UNSEEN, "--photo", photo) for photo in ("side", "glasses", "hat")}
RANDOM = '{"direction_people": 0, "rounds": 1, "bucket_size": 2, "bucket_steps": 1, "warmup_steps": 1}'  # of the one round the one step leaves Down be
SMALL = "meta-lora:rank=2,meta_rank=8,learning_rate=2.5e-2"  # 64 numbers fewer than a LoRA of rank 1 has
LARGE = "lora-r16:learning_rate=5e-3"
NOTHING = "–"  # in a table, where a method has no such figure
FEW = "0:54"  # as many as stage 1 asks for, though a random Down learns nothing of them
BAD = [f"--degrade={how}" for how in ("blur=2.5", "blur=5", "dark=0.5", "dark=0.8", "lowres=0.5", "lowres=0.8", "noise=0.05", "noise=0.1", "occlusion=0.15", "occlusion=0.3")]


class Table(NamedTuple):
    """One evaluation.

    Args:
        dataset: a key of DATASETS.
        more: arguments of `evaluate` besides the methods.
        sheet: methods of which a contact sheet is kept.
        curves: whether each score over the steps is kept.
        random: whether *Down* is random, as it is before stage 1.
        beside: another table with the same people, with whose methods these are compared person by person where they are the same but for the rate.
    """

    dataset: str
    methods: tuple[str, ...]
    more: tuple[str, ...] = ()
    sheet: tuple[str, ...] = ()
    curves: bool = False
    random: bool = False
    beside: str = ""


OURS = ("meta-lora@50", "meta-lora@80", "meta-lora@100", "meta-lora", "meta-lora@208")
TABLES = {
    "people": Table("people", ("base", *OURS[:4]), sheet=("base", "meta-lora")),
    "rank-1": Table("people", (*OURS, f"{SMALL}@125", f"{SMALL}@208", *(f"lora-r1@{steps}" for steps in (125, 208, 375, 625))), ("--limit", "24"), curves=True),
    "words": Table("others", tuple(f"meta-lora{told}" for told in ("", ":reworded=0", ":asked_draws=0", ":reworded=0,asked_draws=0")), ("--limit", "12")),
    "rank-16": Table("people", (*OURS[1:4], "meta-lora:rank=16@100", "meta-lora:rank=16@125", *(f"{LARGE}@{steps}" for steps in (125, 208, 375))), ("--limit", "24")),
    "random": Table("people", ("meta-lora:learning_rate=1.2e-2@100", "meta-lora:learning_rate=1.2e-2", f"{SMALL}@125", f"{SMALL}@208"), ("--limit", "24"), random=True, beside="rank-1"),
    "bad": Table("people", ("meta-lora",), ("--limit", "8", *BAD)),
    **{photo: Table(photo, ("meta-lora",), ("--limit", "8")) for photo in ("side", "glasses", "hat")},
    "mugs": Table("mugs", ("base", "meta-lora@40", "meta-lora@80", "meta-lora@125", "meta-lora:start_mid=0,start_up=0@125", "lora-r1@375", f"{LARGE}@125", f"{LARGE}@375"),
                  ("--limit", "24"), sheet=("base", "meta-lora@40")),
    "peer": Table("people", ("base", "meta-lora", "dreambooth-r16:learning_rate=1e-3@500"), ("--limit", "24"))}
USUAL = [name for name in TABLES if name != "peer"]  # whose script is fetched, and needs torchvision


def measure(name: str, table: Table, work: Path, output: Path, judge: tuple[Classifier, int], cores: int) -> dict[str, Any]:
    """Evaluates one table in work/`name` and writes output/`name`.json, which is returned: evaluate's summary, and in every method what the judge finds.

    judge: as `trained_judge` gives it.
    """
    evaluation, dataset = work / name, work / "data" / table.dataset
    if not (dataset / "metadata.jsonl").exists():
        side_by_side([["metalora.miniature", "dataset", "--output", str(dataset), *DATASETS[table.dataset]]])
    methods = [part for method in table.methods for part in ("--method", method)]
    downs = ["--meta-down", str(random_downs(work))] if table.random else []
    side_by_side([["metalora", "evaluate", str(dataset), *methods, *table.more, *downs, "--output", str(evaluation)]] * cores)
    measured = json.loads((evaluation / "summary.json").read_text())
    if measured["subject"] == FACE:
        for method, found in check_evaluation(*judge, evaluation).items():
            measured["methods"][method]["found"] = found
    if table.beside:
        measured[f"paired with {table.beside}"] = list(_compared(name, table, work))
    output.mkdir(parents=True, exist_ok=True)
    if table.sheet:
        shown = {method: read_rows(evaluation / folder_of(method)) for method in (*table.sheet, TRUE_PHOTOS)}
        save_sheet(contact_sheet(evaluation, shown, measured["gallery"]), output / f"{name}-sheet.jpg")
    if table.curves:
        shutil.copyfile(evaluation / "curves.svg", output / f"{name}.svg")
    save_json(output / f"{name}.json", measured)
    return measured


def random_downs(work: Path) -> Path:
    """A folder of Meta-Downs as they are before stage 1, made where it is not there."""
    folder, data = work / "data" / "random", work / "data" / "few"
    missing = [domain for domain in DOMAINS if not (folder / domain / "config.json").exists()]
    if missing:
        side_by_side([["metalora.miniature", "render", "--output", str(data), "--people", FEW, "--scenes", "1"]])
        side_by_side([["metalora.miniature", "meta-down", "--data", str(data), "--domain", domain, "--work", str(work / f"random-{domain}"),
                       "--output", str(folder / domain), "--config", RANDOM] for domain in missing])
    return folder


def _compared(name: str, table: Table, work: Path) -> Iterator[dict[str, Any]]:
    """This table's methods less those beside it that are the same but for the rate, which is found for each."""
    for pair in product(table.methods, TABLES[table.beside].methods):
        if len({but_the_rate(method) for method in pair}) == 1:
            yield from differences({f"{method}, {of}": read_rows(work / of / folder_of(method)) for method, of in zip(pair, (name, table.beside))})


def but_the_rate(method: str) -> str:
    """A method in words, which leave out its rate of learning."""
    return words(method, Method.parse(method).steps)


def rows(measured: dict[str, Any]) -> Iterator[str]:
    """The methods as rows of a table in Markdown; what was measured of none has no column."""
    likeness = "R-FaceSim" if measured["subject"] == FACE else "likeness to other photos"
    heads = ["method", "identified", likeness, "hair, skin", "copying", "CLIP-T", "asked for, found", "an expression", "numbers learnt"]
    lines = [_cells(name, scores) for name, scores in measured["methods"].items()]
    kept = [place for place, column in enumerate(zip(*lines)) if set(column) != {NOTHING}]
    head, *body = (f"| {' | '.join(line[place] for place in kept)} |" for line in (heads, *lines))
    yield from (head, "|" + "---|" * len(kept), *body)


def _cells(name: str, scores: dict[str, Any]) -> list[str]:
    found = scores.get("found", {})
    identified = "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * scores["identification"][part] for part in ("mean", "low", "high")))
    looks, everything, expression = (f"{100 * found[head]['found']:.0f} %" if head in found else NOTHING for head in ("looks", "all", "expression"))
    likeness, copying, clip_t = (_mean(scores[score], form) for score, form in (("r_facesim", "{:z.3f}"), ("copying", "{:z.2f}"), ("clip_t", "{:z.3f}")))
    numbers = f"{scores['parameters']:,}" if scores["parameters"] else NOTHING
    return [words(name, scores.get("steps")), identified, likeness, looks, copying, clip_t, everything, expression, numbers]


def _mean(score: dict[str, float | None], form: str) -> str:
    return NOTHING if score["mean"] is None else form.format(score["mean"])


def words(method: str, steps: int | None) -> str:
    """A method's name as the documents have it."""
    if method == TRUE_PHOTOS:
        return "other true pictures"
    named = Method.parse(method)
    kind = {"base": "the base alone", "meta-lora": "Meta-LoRA", "lora": f"LoRA of rank {named.rank}"}.get(named.kind, "diffusers' script")
    settings = [f"{key} {value}" for key, value in named.settings.items() if key != "learning_rate"]
    return ", ".join([kind, *settings, *([f"{steps} steps"] if steps else []), *([str(named.degrade)] if named.degrade else [])])


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature measure`: see --help."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", default=USUAL, help=f"{', '.join(TABLES)} (without a name all but peer)")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and rows, which are taken up again")
    parser.add_argument("--output", type=Path, default=Path("assets/evaluation"))
    parser.add_argument("--judge", type=Path, default=Path("assets/training"), help="work folder of the judge of attributes (%(default)s)")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="to use (%(default)s)")
    given = parser.parse_args(arguments)
    for name in given.tables:
        if name not in TABLES:
            raise MetaLoraError(f"There is no table {name}; known are {', '.join(TABLES)}.")
        beside = TABLES[name].beside
        if beside and beside not in given.tables[:given.tables.index(name)] and not any((given.work / beside).glob(f"*/{SETTINGS}")):
            raise MetaLoraError(f"{name} is compared with {beside}; measure that first, in the same work folder.")
    judge = trained_judge(given.judge)  # before hours of work that it is to read
    for name in given.tables:
        print(f"measure: {name}", file=sys.stderr, flush=True)
        measured = measure(name, TABLES[name], given.work, given.output, judge, given.cores)
        print(f"\n{name}\n\n" + "\n".join(rows(measured)), flush=True)
