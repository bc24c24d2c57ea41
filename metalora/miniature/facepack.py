"""What the two face models share: their places in the pack, light and noise, export to ONNX, and the check through InsightFace.

InsightFace knows the models of a folder by their shapes: nine outputs are an SCRFD detector, one output behind a square
input of 112 px is a recogniser. So `FaceAnalysis(name=FOLDER)` runs our own as it runs any other.
"""

import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from metalora.miniature.shards import Shards
from metalora.miniature.training import generator_on
from metalora.train import send

DETECTOR_FILE, RECOGNISER_FILE = "det.onnx", "rec.onnx"
OPSET = 17


def disturbed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (n, 3, h, w) in [0, 255] under other light and colour, with noise, a part of them soft; in [-1, 1]."""
    n, size, device = len(images), images.shape[-1], images.device
    drawn = torch.rand(5, n, 1, 1, 1, generator=generator)
    uniform, tint = send(drawn, device), send(1 + 0.12 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5), device)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * (0.7 + 0.6 * uniform[0]) * tint + mean * (0.7 + 0.6 * uniform[1])
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, (1.2 * uniform[2]).clamp(max=1))
    soft = send((drawn[3].flatten() < 0.35).nonzero().flatten(), device)
    part = round(size * (0.4 + 0.4 * drawn[4, 0].item()))
    small = F.interpolate(images[soft], size=(part, part), mode="bilinear", align_corners=False, antialias=True)
    images[soft] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    local = generator_on(device, generator)
    noise = torch.randn(images.shape, generator=local, device=device) * 6 * torch.rand(n, 1, 1, 1, generator=local, device=device)
    return (images + noise).clamp(0, 255) / 127.5 - 1


def export_onnx(model: nn.Module, path: Path, size: int, outputs: list[str], dynamic: dict[str, dict[int, str]]) -> None:
    """Writes `model` for input (1, 3, size, size) as ONNX; `dynamic` names the axes that may differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with warnings.catch_warnings():  # the older exporter keeps the layout that InsightFace reads; it says it is older
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.zeros(1, 3, size, size),), str(beside), input_names=["input"],
                          output_names=outputs, dynamic_axes=dynamic, opset_version=OPSET, dynamo=False)
    os.replace(beside, path)


@dataclasses.dataclass(frozen=True)
class Found:
    """Faces of one picture: boxes (k, 4) px, unit embeddings (k, 512) or none without a recogniser."""

    boxes: np.ndarray
    embeddings: np.ndarray | None


class Analyser:
    """InsightFace's FaceAnalysis on a pack folder, as an app would use it."""

    def __init__(self, pack: Path, size: int, threshold: float = 0.5):
        from insightface.app import FaceAnalysis

        self.analysis = FaceAnalysis(name=str(pack), providers=["CPUExecutionProvider"])
        self.analysis.prepare(ctx_id=-1, det_thresh=threshold, det_size=(size, size))

    def find(self, image: torch.Tensor) -> Found:
        """Faces of a (3, h, w) uint8 picture, the surest first."""
        faces = self.analysis.get(np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1]))
        faces = sorted(faces, key=lambda face: -face.det_score)
        boxes = np.array([face.bbox for face in faces], np.float32).reshape(-1, 4)
        known = faces and getattr(faces[0], "embedding", None) is not None
        return Found(boxes, np.stack([face.normed_embedding for face in faces]) if known else None)


def overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of each of `boxes` (k, 4) with `box` (4,): (k,)."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return common / np.maximum(areas - common, 1e-6)


def auc(same: np.ndarray, different: np.ndarray) -> float:
    """The chance that a pair of one person (similarities (n,)) is more alike than a pair of two (m,); of equals, a half."""
    different = np.sort(different)
    below = (np.searchsorted(different, same, "left") + np.searchsorted(different, same, "right")) / 2
    return float(below.mean() / len(different))


def identification(similarity: np.ndarray, persons: np.ndarray) -> dict[str, float]:
    """From how alike pictures of these persons (n,) are, (n, n): `rank_1`, the share of pictures nearest to their own person's first, among the first of everybody.

    Returns:
        rank_1, and the number of people as `gallery`. The first pictures themselves do not count.
    """
    gallery = np.unique(persons, return_index=True)[1]
    probes = np.setdiff1d(np.arange(len(persons)), gallery)
    nearest = gallery[similarity[np.ix_(probes, gallery)].argmax(axis=1)]
    return {"rank_1": round(float((persons[nearest] == persons[probes]).mean()), 4), "gallery": len(gallery)}


def separation(embeddings: np.ndarray, persons: np.ndarray) -> dict[str, float]:
    """How well unit embeddings (n, d) tell people apart.

    Returns:
        auc: chance that a pair of one person is closer than a pair of two. rank_1: share of pictures whose nearest
        other picture, among one of each other person and one of the same, is of the same person.
        same, different: mean cosine similarity of the two kinds of pairs. Nothing where a kind of pair is lacking.
    """
    if not 1 < len(np.unique(persons)) < len(persons):
        return {}
    similarity = embeddings @ embeddings.T
    upper = np.triu(np.ones_like(similarity, dtype=bool), 1)
    equal = persons[:, None] == persons[None]
    same, different = similarity[upper & equal], similarity[upper & ~equal]
    return {"auc": round(auc(same, different), 4), **identification(similarity, persons), "same": round(float(same.mean()), 3), "different": round(float(different.mean()), 3)}


def kernel_distance(one: np.ndarray, other: np.ndarray) -> float | None:
    """How differently two sets of unit embeddings (n, d) and (m, d) are distributed: about 0 for two draws of one world, also below.

    None where a set has fewer than two. Unbiased squared discrepancy under the kernel (cosine + 1)³, "Demystifying MMD GANs" (Bińkowski et al. 2018, section 4), of faces here.
    """
    if min(len(one), len(other)) < 2:
        return None
    within = [(((each @ each.T + 1) ** 3).sum() - 8 * len(each)) / (len(each) * (len(each) - 1)) for each in (one, other)]
    return round(float(sum(within) - 2 * ((one @ other.T + 1) ** 3).mean()), 4)


def check_pack(pack: Path, validation: Shards, size: int, pictures: int = 600) -> dict[str, float]:
    """End to end on unseen people: found faces, and how well their embeddings tell the people apart."""
    analyser, found, persons = Analyser(pack, size), [], []
    for image, record in list(zip(validation.images, validation.records, strict=True))[:pictures]:
        faces = analyser.find(image)
        if len(faces.boxes):
            found.append(faces.embeddings[0])
            persons.append(record["person"])
    shown = min(pictures, len(validation))
    embeddings = np.stack(found) if found else np.zeros((0, 1), np.float32)
    return {"found": round(len(found) / shown, 4), "pictures": shown} | separation(embeddings, np.array(persons))
