"""Hair on the template head.

Hair is over a thousand strands: thin ribbons that start on the scalp, follow the style's flow, gather into locks, fall, and stay
outside the head. Everything is made once on the template; on a person it moves with the scalp under its roots.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from metalora.miniature.props import CENTRE, Prop, angles, ball, skull, unit

VARIANTS = 4
LOCKS = 150  # guides that the strands gather to


@dataclass(frozen=True)
class Style:
    """How hair is cut and combed. Lengths in metres; thickness is how far it stands off the scalp."""

    length: float
    top: float  # thickness on top of the head
    side: float  # thickness at the sides
    flow: str  # "crown" | "side" | "back" | "centre" | "tangled"
    fall: float = 0.0  # how strongly it hangs
    curl: float = 0.0  # radius of its waves
    turns: float = 1.4  # waves along a strand
    fringe: float = 0.0  # length over the brow
    bun: bool = False
    width: float = 0.0042  # of a strand at its widest
    clump: float = 0.5  # how far strands gather to locks
    roots: int = 1000
    segments: int = 6  # of a strand


STYLES = {
    "short": Style(0.040, 0.015, 0.006, "crown"),
    "side-parted": Style(0.085, 0.024, 0.007, "side", clump=0.6, segments=8),
    "swept-back": Style(0.095, 0.022, 0.008, "back", clump=0.6, segments=8),
    "curly": Style(0.060, 0.030, 0.020, "tangled", 0.15, 0.0065, 2.4, clump=0.25, width=0.0048, segments=8),
    "afro": Style(0.050, 0.058, 0.050, "tangled", 0.0, 0.0050, 3.0, clump=0.1, width=0.0052, roots=1300),
    "chin-length": Style(0.19, 0.020, 0.018, "centre", 0.9, clump=0.45, segments=11, width=0.0062),
    "fringed": Style(0.19, 0.020, 0.018, "centre", 0.9, fringe=0.072, clump=0.35, segments=11, width=0.0062),
    "long": Style(0.31, 0.017, 0.015, "centre", 0.9, clump=0.45, segments=16, width=0.0070, roots=1100),
    "wavy": Style(0.30, 0.022, 0.024, "centre", 0.75, 0.0075, 1.9, clump=0.65, segments=16, width=0.0066, roots=1100),
    "tied-up": Style(0.13, 0.010, 0.007, "back", bun=True, clump=0.6, segments=8),
}


def hairline(azimuth: np.ndarray) -> np.ndarray:
    """Height z of the edge of the hair at an angle from straight ahead, in radians."""
    degrees = np.abs(np.degrees(azimuth))
    return np.interp(degrees, [0, 25, 42, 58, 72, 84, 90, 112, 122, 140, 180],
                     [.768, .767, .760, .748, .728, .700, .722, .724, .69, .65, .625])


def _roots(rng: np.random.Generator, count: int) -> np.ndarray:
    """Directions, evenly spread over the scalp: (n, 3)."""
    k = np.arange(count * 3) + rng.random()
    z, turn = 1 - 2 * (k + 0.5) / (count * 3 + 1), np.pi * (1 + 5**0.5) * k
    directions = np.stack([np.sqrt(1 - z**2) * np.cos(turn), np.sqrt(1 - z**2) * np.sin(turn), z], 1)
    surface = CENTRE + directions * skull().radius(directions)[:, None]
    return directions[surface[:, 2] > hairline(angles(directions)[0]) + rng.normal(0, 0.0025, len(directions))]


def _flow(style: Style, d: np.ndarray, part: float) -> np.ndarray:
    """Where hair lies from a root at direction d: (n, 3), tangent to the head."""
    side = np.where(d[:, :1] > part, 1.0, -1.0)
    field = {"crown": d - unit(np.array([[0.05, 0.45, 0.9]])),
             "side": np.concatenate([side, np.full_like(side, 0.25), np.full_like(side, -0.15)], 1),
             "back": np.tile([[0.0, 1.0, -0.1]], (len(d), 1)),
             "centre": np.concatenate([side, np.full_like(side, 0.45), np.full_like(side, -0.3)], 1),
             "tangled": np.sin(d * 97.0 + np.roll(d, 1, axis=1) * 61.0)}[style.flow]
    return unit(field - (field * d).sum(1, keepdims=True) * d)


@lru_cache(maxsize=None)
def hair(name: str, variant: int) -> Prop:
    """The strands of a style on the template head; `variant` 0..VARIANTS-1 changes the parting and the strands."""
    style, rng = STYLES[name], np.random.default_rng(variant * 1000 + sorted(STYLES).index(name))
    d = _roots(rng, style.roots)
    part = 0.0 if style.flow == "centre" and variant % 2 else rng.uniform(-0.45, 0.45)
    guide = _guides(rng, d, part)
    curves = _grow(style, rng, d, part, guide)
    along = np.linspace(0, 1, style.segments + 1)[None, :, None]
    gathered = curves[guide] + 0.3 * (curves[:, :1] - curves[guide][:, :1])
    curves = curves + style.clump * along**1.3 * (gathered - curves)
    if style.curl:
        curves = curves + style.curl * np.clip(3 * along, 0, 1) * _wave(style, rng, curves, guide)
    if style.fall < 0.5:  # a short strand that would lie on the shoulders is no strand
        keep = curves[..., 2].min(1) > 0.625
        curves, guide = curves[keep], guide[keep]
    tone = np.clip(0.5 + 0.22 * rng.normal(size=len(d))[guide] + 0.18 * rng.normal(size=len(curves)), 0, 1)
    return _ribbons(curves, tone, style, rng)


def _guides(rng: np.random.Generator, d: np.ndarray, part: float) -> np.ndarray:
    """For each root the nearest of the guides on its side of the parting: (n,)."""
    chosen = rng.choice(len(d), min(LOCKS, len(d)), replace=False)
    likeness = d @ d[chosen].T - 2.0 * ((d[:, :1] > part) != (d[chosen, 0] > part)[None])
    return chosen[likeness.argmax(1)]


def _grow(style: Style, rng: np.random.Generator, d: np.ndarray, part: float, guide: np.ndarray) -> np.ndarray:
    """Curves (n, style.segments + 1, 3) from roots at directions d."""
    n, tangled = len(d), style.flow == "tangled"
    azimuth, _ = angles(d)
    layer = rng.uniform(0.3, 1.0, (n, 1))
    thickness = (style.side + (style.top - style.side) * np.clip(d[:, 2:], 0, 1) ** 0.7) * layer
    flow = _flow(style, d, part)
    fringe = (np.abs(azimuth) < np.radians(44)) & (d[:, 2] < 0.82) & (style.fringe > 0)
    length = np.where(fringe, style.fringe, style.length) * rng.uniform(0.82, 1.08, n)
    if style.fall < 0.5:  # short at the nape
        height = CENTRE[2] + d[:, 2] * skull().radius(d)
        length *= np.clip((height - 0.635) / 0.07, 0.15, 1)
    flow[fringe] = unit(np.stack([d[fringe, 0] * 0.3, -0.2 + 0 * d[fringe, 0], -1 + 0 * d[fringe, 0]], 1))
    stray = rng.normal(0, 0.16, (n, 3))[guide] + rng.normal(0, 0.05, (n, 3))  # locks lie a little askew
    direction = unit((d * 1.2 if tangled else 0) + flow + stray)
    position = CENTRE + d * (skull().radius(d)[:, None] + 0.001)
    points = [position]
    for k in range(1, style.segments + 1):
        share, towards = k / style.segments, unit(position - CENTRE)
        aside = np.clip((np.abs(angles(towards)[0]) - 0.75) / 0.4, 0, 1)[:, None]
        pull = style.fall * share**0.5 * np.where(fringe[:, None], 1.0, aside)
        if not tangled:  # hair lies on the head until it falls
            direction = unit(direction - np.clip((direction * towards).sum(1, keepdims=True), 0, None) * towards)
        direction = unit(direction * (1 - pull) + pull * np.array([0, 0, -1.0]) + rng.normal(0, 0.1 / style.segments**0.5, (n, 3)))
        position = position + direction * (length / style.segments)[:, None]
        towards, distance = unit(position - CENTRE), np.linalg.norm(position - CENTRE, axis=1, keepdims=True)
        surface = skull().radius(towards)[:, None]
        floor = surface + thickness * (0.2 if tangled else min(1.0, 0.3 + share * 1.6))
        most = surface + thickness if style.fall < 0.5 else distance
        position = CENTRE + towards * np.maximum(np.minimum(distance, most), floor)
        points.append(position)
    return np.stack(points, 1)


def _wave(style: Style, rng: np.random.Generator, curves: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """Offsets of a helix about each curve, in step within a lock: (n, k, 3)."""
    n, k, _ = curves.shape
    phase = rng.uniform(0, 2 * np.pi, n)[guide] + rng.normal(0, 0.35, n)
    turn = phase[:, None] + 2 * np.pi * style.turns * np.linspace(0, 1, k)[None]
    towards = unit(curves - CENTRE)
    sideways = unit(np.cross(np.gradient(curves, axis=1), towards))
    return np.sin(turn)[..., None] * sideways + 0.6 * np.cos(turn)[..., None] * towards


def _ribbons(curves: np.ndarray, tone: np.ndarray, style: Style, rng: np.random.Generator) -> Prop:
    """Curves (n, k, 3) as tapered strips that lie against the head."""
    n, k, _ = curves.shape
    tangent = unit(np.gradient(curves, axis=1))
    across = unit(np.cross(tangent, unit(curves - CENTRE)) + 1e-3 * rng.normal(size=(n, 1, 3)))
    taper = np.interp(np.linspace(0, 1, k), [0, 0.2, 0.75, 1], [0.9, 1.0, 0.9, 0.25])
    half = across * (style.width * rng.uniform(0.75, 1.25, (n, 1)) * taper)[..., None] / 2
    strip = np.stack([curves - half, curves + half], 2)  # (n, k, 2, 3)
    index = np.arange(n * k * 2).reshape(n, k, 2)
    a, b, c, e = index[:, :-1, 0], index[:, :-1, 1], index[:, 1:, 1], index[:, 1:, 0]
    triangles = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, e], -1).reshape(-1, 3)])
    anchors = skull().anchors(curves[:, 0]).repeat_interleave(k * 2, 0)
    along = np.broadcast_to(np.linspace(0, 1, k)[None, :, None], (n, k, 2)).ravel()
    grain = np.concatenate([tangent, np.broadcast_to(tone[:, None, None], (n, k, 1))], -1)
    grain = np.broadcast_to(grain[:, :, None], (n, k, 2, 4)).reshape(-1, 4)
    points = strip.reshape(-1, 3)
    if style.bun:
        knot, faces = ball(np.array([0.0, 0.062, 0.80]), 0.036)
        triangles = np.concatenate([triangles, faces + len(points)])
        anchors = torch.cat([anchors, skull().anchors(knot)])
        along = np.concatenate([along, np.full(len(knot), 0.6)])
        around = unit(np.cross(knot - knot.mean(0), np.array([0.3, -0.4, 1.0])))
        grain = np.concatenate([grain, np.concatenate([around, 0.5 + 0.3 * np.sin(300 * knot[:, 2:])], 1)])
        points = np.concatenate([points, knot])
    return Prop(torch.from_numpy(points).float(), torch.from_numpy(triangles), anchors, torch.from_numpy(along.copy()).float(),
                torch.from_numpy(grain.copy()).float())
