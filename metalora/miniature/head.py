"""The head model: from a person's few numbers and an expression to the vertices of head and shoulders."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

HEAD_FILE = Path(__file__).parents[2] / "assets/world/head.safetensors"
PARTS = ("skin", "eye", "lash", "teeth", "cloth")
MASKS = ("lips", "eyelids", "ears", "inside-mouth")
ACTIONS = ("browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekSquintLeft",
           "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft",
           "eyeWideRight", "jawOpen", "mouthFrownLeft", "mouthFrownRight", "mouthLowerDownLeft", "mouthLowerDownRight",
           "mouthPressLeft", "mouthPressRight", "mouthSmileLeft", "mouthSmileRight", "mouthUpperUpLeft",
           "mouthUpperUpRight", "noseSneerLeft", "noseSneerRight")


def attribute_features(attributes: Tensor) -> Tensor:
    """(n, 6) sex (1 = woman), age, weight, african, asian, caucasian -> (n, 12) features that the mean head is linear in."""
    sex, age, weight, african, asian, _ = attributes.unbind(1)
    one = torch.ones_like(sex)
    return torch.stack([one, sex, age, age**2, weight, weight**2, african, asian, sex * age, sex * weight, sex * african,
                        sex * asian], 1)


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Area-weighted unit normals (v, 3)."""
    a, b, c = vertices[triangles].unbind(1)
    face = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in range(3):
        total.index_add_(0, triangles[:, corner], face)
    return torch.nn.functional.normalize(total, dim=1)


@dataclass
class HeadModel:
    """Tensors of the head file; metres, x to the person's left, y to the back, z up."""

    template: Tensor  # (v, 3)
    triangles: Tensor  # (t, 3)
    parts: Tensor  # (t,) index into PARTS
    linear: Tensor  # (12, v, 3)
    components: Tensor  # (64, v, 3), each scaled to one standard deviation
    actions: Tensor  # (26, v, 3)
    masks: Tensor  # (v, 4) in 0..1
    occlusion: Tensor  # (v,)
    head_weight: Tensor  # (v,)

    def vertices(self, attributes: Tensor, shape: Tensor) -> Tensor:
        """Rest vertices (n, v, 3) of people: attributes (n, 6), shape (n, 64) in standard deviations."""
        weights = torch.cat([attribute_features(attributes), shape], 1)
        basis = torch.cat([self.linear, self.components]).flatten(1)
        return (weights @ basis).view(-1, *self.template.shape)

    def vertices_of(self, part: str) -> Tensor:
        """Indices of the vertices that triangles of a part use."""
        return self.triangles[self.parts == PARTS.index(part)].unique()


@lru_cache(maxsize=4)
def load_head(device: str = "cpu", path: Path = HEAD_FILE) -> HeadModel:
    """The head model on a device, in float32; loaded once."""
    tensors = {k: v.to(device).float() for k, v in load_file(path).items()}
    tensors["triangles"], tensors["parts"] = tensors["triangles"].long(), tensors["parts"].long()
    return HeadModel(**tensors)
