"""What a domain's photos are of: a face in each, or, where the domain is of things, the whole picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from . import hub
from .config import PICTURE, BaseSettings
from .dino import Dino
from .errors import MetaLoraError
from .face import Face, FaceFinder, Finder


class PictureFinder(Finder):
    """Takes every picture as a whole; two are as like as a DINO model has it. [DreamBooth, arXiv 2208.12242, section 4]"""

    whole = True

    def __init__(self, dino: Dino):
        self.dino, self.width = dino, dino.width

    @classmethod
    def of(cls, settings: BaseSettings) -> PictureFinder:
        """The one that a base model's settings name, fetched when it must be."""
        return cls(Dino(hub.model_folder(settings.dino)))

    def detect(self, image: Image.Image) -> list[Face]:
        """The picture itself. Its box is the largest square in the middle, which is what stage 1 learns of a photo, too."""
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        return [Face((left, top, left + side, top + side), np.zeros((0, 2), np.float32), 1.0, self.dino.images([image])[0])]

    def pick(self, image: Image.Image, face: int | None = None) -> Face:
        """The same; MetaLoraError for any number but 1."""
        if face not in (None, 1):
            raise MetaLoraError(f"In this domain the whole photo is the subject, so there is no face {face}; leave --face out.")
        return self.detect(image)[0]


def finder_for(settings: BaseSettings, subject: str) -> Finder:
    """What finds a subject, one of SUBJECTS, with the models that a base's settings name."""
    return (PictureFinder if subject == PICTURE else FaceFinder).of(settings)
