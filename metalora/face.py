"""Faces in a picture: where they are and whose they look like, by InsightFace's FaceAnalysis on a pack of ONNX files.

Where the subject is no face, another finder stands in for that of faces; see subject.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .config import BaseSettings
from .errors import FULL, MetaLoraError, naming

THREADS = 2  # of ONNX Runtime; its default takes every core and spins
THRESHOLD = 0.5  # least score of a face
PADDINGS = (0.0, 0.5, 1.5)  # room added round the picture, in its longer sides, one after the other until a face is found
FLATTEST = 8  # widest ratio of the sides that the detector is given; flatter pictures are padded
INSIGHTFACE = Path.home() / ".insightface" / "models"  # where InsightFace keeps the packs that it fetches


@dataclass(frozen=True, eq=False)
class Face:
    """One face of a picture, or what stands for it where the subject is no face."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, px, inside the picture
    keypoints: np.ndarray  # (5, 2) px: eyes from left to right as seen, nose, corners of the mouth; (0, 2) for no face
    score: float  # how sure the detector is, 0 … 1
    embedding: np.ndarray  # (d,) float32, unit length; the dot product of two is their cosine
    number: int = 1  # its place from the left, from 1

    @property
    def area(self) -> float:
        """Of its box, px²."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


class SeveralFaces(MetaLoraError):
    """A photo shows more than the one face that is wanted."""


def only(finder: Finder, image: Image.Image, name: object) -> Face:
    """The one face of a photo that is compared with, where nobody can say which. MetaLoraError, which begins with the photo's name, for none or several."""
    with naming(name):
        try:
            return finder.pick(image)
        except SeveralFaces as error:
            raise MetaLoraError("The photo shows several faces; leave it out, or cut it to the one.") from error


class Finder(ABC):
    """Finds the subjects of pictures and embeds them."""

    width: int  # d, numbers of an embedding
    whole = False  # whether the subject is every picture as a whole, so that nothing lies outside it

    @classmethod
    @abstractmethod
    def of(cls, settings: BaseSettings) -> Finder:
        """The one that a base model's settings name."""

    @abstractmethod
    def detect(self, image: Image.Image) -> list[Face]:
        """All subjects, the largest first, numbered from left to right; an empty list for none."""

    @abstractmethod
    def pick(self, image: Image.Image, face: int | None = None) -> Face:
        """The one subject of a picture, or the one with that number; MetaLoraError for none, or for several and no number."""

    def embed(self, image: Image.Image) -> np.ndarray | None:
        """Embedding (d,) of the largest subject, unit length, or None where there is none."""
        found = self.detect(image)
        return found[0].embedding if found else None

    def embed_all(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Embeddings (n, d) of the largest subject of each picture that shows one."""
        found = [embedding for image in images if (embedding := self.embed(image)) is not None]
        return np.stack(found) if found else np.zeros((0, self.width), np.float32)


class FaceFinder(Finder):
    """Finds and embeds faces. `pack` is a folder with a detector and a recogniser as ONNX, or a pack that InsightFace knows.

    Raises MetaLoraError where the pack is missing, incomplete or damaged, or cannot be fetched.
    """

    width = 512

    def __init__(self, pack: str | Path, det_size: int = 640):
        self.pack = str(pack)
        self._app = _load(self.pack, det_size)

    @classmethod
    def of(cls, settings: BaseSettings) -> FaceFinder:
        """The one that a base model's settings name."""
        return cls(settings.face_pack, settings.det_size)

    def detect(self, image: Image.Image) -> list[Face]:
        """All faces, the largest first, numbered from left to right; an empty list for none.

        A face that fills the picture is missed by detectors that learnt on faces with room round them, so a picture in
        which none is found is looked at again with room added.
        """
        pixels = np.asarray(image.convert("RGB"))[..., ::-1]  # (height, width, 3), BGR as InsightFace takes it
        for padding in PADDINGS:
            found = self._look(pixels, padding)
            if found:
                order = sorted(found, key=lambda face: (face.box[0] + face.box[2], face.box[1]))
                numbered = [replace(face, number=i) for i, face in enumerate(order, 1)]
                return sorted(numbered, key=lambda face: -face.area)
        return []

    def pick(self, image: Image.Image, face: int | None = None) -> Face:
        """The one face of a picture, or the one with that number; MetaLoraError for none, or for several and no number."""
        found = sorted(self.detect(image), key=lambda f: f.number)
        if not found:
            raise MetaLoraError("No face was found in the photo; give one that shows the face from the front, in good light and not too small.")
        if face is None:
            if len(found) > 1:
                raise SeveralFaces(f"The photo shows {len(found)} faces; cut it to one, or say to adapt which with --face K, from left to right: {_listed(found)}.")
            return found[0]
        if not 1 <= face <= len(found):
            shown = "1 face, so --face can only be 1" if len(found) == 1 else f"{len(found)} faces, so --face is 1 to {len(found)}"
            raise MetaLoraError(f"There is no face {face}; the photo shows {shown}.")
        return found[face - 1]

    def _look(self, pixels: np.ndarray, padding: float) -> list[Face]:
        height, width = pixels.shape[:2]
        margin = round(padding * max(height, width))
        down = margin + max(0, -(-width // FLATTEST) - height)  # the room below and to the right also makes flat pictures less so
        right = margin + max(0, -(-height // FLATTEST) - width)
        canvas = np.pad(pixels, ((margin, down), (margin, right), (0, 0)))
        faces = []
        for raw in self._app.get(np.ascontiguousarray(canvas)):
            points = (np.asarray(raw.bbox, np.float64).reshape(2, 2) - margin).clip(0, (width, height))
            length = float(np.linalg.norm(raw.embedding))
            if (points[1] - points[0]).min() >= 1 and length > 0:
                box = tuple(float(v) for v in points.ravel())
                keypoints = np.asarray(raw.kps, np.float32) - margin
                faces.append(Face(box, keypoints, float(raw.det_score), (raw.embedding / length).astype(np.float32)))
        return faces


def crop(image: Image.Image, face: Face, size: int, margin: float = 0.6) -> Image.Image:
    """A square of `size` px round the face, `margin` face heights wider than it in all; white where it leaves the picture."""
    left, top, right, bottom = face.box
    side = max(right - left, bottom - top) * (1 + margin)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    cut = Image.new("RGB", (max(1, round(side)),) * 2, "white")
    cut.paste(image.convert("RGB"), (-round(x), -round(y)))
    return cut.resize((size, size), Image.Resampling.LANCZOS)


def thumbnails(image: Image.Image, faces: Sequence[Face], size: int = 128) -> list[Image.Image]:
    """Crops of the faces from left to right: item i shows the face with number i + 1."""
    return [crop(image, face, size) for face in sorted(faces, key=lambda face: face.number)]


def _listed(faces: Sequence[Face]) -> str:
    """"1 at (40, 60), 2 at (210, 55)"."""
    return ", ".join(f"{f.number} at ({round((f.box[0] + f.box[2]) / 2)}, {round((f.box[1] + f.box[3]) / 2)})" for f in faces)


def _load(pack: str, det_size: int):
    folder = Path(pack).expanduser()
    looks_like_folder = os.sep in pack or pack.startswith((".", "~"))
    if looks_like_folder and not folder.is_dir():
        raise MetaLoraError(f"The face pack {folder} is not there; get the project's files afresh, or name another in metalora.json.")
    # InsightFace prints what it fetches to stdout, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        app = _analysis(str(folder) if folder.is_dir() else pack)
    if not {"detection", "recognition"} <= set(app.models):
        raise MetaLoraError(f"The face pack {pack} lacks a detector or a recogniser; get it afresh.")
    app.prepare(ctx_id=-1, det_thresh=THRESHOLD, det_size=(det_size, det_size))
    return app


def _analysis(pack: str):
    import onnxruntime
    import requests
    from insightface.app import FaceAnalysis

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return FaceAnalysis(
            name=pack, allowed_modules=["detection", "recognition"], providers=["CPUExecutionProvider"], sess_options=options
        )
    except (requests.RequestException, RuntimeError) as error:
        if Path(pack).is_dir():
            raise MetaLoraError(f"The face pack {pack} is damaged; get it afresh.") from error
        raise MetaLoraError(f"The face pack {pack} is not on this machine and could not be fetched; go online once, or name a folder in metalora.json.") from error
    except Exception as error:  # noqa: BLE001  an AssertionError for an empty folder, ONNX Runtime's own kinds for damaged files
        if getattr(error, "errno", None) in FULL:
            raise MetaLoraError(f"The disk is full, so the face pack {pack} could not be fetched; free some space, remove {INSIGHTFACE / pack}, and start again.") from error
        again = "get it afresh" if Path(pack).is_dir() else f"remove {INSIGHTFACE / pack} and start again, and it is fetched afresh"
        raise MetaLoraError(f"The face pack {pack} is incomplete or damaged; {again}.") from error
