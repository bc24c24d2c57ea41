"""One person, as Mid and Up of every layer: the identity file, and its export as an ordinary LoRA.

Where a base has no Meta-Down, a person is an ordinary LoRA from the start: the same three factors with a Down of their own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from . import licence
from .adapter import Factors, collapse
from .config import FORMAT_VERSION
from .errors import MetaLoraError
from .family import Family, Kohya
from .files import load_tensors, save_tensors
from .metadown import MetaDown

HEADER = "metalora"  # the one key of the safetensors header, a JSON object
ExportFormat = Literal["diffusers", "kohya"]


@dataclass(frozen=True, eq=False)
class Identity:
    """Mid and Up of one person, and what is needed to use them. No photo, no face embedding, no file name of the user's."""

    factors: Factors  # layer name → Mid (r, r_m), Up (d_out, r), float32
    base: str
    base_fingerprint: str
    meta_down: str  # name of the Meta-Down; empty for an ordinary LoRA
    meta_down_sha256: str
    rank: int
    meta_rank: int  # the first so many rows of Meta-Down are theirs
    scale: float
    domain: str
    noun: str  # class noun: "woman"
    trigger: str
    steps: int
    seed: int
    format_version: int = FORMAT_VERSION
    downs: dict[str, Tensor] = field(default_factory=dict)  # layer name → Down (r_m, d_in) of an ordinary LoRA; else none

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the person's factors, which names this identity in pictures and adapter lists."""
        return hashlib.sha256(save_bytes(self._tensors())).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file; it is complete or absent. MetaLoraError where the disk is full."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise MetaLoraError(f"An identity is a .safetensors file; name it {path.with_suffix('.safetensors').name}.")
        return save_tensors(path, self._tensors(), {HEADER: json.dumps(self._header()), **licence.header(self.base)})

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read what `save` wrote; MetaLoraError for a pickle (not opened), a damaged file or another kind of file."""
        tensors, metadata = load_tensors(path, "an identity file")
        try:
            header = json.loads(metadata[HEADER])
            if header["format_version"] > FORMAT_VERSION:
                raise MetaLoraError(f"{Path(path).name} was made by a newer Meta-LoRA; update this one.")
            names = [key.removesuffix(".mid") for key in tensors if key.endswith(".mid")]
            factors = {name: (tensors[f"{name}.mid"], tensors[f"{name}.up"]) for name in names}
            downs = {key.removesuffix(".down"): tensors[key] for key in tensors if key.endswith(".down")}
            identity = cls(factors, **header, downs=downs)
            identity._check()
        except (KeyError, TypeError, ValueError) as error:
            raise MetaLoraError(f"{Path(path).name} is not an identity file of Meta-LoRA, or it is damaged.") from error
        return identity

    @property
    def prompt_words(self) -> str:
        """What stands for the person in a prompt: trigger words and class noun."""
        return f"{self.trigger} {self.noun}"

    def check(self, base: str, base_fingerprint: str) -> None:
        """Raise MetaLoraError, with both names, where the base is another than this identity was made on."""
        if base_fingerprint != self.base_fingerprint:
            raise MetaLoraError(
                f"This identity was made on the base {self.base} ({self.base_fingerprint[:8]}), but the base here is {base} "
                f"({base_fingerprint[:8]}); open {self.base} or adapt again."
            )

    @property
    def is_plain(self) -> bool:
        """Whether this is an ordinary LoRA, which belongs to no Meta-Down."""
        return bool(self.downs)

    def check_meta_down(self, meta_down: MetaDown) -> None:
        """Raise MetaLoraError, with both names, where the Meta-Down is another than this identity was made with."""
        if meta_down.sha256 != self.meta_down_sha256:
            raise MetaLoraError(
                f"This identity was made with the Meta-Down {self.meta_down} ({self.meta_down_sha256[:8]}), but the one here is "
                f"{meta_down.name} ({meta_down.sha256[:8]}); use the former or adapt again."
            )

    def to_lora(self, meta_down: MetaDown | None) -> dict[str, Tensor]:
        """The ordinary LoRA of rank r under diffusers' names, the scale folded into B: exact, and needs nothing of ours."""
        if not self.is_plain:
            self.check_meta_down(meta_down)
        downs = self.downs or meta_down.tensors
        if not self.factors.keys() <= downs.keys():
            raise MetaLoraError(f"This identity names layers that its Meta-Down {self.meta_down} has not; it is damaged, get it afresh.")
        return diffusers_names({n: collapse(mid, up, downs[n][: self.meta_rank].float(), self.scale) for n, (mid, up) in self.factors.items()})

    def export(self, path: str | Path, meta_down: MetaDown | None, family: Family, format: ExportFormat = "diffusers") -> Path:
        """Write the ordinary LoRA for bases of that family: "diffusers" names for diffusers and ComfyUI, "kohya" names for kohya and its followers."""
        lora = self.to_lora(meta_down)
        if format == "kohya":
            about = {"ss_network_module": family.kohya.module, "ss_network_dim": str(self.rank)}
            return save_tensors(path, kohya_names(lora, family.kohya), {**about, **licence.header(self.base)})
        if format != "diffusers":
            raise MetaLoraError(f"There is no export format {format}; choose diffusers or kohya.")
        return save_tensors(path, lora, {"format": "pt", **licence.header(self.base)})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{n}.{part}": t for n, pair in self.factors.items() for part, t in zip(("mid", "up"), pair)}
        return {key: t.contiguous() for key, t in (tensors | {f"{n}.down": t for n, t in self.downs.items()}).items()}

    def _header(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key in self.__dataclass_fields__ and key not in ("factors", "downs")}

    def _check(self) -> None:
        kinds = {"rank": int, "meta_rank": int, "steps": int, "seed": int, "scale": (int, float)}
        if not all(isinstance(value, kinds.get(key, str)) for key, value in self._header().items() if key != "format_version"):
            raise ValueError("the header has a value of another kind")
        for mid, up in self.factors.values():
            if mid.shape != (self.rank, self.meta_rank) or up.ndim != 2 or up.shape[1] != self.rank:
                raise ValueError("a factor has another shape than the header says")
            if not (torch.isfinite(mid).all() and torch.isfinite(up).all()):
                raise ValueError("a factor is not finite")
        if not self.factors:
            raise ValueError("no layer")
        if self.downs and {n: t.shape[0] for n, t in self.downs.items()} != dict.fromkeys(self.factors, self.meta_rank):
            raise ValueError("the Downs are not those of the layers")


def diffusers_names(lora: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(A, B) of each layer under the names that a pipeline's load_lora_weights reads."""
    named = {}
    for name, (a, b) in lora.items():
        named[f"transformer.{name}.lora_A.weight"] = a.contiguous()
        named[f"transformer.{name}.lora_B.weight"] = b.contiguous()
    return named


def kohya_names(lora: dict[str, Tensor], kohya: Kohya) -> dict[str, Tensor]:
    """The same LoRA under kohya's names. Layers that it fuses become one of several times the rank, B block-diagonal: exact.

    alpha is the rank, so that a program that multiplies by alpha / rank multiplies by one.
    Raises MetaLoraError for a LoRA that adapts only some of the layers that are fused, or others than are named.
    """
    left = dict(lora)
    places = [key.split(".")[1:3] for key in lora]
    blocks = sorted({(kind, index) for kind, index in places if kind.endswith("transformer_blocks")}, key=lambda block: (block[0], int(block[1])))
    named: dict[str, Tensor] = {}
    for kind, index in blocks:
        fused, short = (kohya.double, "double") if kind == "transformer_blocks" else (kohya.single, "single")
        for target, sources in fused.items():
            keys = [f"transformer.{kind}.{index}.{source}" for source in sources]
            if not any(f"{key}.lora_A.weight" in left for key in keys):
                continue
            try:
                a = [left.pop(f"{key}.lora_A.weight") for key in keys]  # each (r, d_in)
                b = [left.pop(f"{key}.lora_B.weight") for key in keys]  # each (d_out, r)
            except KeyError as error:
                raise MetaLoraError("The kohya format needs q, k and v adapted together; export as diffusers instead.") from error
            prefix = f"lora_unet_{short}_blocks_{index}_{target}"
            named[f"{prefix}.lora_down.weight"] = torch.cat(a)
            named[f"{prefix}.lora_up.weight"] = torch.block_diag(*b)
            named[f"{prefix}.alpha"] = torch.tensor(float(sum(len(x) for x in a)))
    if left:
        raise MetaLoraError(f"The kohya format has no name for {next(iter(left))}; export as diffusers instead.")
    return named
