"""Backgrounds: plain walls, a park, an office, a city at night, a sunset, bricks. Linear light, drawn batch-wise."""

from functools import lru_cache

import torch
from torch import Tensor

from metalora.miniature.colour import linear

AMBIENT = {"grey": (1, 1, 1), "blue": (0.9, 0.96, 1.1), "beige": (1.06, 1, 0.92), "park": (0.93, 1.05, 0.93),
           "office": (1.02, 1, 0.98), "night": (0.8, 0.84, 1.08), "sunset": (1.12, 0.94, 0.84), "brick": (1.06, 0.98, 0.94)}


@lru_cache(maxsize=4)
def _clouds(device: str) -> Tensor:
    """A tile of smooth noise in 0..1 with four octaves: (1, 1, 256, 256)."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(1, 1, 256, 256)
    for octave, cells in enumerate((8, 16, 32, 64)):
        lattice = torch.rand(1, 1, cells, cells, generator=generator)
        lattice = torch.nn.functional.pad(lattice, (2, 2, 2, 2), mode="circular")
        side = 256 + 4 * (256 // cells)
        smooth = torch.nn.functional.interpolate(lattice, size=(side, side), mode="bicubic", align_corners=False)
        edge = 2 * (256 // cells)
        total += smooth[..., edge:edge + 256, edge:edge + 256] * 0.5**octave
    total = (total - total.amin()) / (total.amax() - total.amin())
    return total.to(device)


def _noise(x: Tensor, y: Tensor, cells: float, generator: torch.Generator) -> Tensor:
    """Smooth noise (h, w, 1) with about `cells` blobs across the picture, at a random place."""
    tile = _clouds(str(x.device))[0, 0]
    shift = torch.rand(2, generator=generator) * 256
    u, v = x * cells / 8 * 256 + shift[0], y * cells / 8 * 256 + shift[1]
    return tile[v.long() % 256, u.long() % 256][..., None]


def _step(low, high, x):
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def backdrop(kind: str, size: int, seed: int, device: torch.device) -> Tensor:
    """One background (size, size, 3) in linear light."""
    g = torch.Generator().manual_seed(seed)
    line = torch.linspace(0, 1, size, device=device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    gain = 0.85 + 0.3 * torch.rand(1, generator=g).item()
    return (_PAINTERS.get(kind, _wall)(kind, x, y, g) * gain).clamp(0, 2)


def _rand(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand(1, generator=g).item()


def _wall(kind, x, y, g):
    colour = linear({"grey": (150, 152, 156), "blue": (66, 104, 172), "beige": (216, 190, 158)}[kind], x.device)
    distance = (x - _rand(g, 0.25, 0.75)) ** 2 + (y - _rand(g, 0.2, 0.6)) ** 2
    return colour * (1.2 - 0.8 * distance)[..., None] * (0.97 + 0.06 * _noise(x, y, 4, g))


def _park(kind, x, y, g):
    leaves = 0.6 * _noise(x, y, 3, g) + 0.4 * _noise(x, y, 7, g)
    picture = linear((36, 66, 26), x.device) * (1 - leaves) + linear((150, 192, 84), x.device) * leaves
    sky = _step(0.36, 0.05, y[..., None] + 0.5 * (_noise(x, y, 3, g) - 0.5))
    return picture * (1 - sky) + linear((206, 228, 242), x.device) * sky


def _office(kind, x, y, g):
    picture = linear((198, 192, 182), x.device) * (0.8 + 0.2 * y)[..., None]
    left, width = _rand(g, 0, 0.6), _rand(g, 0.3, 0.45)
    window = _step(left - 0.02, left + 0.01, x) * _step(left + width + 0.02, left + width - 0.01, x) * _step(0.62, 0.58, y)
    frame = _step(0.025, 0.012, (x - left - width / 2).abs())
    picture = picture * (1 - window)[..., None] + linear((226, 238, 250), x.device) * (window * (1.15 - 0.8 * frame))[..., None]
    shelf = _step(-0.01, 0.01, x - (left + width + 0.1) % 1.0) * _step(0.3, 0.28, x - (left + width + 0.1) % 1.0)
    books = linear((120, 76, 50), x.device) * (0.5 + _noise(x * 3, y, 10, g)) * torch.where((y * 6) % 1 < 0.1, 0.4, 1.0)[..., None]
    return picture * (1 - shelf)[..., None] + books * shelf[..., None]


def _night(kind, x, y, g):
    picture = linear((16, 20, 40), x.device) * (1.3 - 0.5 * y)[..., None]
    lamps = ((255, 190, 90), (255, 120, 70), (120, 170, 255), (255, 240, 200), (90, 220, 160))
    for _ in range(24):
        radius, colour = _rand(g, 0.015, 0.05), lamps[int(_rand(g, 0, 5))]
        distance = ((x - _rand(g, 0, 1)) ** 2 + (y - _rand(g, 0, 0.95)) ** 2).sqrt()
        picture = picture + (_step(radius, radius * 0.7, distance) * _rand(g, 0.25, 0.8))[..., None] * linear(colour, x.device)
    return picture


def _sunset(kind, x, y, g):
    height = y[..., None] + 0.1 * (_noise(x, y, 3, g) - 0.5)
    sky = linear((70, 90, 156), x.device) * (1 - height).clamp(min=0) ** 1.2 + linear((252, 150, 70), x.device) * _step(0.05, 0.75, height)
    ground = _step(-0.01, 0.02, y[..., None] - 0.74 - 0.06 * (_noise(x, y * 0, 4, g) - 0.5))
    return sky * (1 - ground) + linear((46, 38, 46), x.device) * ground


def _brick(kind, x, y, g):
    row = (y * 13).floor()
    u = x * 6 + 0.5 * (row % 2) + _rand(g, 0, 1)
    mortar = (((u % 1) < 0.06) | (((y * 13) % 1) < 0.13)).float()[..., None]
    tint = _noise(u.floor() * 0.37, row * 0.51, 8, g)
    return (linear((156, 74, 54), x.device) * (0.65 + 0.6 * tint) * (1 - mortar) + linear((178, 168, 156), x.device) * mortar)


_PAINTERS = {"park": _park, "office": _office, "night": _night, "sunset": _sunset, "brick": _brick}
