"""Clothes on the template: where they end at the neck, and what stands off the body: rolled collars, shirt collars, lapels, ties.

Angles go round the neck from the front, in degrees; lengths are metres. All pieces are made once and move with the body beneath.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from metalora.miniature.head import load_head, vertex_normals
from metalora.miniature.props import Prop, grid_triangles

NECK_AXIS = -0.028  # y of the neck's middle
THICKNESS = {"t-shirt": 0.003, "striped": 0.003, "v-neck": 0.005, "turtleneck": 0.006, "suit": 0.007, "shirt": 0.004}
# A coordinate's whole part says what a point of a piece belongs to; the fraction runs across the piece.
BODY, COLLAR, TIE, LAPEL, ROLL = range(5)


def neckline(top: str, place: Tensor) -> Tensor:
    """Height of a garment's upper edge at a template place (n, 3) -> (n,)."""
    across, front = place[:, 0].abs(), ((-0.01 - place[:, 1]) / 0.03).clamp(0, 1)
    crew = lambda: front * (0.521 + 7 * across**2) + (1 - front) * (0.550 + 0.2 * across)
    return {"t-shirt": crew, "striped": lambda: crew() + 0.003, "v-neck": lambda: front * (0.474 + 1.20 * across) + (1 - front) * (0.553 + 0.2 * across),
            "turtleneck": lambda: 0.560 + 0 * across, "suit": lambda: 0.552 + 0.18 * across,
            "shirt": lambda: front * (0.474 + 1.6 * across) + (1 - front) * 0.562}[top]()


def opening(z):
    """Half the width of a jacket's opening at a height, of tensors or arrays."""
    return 0.046 - 0.30 * (0.560 - z)


@lru_cache(maxsize=1)
def _chest() -> tuple[np.ndarray, np.ndarray]:
    """The front of the template's body: points in (x, z) and their y."""
    head = load_head()
    ahead = vertex_normals(head.template, head.triangles)[:, 1] < -0.15
    skin = head.vertices_of("skin")
    points = head.template[skin[ahead[skin] & (head.template[skin, 2] < 0.572) & (head.template[skin, 1] < 0.0)]].numpy()
    return points[:, [0, 2]], points[:, 1]


def _front(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """y of the chest at places (x, z) of any shape, by inverse distance."""
    at, y = _chest()
    weight = 1 / (((np.stack([x, z], -1)[..., None, :] - at) ** 2).sum(-1) ** 2 + 1e-9)
    return (weight * y).sum(-1) / weight.sum(-1)


def _sheet(points: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid (rows along, columns across, 3) as points, triangles and coordinate."""
    rows, columns, _ = points.shape
    across = np.broadcast_to(kind + np.linspace(0.03, 0.97, columns), (rows, columns))
    return points.reshape(-1, 3), grid_triangles(rows, columns), across.ravel()


def _round(angle: np.ndarray, radius: np.ndarray, z: np.ndarray) -> np.ndarray:
    angle = np.radians(angle)
    return np.stack([radius * np.sin(angle), NECK_AXIS - radius * np.cos(angle), z + 0 * angle], -1)


def _roll() -> list:
    """The rolled collar of a turtleneck: a profile turned round the neck, lower at the front."""
    profile = np.array([(0.050, 0.584), (0.055, 0.591), (0.061, 0.592), (0.065, 0.587), (0.067, 0.576), (0.067, 0.562), (0.065, 0.551), (0.058, 0.547)])
    angle = np.linspace(-180, 180, 49)[:, None]
    drop = 0.016 * np.cos(np.radians(angle))
    return [_sheet(_round(angle + 0 * profile[:, 0], profile[:, 0] + 0 * angle, profile[:, 1] - drop), ROLL)]


def _collar(opens: float, spread: float, length: float = 1.0) -> list:
    """Both leaves of a shirt collar: up from the neck, over, and down to a point that lies `spread` degrees beside the opening."""
    knots = np.array([opens, 45, 90, 135, 180])
    angle = np.linspace(opens, 180, 22)[:, None]
    top_z, top_r = (np.interp(angle, knots, v) for v in ((.536, .554, .574, .584, .587), (.050, .053, .055, .053, .049)))
    low_z, low_r = (np.interp(angle, knots, v) for v in ((.492, .520, .556, .562, .564), (.067, .076, .082, .072, .062)))
    t = np.linspace(0, 1, 7) * length
    side = angle + spread * t * np.clip((70 - angle) / 60, 0, 1)
    radius, z = top_r + (low_r - top_r) * t + 0.005 * np.sin(math.pi * t), top_z + (low_z - top_z) * t + 0.004 * np.sin(math.pi * t)
    return [_sheet(_round(sign * side, radius, z), COLLAR) for sign in (-1, 1)]


def _lapels() -> list:
    z = np.linspace(0.562, 0.400, 20)[:, None]
    inner = opening(z)
    wide = np.interp(0.562 - z, [0, 0.045, 0.052, 0.060, 0.162], [0.018, 0.038, 0.026, 0.043, 0.016])
    t = np.linspace(0, 1, 6)
    x = inner + wide * t
    y = _front(x, z + 0 * x) - THICKNESS["suit"] - 0.004 - 0.004 * np.sin(math.pi * np.minimum(t * 1.6, 1))
    return [_sheet(np.stack([sign * x, y, z + 0 * x], -1), LAPEL) for sign in (-1, 1)]


def _tie() -> list:
    pieces = []
    for top, low, widths, out in ((0.522, 0.400, (0.008, 0.022), 0.011), (0.540, 0.516, (0.0145, 0.009), 0.015)):
        z = np.linspace(top, low, 12)[:, None]
        t = np.linspace(-1, 1, 7)
        x = np.interp(top - z, [0, top - low], widths) * t
        pieces.append(_sheet(np.stack([x, _front(0 * x, z + 0 * x) - out - 0.004 * (1 - t**2), z + 0 * x], -1), TIE))
    return pieces


@lru_cache(maxsize=16)
def pieces(top: str) -> Prop | None:
    """What of a garment stands off the body, if anything does."""
    sheets = {"turtleneck": _roll, "shirt": lambda: _collar(24, 10), "suit": lambda: _collar(5, 13, 0.72) + _lapels() + _tie()}.get(top)
    if sheets is None:
        return None
    points, triangles, across = zip(*sheets())
    starts = np.cumsum([0] + [len(p) for p in points[:-1]])
    triangles = np.concatenate([t + start for t, start in zip(triangles, starts)])
    points, head = torch.from_numpy(np.concatenate(points)).float(), load_head()
    skin = head.vertices_of("skin")
    skin = skin[head.template[skin, 2] < 0.585]
    anchors = skin[torch.cdist(points, head.template[skin]).topk(4, largest=False).indices]
    return Prop(points, torch.from_numpy(triangles), anchors, torch.from_numpy(np.concatenate(across)).float(), torch.zeros(len(points), 4))
