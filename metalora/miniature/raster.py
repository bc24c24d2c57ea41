"""A depth-buffer rasteriser in plain torch: many pictures at once, the same result on a CPU and on a GPU.

Triangles of all pictures lie in one list. Each is cut into the rows of pixels that it touches, each row into its pixels, and the
nearest triangle of a pixel wins a scatter-minimum over packed keys. So the work grows with the pixels that are covered, not with
the boxes around the triangles, which for strands of hair are sixty times as large.
"""

import torch
from torch import Tensor

_AT_ONCE = 300_000  # triangles
_SLACK = 1e-4  # px by which rows are longer, so that rounding leaves no hole between neighbours
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
    seen = ((high >= low).all(1)) & (points[..., 2] > 0).all(1) & (two_sided | (area < 0)) & (area.abs() > 1e-9)
    keys = torch.full((pictures * size * size,), _EMPTY, dtype=torch.int64, device=points.device)
    for part in seen.nonzero()[:, 0].split(_AT_ONCE):
        triangle, x, y = _pixels(planes[part], low[part], high[part])
        w0, w1 = (planes[part][triangle, k] for k in (0, 1))
        across, down = x + 0.5, y + 0.5
        w0, w1 = (w[:, 0] * across + w[:, 1] * down + w[:, 2] for w in (w0, w1))
        triangle = part[triangle]
        z = points[triangle][..., 2]
        depth = z[:, 2] + w0 * (z[:, 0] - z[:, 2]) + w1 * (z[:, 1] - z[:, 2])
        pixel = (picture[triangle] * size + y) * size + x
        keys.scatter_reduce_(0, pixel, ((depth * _DEPTH_STEPS).long() << 32) | triangle, "amin")
    empty = keys == _EMPTY
    index = torch.where(empty, -1, keys & 0xFFFFFFFF).view(pictures, size, size)
    depth = torch.where(empty, torch.inf, (keys >> 32).float() / _DEPTH_STEPS).view(pictures, size, size)
    return index, depth


def _pixels(planes: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels whose centres lie in the triangles, as three equal lists: which triangle, x, y.

    planes: (n, 2, 3) as `_edges` gives them; low, high: (n, 2) the first and last pixel of each in x and y.
    """
    triangle, row = _enumerate(high[:, 1] - low[:, 1] + 1)
    y = low[triangle, 1] + row
    third = torch.tensor([0.0, 0.0, 1.0], device=planes.device) - planes.sum(1)
    slope, at_zero = [], []
    for plane in (planes[:, 0], planes[:, 1], third):
        slope.append(plane[triangle, 0])
        at_zero.append(plane[triangle, 1] * (y + 0.5) + plane[triangle, 2])
    slope, at_zero = torch.stack(slope), torch.stack(at_zero)  # (3, rows): a weight along the row is slope x + at_zero
    root = -at_zero / slope
    begin = torch.where(slope > 0, root, -torch.inf).amax(0) - _SLACK
    end = torch.where(slope < 0, root, torch.inf).amin(0) + _SLACK
    outside = ((slope == 0) & (at_zero < 0)).any(0)
    first = torch.maximum((begin - 0.5).ceil(), low[triangle, 0].float())
    last = torch.minimum((end - 0.5).floor(), high[triangle, 0].float())
    count = torch.where(outside, 0.0, (last - first + 1).clamp(min=0)).long()
    of_row, column = _enumerate(count)
    return triangle[of_row], first[of_row].long() + column, y[of_row]


def _enumerate(count: Tensor) -> tuple[Tensor, Tensor]:
    """For groups of so many members (n,): of each member the group and its number in it."""
    group = torch.repeat_interleave(count)
    return group, torch.arange(len(group), device=count.device) - (count.cumsum(0) - count)[group]


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
