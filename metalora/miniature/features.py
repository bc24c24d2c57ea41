"""What the base's training reads of the pictures, computed once: latents, and what CLIP sees in each patch."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPModel

from metalora.miniature.shards import Batch, load_shards
from metalora.miniature.training import Job
from metalora.miniature.vae import encode, to_floats

Encode = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # uint8 pictures (n, 3, h, w) → what a network makes of them, each (n, ...)


@dataclasses.dataclass(frozen=True)
class Latents:
    """Means and deviations of the VAE's posterior, scaled as the transformer sees them, of pictures and their mirrors.

    Args:
        mean, deviation: (2, n, channels, h, w) float16; the first axis is as drawn, mirrored.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def draw(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """A sample of each picture's posterior, (n, channels, h, w): every step draws anew, by a generator on the latents' device."""
        mean, deviation = self.mean[batch.rows].float(), self.deviation[batch.rows].float()
        return mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device)

    def select(self, mask: torch.Tensor) -> "Latents":
        """Those of the pictures for which `mask` (n,) holds."""
        return Latents(self.mean[:, mask], self.deviation[:, mask])

    def to(self, device: torch.device) -> "Latents":
        """The same on a device."""
        return Latents(self.mean.to(device), self.deviation.to(device))


def cached(name: str, job: Job, weight: torch.Tensor, encode_images: Encode) -> dict[str, torch.Tensor]:
    """What a network makes of all pictures of the data folders and of their mirrors, each (2, n, ...) float16.

    Every folder has a file of its own in the work folder, so that one that is added later is encoded alone. A file counts as
    long as the folder's pictures and the network are the same, of which `weight` is one by which networks are told apart.
    """
    parts = []
    for folder in job.data:
        images = load_shards(folder).images
        digest = hashlib.sha256(weight.detach().cpu().numpy().tobytes())
        digest.update(images[:: max(1, len(images) // 64)].numpy().tobytes())
        path, key = job.work / f"{name}-{folder.name}.safetensors", f"{len(images)}-{digest.hexdigest()}"
        parts.append(_read(path, key) or _write(path, key, images, encode_images))
    return {each: torch.cat([part[each] for part in parts], dim=1) for each in parts[0]}


def _read(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a file of that key, if there is one."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} if file.metadata()["key"] == key else None


def _write(path: Path, key: str, images: torch.Tensor, encode_images: Encode) -> dict[str, torch.Tensor]:
    both = [encode_images(each) for each in (images, images.flip(-1))]
    tensors = {name: torch.stack([each[name].half() for each in both]).contiguous() for name in both[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"key": key})
    return tensors


def encode_latents(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and deviation of the latents, scaled as the transformer sees them."""
    mean, deviation = encode(vae, images)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return {"mean": (mean - shift) * scale, "deviation": deviation * scale}


@torch.no_grad()
def encode_patches(clip: CLIPModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What CLIP's vision tower makes of each patch, (n, patches, width)."""
    parts = [clip.vision_model(pixel_values=to_floats(part.to(clip.device))).last_hidden_state[:, 1:].cpu() for part in images.split(64)]
    return {"views": torch.cat(parts)}
