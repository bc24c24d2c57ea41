"""Meta-Down: the factor that stage 1 learns once for a whole domain, with the folder it is kept in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_bytes
from torch import Tensor

from .adapter import Factors
from .config import FORMAT_VERSION, AdapterConfig, overlay
from .errors import MetaLoraError
from .files import load_tensors, save_json, save_tensors, write_atomically
from .licence import front_matter, notice

TENSORS, START, CONFIG, CARD = "meta_down.safetensors", "start.safetensors", "config.json", "README.md"


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

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `meta_down.safetensors` as `save` writes it."""
        return hashlib.sha256(save_bytes({k: v.contiguous() for k, v in self.tensors.items()})).hexdigest()

    @cached_property
    def start_sha256(self) -> str:
        """SHA-256 of `start.safetensors` as `save` writes it; empty where there is no start."""
        return hashlib.sha256(save_bytes(self._start_tensors())).hexdigest() if self.start else ""

    @property
    def stamp(self) -> str:
        """What tells apart two Meta-Downs whose people come out differently: the SHA-256, and that of the start where there is one."""
        return "+".join(filter(None, (self.sha256, self.start_sha256)))

    def _start_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{part}": t.contiguous() for name, pair in self.start.items() for part, t in zip(("mid", "up"), pair)}

    def save(self, folder: str | Path) -> Path:
        """Write the folder: tensors, the start where there is one, config.json, model card. Every file is complete or absent."""
        folder = Path(folder)
        save_tensors(folder / TENSORS, self.tensors)
        if self.start:
            save_tensors(folder / START, self._start_tensors())
        config = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "domain": self.domain,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "adapter": asdict(self.adapter),
            "training": self.training,
            "licence": self.licence,
            "sha256": self.sha256,
        } | ({"start_sha256": self.start_sha256} if self.start else {})
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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetaLoraError(f"{folder} is not a Meta-Down folder: its {CONFIG} is missing or damaged.") from error
        if version > FORMAT_VERSION:
            raise MetaLoraError(f"The Meta-Down in {folder} was made by a newer Meta-LoRA; update this one.")
        tensors, _ = load_tensors(folder / TENSORS, "a Meta-Down")
        meta_down = cls(tensors, adapter, **values, start=_load_start(folder / START, tensors) if config.get("start_sha256") else {})
        for file, named, found in ((TENSORS, "sha256", meta_down.sha256), (START, "start_sha256", meta_down.start_sha256)):
            if config.get(named) not in (None, found):
                raise MetaLoraError(f"The Meta-Down in {folder} is damaged: {file} is not the file that its {CONFIG} names; get it afresh.")
        return meta_down

    def check_base(self, name: str, fingerprint: str) -> None:
        """Raise MetaLoraError, with both names, where the base is another than this was learnt on."""
        if fingerprint != self.base_fingerprint:
            raise MetaLoraError(
                f"The Meta-Down {self.name} was learnt on the base {self.base} ({self.base_fingerprint[:8]}), but the base here is "
                f"{name} ({fingerprint[:8]}); use a Meta-Down made for this base."
            )


def is_complete(folder: Path) -> bool:
    """Whether all files that a Meta-Down's config.json speaks of are there."""
    if not ((folder / TENSORS).is_file() and (folder / CONFIG).is_file()):
        return False
    return (folder / START).is_file() or '"start_sha256"' not in (folder / CONFIG).read_text(encoding="utf-8", errors="replace")


def _load_start(path: Path, downs: dict[str, Tensor]) -> Factors:
    tensors, _ = load_tensors(path, "the start of a Meta-Down")
    if sorted(tensors) != sorted(f"{name}.{part}" for name in downs for part in ("mid", "up")):
        raise MetaLoraError(f"{path} does not fit the Meta-Down beside it; get the folder afresh.")
    return {name: (tensors[f"{name}.mid"], tensors[f"{name}.up"]) for name in downs}


def model_card(meta_down: MetaDown) -> str:
    """The README.md of a Meta-Down folder, with the Hub's front matter."""
    m, a = meta_down, meta_down.adapter
    training = "\n".join(f"- {key}: {value}" for key, value in m.training.items()) or "- not recorded"
    start = f"\n- {START}, Mid and Up that a new person begins with: SHA-256 {m.start_sha256}" if m.start else ""
    return f"""---
{front_matter(m.base, m.licence)}
base_model: {m.base}
tags: [meta-lora, personalization]
---

# Meta-Down {m.name}

The shared factor of a three-factor adapter, y = W x + s · Up · Mid · Down · x, for the domain "{m.domain}" of the base model
{m.base}. It belongs to no person: Mid and Up of a new person are trained on top of it, from one photo.
Method: "Meta-LoRA: Meta-Learning LoRA Components for Domain-Aware ID Personalization", arXiv 2503.22352.

- base fingerprint: {m.base_fingerprint}
- ranks: Meta-Down {a.meta_rank}, person {a.rank}; scale {a.scale}
- adapted layers: {len(m.tensors)}, those that match `{a.targets}`
- SHA-256 of {TENSORS}: {m.sha256}{start}

## Training
{training}
{notice(m.base)}"""
