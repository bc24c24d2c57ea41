"""Meta-Down: the factor that stage 1 learns once for a whole domain, with the folder it is kept in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from .adapter import Factors
from .config import FACE, FORMAT_VERSION, SUBJECTS, AdaptConfig, AdapterConfig, overlay
from .errors import MetaLoraError
from .files import CARD, CONFIG, MORE, PREDICTOR, START, TENSORS, load_tensors, save_json, save_tensors, write_atomically
from .licence import front_matter, notice
from .predict import Predictor


@dataclass(frozen=True, eq=False)
class MetaDown:
    """Down of every adapted layer, and what it was made for. Compare two by `sha256`."""

    tensors: dict[str, Tensor]  # layer name → (r_m, d_in), float32
    adapter: AdapterConfig
    name: str
    domain: str
    base: str  # id of the base model
    base_fingerprint: str
    training: dict[str, Any] = field(default_factory=dict)
    licence: str = "cc0-1.0"
    start: Factors = field(default_factory=dict)  # layer name → Mid, Up that a new person begins with; none: fresh ones
    predictor: Predictor | None = None  # tells a start of one's own from the face
    subject: str = FACE  # what the domain's photos are of, one of SUBJECTS
    adapt: dict[str, Any] = field(default_factory=dict)  # settings of stage 2 that suit this domain, where they are not the base's

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `meta_down.safetensors` as `save` writes it."""
        return hashlib.sha256(save_bytes({k: v.contiguous() for k, v in self.tensors.items()})).hexdigest()

    @cached_property
    def more(self) -> dict[str, tuple[dict[str, Tensor], str]]:
        """Files beside `meta_down.safetensors` as `save` writes them: their tensors and SHA-256."""
        start = {f"{name}.{part}": t.contiguous() for name, pair in self.start.items() for part, t in zip(("mid", "up"), pair)}
        files = {START: start, PREDICTOR: self.predictor.tensors() if self.predictor else {}}
        return {name: (tensors, hashlib.sha256(save_bytes(tensors)).hexdigest()) for name, tensors in files.items() if tensors}

    @property
    def stamp(self) -> str:
        """What tells apart two Meta-Downs whose people come out differently: the SHA-256 of every file."""
        return "+".join([self.sha256, *(sha256 for _, sha256 in self.more.values())])

    def over(self, config: AdaptConfig) -> AdaptConfig:
        """A base's settings of stage 2 under this domain's own."""
        return overlay(config, self.adapt, f"the Meta-Down {self.name}")

    def start_for(self, face: Tensor | None, share: float) -> Factors:
        """Mid and Up that somebody with that embedding (d,) begins with: this share of the way from everybody's start to their own."""
        if self.predictor is None or face is None or share == 0:
            return self.start
        own = self.predictor.start(face)
        common = self.start or {name: (mid[0], up[0]) for name, (mid, up) in self.predictor.basis.items()}
        return {name: tuple(torch.lerp(old, new, share) for old, new in zip(common[name], own[name])) for name in own}

    def save(self, folder: str | Path) -> Path:
        """Write the folder: tensors, start and predictor where there are any, config.json, model card. Every file is complete or absent."""
        folder = Path(folder)
        save_tensors(folder / TENSORS, self.tensors)
        for name, (tensors, _) in self.more.items():
            save_tensors(folder / name, tensors)
        config = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "domain": self.domain,
            "subject": self.subject,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "adapter": asdict(self.adapter),
            "adapt": self.adapt,
            "training": self.training,
            "licence": self.licence,
            "sha256": self.sha256,
        } | {MORE[name]: sha256 for name, (_, sha256) in self.more.items()}
        write_atomically(folder / CARD, lambda beside: beside.write_text(model_card(self), encoding="utf-8"))
        save_json(folder / CONFIG, config)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> MetaDown:
        """Read a folder that `save` wrote; MetaLoraError where a file lacks or is damaged."""
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            adapter = overlay(AdapterConfig(), config["adapter"], f"{folder / CONFIG}")
            version = int(config["format_version"])
            values = {k: config[k] for k in ("name", "domain", "base", "base_fingerprint", "training", "licence")}
            values |= {"subject": config.get("subject", FACE), "adapt": dict(config.get("adapt", {}))}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetaLoraError(f"{folder} is not a Meta-Down folder: its {CONFIG} is missing or damaged.") from error
        if version > FORMAT_VERSION:
            raise MetaLoraError(f"The Meta-Down in {folder} was made by a newer Meta-LoRA; update this one.")
        if values["subject"] not in SUBJECTS:
            raise MetaLoraError(f"The Meta-Down in {folder} is of a subject that is not known here ({values['subject']}); update Meta-LoRA, or get the folder afresh.")
        overlay(AdaptConfig(), values["adapt"], f"{folder / CONFIG}")
        tensors, _ = load_tensors(folder / TENSORS, "a Meta-Down")
        named = {name for name, key in MORE.items() if config.get(key)}
        start = _load_start(folder / START, tensors) if START in named else {}
        predictor = _load_predictor(folder / PREDICTOR, tensors) if PREDICTOR in named else None
        meta_down = cls(tensors, adapter, **values, start=start, predictor=predictor)
        hashes = {TENSORS: ("sha256", meta_down.sha256)} | {name: (MORE[name], sha256) for name, (_, sha256) in meta_down.more.items()}
        for file, (key, found) in hashes.items():
            if config.get(key) not in (None, found):
                raise MetaLoraError(f"The Meta-Down in {folder} is damaged: {file} is not the file that its {CONFIG} names; get it afresh.")
        return meta_down

    def check_base(self, name: str, fingerprint: str) -> None:
        """Raise MetaLoraError, with both names, where the base is another than this was learnt on."""
        if fingerprint != self.base_fingerprint:
            raise MetaLoraError(
                f"The Meta-Down {self.name} was learnt on the base {self.base} ({self.base_fingerprint[:8]}), but the base here is "
                f"{name} ({fingerprint[:8]}); use a Meta-Down made for this base."
            )


def _load_start(path: Path, downs: dict[str, Tensor]) -> Factors:
    tensors, _ = load_tensors(path, "the start of a Meta-Down")
    if sorted(tensors) != sorted(f"{name}.{part}" for name in downs for part in ("mid", "up")):
        raise MetaLoraError(f"{path} does not fit the Meta-Down beside it; get the folder afresh.")
    return {name: (tensors[f"{name}.mid"], tensors[f"{name}.up"]) for name in downs}


def _load_predictor(path: Path, downs: dict[str, Tensor]) -> Predictor:
    tensors, _ = load_tensors(path, "the predictor of a Meta-Down")
    try:
        return Predictor.of(tensors, list(downs))
    except KeyError as error:
        raise MetaLoraError(f"{path} does not fit the Meta-Down beside it; get the folder afresh.") from error


def model_card(meta_down: MetaDown) -> str:
    """The README.md of a Meta-Down folder, with the Hub's front matter."""
    m, a = meta_down, meta_down.adapter
    training = "\n".join(f"- {key}: {value}" for key, value in m.training.items()) or "- not recorded"
    own = f"\n- settings of stage 2 that suit it: {json.dumps(m.adapt)}" if m.adapt else ""
    says = {START: "Mid and Up that a new person begins with", PREDICTOR: "which tells such a start of one's own from the face"}
    more = "".join(f"\n- {name}, {says[name]}: SHA-256 {sha256}" for name, (_, sha256) in m.more.items())
    return f"""---
{front_matter(m.base, m.licence)}
tags: [meta-lora, personalization]
---

# Meta-Down {m.name}

The shared factor of a three-factor adapter, y = W x + s · Up · Mid · Down · x, for the domain "{m.domain}" of the base model
{m.base}. It belongs to no person: Mid and Up of a new person are trained on top of it, from one photo.
Method: "Meta-LoRA: Meta-Learning LoRA Components for Domain-Aware ID Personalization", arXiv 2503.22352.

- subject of its photos: {"a face" if m.subject == FACE else "the whole picture"}
- base fingerprint: {m.base_fingerprint}
- ranks: Meta-Down {a.meta_rank}, person {a.rank}; scale {a.scale}{own}
- adapted layers: {len(m.tensors)}, those that match `{a.targets}`
- SHA-256 of {TENSORS}: {m.sha256}{more}

## Training
{training}
{notice(m.base)}"""
