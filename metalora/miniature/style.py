"""How a picture is made: a photo, a pencil drawing, an oil painting or a black-and-white photo, from the same rendered pictures.

All functions take display values 0..1 of pictures of one style, (n, 3, size, size), and textures by a seed for each picture.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from metalora.miniature.colour import display

SUPERSAMPLE = 2  # points that are shaded for a pixel, each way
LUMA = (0.30, 0.59, 0.11)
STROKE, SECTORS = 2.0, 8  # radius of a stroke in pixels of a picture 128 wide; sectors of the Kuwahara filter


@lru_cache(maxsize=8)
def _grain(size: int, device: str) -> Tensor:
    """White Gaussian noise, of which every picture takes its own window: (size + 64, size + 64)."""
    return torch.randn(size + 64, size + 64, generator=torch.Generator().manual_seed(11)).to(device)


def _noise(picture: Tensor, seeds: list[int]) -> Tensor:
    size = picture.shape[-1]
    tile = _grain(size, str(picture.device))
    return torch.stack([tile[s % 61:s % 61 + size, s // 61 % 61:s // 61 % 61 + size] for s in seeds])[:, None]


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (n, c, h, w), edges repeated."""
    reach = max(1, math.ceil(2.5 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0, device=x.device) / sigma) ** 2)
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    flat = pad(x.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    return conv2d(conv2d(flat, taps), taps.transpose(2, 3)).view_as(x)


def _luma(picture: Tensor) -> Tensor:
    return (picture * torch.tensor(LUMA, device=picture.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _grid(picture: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in units of 1/128 of the picture."""
    line = (torch.arange(picture.shape[-1], device=picture.device) + 0.5) * 128 / picture.shape[-1]
    return line[None, :], line[:, None]


def black_and_white(picture: Tensor, subject: Tensor, seeds: list[int]) -> Tensor:
    """A panchromatic film: more contrast in the middle tones, a little grain, darker corners."""
    grey = _luma(picture) ** 0.9
    grey = grey + 0.35 * (grey * grey * (3 - 2 * grey) - grey)
    x, y = _grid(picture)
    corner = 1 - 0.22 * (((x - 64) / 90) ** 2 + ((y - 64) / 90) ** 2)
    return (grey * corner + 0.015 * _noise(picture, seeds)).clamp(0, 1).expand_as(picture)


def pencil(picture: Tensor, subject: Tensor, seeds: list[int]) -> Tensor:
    """Graphite on paper: lines by extended differences of Gaussians (Winnemöller et al., 2012), tone by layers of hatching."""
    unit = picture.shape[-1] / 128
    grey, noise = _luma(picture), _noise(picture, seeds)
    narrow, wide = _blur(grey, 0.6 * unit), _blur(grey, 1.1 * unit)
    lines = ((wide * 1.02 - narrow - 0.006) * 14).clamp(0, 1)
    local = _blur(grey, 9 * unit)
    tone = (0.93 - narrow + 0.45 * (local - narrow)).clamp(0, 1) * (0.38 + 0.62 * subject)
    x, y = _grid(picture)
    wobble = 1.3 * _blur(noise, 5 * unit) * unit * 5
    hatch = sum(((tone - level).clamp(min=0) * 1.5) * (0.5 + 0.5 * torch.sin((x * math.cos(a) + y * math.sin(a)) * pitch + wobble))
                for a, level, pitch in ((0.75, 0.10, 1.25), (2.2, 0.38, 1.15), (1.45, 0.60, 1.35)))
    graphite = 0.52 * tone + 0.26 * hatch + 0.75 * lines * (0.5 + 0.5 * subject)
    tooth = 1 + 0.05 * noise  # graphite stays on the heights of the paper
    value = 0.965 + 0.004 * noise - 0.82 * (graphite * tooth).clamp(0, 1)
    paper = torch.tensor([1.0, 0.992, 0.975], device=picture.device).view(1, 3, 1, 1)
    return (value * paper).clamp(0, 1)


def _strokes(picture: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and sine of the direction of strokes, along the picture's edges, and how clear it is: (n, 1, size, size) each."""
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=picture.device) / 4
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gx, gy = conv2d(pad(_luma(picture), (1,) * 4, mode="replicate"), kernels).split(1, 1)
    e, f, g = _blur(torch.cat([gx * gx, gx * gy, gy * gy], 1), 1.8 * unit).split(1, 1)
    spread = ((e - g) ** 2 + 4 * f * f).sqrt()
    angle = 0.5 * torch.atan2(2 * f, e - g) + math.pi / 2
    return angle.cos(), angle.sin(), spread / (e + g + 1e-5)


def oil(picture: Tensor, subject: Tensor, seeds: list[int]) -> Tensor:
    """An oil painting: the anisotropic Kuwahara filter (Kyprianidis, Kang and Döllner, 2009) with bristles along its strokes, on canvas.

    Around each pixel lies an ellipse along the local edge; of its sectors the evenest counts most, so edges stay and the rest flattens.
    """
    unit = picture.shape[-1] / 128
    radius = STROKE * unit
    vivid = (picture + 0.22 * (picture - _luma(picture))).clamp(0, 1)
    cosine, sine, clear = _strokes(picture, unit)
    long, short = radius * (1 + 0.6 * clear), radius / (1 + 0.6 * clear)
    noise = _noise(picture, seeds)
    features = torch.cat([torch.ones_like(noise), vivid, _luma(vivid) ** 2], 1)
    n, c, size, _ = features.shape
    reach = math.ceil(1.5 * radius)
    padded, coarse = (pad(t, (reach,) * 4, mode="replicate") for t in (features, noise))
    turn = torch.arange(SECTORS, device=picture.device) * (2 * math.pi / SECTORS)
    turn_cos, turn_sin = turn.cos().view(1, -1, 1, 1), turn.sin().view(1, -1, 1, 1)
    total = torch.zeros(n, SECTORS, c, size, size, device=picture.device)
    bristle = torch.zeros_like(noise)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dx * dx + dy * dy > reach * reach:
                continue
            u, v = (cosine * dx + sine * dy) / long, (cosine * dy - sine * dx) / short
            near = torch.exp(-1.6 * (u * u + v * v))
            share = near * ((u * turn_cos + v * turn_sin).clamp(min=0) ** 2 + 0.04)
            window = (..., slice(reach + dy, reach + dy + size), slice(reach + dx, reach + dx + size))
            total.addcmul_(share[:, :, None], padded[window][:, None])
            bristle.addcmul_(torch.exp(-0.8 * u * u - 5 * v * v), coarse[window])
    mean = total[:, :, 1:] / total[:, :, :1]
    variance = (mean[:, :, 3:] - _luma(mean[:, :, :3].flatten(0, 1)).view(n, SECTORS, 1, size, size) ** 2).clamp(min=0)
    weight = 1 / (1 + (variance.sqrt() * 60) ** 4)
    painted = (mean[:, :, :3] * weight).sum(1) / weight.sum(1)
    painted = painted + 0.3 * subject * (vivid - painted)  # a portrait keeps the finer brush for the sitter
    x, y = _grid(picture)
    weave = torch.sin(x * 2.6) * torch.sin(y * 2.6)
    relief = bristle - torch.roll(bristle, (1, 1), (2, 3))  # paint lies in ridges, lit from the upper left
    return (painted * (1 + (0.018 * relief + 0.014 * bristle) * (1 - 0.4 * subject) + 0.02 * weave)).clamp(0, 1)


FILTERS = {"pencil": pencil, "oil": oil, "bw": black_and_white}


def finish(pictures: Tensor, subject: Tensor, styles: list[str], seeds: list[int]) -> Tensor:
    """Display values (n, 3, size, size) in each picture's own style; subject (n, 1, size, size): how much of a pixel is not background."""
    pictures = pictures.clone()
    for name, apply in FILTERS.items():
        chosen = [k for k, style in enumerate(styles) if style == name]
        if chosen:
            pictures[chosen] = apply(pictures[chosen], subject[chosen], [seeds[k] for k in chosen])
    return pictures


class Shot(Protocol):
    """What developing wants to know of a picture."""

    exposure: float
    style: str


def develop(background: Tensor, pixel: Tensor, light: Tensor, subject: Tensor, shots: Sequence[Shot], seeds: list[int]) -> Tensor:
    """Pictures uint8 (n, 3, size, size) from linear light at SUPERSAMPLE times their size.

    background (n, fine, fine, 3); of the points `pixel` (m,), counted through all pictures, it is replaced by `light` (m, 3);
    subject (n, fine, fine): which of them are not background.
    """
    n, size = len(shots), background.shape[1] // SUPERSAMPLE
    points = background.flatten(0, 2)
    points[pixel] = light
    exposure = torch.tensor([shot.exposure for shot in shots], device=points.device)
    images = points.view(n, size, SUPERSAMPLE, size, SUPERSAMPLE, 3).mean((2, 4)) * exposure[:, None, None, None]
    share = subject.float().view(n, 1, size, SUPERSAMPLE, size, SUPERSAMPLE).mean((3, 5))
    images = finish(display(images).permute(0, 3, 1, 2), share, [shot.style for shot in shots], seeds)
    return (images * 255).round().byte().contiguous()
