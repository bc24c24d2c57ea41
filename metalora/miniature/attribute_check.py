"""`python -m metalora.miniature attribute-check`: how much of what captions name is in the pictures that a base draws.

A classifier that was trained on true renders alone reads both the generated pictures and, as the ceiling, true renders of the very
scenes that the captions were written of. With `--evaluation` it reads the pictures that `metalora evaluate` left behind instead.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest

from metalora.base import Base
from metalora.errors import MetaLoraError
from metalora.face import FaceFinder
from metalora.generate import GenerateConfig, generate
from metalora.miniature.attributes import HEADS, NAME, Classifier, label, trained_classifier
from metalora.miniature.base import contact_sheet
from metalora.miniature.captions import AGES, ANY_STYLE, BACKGROUNDS, BEARDS, CLOTH_COLOURS, EXPRESSIONS, HAIR_COLOURS, HAIR_WORDS, HATS, OPENINGS
from metalora.miniature.captions import SKINS, TOPS, TURNS, caption
from metalora.miniature.facepack import kernel_distance
from metalora.miniature.people import HELD_OUT, person, scene
from metalora.miniature.pipeline import MiniatureConfig
from metalora.miniature.render import render
from metalora.miniature.sheet import save_sheet, sheet_file
from metalora.miniature.training import Job, read_figures

SHOWN, COLUMNS = 20, 10  # pictures on the sheet
DRAFTS = 4  # captions of a scene, of which the longest is drawn from
LOOKS = ("hair", "hair_colour", "skin")  # what should be as in the photo that a person was learnt from, as far as a prompt does not say otherwise
Check = dict[str, dict[str, float]]


def named(text: str) -> dict[str, str]:
    """The attributes that a caption or a prompt names: the inverse of `captions.caption`. Words that captions do not use name nothing."""
    opening, *parts = text.split(", ")
    found = {"style": style for style, phrases in OPENINGS.items() for phrase in phrases if opening.startswith(f"{phrase} ")}
    said = [phrase for phrases in (*OPENINGS.values(), ANY_STYLE) for phrase in phrases if opening.startswith(f"{phrase} ")]
    found |= _subject(opening.removeprefix(max(said, key=len, default="")).split())
    for part in parts:
        for attribute, words in (("background", BACKGROUNDS), ("expression", EXPRESSIONS)):
            found |= {attribute: value for value, phrases in words.items() if part in phrases}
        found |= {"turn": value for value, phrase in TURNS.items() if part == phrase}
        verb, _, things = part.partition(" ")
        if verb in ("wearing", "in") and not any(part in phrases for phrases in BACKGROUNDS.values()):
            for thing in things.split(" and "):
                found |= _thing(thing)
    return found


def _subject(words: list[str]) -> dict[str, str]:
    text = " ".join(words)
    found = {"age": age for age in AGES if age in words} | {"sex": sex for sex in ("woman", "man") if sex in words}
    found |= {"skin": skin for skin in SKINS if f"{skin} skin" in text}
    found |= {"beard": beard for beard, phrase in BEARDS.items() if f" {phrase}" in text}
    for feature in text.split(" with ", 1)[-1].split(" and "):
        if feature.endswith(" hair"):
            found |= {"hair": word for word in HAIR_WORDS if word in feature.split()}
            found |= {"hair_colour": word for word in HAIR_COLOURS if word in feature.split()}
    return found | ({"hair": "bald"} if "a bald head" in text else {})


def _thing(thing: str) -> dict[str, str]:
    if thing == "glasses":
        return {"glasses": "glasses"}
    for attribute, names in (("hat", HATS), ("top", TOPS)):
        for value, name in sorted(names.items(), key=lambda item: -len(item[1])):
            if f" {thing}".endswith(f" {name}"):
                return {attribute: value} | {f"{attribute}_colour": colour for colour in CLOTH_COLOURS if colour in thing.removesuffix(name).split()}
    return {}


def agreement(found: torch.Tensor, texts: Iterable[str]) -> Check:
    """Of what was read off pictures (n, heads), by attribute: how many were asked for it, the share in which it is found, and the 95 % interval of Wilson of that."""
    hits: dict[str, list[bool]] = {}
    for classes, text in zip(found.tolist(), texts, strict=True):
        asked = named(text)
        for head, got in zip(HEADS, classes, strict=True):
            if head in asked:
                hits.setdefault(head, []).append(got == label(asked, head))
    every = {head: hits[head] for head in HEADS if head in hits} | {"all": [hit for each in hits.values() for hit in each]}
    return {head: _share(each) for head, each in every.items()}


def _share(hits: list[bool]) -> dict[str, float]:
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {"asked": len(hits), "found": round(sum(hits) / len(hits), 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def looks(found: torch.Tensor, photos: torch.Tensor, texts: Iterable[str]) -> Check:
    """How much of LOOKS is the same in what was read off pictures and off the photos that those in them were learnt from, both (n, heads).

    Only texts count that ask for a photo and for no hat, which hides hair. As `agreement`; nothing where there is no such text.
    """
    hits: list[bool] = []
    for same, asked in zip((found == photos).tolist(), map(named, texts), strict=True):
        if asked.get("style") == "photo" and "hat" not in asked:
            hits += [hit for head, hit in zip(HEADS, same, strict=True) if head in LOOKS and head not in asked]
    return {"looks": _share(hits)} if hits else {}


class Drawn(NamedTuple):
    """What a base draws, judged."""

    found: dict[str, Check]  # of the pictures drawn from captions of held-out people's scenes, and of the true renders of these
    faces: dict[str, float | None]  # share of pictures in which one is found, and how differently from true ones they are distributed
    sheet: Image.Image  # in every pair of rows true renders above, and what was drawn from their captions below


def check_base(classifier: Classifier, base: Base, pictures: int, guidance: float | None, seed: int) -> Drawn:
    """Draws so many pictures and judges them."""
    scenes = [(who := person(HELD_OUT + 5000 + k), scene(who, k % 7)) for k in range(pictures)]
    drafts = [[caption(view.attributes, random.Random(f"{seed} {k} {n}")) for n in range(DRAFTS)] for k, (_, view) in enumerate(scenes)]
    texts = [max(each, key=len) for each in drafts]
    size = base.settings.resolution
    true = torch.cat([render(scenes[k:k + 16], size)[0] for k in range(0, pictures, 16)])
    drawn = [image for k, text in enumerate(texts) for image in generate(base, [text], config=GenerateConfig(seed=seed + k, guidance=guidance))]
    columns = min(COLUMNS, pictures)
    rendered = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in true]
    rows = [row for k in range(0, min(SHOWN, pictures) - columns + 1, columns) for row in (rendered[k:k + columns], drawn[k:k + columns])]
    found = {of: agreement(classifier.read_off(images), texts) for of, images in (("generated", stacked(drawn)), ("true renders", true))}
    return Drawn(found, _faces(base, drawn, rendered), contact_sheet([image for row in rows for image in row], columns))


def _faces(base: Base, drawn: Sequence[Image.Image], true: Sequence[Image.Image]) -> dict[str, float | None]:
    finder = FaceFinder.of(base.settings)
    ours, theirs = (finder.embed_all(images) for images in (drawn, true))
    return {"found": len(ours) / len(drawn), "kernel_distance": kernel_distance(ours, theirs), "of_true_halves": kernel_distance(theirs[::2], theirs[1::2])}


def trained_judge(work: Path) -> tuple[Classifier, int]:
    """The classifier of a work folder, and the size in px of the pictures that it reads. MetaLoraError where its training has not finished."""
    config = MiniatureConfig.of(read_figures(work / NAME)["model"])
    return trained_classifier(Job(data=(), work=work, minutes=0.0, model=config)), config.size


def check_evaluation(classifier: Classifier, size: int, folder: Path) -> dict[str, Check]:
    """Agreement of the pictures of every method of an evaluation with the prompts, and of their looks with the photos."""
    def read(rows: Sequence[dict], of: str) -> torch.Tensor:
        """What the judge reads off the file that each row names, (rows, heads); a file that several name is read once."""
        names, which = np.unique([row[of] for row in rows], return_inverse=True)
        return classifier.read_off(stacked([Image.open(folder / name).convert("RGB").resize((size, size)) for name in names]))[which]

    found = {}
    for method in sorted({path.parent for path in folder.glob("*/*.jsonl")}):
        rows = [json.loads(line) for path in sorted(method.glob("*.jsonl")) for line in path.read_text().splitlines()]
        rows = [row for row in rows if row.get("picture")]
        if rows:
            pictures, photos = (read(rows, of) for of in ("picture", "reference"))
            texts = [row["prompt"].replace("{person}", f"a {row['domain']}") for row in rows]
            found[rows[0]["method"]] = agreement(pictures, texts) | looks(pictures, photos, texts)
    if not found:
        raise MetaLoraError(f"{folder} has no pictures of an evaluation; give the folder that `metalora evaluate` wrote.")
    return found


def stacked(images: Iterable[Image.Image]) -> torch.Tensor:
    """Pictures of one size as uint8 (n, 3, size, size)."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])


def _table(found: dict[str, Check]) -> Iterator[str]:
    yield f"{'':14}" + "".join(f"{name:>28}" for name in found)
    for head in (*HEADS, "all", "looks"):
        cells = [check.get(head) for check in found.values()]
        if any(cells):
            yield f"{head:14}" + "".join(f"{c['found']:>12.1%} ({c['low']:.0%}-{c['high']:.0%})" if c else "" for c in cells)


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature attribute-check`: see --help."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature attribute-check", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help=f"folder in which the training `{NAME}` has finished")
    parser.add_argument("--base", default="miniature", help="the base that draws (%(default)s)")
    parser.add_argument("--evaluation", type=Path, help="the output of `metalora evaluate`, to read instead of drawing")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--guidance", type=float, help="the base's own when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=sheet_file, metavar="FILE", help=f"a picture of the first {SHOWN} true renders, and below each what was drawn from its caption")
    given = parser.parse_args(arguments)
    classifier, size = trained_judge(given.work)
    if given.evaluation:
        found = check_evaluation(classifier, size, given.evaluation)
        print("\n".join(_table(found)))
    else:
        base = Base.open(given.base)
        if base.settings.resolution != size:
            raise MetaLoraError(f"{given.base} draws at {base.settings.resolution} px and the classifier in {given.work} reads {size} px; "
                                f"train one on pictures rendered with --size {base.settings.resolution}.")
        found, faces, sheet = check_base(classifier, base, given.pictures, given.guidance, given.seed)
        if given.sheet:
            save_sheet(sheet, given.sheet)
        print("\n".join(_table(found)))
        print("faces: {found:.1%} found, kernel distance from true ones {kernel_distance}, of two halves of these {of_true_halves}".format(**faces))
        found["faces"] = faces
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
