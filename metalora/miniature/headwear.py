"""Hats and glasses on the template head, and the hair that a hat leaves to be seen."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from metalora.miniature.hair import hair
from metalora.miniature.props import CENTRE, Prop, grid_triangles, skull, unit


def hat_line(azimuth: np.ndarray) -> np.ndarray:
    """Height z of a hat's edge."""
    return np.interp(np.abs(np.degrees(azimuth)), [0, 60, 100, 180], [.752, .742, .726, .685])


@lru_cache(maxsize=None)
def hat(kind: str) -> Prop:
    """A beanie or a cap: a shell over the cranium, with a rolled edge or a brim."""
    azimuth, rows = np.linspace(-np.pi, np.pi, 61), 14
    edge = hat_line(azimuth)
    directions = []
    for a, z in zip(azimuth, edge):
        heights = np.linspace(-0.3, np.pi / 2, 400)
        d = np.stack([np.sin(a) * np.cos(heights), -np.cos(a) * np.cos(heights), np.sin(heights)], 1)
        low = heights[np.argmax(CENTRE[2] + d[:, 2] * skull().radius(d) > z)]
        h = np.linspace(np.pi / 2, low, rows)
        directions.append(np.stack([np.sin(a) * np.cos(h), -np.cos(a) * np.cos(h), np.sin(h)], 1))
    d = np.stack(directions)  # (61, rows, 3)
    lift = 0.018 + (0.022 if kind == "beanie" else 0.010) * np.clip(d[..., 2], 0, 1)
    if kind == "beanie":
        lift[:, -4:] += 0.007
    points = CENTRE + d * (skull().radius(d.reshape(-1, 3)).reshape(d.shape[:2]) + lift)[..., None]
    triangles, shade = grid_triangles(*points.shape[:2]), np.broadcast_to(azimuth[:, None], points.shape[:2]).ravel()
    points = points.reshape(-1, 3)
    if kind == "cap":
        front = np.abs(azimuth) < 1.1
        rim = points.reshape(61, rows, 3)[front, -1]
        reach = 0.065 * np.clip(np.cos(azimuth[front] * 1.35), 0, 1) ** 0.6
        steps = np.linspace(0, 1, 6)
        brim = rim[:, None] + np.stack([0 * steps[None] + 0 * reach[:, None], -reach[:, None] * steps,
                                        np.broadcast_to(-0.016 * steps**2, (len(rim), 6))], -1)
        triangles = np.concatenate([triangles, grid_triangles(len(rim), 6) + len(points)])
        points, shade = np.concatenate([points, brim.reshape(-1, 3)]), np.concatenate([shade, np.zeros(brim.size // 3)])
    return Prop(torch.from_numpy(points).float(), torch.from_numpy(triangles), skull().anchors(points),
                torch.from_numpy(shade.copy()).float(), torch.zeros(len(points), 4))


@lru_cache(maxsize=None)
def hair_under_hat(name: str, variant: int) -> Prop:
    """The same hair without what a hat would cover."""
    full = hair(name, variant)
    towards = full.points.numpy() - CENTRE
    below = torch.from_numpy(full.points.numpy()[:, 2] < hat_line(np.arctan2(towards[:, 0], -towards[:, 1])) + 0.004)
    return replace(full, triangles=full.triangles[below[full.triangles].all(1)])


@lru_cache(maxsize=None)
def glasses(kind: str) -> Prop:
    """Thin frames: two rims, a bridge and temples, as bands that face the camera."""
    width, height, power = {"round": (0.023, 0.022, 2.0), "square": (0.025, 0.018, 5.0), "oval": (0.026, 0.017, 2.3)}[kind]
    plane, paths = -0.152, []
    t = np.linspace(0, 2 * np.pi, 33)
    for side in (-1, 1):
        x = np.sign(np.cos(t)) * np.abs(np.cos(t)) ** (2 / power) * width + side * 0.032
        z = np.sign(np.sin(t)) * np.abs(np.sin(t)) ** (2 / power) * height + 0.694
        paths.append(np.stack([x, plane + 0.1 * np.abs(x) ** 1.5, z], 1))
        paths.append(np.array([[side * (0.032 + width), plane + 0.004, 0.698], [side * 0.071, plane + 0.035, 0.699],
                               [side * 0.079, -0.055, 0.700], [side * 0.080, -0.03, 0.698]]))
    paths.append(np.array([[-0.010, plane, 0.698], [0, plane - 0.003, 0.700], [0.010, plane, 0.698]]))
    points, triangles, total = [], [], 0
    for path in paths:
        tangent = unit(np.gradient(path, axis=0))
        across = unit(np.cross(tangent, np.array([0.0, -1.0, 0.05])))
        for normal in (across, np.array([0.0, 1.0, 0.0]) + 0 * across):
            band = np.stack([path - normal * 0.0013, path + normal * 0.0013], 1).reshape(-1, 3)
            triangles.append(grid_triangles(len(path), 2) + total)
            points.append(band)
            total += len(band)
    points = np.concatenate(points)
    anchor = skull().anchors(np.array([[0.0, -0.145, 0.690]])).expand(len(points), 4)
    return Prop(torch.from_numpy(points).float(), torch.from_numpy(np.concatenate(triangles)), anchor,
                torch.zeros(len(points)), torch.zeros(len(points), 4))
