"""Geometry that is made once on the template of the head and moves with it, and what it is made of."""

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from metalora.miniature.head import MASKS, HeadModel, load_head

CENTRE = np.array([0.0, -0.02, 0.715])


@dataclass(frozen=True)
class Prop:
    """Geometry that follows the head: template positions, triangles, and the head vertices each point moves with."""

    points: Tensor  # (p, 3)
    triangles: Tensor  # (t, 3)
    anchors: Tensor  # (p, 4) vertex indices of the head model
    shade: Tensor  # (p,) along a strand from root 0 to tip 1, or any coordinate that the shader wants
    grain: Tensor  # (p, 4) direction of a strand, on the template, and its tone in 0..1; zero for what is no hair

    def to(self, device: torch.device) -> "Prop":
        """The same on a device. The copy is kept: many pictures show it, and hair is of megabytes."""
        if device.type != "cpu" and device not in self._copies:
            self._copies[device] = Prop(*(getattr(self, field.name).to(device) for field in fields(self)))
        return self._copies.get(device, self)

    @cached_property
    def _copies(self) -> dict[torch.device, "Prop"]:
        return {}

    def on(self, displacement: Tensor) -> Tensor:
        """Positions (p, 3) on a head whose vertices have moved from the template by `displacement` (v, 3)."""
        return self.points + displacement[self.anchors].mean(1)


def angles(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Azimuth from straight ahead and height above the horizon, in radians, of unit vectors (..., 3)."""
    return np.arctan2(directions[..., 0], -directions[..., 1]), np.arcsin(np.clip(directions[..., 2], -1, 1))


def unit(v: np.ndarray) -> np.ndarray:
    return v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-9)


def grid_triangles(rows: int, columns: int) -> np.ndarray:
    """Triangles of a grid of rows x columns points."""
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])


def ball(centre: np.ndarray, radius: float, n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Points and triangles of a bumpy ball."""
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, n), np.linspace(0.05, np.pi - 0.05, n), indexing="ij")
    bumps = 1 + 0.07 * np.sin(u * 6 + v * 9)
    points = np.stack([np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v)], -1) * bumps[..., None]
    return centre + radius * points.reshape(-1, 3), grid_triangles(n, n)


class Skull:
    """The template's radius around CENTRE by direction, and the nearest vertices of any point."""

    def __init__(self, head: HeadModel):
        skin = head.vertices_of("skin")
        skin = skin[head.masks[skin, MASKS.index("ears")] < 0.25]
        self.index = skin.numpy()
        self.points = head.template[skin].numpy()
        offset = self.points - CENTRE
        self.nearest = cKDTree(self.points)
        self.reach = np.linalg.norm(offset, axis=1)
        self.towards = offset / self.reach[:, None]
        azimuth, height = np.linspace(-np.pi, np.pi, 73), np.linspace(-1.35, np.pi / 2, 49)
        a, h = np.meshgrid(azimuth, height, indexing="ij")
        grid = np.stack([np.sin(a) * np.cos(h), -np.cos(a) * np.cos(h), np.sin(h)], -1)
        close = np.exp((grid.reshape(-1, 3) @ self.towards.T - 1) * 400) * (self.reach > 0.05) + 1e-12
        self.radius_grid = (close * self.reach).sum(1).reshape(a.shape) / close.sum(1).reshape(a.shape)

    def radius(self, directions: np.ndarray) -> np.ndarray:
        azimuth, height = angles(directions)
        column = (azimuth + np.pi) / (2 * np.pi) * 72
        row = np.clip((height + 1.35) / (np.pi / 2 + 1.35) * 48, 0, 47.999)
        i, j = np.clip(column.astype(int), 0, 71), row.astype(int)
        u, v = column - i, row - j
        g = self.radius_grid
        return (g[i, j] * (1 - u) + g[i + 1, j] * u) * (1 - v) + (g[i, j + 1] * (1 - u) + g[i + 1, j + 1] * u) * v

    def anchors(self, points: np.ndarray) -> Tensor:
        """The four skin vertices that are nearest to each of the points (n, 3), the nearest first: (n, 4)."""
        return torch.from_numpy(self.index[self.nearest.query(points, k=4)[1]])


@lru_cache(maxsize=1)
def skull() -> Skull:
    return Skull(load_head())
