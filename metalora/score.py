"""Scores of generated pictures: whose face, how faithful to the words, how much of the photo was merely copied.

The functions take unit face embeddings as rows; a row of NaN stands for a picture in which no face was found. Such a picture
has no similarity, and counts as wrong where people are to be identified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .clip import Clip
from .dino import Dino
from .face import Finder


def similarity(faces: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Mean cosine (n,) of faces (n, d) to the photos (m, d) learnt from: "similarity to your photo". Near 0.7 is the mark of copying."""
    return _mean_cosine(faces, photos)


def r_facesim(faces: np.ndarray, others: np.ndarray) -> np.ndarray:
    """R-FaceSim [paper]: mean cosine (n,) of faces (n, d) to *other* photos (m, d) of the person, never one learnt from."""
    return _mean_cosine(faces, others)


def copying(faces: np.ndarray, photos: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Similarity to the photo minus R-FaceSim (n,): what a picture has of this one photo beyond the person."""
    return similarity(faces, photos) - r_facesim(faces, others)


def gallery_entry(others: np.ndarray) -> np.ndarray:
    """How a gallery knows a person: the mean (d,) of the embeddings (m, d) of the *other* photos, at unit length; NaN for none."""
    known = others[~np.isnan(others).any(axis=1)]
    if not len(known):
        return np.full(others.shape[1], np.nan, np.float32)
    mean = known.mean(axis=0)
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def nearest(faces: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Rows (n,) of the gallery (g, d) that the faces (n, d) are closest to; -1 for a face of NaN. Gallery rows of NaN are nobody's."""
    cosines = np.where(np.isnan(gallery).any(axis=1), -np.inf, np.nan_to_num(faces) @ np.nan_to_num(gallery).T)  # (n, g)
    return np.where(np.isnan(faces).any(axis=1), -1, cosines.argmax(axis=1))


def identification(faces: np.ndarray, own: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Rank-1 identification (n,) of booleans: is the nearest of the gallery (g, d) the right one, row own[i]? Chance is 1/g.

    [ours] The gallery's entry of a person is `gallery_entry` of photos that were not learnt from.
    """
    return nearest(faces, gallery) == own


def interval(groups: Sequence[np.ndarray], level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of all values and the ends of its bootstrap interval; whole groups (a person's pictures each) are drawn anew.

    NaN values do not count; without any value all three are NaN. The pictures of one person are no independent draws, which
    is why people are resampled and not pictures.
    """
    sums = np.array([np.nansum(g, dtype=np.float64) for g in groups])
    counts = np.array([np.count_nonzero(~np.isnan(np.asarray(g, np.float64))) for g in groups])
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        return (float("nan"),) * 3
    picks = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(sums.sum() / counts.sum()), float(low), float(high)


@dataclass(frozen=True)
class Scorer:
    """Puts numbers to pictures with a finder of faces, or of what else is the subject, a CLIP and, where there is one, a DINO."""

    finder: Finder
    clip: Clip
    dino: Dino | None = None

    def faces(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embedding (n, d) of the largest face of each picture; a row of NaN where there is none."""
        found = [self.finder.embed(image) for image in images]
        rows = [np.full(self.finder.width, np.nan, np.float32) if face is None else face for face in found]
        return np.stack(rows) if rows else np.zeros((0, self.finder.width), np.float32)

    def clip_t(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """CLIP-T (n,): cosine of each picture to its own prompt."""
        return (self.clip.images(images) * self.clip.texts(prompts)).sum(axis=1)

    def clip_i(self, images: Sequence[Image.Image], photos: Sequence[Image.Image]) -> np.ndarray:
        """CLIP-I (n,): mean cosine of each picture to the photos learnt from."""
        return (self.clip.images(images) @ self.clip.images(photos).T).mean(axis=1)

    def dino_i(self, images: Sequence[Image.Image], photos: Sequence[Image.Image]) -> np.ndarray:
        """DINO (n,): mean cosine of each whole picture to the photos learnt from [paper]; needs a DINO."""
        assert self.dino is not None
        return (self.dino.images(images) @ self.dino.images(photos).T).mean(axis=1)

    def score(
        self, images: Sequence[Image.Image], photos: Sequence[Image.Image],
        held_out: Sequence[Image.Image] = (), prompts: Sequence[str] | None = None,
    ) -> list[dict[str, float | bool | None]]:  # fmt: skip
        """A row for each picture: face, similarity, r_facesim, copying, clip_t, clip_i; None where a value cannot be had.

        `photos` are those learnt from, `held_out` others of the person, `prompts` one for each picture; what lacks is not scored.
        """
        faces, known, others = self.faces(images), self.faces(photos), self.faces(held_out)
        columns = likeness(faces, known, others)
        nothing = np.full(len(images), np.nan)
        columns["clip_t"] = self.clip_t(images, prompts) if prompts is not None else nothing
        columns["clip_i"] = self.clip_i(images, photos) if photos else nothing
        return [{"face": not bool(np.isnan(face).any())} | {k: number(v[i]) for k, v in columns.items()} for i, face in enumerate(faces)]


def likeness(faces: np.ndarray, photos: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """The three scores of faces by name."""
    return {"similarity": similarity(faces, photos), "r_facesim": r_facesim(faces, others), "copying": copying(faces, photos, others)}


def number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return None if np.isnan(value) else float(value)


def _mean_cosine(faces: np.ndarray, photos: np.ndarray) -> np.ndarray:
    known = photos[~np.isnan(photos).any(axis=1)]
    return (faces @ known.T).mean(axis=1) if len(known) else np.full(len(faces), np.nan)
