"""The base model: a diffusers FLUX pipeline, opened from a folder or the Hub, with the few calls that training needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from . import hub
from .config import BaseSettings
from .errors import MetaLoraError

LEAN_BELOW = 48 * 2**30  # bytes of GPU memory under which only the component at work lies on the GPU


class Text(NamedTuple):
    """Prompts as the transformer takes them."""

    embeds: Tensor  # (n, tokens, d_t5)
    pooled: Tensor  # (n, d_clip)

    def rows(self, index: Tensor) -> Text:
        """The prompts at `index` (batch,)."""
        return Text(self.embeds[index], self.pooled[index])


@dataclass
class Base:
    """A FLUX pipeline on a device, with its settings. Its weights are never written to."""

    pipeline: FluxPipeline
    settings: BaseSettings
    name: str  # as users know it: the catalogue's or the Hub's name
    fingerprint: str  # SHA-256 of its architecture and a sample of its weights
    device: torch.device
    lean: bool = False

    @classmethod
    def open(cls, name: str, device: str | None = None) -> Base:
        """Open a folder, a short name of the catalogue or a Hub id: float32 on a CPU, bfloat16 on a GPU.

        Raises MetaLoraError where it cannot be had, is no FLUX pipeline or does not fit the device.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and not torch.cuda.is_available():
            raise MetaLoraError("There is no usable GPU on this machine; leave the device out, or choose cpu.")
        folder = hub.base_folder(str(name))
        _quiet()
        settings = BaseSettings.load(folder)
        pipeline = _load_pipeline(folder, torch.bfloat16 if place.type == "cuda" else torch.float32)
        lean = place.type == "cuda" and torch.cuda.get_device_properties(place).total_memory < LEAN_BELOW
        if not lean:
            pipeline.to(place)
        return cls(pipeline, settings, settings.name or str(name), fingerprint(folder), place, lean)

    @property
    def transformer(self) -> FluxTransformer2DModel:
        return self.pipeline.transformer

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.vae

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @contextmanager
    def resident(self, *components: str) -> Iterator[None]:
        """Have these components on the device meanwhile; only a lean base moves anything."""
        modules = [getattr(self.pipeline, c) for c in components] if self.lean else []
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")
            if modules:
                torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """CLIP and T5 embeddings of n prompts."""
        with self.resident("text_encoder", "text_encoder_2"):
            embeds, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), None, device=self.device, max_sequence_length=self.settings.max_sequence_length
            )
        return Text(embeds, pooled)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of (n, 3, height, width) pictures in [-1, 1], scaled as the transformer takes them."""
        shift, scale = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor
        with self.resident("vae"):
            latent = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        return (latent.mean.float() - shift) * scale, latent.std.float() * scale  # each (n, 16, height/8, width/8)

    def velocity(self, tokens: Tensor, sigma: Tensor, text: Text, image_ids: Tensor, guidance: float) -> Tensor:
        """What the transformer predicts for packed latents (batch, tokens, 64) at noise levels (batch,)."""
        text_ids = torch.zeros(text.embeds.shape[1], 3, device=tokens.device, dtype=tokens.dtype)
        embedded = self.transformer.config.guidance_embeds
        return self.transformer(
            hidden_states=tokens,
            timestep=sigma.to(tokens.dtype),
            guidance=torch.full_like(sigma, guidance) if embedded else None,
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]


def fingerprint(folder: Path) -> str:
    """SHA-256 over the transformer's config and the first MiB of each of its weight files: which model this is."""
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def _quiet() -> None:
    """Keep the libraries' bars for the reading of each component off the screen; downloads still show theirs."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _load_pipeline(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        if kind != "FluxPipeline":
            raise MetaLoraError(f"The base in {folder} is a {kind}; only FLUX pipelines are understood.")
        pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MetaLoraError(f"The base in {folder} cannot be read ({str(error).splitlines()[0][:120]}); get it afresh.") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    return pipeline
