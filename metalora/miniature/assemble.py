"""Puts the trained parts of a work folder together as the assets that the app carries.

miniature/ is an ordinary FluxPipeline folder in float16 with metalora.json; clip/ an ordinary CLIPModel folder whose text
tower is the pipeline's; face/ a pack that InsightFace's FaceAnalysis opens; dino/, where likeness was trained, a Dinov2Model
folder; training/ a work folder of what the app does not need, to be trained further, and the judge of attributes. Each has a
model card made from the figures of its trainings. Run it again when a part has been trained anew; a
Meta-Down learnt on older weights of the base is then refused by name, so learn it afresh.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel, Dinov2Model

from metalora.errors import MetaLoraError
from metalora.miniature.attributes import NAME as ATTRIBUTES
from metalora.miniature.base import Denoiser, trained_base
from metalora.miniature.captions import TRIGGER, asked_phrases, caption_phrases, prompt_phrases, thing_phrases, vocabulary
from metalora.miniature.clip import build_processor, trained_clip
from metalora.miniature.facepack import DETECTOR_FILE, RECOGNISER_FILE
from metalora.miniature.likeness import NAME as LIKENESS
from metalora.miniature.likeness import build_processor as build_dino_processor
from metalora.miniature.likeness import trained_dino
from metalora.miniature.pipeline import MiniatureConfig, clip_tokenizer, make_readable, save_pipeline, write_settings
from metalora.miniature.training import Job, read_figures, write_result
from metalora.miniature.vae import REFINED

KEPT = (ATTRIBUTES, "face-detector", "face-recogniser")  # trainings whose weights are in no other asset, or as ONNX alone
MOST_MEGABYTES = 60.0  # of all assets together, so that the project stays a quick download
GUIDANCE = 3.5  # that a base which has learnt guidance is used with
# What metalora.json says of this base beyond `write_settings`; found by trial on people of the training.
LEARNING: dict[str, Any] = {"batch_size": 4, "background": 0.1, "prior_pictures": 8, "asked_draws": 48, "reworded": 0.5, "ema": 0.96, "flow": {"logit_mean": 0.5}}
SETTINGS: dict[str, Any] = {
    # The steps are not: they were read off the curve of the held-out people that the README shows, as what keeps of a prompt what it names.
    "adapt": {"steps": 125, "learning_rate": 8e-3, **LEARNING},
    "plain": {"steps": 375, "learning_rate": 1e-2, **LEARNING},
    # Directions alone: rounds after them, with what follows here, gain nothing for people of such a rank.
    "meta": {"direction_people": 1000, "batch_size": 32, "background": 0.1, "flow": {"logit_mean": 0.5},
             "rounds": 0, "bucket_size": 96, "bucket_steps": 100, "warmup_steps": 30, "learning_rate": 2e-3, "down_learning_rate": 2e-4},
}
COMMON = ("command", "seed", "training", "model", "steps", "samples", "minutes", "loss", "torch", "device", "earlier")  # of every result.json


@dataclasses.dataclass(frozen=True)
class Parts:
    """The trainings of a work folder: the base's is `base-guided` where that is there; `figures` by training."""

    work: Path
    base: str
    figures: dict[str, dict[str, Any]]

    @property
    def config(self) -> MiniatureConfig:
        return MiniatureConfig.of(self.figures[self.base]["model"])

    @property
    def job(self) -> Job:
        return Job(data=(), work=self.work, minutes=0.0, model=self.config)

    def pick(self, *names: str) -> dict[str, dict[str, Any]]:
        """Figures of those of these trainings that there are."""
        return {name: self.figures[name] for name in names if name in self.figures}


def read_parts(work: Path) -> Parts:
    """The figures of all trainings that the assets need.

    Raises:
        MetaLoraError: some have not finished, or were trained at other sizes than the rest.
    """
    more = [name for name in (REFINED, "base-guided", LIKENESS, ATTRIBUTES) if (work / name / "result.json").exists()]
    needed = ["vae", "clip", "base", *more, "face-detector", "face-recogniser"]
    missing = [name for name in needed if not (work / name / "result.json").exists()]
    if missing:
        raise MetaLoraError(f"{work} lacks the result of {', '.join(missing)}; run `python -m metalora.miniature "
                            f"{missing[0]}` to its end first.")
    figures = {name: read_figures(work / name) for name in needed}
    base = "base-guided" if "base-guided" in more else "base"
    others = [name for name in figures if any(figures[name]["model"][size] != figures[base]["model"][size] for size in _sizes(name, figures[base]))]
    if others:
        raise MetaLoraError(f"{', '.join(others)} in {work} was trained at other sizes than {base}; train it again with the same --config.")
    return Parts(work, base, figures)


def _sizes(name: str, figures: dict[str, Any]) -> list[str]:
    """The sizes of the miniature that a training has to share with the base's."""
    own = {"vae": ("vae_widths", "latent_"), REFINED: ("vae_widths", "latent_"), "clip": ("clip_",), "base": ("",), "base-guided": ("",)}
    return [size for size in figures["model"] if size == "size" or size.startswith(own.get(name, ("-",)))]


def write_miniature(parts: Parts, folder: Path) -> None:
    """The pipeline in float16, metalora.json and the card."""
    save_pipeline(trained_base(parts.job, parts.base), folder)
    guided = {"guidance": GUIDANCE} if parts.base == "base-guided" else {}
    phrases = {"caption_phrases": caption_phrases(), "asked_phrases": asked_phrases(), "thing_phrases": thing_phrases(), "prompt_phrases": prompt_phrases()}
    write_settings(folder, parts.config, TRIGGER, **phrases, **guided, **SETTINGS)
    _describe(folder, MINIATURE_CARD, parts.pick("vae", REFINED, "clip", "base", "base-guided"), size=parts.config.size)


def write_clip(parts: Parts, folder: Path) -> None:
    """The CLIP model in float16, its processor and the card."""
    trained_clip(parts.job).half().save_pretrained(folder)
    build_processor(parts.config, clip_tokenizer(vocabulary(), parts.config.clip_tokens)).save_pretrained(folder)
    _describe(folder, CLIP_CARD, parts.pick("clip"), size=parts.config.size)


def write_face(parts: Parts, folder: Path) -> None:
    """The two ONNX files and the card."""
    folder.mkdir(parents=True)
    shutil.copyfile(parts.work / "face-detector" / DETECTOR_FILE, folder / DETECTOR_FILE)
    shutil.copyfile(parts.work / "face-recogniser" / RECOGNISER_FILE, folder / RECOGNISER_FILE)
    _describe(folder, FACE_CARD, parts.pick("face-detector", "face-recogniser"))


def write_dino(parts: Parts, folder: Path) -> None:
    """The DINO in float16, its processor and the card."""
    trained_dino(parts.job).half().save_pretrained(folder)
    build_dino_processor(parts.config.size).save_pretrained(folder)
    _describe(folder, DINO_CARD, parts.pick(LIKENESS), size=parts.config.size)


def write_training(parts: Parts, folder: Path) -> None:
    """What is KEPT as far as its weights are there, in float16, with its figures, and the card."""
    kept = {name: parts.figures[name] for name in _kept(parts)}
    for name, figures in kept.items():
        weights = load_file(parts.work / name / "model.safetensors")
        write_result(folder / name, {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, figures)
    _describe(folder, TRAINING_CARD, kept)


def _kept(parts: Parts) -> list[str]:
    return [name for name in KEPT if name in parts.figures and (parts.work / name / "model.safetensors").exists()]


def assemble(work: Path, output: Path) -> dict[str, float]:
    """Writes output/miniature, clip, face and training, and, where likeness was trained, dino; all are whole before the first replaces its elder.

    Returns:
        Megabytes of each, and of all assets.

    Raises:
        MetaLoraError: a part is missing or does not fit the others, or the assets would be too large.
    """
    parts, output = read_parts(Path(work)), Path(output)
    writers: dict[str, Callable[[Parts, Path], None]] = {"miniature": write_miniature, "clip": write_clip, "face": write_face}
    if LIKENESS in parts.figures:
        writers["dino"] = write_dino
    if _kept(parts):
        writers["training"] = write_training
    beside = output / f".assembling-{os.getpid()}"
    try:
        for name, write in writers.items():
            write(parts, beside / name)
        make_readable(beside)
        sizes = {name: megabytes(beside / name) for name in writers}
        rest = sum(megabytes(path) for path in output.iterdir() if path.name not in writers and path != beside)
        sizes["all"] = sum(sizes.values()) + rest
        if sizes["all"] > MOST_MEGABYTES:
            raise MetaLoraError(f"The assets would take {sizes['all']:.1f} MB, more than {MOST_MEGABYTES:g}; train smaller parts.")
        for name in writers:
            _replace(output / name, beside / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {name: round(size, 2) for name, size in sizes.items()}


def disassemble(assets: Path, work: Path) -> list[str]:
    """The way back: writes the trainings that `assets` were made of into a work folder, weights and figures.

    A training that finds its own result there, but no checkpoint, goes on from those weights, so that what was published can
    be trained further by whoever has nothing else.

    Returns:
        The names of the trainings.

    Raises:
        MetaLoraError: one of them is there already.
    """
    assets, work, figures = Path(assets), Path(work), {}
    for folder in ("face", "clip", "miniature", "dino", "training"):
        if (assets / folder / "training.json").exists():
            figures |= json.loads((assets / folder / "training.json").read_text())
    taken = [name for name in figures if (work / name).exists()]
    if taken:
        raise MetaLoraError(f"{work} has a training {taken[0]} already; choose another folder.")
    pipeline = FluxPipeline.from_pretrained(assets / "miniature", dtype=torch.float32)
    base = Denoiser(pipeline, 0)
    clip = CLIPModel.from_pretrained(assets / "clip", dtype=torch.float32)
    if REFINED in figures:
        figures["vae"]["model"] = figures[REFINED]["model"]  # of the weights that it has now
    weights: dict[str, nn.Module | dict[str, torch.Tensor]] = {"vae": pipeline.vae, REFINED: pipeline.vae, "clip": clip, "base": base, "base-guided": base}
    if LIKENESS in figures:
        weights[LIKENESS] = Dinov2Model.from_pretrained(assets / "dino", dtype=torch.float32)
    onnx = {"face-detector": DETECTOR_FILE, "face-recogniser": RECOGNISER_FILE}
    for name, each in figures.items():
        if (kept := assets / "training" / name / "model.safetensors").exists():
            weights[name] = load_file(kept)
        write_result(work / name, weights.get(name), each)
        if name in onnx:
            shutil.copyfile(assets / "face" / onnx[name], work / name / onnx[name])
    return list(figures)


def megabytes(path: Path) -> float:
    """Size of a file, or of all files below a folder, in millions of bytes."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def _replace(folder: Path, new: Path) -> None:
    """Renames `new` to `folder`; what was there is put aside first, for a folder that is not empty cannot be renamed over."""
    if folder.exists():
        os.replace(folder, new.with_name(f"{new.name}-before"))
    os.replace(new, folder)


def _describe(folder: Path, card: str, figures: dict[str, dict[str, Any]], **more: Any) -> None:
    """Writes the card and, for whoever trains again, every figure and setting of the trainings as training.json."""
    text = card.format(trainings="\n\n".join(_training(name, each) for name, each in figures.items()), **more)
    (folder / "README.md").write_text(text)
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n")


def _training(name: str, figures: dict[str, Any]) -> str:
    """A training as the card tells it: command, seed, length, and what was measured."""
    earlier = figures.get("earlier")
    lines = [f"### {name}", f"    {figures['command']}", f"Seed {figures['seed']}, {figures['steps']:,} steps, {figures['samples']:,} samples, "
             f"{figures['minutes']:g} minutes on {figures.get('device', 'a CPU')} with torch {figures['torch']}; last smoothed loss {figures['loss']:g}."
             + (f" It began from the weights of {earlier['samples']:,} samples in {earlier['minutes']:g} minutes." if earlier else "")]
    measured = _flat({key: value for key, value in figures.items() if key not in COMMON})
    return "\n\n".join([*lines, "\n".join(["| measured | |", "|---|---|", *(f"| {key} | {value} |" for key, value in measured)])])


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{before}{key.replace('_', ' ')}"
        rows += _flat(value, f"{name}: ") if isinstance(value, dict) else [(name, f"{value:g}" if isinstance(value, float) else value)]
    return rows


def _from(pictures: str, unseen: str) -> str:
    """The end of a card: what the weights were made from, on what they were measured, and the place for the trainings."""
    return f"""## What it was made from

{pictures} The weights were trained from random numbers.
They are under Apache-2.0, as the code is. What is measured below was measured on {unseen} in no training picture.

## Trainings

{{trainings}}
"""


_FROM = _from("""Portraits that our own renderer draws (`python -m metalora.miniature render`): no photograph and no picture of a real
person. The renderer's head model is derived from MakeHuman's CC0 data.""", "rendered people who are")

MINIATURE_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [flux, miniature, synthetic]
---

# Miniature

A text-to-image model of portraits, {size} x {size} px, built of the very parts of FLUX.1-dev, only small:
`diffusers.FluxPipeline.from_pretrained` opens this folder. It is there to learn from, to try Meta-LoRA on without a GPU,
and to test with; it draws people of a synthetic world and nothing else, from captions of a small vocabulary.
`metalora.json` tells Meta-LoRA how to use it. Its solver adds noise at every step, which it draws from torch's own random
numbers: `torch.manual_seed` makes a picture the same again, beside the pipeline's `generator`.

""" + _FROM

CLIP_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, miniature, synthetic]
---

# CLIP of the miniature

A small CLIP of synthetic portraits, {size} x {size} px, and their captions. Its text tower is the first text encoder of the
miniature; the whole of it describes a photo before a person is learnt and scores pictures against prompts.
`transformers.CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` open this folder.

""" + _FROM

FACE_CARD = """---
license: apache-2.0
library_name: insightface
tags: [face-detection, face-recognition, miniature, synthetic]
---

# Faces of the miniature's world

A detector with SCRFD's outputs (`det.onnx`) and a recogniser of 512 dimensions (`rec.onnx`) for synthetic portraits;
`insightface.app.FaceAnalysis(name=FOLDER)` opens the folder. They were made for drawn faces of the miniature's world and
are no good at telling real people apart.

""" + _FROM

DINO_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [dinov2, miniature, synthetic]
---

# Likeness of things in the miniature's world

A small DINOv2 for synthetic pictures of things, {size} x {size} px. Its class token, at unit length, is nearly the same for
pictures of one thing in several scenes and another for other things: the likeness of things that have no face to go by.
It was trained on pairs of pictures that are known to show one thing, not by self-distillation, and knows no photographs.
`transformers.AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained` open this folder.

""" + _from("Pictures of things that our own renderer draws: no photograph.", "things that are")

TRAINING_CARD = """---
license: apache-2.0
tags: [miniature, synthetic]
---

# What the app does not need

Weights in float16 and figures of trainings of the miniature, as a work folder of `python -m metalora.miniature` has them: the judge of
attributes (`attribute-check --work assets/training`), and detector and recogniser as PyTorch has them, to be trained further; the app has
their ONNX files in `assets/face`.

""" + _FROM
