"""A CLIP model: pictures and texts as directions in one space, where what belongs together lies close."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import MetaLoraError

CHUNK = 32  # pictures or texts at a time


class Clip:
    """A transformers CLIPModel with its processor, from a folder or the Hub; loaded on first use.

    Raises MetaLoraError, on first use, where it cannot be read.
    """

    def __init__(self, place: str | Path):
        self.place = str(place)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(n, d) float32, unit length."""
        model, processor = self._parts
        return self._features(images, lambda some: model.get_image_features(**processor(images=[i.convert("RGB") for i in some], return_tensors="pt")))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32, unit length; what is longer than the model can read is cut off."""
        model, processor = self._parts
        options = dict(return_tensors="pt", padding=True, truncation=True)
        return self._features(texts, lambda some: model.get_text_features(**processor(text=list(some), **options)))

    def _features(self, items: Sequence[Any], encode: Any) -> np.ndarray:
        import torch

        assert len(items) > 0, "something to encode"
        with torch.no_grad():
            chunks = [encode(items[i : i + CHUNK]).pooler_output.float() for i in range(0, len(items), CHUNK)]
        return torch.nn.functional.normalize(torch.cat(chunks), dim=-1).numpy()

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            return CLIPModel.from_pretrained(self.place).float().eval(), CLIPProcessor.from_pretrained(self.place)
        except (OSError, ValueError) as error:
            raise MetaLoraError(f"The CLIP model {self.place} cannot be read; get it afresh, or go online once.") from error
