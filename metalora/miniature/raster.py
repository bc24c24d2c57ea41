"""A depth-buffer rasteriser in plain torch: many pictures at once, the same result on a CPU and on a GPU.

Triangles of all pictures lie in one list. Each is cut into the rows of pixels that it touches, each row into its pixels, and the
nearest triangle of a pixel wins a scatter-minimum over packed keys. So the work grows with the pixels that are covered, not with
the boxes around the triangles, which for strands of hair are sixty times as large.
"""

from functools import partial

import torch
from torch import Tensor

from metalora.miniature.fused import Fused

_AT_ONCE = {"cpu": 20_000, "cuda": 300_000}  # triangles; what is worked out for a CPU's stays in its cache
_SLACK = 1e-4  # px by which rows are longer, so that rounding leaves no hole between neighbours
_EMPTY = torch.iinfo(torch.int64).max
_DEPTH_STEPS = 1_000_000  # per metre: a micrometre


@Fused
def _edges(points: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of the barycentric weights of corners 0 and 1 as planes over the picture: (n, 2, 3), and the signed area."""
    (ax, ay), (bx, by), (cx, cy) = (points[:, k, :2].unbind(1) for k in range(3))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    safe = torch.where(area.abs() < 1e-9, torch.full_like(area, 1e-9), area)
    first = torch.stack([by - cy, cx - bx, bx * cy - by * cx], 1)
    second = torch.stack([cy - ay, ax - cx, cx * ay - cy * ax], 1)
    return torch.stack([first, second], 1) / safe[:, None, None], area


def rasterize(points: Tensor, picture: Tensor, pictures: int, size: int, two_sided: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest triangle at every pixel centre.

    points: (n, 3 corners, 3) x and y in pixels, y down, depth in metres; picture: (n,) which picture a triangle is in;
    two_sided: (n,) whether the back of it shows; fronts run counter-clockwise as seen. Returns the triangle's index (pictures, size, size), -1 where there is
    none, and the depth in metres, infinite where there is none.
    """
    planes, area = _edges(points)
    low, high = _bounds(points, size)
    seen = ((high >= low).all(1)) & (points[..., 2] > 0).all(1) & (two_sided | (area < 0)) & (area.abs() > 1e-9)
    keys = torch.full((pictures * size * size,), _EMPTY, dtype=torch.int64, device=points.device)
    for part in seen.nonzero()[:, 0].split(_AT_ONCE[points.device.type]):
        own = planes[part]
        third = torch.tensor([0.0, 0.0, 1.0], device=points.device) - own.sum(1, keepdim=True)
        weights = torch.cat([own, third], 1).permute(1, 2, 0).contiguous()  # (3, 3, n)
        triangle, x, y = _pixels(weights, low[part].T.contiguous(), high[part].T.contiguous())
        pixel, key = _keys(triangle, x, y, weights, points[part, :, 2].T.contiguous(), picture[part], part, size)
        keys.scatter_reduce_(0, pixel, key, "amin")
    empty = keys == _EMPTY
    index = torch.where(empty, -1, keys & 0xFFFFFFFF).view(pictures, size, size)
    depth = torch.where(empty, torch.inf, (keys >> 32).float() / _DEPTH_STEPS).view(pictures, size, size)
    return index, depth


@Fused
def _bounds(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first and last pixel of each triangle in x and y, (n, 2) each."""
    places = points[..., :2] - 0.5
    return places.amin(1).ceil().clamp(min=0).long(), places.amax(1).floor().clamp(max=size - 1).long()


@Fused
def _keys(triangle: Tensor, x: Tensor, y: Tensor, weights: Tensor, depths: Tensor, picture: Tensor, part: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each pixel lies in the list of all, and a key that is the smaller the nearer it is; the key's lower half names the triangle.

    triangle, x, y: what `_pixels` found; weights, depths (3, n), picture, part (n,): of the triangles, part their numbers among all.
    """
    of = partial(torch.index_select, dim=0, index=triangle)
    across, down = x + 0.5, y + 0.5
    first, second = (of(a).mul_(across).add_(of(b).mul_(down)).add_(of(c)) for a, b, c in weights[:2].unbind())
    z0, z1, z2 = depths.unbind()
    depth = of(z2) + first * of(z0 - z2) + second * of(z1 - z2)
    return (of(picture) * size + y) * size + x, ((depth * _DEPTH_STEPS).long() << 32) | of(part)


def _pixels(weights: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels whose centres lie in the triangles, as three equal lists: which triangle, x, y.

    weights: (3, 3, n) each corner's as a plane over the picture; low, high: (2, n) the first and last pixel of each in x and y.
    """
    rows = high[1] - low[1] + 1
    triangle = torch.repeat_interleave(rows)
    y, first, count = _spans(triangle, _before(rows), weights, low, high)
    row = torch.repeat_interleave(count)
    x = torch.arange(len(row), device=rows.device) + (first - _before(count))[row]
    return triangle[row], x, y[row]


@Fused
def _spans(triangle: Tensor, before: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of all triangles, as one list: y, the first x inside, and how many are inside.

    triangle: (m,) whose row it is; before: (n,) how many rows lie before each triangle's.
    """
    of = partial(torch.index_select, dim=0, index=triangle)
    y = torch.arange(len(triangle), device=triangle.device) + of(low[1] - before)
    begin, end, outside, down = None, None, None, y + 0.5
    for a, b, c in weights.unbind():  # along the row a weight is slope x + at_zero
        slope, at_zero = of(a), of(b).mul_(down).add_(of(c))
        root = -at_zero / slope
        left, right = torch.where(slope > 0, root, -torch.inf), torch.where(slope < 0, root, torch.inf)
        never = (slope == 0) & (at_zero < 0)
        begin, end, outside = (left, right, never) if begin is None else (torch.maximum(begin, left), torch.minimum(end, right), outside | never)
    first = torch.maximum((begin - _SLACK - 0.5).ceil(), of(low[0].float()))
    last = torch.minimum((end + _SLACK - 0.5).floor(), of(high[0].float()))
    return y, first.long(), torch.where(outside, 0.0, (last - first + 1).clamp(min=0)).long()


def _before(count: Tensor) -> Tensor:
    """How many members all earlier groups have, for groups of so many (n,)."""
    return count.cumsum(0) - count


def barycentric(points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Covered pixels, as flat indices (m,), and their perspective-correct weights (m, 3) in their triangles."""
    size = index.shape[-1]
    flat = index.flatten()
    pixel = (flat >= 0).nonzero()[:, 0]
    return pixel, _weights(points[flat[pixel]], pixel, size)


@Fused
def _weights(corners: Tensor, pixel: Tensor, size: int) -> Tensor:
    """Perspective-correct weights (m, 3) of pixels in their triangles (m, 3, 3)."""
    planes, _ = _edges(corners)
    x, y = (pixel % size).float() + 0.5, (pixel // size % size).float() + 0.5
    first, second = (planes[:, k, 0] * x + planes[:, k, 1] * y + planes[:, k, 2] for k in (0, 1))
    weights = torch.stack([first, second, 1 - first - second], 1) / corners[..., 2]
    return weights / weights.sum(1, keepdim=True)
