"""A depth-buffer rasteriser in plain torch: many pictures at once, the same result on a CPU and on a GPU.

Triangles of all pictures lie in one list. They are grouped by the size of their bounding box, each group tests all pixels
of its boxes in one tensor operation, and the nearest triangle of a pixel wins a scatter-minimum over packed keys.
"""

import torch
from torch import Tensor

_BOX_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512)
_EMPTY = torch.iinfo(torch.int64).max
_DEPTH_STEPS = 1_000_000  # per metre: a micrometre


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
    low = (points[..., :2].amin(1) - 0.5).ceil().clamp(min=0).long()
    high = (points[..., :2].amax(1) - 0.5).floor().clamp(max=size - 1).long()
    extent = (high - low + 1).amax(1)
    seen = ((high >= low).all(1)) & (points[..., 2] > 0).all(1) & (two_sided | (area < 0)) & (area.abs() > 1e-9)
    keys = torch.full((pictures * size * size,), _EMPTY, dtype=torch.int64, device=points.device)
    smaller = 0
    for side in _BOX_SIDES:
        chosen = (seen & (extent > smaller) & (extent <= side)).nonzero()[:, 0]
        smaller = side
        for part in chosen.split(max(1, 150_000 // side**2)):
            _scatter_boxes(keys, part, points, planes, low, high, picture, side, size)
    empty = keys == _EMPTY
    index = torch.where(empty, -1, keys & 0xFFFFFFFF).view(pictures, size, size)
    depth = torch.where(empty, torch.inf, (keys >> 32).float() / _DEPTH_STEPS).view(pictures, size, size)
    return index, depth


def _scatter_boxes(keys, part, points, planes, low, high, picture, side, size) -> None:
    offset = torch.arange(side, device=keys.device)
    x = low[part, 0, None] + offset + 0.5  # (n, side)
    y = low[part, 1, None] + offset + 0.5  # (n, side)
    plane = planes[part][..., None]
    first, second = ((plane[:, k, 0] * x)[:, None] + (plane[:, k, 1] * y + plane[:, k, 2])[..., None] for k in (0, 1))
    # Columns and rows beyond the picture's edge must lose too: their weights are made negative.
    first = torch.where((x > high[part, 0, None] + 1)[:, None] | (y > high[part, 1, None] + 1)[..., None], -1.0, first)
    inside = torch.minimum(torch.minimum(first, second), 1 - first - second) >= 0  # (n, side, side)
    row, dy, dx = inside.nonzero(as_tuple=True)
    triangle = part[row]
    z = points[triangle][..., 2]
    w0, w1 = first[row, dy, dx], second[row, dy, dx]
    depth = z[:, 2] + w0 * (z[:, 0] - z[:, 2]) + w1 * (z[:, 1] - z[:, 2])
    pixel = (picture[triangle] * size + low[triangle, 1] + dy) * size + low[triangle, 0] + dx
    keys.scatter_reduce_(0, pixel, ((depth * _DEPTH_STEPS).long() << 32) | triangle, "amin")


def barycentric(points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Covered pixels, as flat indices (m,), and their perspective-correct weights (m, 3) in their triangles."""
    size = index.shape[-1]
    flat = index.flatten()
    pixel = (flat >= 0).nonzero()[:, 0]
    corners = points[flat[pixel]]
    planes, _ = _edges(corners)
    x, y = (pixel % size).float() + 0.5, (pixel // size % size).float() + 0.5
    first, second = (planes[:, k, 0] * x + planes[:, k, 1] * y + planes[:, k, 2] for k in (0, 1))
    weights = torch.stack([first, second, 1 - first - second], 1) / corners[..., 2]
    return pixel, weights / weights.sum(1, keepdim=True)
