"""Places: ten painted panoramas, out of focus as behind a portrait lens, of which every picture gets a piece of its own.

A panorama is painted once in linear light with highlights far above white, then blurred with a disc: so bright points become
the discs that a lens makes of them. Painters get pixel coordinates in panorama heights, x to the right and y down.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from metalora.miniature.colour import linear, step

HEIGHT, WIDTH, VARIANTS = 224, 560, 3
# Radius of the blur, in pixels of a panorama.
BLUR = {"grey": 0, "blue": 0, "brick": 2, "park": 5, "office": 2, "night": 6, "sunset": 3, "beach": 2, "snow": 2, "library": 2}


def _rand(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand(1, generator=g).item()


def _noise(g: torch.Generator, cells: float, stretch: float = 1.0, octaves: int = 3) -> Tensor:
    """Smooth noise in 0..1, `cells` blobs high and `stretch` times longer than high: (HEIGHT, WIDTH)."""
    total = torch.zeros(HEIGHT, WIDTH)
    for octave in range(octaves):
        rows = max(2, int(cells * 2**octave))
        columns = max(2, int(cells * 2**octave * WIDTH / HEIGHT / stretch))
        lattice = torch.rand(1, 1, rows + 1, columns + 1, generator=g)
        total += interpolate(lattice, size=(HEIGHT, WIDTH), mode="bicubic", align_corners=True)[0, 0] * 0.55**octave
    return (total - total.amin()) / (total.amax() - total.amin())


def _mix(a: Tensor, b: Tensor | tuple, share: Tensor) -> Tensor:
    """Blends pictures or sRGB colours by a share (HEIGHT, WIDTH)."""
    a, b = (linear(c) if isinstance(c, tuple) else c for c in (a, b))
    return a + (b - a) * share[..., None]


def _cells(x: Tensor, g: torch.Generator, count: int) -> Tensor:
    """A random number in 0..1 for every whole part of x."""
    return torch.rand(count, generator=g)[x.floor().long() % count]


def _wall(colour):
    def paint(x, y, g):
        far = (x - _rand(g, 0.9, 1.6)).abs() * 0.75 + (y - 0.45) ** 2 * 0.9
        return linear(colour) * (1.35 - 0.9 * far.clamp(max=1.1))[..., None] * (0.96 + 0.08 * _noise(g, 2))[..., None]
    return paint


def _brick(x, y, g):
    row = y * 17
    u = x * 7 + 0.5 * (row.floor() % 2)
    mortar = torch.maximum(step(0.10, 0.02, u % 1), step(0.20, 0.06, row % 1))
    tint = _cells(row.floor() * 31 + u.floor(), g, 997)
    brick = _mix((150, 62, 42), (196, 104, 74), tint) * (0.55 + 0.75 * _noise(g, 5))[..., None]
    return _mix(brick, (186, 174, 160), mortar) * (0.8 + 0.35 * _noise(g, 1.5))[..., None]


def _park(x, y, g):
    leaves = _noise(g, 9, octaves=4)
    crown = _mix((26, 62, 18), (128, 182, 52), leaves * step(0.1, 0.5, 0.5 * y + 0.5 * _noise(g, 3)))
    sky = step(0.60, 0.72, _noise(g, 12, octaves=3)) * step(0.60, 0.25, y)
    picture = _mix(crown, linear((214, 236, 230)) * 2.6, sky)
    for _ in range(9):
        at, half = _rand(g, 0, WIDTH / HEIGHT), _rand(g, 0.012, 0.035)
        trunk = step(half, half * 0.6, (x - at - 0.04 * (y - 0.5)).abs()) * step(0.72, 0.68, y) * step(0.02, 0.2, y)
        picture = _mix(picture, (62, 46, 32), trunk * 0.9)
    lawn = _mix((86, 148, 38), (172, 206, 82), _noise(g, 4, stretch=5))
    return _mix(picture, lawn, step(0.60, 0.66, y + 0.04 * _noise(g, 4)))


def _office(x, y, g):
    period = 0.80
    u = (x + _rand(g, 0, period)) % period
    picture = _mix((206, 202, 194), (172, 168, 162), step(0, 1, y)) * (0.95 + 0.1 * _noise(g, 2))[..., None]
    pane = step(0.03, 0.04, u) * step(0.39, 0.38, u) * step(0.10, 0.11, y) * step(0.74, 0.73, y)
    towers = 0.30 + 0.25 * _cells(u * 22, g, 97)
    outside = _mix((176, 208, 240), (116, 140, 168), (y > towers).float()) * 1.5
    outside = _mix(outside, (240, 244, 250), ((y * 26) % 1 < 0.35).float() * step(0.34, 0.30, y))  # a blind, half down
    picture = _mix(picture, outside, pane)
    frame = pane * torch.maximum(step(0.012, 0.006, (u - 0.21).abs()), step(0.012, 0.006, (y - 0.42).abs()))
    picture = _mix(picture, (238, 238, 236), frame)
    shelf = step(0.46, 0.465, u) * step(0.76, 0.755, u) * step(0.06, 0.065, y)
    picture = _mix(picture, (206, 196, 182), shelf)
    binder = _cells((u * 28).floor() * 13 + (y * 4).floor() * 7, g, 89)
    hues = torch.stack([linear(c) for c in ((40, 66, 110), (232, 230, 224), (150, 154, 160), (44, 46, 50), (222, 220, 212), (190, 62, 48))])
    body = shelf * step(0.475, 0.478, u) * step(0.745, 0.742, u) * (((y * 4) % 1) > 0.30).float() * (((y * 4) % 1) < 0.93).float() * (binder > 0.18).float()
    picture = _mix(picture, hues[(binder * 6).long().clamp(max=5)] * (0.35 + 0.65 * step(0.0, 0.25, (u * 28) % 1))[..., None], body)
    desk, screen = step(0.80, 0.81, y), torch.maximum((u - 0.22).abs() / 0.135, (y - 0.67).abs() / 0.095)
    picture = _mix(_mix(picture, (128, 92, 62), desk * (u < 0.46).float()), (34, 36, 40), step(1.0, 0.97, screen))
    return _mix(picture, linear((70, 140, 220)) * 1.3, step(0.9, 0.87, screen))


def _lights(picture, g, count, low, high, strength, colours):
    """Bright points, which the lens will make discs of, at heights low..high."""
    row = ((low + (high - low) * torch.rand(count, generator=g)) * HEIGHT).long().clamp(1, HEIGHT - 2)
    column = (torch.rand(count, generator=g) * WIDTH).long()
    hue = torch.stack([linear(c) for c in colours])[torch.randint(len(colours), (count,), generator=g)]
    picture[row, column] += hue * strength * (0.3 + torch.rand(count, 1, generator=g))
    return picture


def _night(x, y, g):
    picture = _mix((16, 20, 52), (54, 38, 74), y)
    column = (x * 7).floor()
    roof = 0.12 + 0.42 * _cells(column, g, 61)
    tower = (y > roof).float() * (((x * 7) % 1) > 0.06).float()
    picture = _mix(picture, (20, 22, 38), tower)
    window = tower * (((x * 49) % 1) > 0.45).float() * (((y * 30) % 1) > 0.5).float() * (y < 0.8).float()
    lit = (_cells((x * 49).floor() * 17 + (y * 30).floor() * 29, g, 499) > 0.84).float()
    picture = _mix(picture, linear((255, 206, 120)) * 2.0, window * lit)
    picture = _mix(picture, (34, 28, 40), step(0.86, 0.9, y))
    lamps = ((255, 190, 90), (255, 96, 60), (110, 160, 255), (255, 236, 190), (80, 220, 170), (255, 90, 170))
    return _lights(picture, g, 120, 0.10, 0.98, 60.0, lamps)


def _sunset(x, y, g):
    sky = _mix((62, 70, 140), (214, 96, 110), step(0.0, 0.38, y))
    sky = _mix(sky, linear((255, 168, 66)) * 1.25, step(0.28, 0.60, y))
    clouds = step(0.52, 0.75, _noise(g, 6, stretch=5)) * step(0.62, 0.2, y)
    sky = _mix(sky, linear((255, 128, 92)) * 1.3, clouds * 0.85)
    for at in torch.arange(0.2, WIDTH / HEIGHT, 1.0).tolist():  # farther apart than a piece is wide: never two
        distance = ((x - at - _rand(g, 0, 0.08)) ** 2 + (y - 0.565) ** 2).sqrt()
        sky = sky + linear((255, 190, 90)) * (0.5 * torch.exp(-distance / 0.09))[..., None]
        sky = _mix(sky, linear((255, 236, 170)) * 3, step(0.052, 0.045, distance))
    water = _mix((236, 128, 84), (60, 50, 92), step(0.62, 0.95, y)) * (0.7 + 0.6 * _noise(g, 14, stretch=9))[..., None]
    picture = _mix(sky, water, (y > 0.63).float())
    hill = y - 0.63 + 0.13 * _noise(g, 2, stretch=2)
    return _mix(picture, (52, 34, 58), step(0.0, 0.01, hill) * (y < 0.635).float())


def _beach(x, y, g):
    sky = _mix((84, 158, 226), (196, 226, 242), step(0.0, 0.45, y))
    sky = _mix(sky, (250, 250, 250), step(0.55, 0.8, _noise(g, 4, stretch=3)) * step(0.42, 0.25, y))
    sea = _mix((20, 98, 158), (70, 188, 192), step(0.44, 0.64, y)) * (0.85 + 0.3 * _noise(g, 16, stretch=8))[..., None]
    shore = y + 0.06 * (_noise(g, 3, stretch=3) - 0.5)
    foam = torch.maximum(step(0.022, 0.008, (shore - 0.645).abs()), 0.6 * step(0.010, 0.004, (shore - 0.575).abs()))
    sand = _mix((222, 192, 140), (244, 222, 178), _noise(g, 8, stretch=2))
    picture = _mix(sky, sea, step(0.435, 0.44, y))
    return _mix(_mix(picture, sand, step(0.65, 0.66, shore)), (252, 252, 250), foam)


def _snow(x, y, g):
    picture = _mix((150, 186, 222), (226, 236, 246), step(0.0, 0.5, y))
    ridge = 0.20 + 0.26 * _noise(g, 2, stretch=1.5, octaves=4)
    peak = _mix((120, 142, 180), (240, 246, 252), step(0.42, 0.62, _noise(g, 7)))
    picture = _mix(picture, peak, step(0.0, 0.01, y - ridge))
    picture = _mix(picture, (236, 242, 250), step(0.50, 0.53, y))
    for _ in range(26):
        at, top, low = _rand(g, 0, WIDTH / HEIGHT), _rand(g, 0.16, 0.42), _rand(g, 0.54, 0.72)
        t = (y - top) / (low - top)
        half = 0.075 * t * (0.65 + 0.35 * ((t * 6) % 1)) * (low - top) / 0.3
        fir = ((x - at).abs() < half).float() * (t > 0).float() * (t < 1).float()
        snowed = fir * (((t * 6) % 1) > 0.45).float() * step(0.3, 0.5, _noise(g, 20, octaves=1))
        picture = _mix(_mix(picture, (40, 72, 62), fir), (238, 244, 250), snowed)
    ground = _mix((196, 214, 238), (250, 250, 252), _noise(g, 5, stretch=3))
    return _mix(picture, ground, step(0.62, 0.70, y)) * 1.1


def _library(x, y, g):
    rows = 5.4
    level, row = (y * rows) % 1, (y * rows).floor()
    wide = 34.0
    book = (x * wide + 0.45 * torch.sin(x * 61 + row * 5)).floor() + row * 211
    hues = ((128, 26, 30), (26, 60, 112), (30, 92, 60), (176, 128, 52), (92, 54, 30), (214, 200, 168), (70, 36, 84), (182, 78, 34), (34, 34, 40))
    colour = torch.stack([linear(c) for c in hues])[(_cells(book, g, 797) * len(hues)).long()]
    within = (x * wide + 0.45 * torch.sin(x * 61 + row * 5)) % 1
    round_back = 0.45 + 0.75 * (1 - (2 * within - 1) ** 2)
    gold = ((level - 0.38).abs() < 0.025).float() * (_cells(book, g, 797) > 0.45).float()
    spine = _mix(colour * round_back[..., None], (224, 186, 96), gold * 0.8)
    tall = 0.10 + 0.22 * _cells(book, g, 797)
    picture = _mix((30, 20, 14), spine, (level > tall).float())
    board = torch.maximum((level > 0.90).float(), step(0.022, 0.016, ((x + _rand(g, 0, 1)) % 0.72 - 0.36).abs()))
    return _mix(picture, (122, 78, 44), board) * (0.8 + 0.5 * _noise(g, 1.5))[..., None]


PAINTERS = {"grey": _wall((150, 152, 156)), "blue": _wall((58, 98, 170)), "brick": _brick, "park": _park, "office": _office,
            "night": _night, "sunset": _sunset, "beach": _beach, "snow": _snow, "library": _library}
PLACES = tuple(PAINTERS)


@lru_cache(maxsize=64)
def _panorama(place: str, variant: int, device: str) -> Tensor:
    """One painted panorama as the lens sees it: (3, HEIGHT, WIDTH) in linear light."""
    g = torch.Generator().manual_seed(PLACES.index(place) * VARIANTS + variant)
    y, x = torch.meshgrid((torch.arange(HEIGHT) + 0.5) / HEIGHT, (torch.arange(WIDTH) + 0.5) / HEIGHT, indexing="ij")
    picture = PAINTERS[place](x, y, g).clamp(0).permute(2, 0, 1)[:, None]
    radius = BLUR[place]
    if radius:
        across = torch.arange(-radius, radius + 1.0)
        disc = (radius + 0.5 - (across[:, None] ** 2 + across**2).sqrt()).clamp(0, 1)
        picture = conv2d(pad(picture, (radius,) * 4, mode="replicate"), (disc / disc.sum())[None, None])
    return picture[:, 0].to(device)


def backdrop(place: str, size: int, seed: int, device: torch.device) -> Tensor:
    """One background (size, size, 3) in linear light: a piece of a panorama, its place, scale, side and tint by the seed."""
    g = torch.Generator().manual_seed(seed)
    variant, side = int(_rand(g, 0, VARIANTS)), int(HEIGHT * _rand(g, 0.68, 0.92))
    top, left = int(_rand(g, 0.2, 0.8) * (HEIGHT - side)), int(_rand(g, 0, WIDTH - side))
    piece = _panorama(place, variant, str(device))[:, top:top + side, left:left + side]
    tint = torch.tensor([_rand(g, 0.94, 1.06) for _ in range(3)]) * _rand(g, 0.85, 1.12)
    if _rand(g, 0, 1) < 0.5:
        piece = piece.flip(2)
    picture = interpolate(piece[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    return (picture.permute(1, 2, 0) * tint.to(device)).clamp(0, 3)
