"""Hair and hats on the template head.

Hair is some four hundred locks: ribbons that start on the scalp, follow the style's flow, fall, and stay outside the head.
Everything is made once on the template; on a person it moves with the scalp under its roots.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from metalora.miniature.head import MASKS, HeadModel, load_head

CENTRE = np.array([0.0, -0.02, 0.715])
SEGMENTS = 5
VARIANTS = 6


@dataclass(frozen=True)
class Prop:
    """Geometry that follows the head: template positions, triangles, and the head vertices each point moves with."""

    points: Tensor  # (p, 3)
    triangles: Tensor  # (t, 3)
    anchors: Tensor  # (p, 4) vertex indices of the head model
    shade: Tensor  # (p,) along a lock from root 0 to tip 1, or any coordinate that the shader wants

    def on(self, displacement: Tensor) -> Tensor:
        """Positions (p, 3) on a head whose vertices have moved from the template by `displacement` (v, 3)."""
        return self.points + displacement[self.anchors].mean(1)


@dataclass(frozen=True)
class Style:
    """length and thickness in metres; part: where the hair parts; fall: how strongly it hangs; curl: radius of its waves."""

    length: float
    top: float
    side: float
    flow: str  # "crown" | "side" | "back" | "centre" | "tangled"
    fall: float = 0.0
    curl: float = 0.0
    fringe: float = 0.0
    bun: bool = False
    width: float = 0.011


STYLES = {
    "short": Style(0.045, 0.016, 0.007, "crown"),
    "side-parted": Style(0.075, 0.022, 0.007, "side"),
    "swept-back": Style(0.085, 0.022, 0.008, "back"),
    "curly": Style(0.045, 0.030, 0.022, "tangled", 0.15, 0.006, width=0.016),
    "afro": Style(0.040, 0.056, 0.046, "tangled", 0.0, 0.006, width=0.017),
    "chin-length": Style(0.20, 0.018, 0.016, "centre", 0.9),
    "fringed": Style(0.19, 0.018, 0.016, "centre", 0.9, fringe=0.075),
    "long": Style(0.30, 0.016, 0.014, "centre", 0.9),
    "wavy": Style(0.28, 0.022, 0.022, "centre", 0.75, 0.010),
    "tied-up": Style(0.10, 0.010, 0.008, "back", bun=True),
}


def hairline(azimuth: np.ndarray) -> np.ndarray:
    """Height z of the edge of the hair at an angle from straight ahead, in radians."""
    degrees = np.abs(np.degrees(azimuth))
    return np.interp(degrees, [0, 25, 42, 58, 72, 84, 90, 112, 122, 140, 180],
                     [.766, .765, .760, .748, .728, .700, .722, .724, .69, .65, .625])


def hat_line(azimuth: np.ndarray) -> np.ndarray:
    """Height z of a hat's edge."""
    return np.interp(np.abs(np.degrees(azimuth)), [0, 60, 100, 180], [.764, .752, .738, .700])


def _angles(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arctan2(directions[..., 0], -directions[..., 1]), np.arcsin(np.clip(directions[..., 2], -1, 1))


class Skull:
    """The template's radius around CENTRE by direction, and the nearest vertices of any point."""

    def __init__(self, head: HeadModel):
        skin = head.vertices_of("skin")
        skin = skin[(head.masks[skin, MASKS.index("ears")] < 0.25).cpu()] if head.template.device.type == "cpu" else skin
        self.index = skin.cpu().numpy()
        self.points = head.template[skin].cpu().numpy()
        offset = self.points - CENTRE
        self.reach = np.linalg.norm(offset, axis=1)
        self.towards = offset / self.reach[:, None]
        azimuth, height = np.linspace(-np.pi, np.pi, 73), np.linspace(-1.35, np.pi / 2, 49)
        a, h = np.meshgrid(azimuth, height, indexing="ij")
        grid = np.stack([np.sin(a) * np.cos(h), -np.cos(a) * np.cos(h), np.sin(h)], -1)
        close = np.exp((grid.reshape(-1, 3) @ self.towards.T - 1) * 400) * (self.reach > 0.05) + 1e-12
        self.radius_grid = (close * self.reach).sum(1).reshape(a.shape) / close.sum(1).reshape(a.shape)

    def radius(self, directions: np.ndarray) -> np.ndarray:
        azimuth, height = _angles(directions)
        column = (azimuth + np.pi) / (2 * np.pi) * 72
        row = np.clip((height + 1.35) / (np.pi / 2 + 1.35) * 48, 0, 47.999)
        i, j = np.clip(column.astype(int), 0, 71), row.astype(int)
        u, v = column - i, row - j
        g = self.radius_grid
        return (g[i, j] * (1 - u) + g[i + 1, j] * u) * (1 - v) + (g[i, j + 1] * (1 - u) + g[i + 1, j + 1] * u) * v

    def anchors(self, points: np.ndarray) -> Tensor:
        distance = ((points[:, None] - self.points[None]) ** 2).sum(-1)
        return torch.from_numpy(self.index[np.argpartition(distance, 4, axis=1)[:, :4]])


@lru_cache(maxsize=1)
def skull() -> Skull:
    return Skull(load_head())


def _unit(v: np.ndarray) -> np.ndarray:
    return v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-9)


def _roots(rng: np.random.Generator, count: int) -> np.ndarray:
    """Directions, evenly spread over the scalp: (n, 3)."""
    k = np.arange(count * 3) + rng.random()
    z, turn = 1 - 2 * (k + 0.5) / (count * 3 + 1), np.pi * (1 + 5**0.5) * k
    directions = np.stack([np.sqrt(1 - z**2) * np.cos(turn), np.sqrt(1 - z**2) * np.sin(turn), z], 1)
    azimuth, _ = _angles(directions)
    surface = CENTRE + directions * skull().radius(directions)[:, None]
    return directions[surface[:, 2] > hairline(azimuth) + rng.normal(0, 0.002, len(directions))]


def position_z(directions: np.ndarray) -> np.ndarray:
    """Height of the scalp's point at a direction."""
    return CENTRE[2] + directions[:, 2] * skull().radius(directions)


def _flow(style: Style, d: np.ndarray, part: float) -> np.ndarray:
    """Where hair lies from a root at direction d: (n, 3), tangent to the head."""
    side = np.where(d[:, :1] > part, 1.0, -1.0)
    field = {"crown": d - _unit(np.array([[0.05, 0.45, 0.9]])),
             "side": np.concatenate([side, np.full_like(side, 0.25), np.full_like(side, -0.15)], 1),
             "back": np.tile([[0.0, 1.0, -0.1]], (len(d), 1)),
             "centre": np.concatenate([side, np.full_like(side, 0.45), np.full_like(side, -0.3)], 1),
             "tangled": np.sin(d * 97.0 + np.roll(d, 1, axis=1) * 61.0)}[style.flow]
    return _unit(field - (field * d).sum(1, keepdims=True) * d)


@lru_cache(maxsize=None)
def hair(name: str, variant: int) -> Prop:
    """The locks of a style on the template head; `variant` 0..VARIANTS-1 changes the parting and the strands."""
    style, rng = STYLES[name], np.random.default_rng(variant * 1000 + sorted(STYLES).index(name))
    tangled = style.flow == "tangled"
    d = _roots(rng, 560 if tangled else 420)
    n = len(d)
    azimuth, height = _angles(d)
    part = 0.0 if style.flow == "centre" and variant % 2 else rng.uniform(-0.45, 0.45)
    layer = rng.uniform(0.25, 1.0, (n, 1))
    thickness = (style.side + (style.top - style.side) * np.clip(d[:, 2:], 0, 1) ** 0.7) * layer
    flow = _flow(style, d, part)
    front = np.abs(azimuth) < np.radians(42)
    fringe = front & (d[:, 2] < 0.82) & (style.fringe > 0)
    length = np.where(fringe, style.fringe, style.length) * rng.uniform(0.8, 1.1, n)
    if style.fall < 0.5:  # short at the nape
        length *= np.clip((position_z(d) - 0.635) / 0.07, 0.12, 1)
    flow[fringe] = _unit(np.stack([d[fringe, 0] * 0.3, -0.2 + 0 * d[fringe, 0], -1 + 0 * d[fringe, 0]], 1))
    position = CENTRE + d * (skull().radius(d)[:, None] + (thickness if tangled else 0.002))
    points, direction = [position], flow
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    for k in range(1, SEGMENTS + 1):
        share, towards = k / SEGMENTS, _unit(position - CENTRE)
        aside = np.clip((np.abs(_angles(towards)[0]) - 0.75) / 0.4, 0, 1)[:, None]
        pull = style.fall * share**0.5 * np.where(fringe[:, None], 1.0, aside)
        outward = np.clip((direction * towards).sum(1, keepdims=True), 0, None)
        direction = _unit(direction - outward * towards)  # hair lies on the head until it falls
        direction = _unit(direction * (1 - pull) + pull * np.array([0, 0, -1.0]) + rng.normal(0, 0.05, (n, 3)))
        sideways = _unit(np.cross(direction, towards))
        wave = (style.curl * length / style.length)[:, None] * (np.sin(phase + 9 * share) * sideways + np.cos(phase * 1.7 + 11 * share) * towards)
        position = position + direction * (length / SEGMENTS)[:, None] + wave
        towards, distance = _unit(position - CENTRE), np.linalg.norm(position - CENTRE, axis=1, keepdims=True)
        floor = skull().radius(towards)[:, None] + thickness * min(1.0, 0.35 + share * 1.6)
        snug = np.minimum(distance, floor + style.curl + 0.004) if style.fall < 0.5 else distance
        position = CENTRE + towards * np.maximum(snug, floor)
        points.append(position)
    curves = np.stack(points, 1)
    if style.fall < 0.5:  # a short lock that would lie on the shoulders is no lock
        curves = curves[curves[..., 2].min(1) > 0.625]
    return _ribbons(curves, style, rng)


def _ribbons(curves: np.ndarray, style: Style, rng: np.random.Generator) -> Prop:
    """Curves (n, k, 3) -> flat tapered strips that lie against the head."""
    n, k, _ = curves.shape
    tangent = _unit(np.gradient(curves, axis=1))
    across = _unit(np.cross(tangent, _unit(curves - CENTRE)))
    taper = np.interp(np.linspace(0, 1, k), [0, 0.2, 0.7, 1], [0.8, 1.0, 0.9, 0.15])
    half = across * (style.width * rng.uniform(0.7, 1.3, (n, 1)) * taper)[..., None] / 2 * (1.4 if style.curl else 1)
    strip = np.stack([curves - half, curves + half], 2)  # (n, k, 2, 3)
    index = np.arange(n * k * 2).reshape(n, k, 2)
    a, b, c, e = index[:, :-1, 0], index[:, :-1, 1], index[:, 1:, 1], index[:, 1:, 0]
    triangles = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, e], -1).reshape(-1, 3)])
    anchors = skull().anchors(curves[:, 0]).repeat_interleave(k * 2, 0)
    along = np.broadcast_to(np.linspace(0, 1, k)[None, :, None] + rng.uniform(-0.25, 0.25, (n, 1, 1)), (n, k, 2))
    points = strip.reshape(-1, 3)
    if style.bun:
        ball, faces = _ball(np.array([0.0, 0.062, 0.80]), 0.034)
        triangles = np.concatenate([triangles, faces + len(points)])
        anchors = torch.cat([anchors, skull().anchors(ball)])
        along = np.concatenate([along.ravel(), np.full(len(ball), 0.5)])
        points = np.concatenate([points, ball])
    return Prop(torch.from_numpy(points).float(), torch.from_numpy(triangles), anchors,
                torch.from_numpy(along.ravel().copy()).float())


def _grid_triangles(rows: int, columns: int) -> np.ndarray:
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])


def _ball(centre: np.ndarray, radius: float, n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, n), np.linspace(0.05, np.pi - 0.05, n), indexing="ij")
    bumps = 1 + 0.07 * np.sin(u * 6 + v * 9)
    points = np.stack([np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v)], -1) * bumps[..., None]
    return centre + radius * points.reshape(-1, 3), _grid_triangles(n, n)


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
    triangles, shade = _grid_triangles(*points.shape[:2]), np.broadcast_to(azimuth[:, None], points.shape[:2]).ravel()
    points = points.reshape(-1, 3)
    if kind == "cap":
        front = np.abs(azimuth) < 1.1
        rim = points.reshape(61, rows, 3)[front, -1]
        reach = 0.065 * np.clip(np.cos(azimuth[front] * 1.35), 0, 1) ** 0.6
        steps = np.linspace(0, 1, 6)
        brim = rim[:, None] + np.stack([0 * steps[None] + 0 * reach[:, None], -reach[:, None] * steps,
                                        np.broadcast_to(-0.016 * steps**2, (len(rim), 6))], -1)
        triangles = np.concatenate([triangles, _grid_triangles(len(rim), 6) + len(points)])
        points, shade = np.concatenate([points, brim.reshape(-1, 3)]), np.concatenate([shade, np.zeros(brim.size // 3)])
    return Prop(torch.from_numpy(points).float(), torch.from_numpy(triangles), skull().anchors(points),
                torch.from_numpy(shade.copy()).float())


@lru_cache(maxsize=None)
def hair_under_hat(name: str, variant: int) -> Prop:
    """The same hair without what a hat would cover."""
    full = hair(name, variant)
    towards = full.points.numpy() - CENTRE
    below = torch.from_numpy(full.points.numpy()[:, 2] < hat_line(np.arctan2(towards[:, 0], -towards[:, 1])) + 0.004)
    return Prop(full.points, full.triangles[below[full.triangles].all(1)], full.anchors, full.shade)


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
        tangent = _unit(np.gradient(path, axis=0))
        across = _unit(np.cross(tangent, np.array([0.0, -1.0, 0.05])))
        for normal in (across, np.array([0.0, 1.0, 0.0]) + 0 * across):
            band = np.stack([path - normal * 0.0013, path + normal * 0.0013], 1).reshape(-1, 3)
            triangles.append(_grid_triangles(len(path), 2) + total)
            points.append(band)
            total += len(band)
    points = np.concatenate(points)
    anchor = skull().anchors(np.array([[0.0, -0.145, 0.690]])).expand(len(points), 4)
    return Prop(torch.from_numpy(points).float(), torch.from_numpy(np.concatenate(triangles)), anchor,
                torch.zeros(len(points)))
