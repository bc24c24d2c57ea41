"""Mid and Up of a new person told from their face, before a single step: where learning then begins.

Stage 1 leaves Mid and Up of many people behind. They vary along a few directions, and where a person lies along these can be
told, in part, from the embedding of the face: a principal component analysis and a ridge regression. [ours, beyond the paper;
HyperDreamBooth, arXiv 2307.06949, has a network tell a person's weights from the photo and goes on from there]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Factors
from .errors import MetaLoraError

FOLDS = 5  # of people, of which each is predicted from the others to choose how much the regression is held back
PENALTIES = torch.logspace(-4, 4, 17, dtype=torch.float64)  # in the mean square of an embedding's numbers


@dataclass(frozen=True, eq=False)
class Predictor:
    """A linear map from a face to Mid and Up."""

    basis: Factors  # layer → (1 + k, r, r_m), (1 + k, d_out, r): the mean person, then the k directions
    weight: Tensor  # (k, d), float32
    bias: Tensor  # (k,)

    def start(self, face: Tensor) -> Factors:
        """Mid and Up of every layer for an embedding (d,). MetaLoraError where it is of another recogniser's size."""
        if face.shape != self.weight.shape[1:]:
            raise MetaLoraError(
                f"The predictor of this Meta-Down was fitted on embeddings of {self.weight.shape[1]} numbers, and this face has {len(face)}; "
                "use the face pack it was made with, or learn with start_face=0."
            )
        along = torch.cat([torch.ones(1), self.weight @ face.float() + self.bias])
        return {name: (torch.tensordot(along, mid, 1), torch.tensordot(along, up, 1)) for name, (mid, up) in self.basis.items()}

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept in a file."""
        parts = {f"{name}.{part}": t.contiguous() for name, pair in self.basis.items() for part, t in zip(("mid", "up"), pair)}
        return {"weight": self.weight, "bias": self.bias, **parts}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: Sequence[str]) -> Predictor:
        """What `tensors` gave, for these layers. KeyError where something lacks."""
        basis = {name: (tensors[f"{name}.mid"], tensors[f"{name}.up"]) for name in layers}
        return cls(basis, tensors["weight"], tensors["bias"])


def fit_predictor(people: Sequence[Factors], faces: Sequence[Tensor], rank: int) -> tuple[Predictor, float]:
    """The predictor with up to `rank` directions, and the share of the variance of Mid and Up that it explains in people left out.

    faces[i] (p, d) are the embeddings of photos of person i; a person counts the same however many there are.
    Raises MetaLoraError for fewer than two people a fold.
    """
    if len(people) < 2 * FOLDS:
        raise MetaLoraError(f"{len(people)} people are too few to fit a predictor on; {2 * FOLDS} is the least, and hundreds are better.")
    heads = torch.stack([torch.cat([t.flatten() for pair in person.values() for t in pair]) for person in people])  # (n, all numbers)
    mean = heads.mean(0)
    directions, along = _components(heads - mean, rank)
    faces = [face.double() for face in faces]
    guesses = torch.cat([_left_out(faces, along, fold) for fold in range(FOLDS)], dim=1)  # (penalties, n, k), people in the folds' order
    order = torch.cat([torch.arange(fold, len(people), FOLDS) for fold in range(FOLDS)])
    missed = (guesses - along[order]).square().sum((1, 2))  # (penalties,)
    best = int(missed.argmin())
    weight, bias = _ridge(faces, along, PENALTIES[best])
    total = (heads - mean).square().sum()
    explained = (along.square().sum() - missed[best]) / total
    rows = torch.cat([mean[None], directions]).split([t.numel() for pair in people[0].values() for t in pair], dim=1)
    shaped = iter(row.reshape(-1, *t.shape) for row, t in zip(rows, (t for pair in people[0].values() for t in pair)))
    basis = {name: (next(shaped), next(shaped)) for name in people[0]}
    return Predictor(basis, weight.float(), bias.float()), explained.item()


def _components(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Principal directions (k, all numbers) and where each person lies along them (n, k), by way of the small matrix of people."""
    values, vectors = torch.linalg.eigh((centred @ centred.T).double())
    values, vectors = values.flip(0), vectors.flip(1)
    rank = min(rank, len(centred) - 1)
    kept = int((values[:rank] > 1e-9 * values[0].clamp(min=1e-30)).sum())
    scale = values[:kept].sqrt()
    return (vectors[:, :kept] / scale).T.to(centred) @ centred, vectors[:, :kept] * scale


def _ridge(faces: Sequence[Tensor], along: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (k, d) and bias (k,) of the regression, every person weighing the same."""
    x, y = torch.cat(list(faces)), torch.cat([row.expand(len(face), -1) for face, row in zip(faces, along)])
    share = torch.cat([torch.full((len(face), 1), 1 / len(face), dtype=x.dtype) for face in faces]) / len(faces)
    x_mean, y_mean = (share * x).sum(0), (share * y).sum(0)
    x, y = x - x_mean, y - y_mean
    square = x.T @ (share * x)
    weight = torch.linalg.solve(square + penalty * square.diagonal().mean() * torch.eye(len(square), dtype=x.dtype), x.T @ (share * y)).T
    return weight, y_mean - weight @ x_mean


def _left_out(faces: Sequence[Tensor], along: Tensor, fold: int) -> Tensor:
    """What each penalty makes of the people of one fold from all others, a mean over their photos: (penalties, people, k)."""
    rest = [i for i in range(len(faces)) if i % FOLDS != fold]
    guesses = []
    for penalty in PENALTIES:
        weight, bias = _ridge([faces[i] for i in rest], along[rest], penalty)
        guesses.append(torch.stack([(faces[i] @ weight.T + bias).mean(0) for i in range(fold, len(faces), FOLDS)]))
    return torch.stack(guesses)
