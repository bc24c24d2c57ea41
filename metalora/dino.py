"""A DINO model: whole pictures as directions in one space, where pictures that show the same thing lie close."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from .clip import unit_rows
from .errors import MetaLoraError

KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")  # model types of transformers; the first DINO is a plain ViT


class Dino:
    """A DINO model of transformers with its image processor, read from a folder at once.

    Raises MetaLoraError where it cannot be read or is something else.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.folder = Path(folder)
        try:
            kind = AutoConfig.from_pretrained(folder).model_type
            if kind not in KINDS:
                raise MetaLoraError(f"The model in {folder} is a {kind}, not a DINO; give the folder or the Hub id of one, such as facebook/dinov2-small.")
            self._model = AutoModel.from_pretrained(folder, use_safetensors=True).float().eval()
            self._processor = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise MetaLoraError(f"The DINO model in {folder} cannot be read; get it afresh.") from error

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(n, d) float32, unit length: what the class token has gathered of each picture."""
        return unit_rows(
            images, lambda some: self._model(**self._processor(images=[i.convert("RGB") for i in some], return_tensors="pt")).last_hidden_state[:, 0]
        )

    @property
    def width(self) -> int:
        """Numbers of an embedding, d."""
        return self._model.config.hidden_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its weights, which says which model it is."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
