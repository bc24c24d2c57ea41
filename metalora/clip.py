"""A CLIP model: pictures and texts as directions in one space, where what belongs together lies close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from .errors import MetaLoraError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 32  # pictures or texts at a time


class Clip:
    """A transformers CLIPModel with its processor, from a folder; loaded on first use.

    `find` is asked for the folder then, where `place` may be something else. Raises MetaLoraError, on first use, where it cannot be read.
    """

    def __init__(self, place: str | Path, find: Callable[[str], Path] = Path):
        self.place, self._find = str(place), find

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(n, d) float32, unit length."""
        model, processor = self._parts
        return unit_rows(images, lambda some: model.get_image_features(**processor(images=[i.convert("RGB") for i in some], return_tensors="pt")).pooler_output)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32, unit length; what is longer than the model can read is cut off."""
        model, processor = self._parts
        options = dict(return_tensors="pt", padding=True, truncation=True)
        return unit_rows(texts, lambda some: model.get_text_features(**processor(text=list(some), **options)).pooler_output)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = self._find(self.place)
        try:
            return CLIPModel.from_pretrained(folder, use_safetensors=True).float().eval(), CLIPProcessor.from_pretrained(folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise MetaLoraError(f"The CLIP model {self.place} cannot be read; get it afresh.") from error


def unit_rows(items: Sequence[Any], encode: Callable[[Sequence[Any]], Tensor]) -> np.ndarray:
    """(n, d) float32, unit length: what `encode` makes of some items at a time."""
    import torch

    assert len(items) > 0, "something to encode"
    with torch.no_grad():
        chunks = [encode(items[i : i + CHUNK]).float() for i in range(0, len(items), CHUNK)]
    return torch.nn.functional.normalize(torch.cat(chunks), dim=-1).numpy()
