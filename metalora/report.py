"""What an evaluation's folder says: summary.json with a figure and an interval for each score, a sheet of pictures, and both as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .config import FACE
from .errors import MetaLoraError
from .files import save_json, write_atomically
from .score import interval, number
from .webreport import curves, html_report

SETTINGS, TRUE_PHOTOS = "settings.json", "true-photos"
SCORES = {"identification": "identified", "r_facesim": "r_facesim", "similarity": "similarity", "copying": "copying",
          "clip_t": "clip_t", "clip_i": "clip_i", "dino": "dino", "faces_found": "face"}  # name in the summary → key of a row  # fmt: skip
PAIRED = ("r_facesim", "identification", "copying", "clip_t")
Rows = dict[str, list[dict[str, Any]]]  # person's file → a row a picture

PEOPLE, OTHERS = 12, 3  # on the sheet, at most
CELL, GAP, BAND, LABEL, METHOD, FOOT = 112, 10, 18, 90, 130, 20  # px: a picture, between two, between people, names, methods, text under a picture
INK, SOFT, PAPER, RIGHT, WRONG = "#1c1e21", "#6a6f76", "#ffffff", "#2e9e5b", "#c9cdd2"


def write_report(output: str | Path, methods: Sequence[str], left_out: dict[str, str] | None = None) -> dict[str, Any]:
    """summary.json, contact-sheet.png, curves.svg where there are any, and report.html over all that these methods have in `output`; returns the summary."""
    output = Path(output)
    found = {name: read_rows(output / folder_of(name)) for name in methods}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        raise MetaLoraError(f"{output} holds no results yet.")
    each = {name: json.loads((output / folder_of(name) / SETTINGS).read_text(encoding="utf-8")) for name in found}
    settings = next(iter(each.values()))
    gallery = settings["gallery"]
    summary = {
        "base": settings["base"], "gallery": gallery, "chance": 1 / gallery, "prompts": settings["prompts"], "seed": settings["seed"],
        "strength": settings.get("strength", 1.0), "subject": settings.get("subject", FACE),
        "methods": {name: summarise(rows) | {key: each[name][key] for key in ("steps", "degrade") if key in each[name]} for name, rows in found.items()},
        "paired": differences({name: rows for name, rows in found.items() if each[name]["steps"]}),
        "left_out": left_out or {},
    }  # fmt: skip
    save_json(output / "summary.json", summary)
    clean = {name: rows for name, rows in found.items() if "degrade" not in each[name]}
    sheet = contact_sheet(output, clean if set(clean) - {TRUE_PHOTOS} else found, gallery)
    write_atomically(output / "contact-sheet.png", lambda beside: sheet.save(beside, format="PNG"))
    drawn = curves(summary["methods"])
    if drawn:
        write_atomically(output / "curves.svg", lambda beside: beside.write_text(drawn, encoding="utf-8"))
    else:
        (output / "curves.svg").unlink(missing_ok=True)  # of methods that were reported before
    page = html_report(summary, drawn, sheet, worse_photos(output, {name: rows for name, rows in found.items() if name not in clean}))
    write_atomically(output / "report.html", lambda beside: beside.write_text(page, encoding="utf-8"))
    return summary


def folder_of(method: str) -> str:
    """The name of a method's folder: its own, where no file system minds."""
    return re.sub(r"[^A-Za-z0-9@=.,_+-]", "_", method)


def read_rows(folder: Path) -> Rows:
    """The rows of a method, by person's file, in the dataset's order."""
    return {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in sorted(folder.glob("*.jsonl"))}


def summarise(rows: Rows, by_domain: bool = True) -> dict[str, Any]:
    """Mean of each score with the ends of its 95 % bootstrap interval over people; also for each domain alone."""
    people = list(rows.values())
    done = [p for p in people if "failed" not in p[0]]  # the others were not learnt: their degraded photo shows no face
    got: dict[str, Any] = {"people": len(people), "failed": len(people) - len(done), "pictures": sum(map(len, done))}
    got["learn_seconds"] = float(np.mean([p[0]["learn_seconds"] for p in done or people]))
    for key in ("parameters", "bytes"):
        got[key] = round(float(np.mean([p[0].get(key, 0) for p in done or people])))
    for name, key in SCORES.items():
        if not all(key in person[0] for person in done or people):
            continue  # only what was measured has a figure
        got[name] = _spread([_values(person, key) for person in people])
    domains = sorted({p[0]["domain"] for p in people})
    if by_domain and len(domains) > 1:
        got["by_domain"] = {d: summarise({k: p for k, p in rows.items() if p[0]["domain"] == d}, False) for d in domains}
    return got


def differences(found: dict[str, Rows]) -> list[dict[str, Any]]:
    """Of every two methods, the first's scores less the second's, person by person, with the ends of the 95 % bootstrap interval over people.

    People differ from one another by more than methods do, so this interval is narrower than those of the two methods would suggest.
    """
    means = {method: {person: {name: _mean(_values(each, SCORES[name])) for name in PAIRED} for person, each in rows.items()} for method, rows in found.items()}
    pairs = []
    for first, second in combinations(means, 2):
        both = [(means[first][person], means[second][person]) for person in means[first] if person in means[second]]
        scores = {name: _spread([np.array([one[name] - other[name]]) for one, other in both]) for name in PAIRED}
        pairs += [{"method": first, "less": second, "people": len(both), **scores}] if both else []
    return pairs


def _values(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """A person's scores, a picture each; NaN where a picture has none."""
    return np.array([np.nan if row[key] is None else float(row[key]) for row in rows])


def _mean(values: np.ndarray) -> float:
    """Of those that there are; NaN where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _spread(groups: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Mean and the ends of the interval, as the summary has them."""
    return dict(zip(("mean", "low", "high"), map(number, interval(groups))))


def table(summary: dict[str, Any]) -> str:
    """The summary as lines of text, a method each."""
    scored = {"r_facesim": "R-FaceSim", "similarity": "to photo", "copying": "copying", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
    scored = {key: head for key, head in scored.items() if all(key in m for m in summary["methods"].values())}
    names = ["method", "people", "identified", *scored.values(), "faces", "learning", "parameters", "bytes"]
    lines = [names]
    for name, m in summary["methods"].items():
        spread = _figure(m["identification"]["mean"], "{:.0%}") + " ({}–{})".format(*(_figure(m["identification"][k], "{:.0%}") for k in ("low", "high")))
        scores = [_figure(m[k]["mean"], "{:.3f}") for k in scored]
        lines.append([name, str(m["people"]), spread, *scores, _figure(m["faces_found"]["mean"], "{:.0%}"), f"{m['learn_seconds']:.1f} s", str(m["parameters"]), str(m["bytes"])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    rows = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines]
    lost = [f"{name}: no face was found in the degraded photo of {m['failed']} people, who count as not identified" for name, m in summary["methods"].items() if m["failed"]]
    return "\n".join([*rows, *lost, f"gallery of {summary['gallery']} people, chance {summary['chance']:.1%}, strength {summary['strength']:g}"])


def contact_sheet(output: Path, found: dict[str, Rows], gallery: int) -> Image.Image:
    """A band a person: the photo, other true pictures, and a line of generated pictures for each method."""
    true, methods = found.get(TRUE_PHOTOS, {}), [name for name in found if name != TRUE_PHOTOS]
    everybody = sorted({person for rows in found.values() for person in rows})
    shown = [everybody[i] for i in np.unique(np.linspace(0, len(everybody) - 1, min(PEOPLE, len(everybody))).round().astype(int))]
    prompts = list(dict.fromkeys(row["prompt"] for name in methods for rows in found[name].values() for row in rows))
    others = min(OTHERS, max((len(true.get(p, [])) for p in shown), default=0))
    step, row = CELL + GAP, CELL + FOOT
    at_others, at_prompts = LABEL + step + GAP, LABEL + step + GAP + others * step + GAP + METHOD
    width = at_prompts + len(prompts) * step + GAP
    title, small = ImageFont.load_default(15), ImageFont.load_default(12)
    heads = [wrap(prompt, small, CELL) for prompt in prompts]
    top = 58 + 15 * max([len(lines) for lines in heads] + [1])
    lines = max(1, len(methods))
    sheet = Image.new("RGB", (max(width, 620), top + len(shown) * (lines * row + BAND) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    legend = f"number: likeness to the other true pictures · green: of {gallery} the right one is the nearest · grey: it is not"
    draw.text((GAP, GAP), legend, INK, title if draw.textlength(legend, title) < sheet.width else small)
    for x, words in [(LABEL, ["photo"]), (at_others, ["other true pictures"]), *((at_prompts + i * step, head) for i, head in enumerate(heads))]:
        for i, line in enumerate(words):
            draw.text((x, top - 12 - 15 * (len(words) - i)), line, SOFT, small)
    for place, person in enumerate(shown):
        y = top + place * (lines * row + BAND)
        rows = next(r[person] for r in found.values() if person in r)
        for i, line in enumerate(wrap(f"{rows[0]['identity']}, {rows[0]['domain']}", small, LABEL - 2 * GAP)):
            draw.text((GAP, y + 15 * i), line, INK, small)
        _paste(sheet, output / rows[0]["reference"], LABEL, y)
        for i, other in enumerate(true.get(person, [])[:others]):
            _paste(sheet, output / other["picture"], at_others + i * step, y)
        for line, method in enumerate(methods):
            draw.text((at_prompts - GAP, y + line * row + CELL // 2), re.sub(r"(?<=[:,])|(?=@)", "\n", method), INK, small, anchor="rm")
            for each in found[method].get(person, []):
                _generated(sheet, output, each, at_prompts + prompts.index(each["prompt"]) * step, y + line * row)
    return sheet


def worse_photos(output: Path, degraded: dict[str, Rows]) -> Image.Image | None:
    """What the photo of the first person became, once for each way of making it worse; None where none was."""
    if not degraded:
        return None
    effects = {name.rpartition("+")[2]: output / folder_of(name) / f"{min(rows)}-photo-0.png" for name, rows in degraded.items()}
    original = output / next(iter(degraded.values()))[min(next(iter(degraded.values())))][0]["reference"]
    strip = Image.new("RGB", (GAP + (1 + len(effects)) * (CELL + GAP), CELL + FOOT + 2 * GAP), PAPER)
    for i, (label, path) in enumerate([("as it is", original), *effects.items()]):
        _paste(strip, path, GAP + i * (CELL + GAP), GAP)
        ImageDraw.Draw(strip).text((GAP + i * (CELL + GAP), GAP + CELL + 4), label, SOFT, ImageFont.load_default(12))
    return strip


def _generated(sheet: Image.Image, output: Path, row: dict[str, Any], x: int, y: int) -> None:
    """A generated picture with its verdict and its figure under it."""
    draw = ImageDraw.Draw(sheet)
    if row["picture"]:
        _paste(sheet, output / row["picture"], x, y)
    draw.rectangle((x, y + CELL + 2, x + CELL - 1, y + CELL + 4), RIGHT if row["identified"] else WRONG)
    draw.text((x, y + CELL + 5), _figure(row["r_facesim"], "{:.2f}") if row["face"] else "no face", SOFT, ImageFont.load_default(12))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Words broken into lines no wider than `width` px, where a single word allows it."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _paste(sheet: Image.Image, path: Path, x: int, y: int) -> None:
    try:
        with Image.open(path) as image:
            sheet.paste(ImageOps.fit(image.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS), (x, y))
    except OSError:  # moved away since; the figures are worth more than the picture
        ImageDraw.Draw(sheet).rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=WRONG)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
