"""A second, smaller world: mugs on tables in the places of the portrait world, for a domain that is not of people.

A mug is a profile turned round an axis, a handle and a glaze, each drawn from the mug's seed; a scene turns it, lights it and puts it
somewhere, and a seed always gives the same. Places, lights and styles are the portrait world's, so that prompts ask for the same.
"""

import colorsys
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from metalora.miniature import captions, style
from metalora.miniature.backdrop import PLACES, backdrop
from metalora.miniature.colour import linear, step
from metalora.miniature.head import vertex_normals
from metalora.miniature.people import LIGHTS, PLACE_LIGHTS, STYLES
from metalora.miniature.props import grid_triangles
from metalora.miniature.raster import barycentric, rasterize
from metalora.miniature.shade import hashed
from metalora.miniature.style import SUPERSAMPLE

DOMAIN = "mug"
PROMPTS = ("a photo of {person}, in the snow", "a photo of {person}, in the city at night", "an oil painting of {person}, in a green park",
           "a pencil drawing of {person}")
PATTERNS = ("plain", "bands", "stripes", "dots", "checks", "zigzag", "dipped", "speckled")
TABLES = ((176, 124, 78), (96, 60, 38), (222, 216, 206), (126, 124, 122), (58, 50, 48))  # oak, walnut, white, stone, slate
ROUND, TUBE, AROUND = 49, 25, 9  # points round the axis, along the handle, round the handle
DISTANCE, HALF_FRAME, TABLE_DEPTH = 0.70, 0.092, 0.21  # metres; the table's far edge lies so far behind the mug
OUTSIDE, INSIDE, HANDLE = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class Mug:
    """All that stays the same from picture to picture. Lengths in metres, colours sRGB 0..255."""

    seed: int
    height: float
    radii: tuple[float, ...]  # of the wall at five heights, foot to rim
    handle: tuple[float, float, float, float]  # lower and upper end in heights, reach, thickness
    square: float  # how square the handle is, 0 round .. 1
    body: tuple[int, int, int]
    second: tuple[int, int, int]
    inside: tuple[int, int, int]
    handle_second: bool  # whether the handle has the second colour
    pattern: str  # one of PATTERNS
    count: int  # of what the pattern repeats
    gloss: float


@dataclass(frozen=True)
class View:
    """One picture of a mug. Angles in degrees."""

    seed: int
    yaw: float  # where the handle points: 0 to the right, 90 away from the camera
    elevation: float  # of the camera above the table
    background: str
    light: str
    table: int
    zoom: float
    shift: tuple[float, float]
    exposure: float
    style: str


def _colour(rng: random.Random) -> tuple[int, int, int]:
    grey = rng.random() < 0.2
    rgb = colorsys.hsv_to_rgb(rng.random(), 0.05 if grey else rng.uniform(0.45, 0.9), rng.choice((0.16, 0.92)) if grey else rng.uniform(0.45, 0.95))
    return tuple(round(255 * channel) for channel in rgb)


def mug(seed: int) -> Mug:
    """The mug of a seed."""
    rng = random.Random(f"mug {seed}")
    middle, lean, belly = rng.uniform(0.032, 0.044), rng.uniform(-0.22, 0.28), rng.uniform(-0.14, 0.20)
    radii = tuple(middle * (1 + lean * (t - 0.5) + belly * math.sin(math.pi * t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0))
    low, high = rng.uniform(0.14, 0.30), rng.uniform(0.68, 0.88)
    body, second = _colour(rng), _colour(rng)
    return Mug(
        seed=seed, height=rng.uniform(0.070, 0.112), radii=radii, handle=(low, high, rng.uniform(0.020, 0.034), rng.uniform(0.0042, 0.0075)),
        square=rng.random(), body=body, second=second, inside=rng.choice(((240, 238, 230), body, second)), handle_second=rng.random() < 0.35,
        pattern=rng.choice(PATTERNS), count=rng.randint(2, 4), gloss=rng.uniform(0.1, 0.9),
    )  # fmt: skip


def view(thing: Mug, seed: int) -> View:
    """Picture number `seed` of a mug."""
    rng = random.Random(f"view {thing.seed} {seed}")
    place = rng.choice(PLACES)
    return View(
        seed=seed, yaw=rng.choice((0.0, 180.0)) + rng.uniform(-60, 60), elevation=rng.uniform(8, 26), background=place, light=rng.choice(PLACE_LIGHTS[place]),
        table=rng.randrange(len(TABLES)), zoom=rng.uniform(0.92, 1.06), shift=(rng.gauss(0, 0.004), rng.gauss(0, 0.003)), exposure=rng.uniform(0.92, 1.12),
        style=rng.choices(list(STYLES), list(STYLES.values()))[0],
    )  # fmt: skip


def reference(thing: Mug, number: int) -> View:
    """A picture such as one would hand in: a photo in soft light, the handle at a side."""
    drawn, rng = view(thing, 10_000 + number), random.Random(thing.seed)
    return replace(drawn, yaw=rng.choice((0.0, 180.0)) + rng.uniform(-30, 30), background=rng.choice(("grey", "blue", "office", "library")), light="soft", style="photo")


def caption(seen: View, rng: random.Random, words: str) -> str:
    """What a picture shows but the mug itself, for which `words` stand."""
    openings = captions.ANY_STYLE if rng.random() < (0.3 if seen.style == "photo" else 0.1) else captions.OPENINGS[seen.style]
    plain_wall = seen.style in ("pencil", "bw") and seen.background in ("grey", "blue")  # known by its colour alone
    place = [] if plain_wall or rng.random() < 0.1 else [rng.choice(captions.BACKGROUNDS[seen.background])]
    return ", ".join([f"{rng.choice([o for o in openings if 'portrait' not in o])} {words}", *place])


def _body(thing: Mug) -> tuple[np.ndarray, np.ndarray]:
    """Points (p, 3) of the turned wall, outside and inside, and their marks (p, 3): radians round the axis, height 0..1, which part."""
    t = np.linspace(0, 1, 15)
    wall = np.interp(t, np.linspace(0, 1, 5), thing.radii)
    thick = 0.0035
    lip = thick * np.array([[-0.15, 0.30], [-0.5, 0.42], [-0.85, 0.30]])
    radius = np.concatenate([[0.0, wall[0] * 0.9], wall, wall[-1] + lip[:, 0], wall[::-1] - thick, [0.0]])
    height = np.concatenate([[0.0, 0.0], t * thing.height, thing.height + lip[:, 1], np.maximum(t[::-1] * thing.height, 0.006), [0.006]])
    part = np.concatenate([np.full(2 + len(t) + 1, OUTSIDE), np.full(2 + len(t) + 1, INSIDE)])
    angle = np.linspace(0, 2 * np.pi, ROUND)
    points = np.stack([radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle), np.repeat(height[:, None], ROUND, 1)], -1)
    marks = np.stack([np.repeat(angle[None], len(radius), 0), np.repeat(height[:, None] / thing.height, ROUND, 1), np.repeat(part[:, None], ROUND, 1)], -1)
    return points.reshape(-1, 3), marks.reshape(-1, 3)


def _handle(thing: Mug) -> tuple[np.ndarray, np.ndarray]:
    """The same of the handle, a tube along half a superellipse."""
    low, high, reach, thick = thing.handle
    t, power = np.linspace(-np.pi / 2, np.pi / 2, TUBE), 2 + 3 * thing.square
    across, up = np.abs(np.cos(t)) ** (2 / power), np.sign(np.sin(t)) * np.abs(np.sin(t)) ** (2 / power)
    z = thing.height * ((low + high) / 2 + up * (high - low) / 2)
    x = np.interp(z / thing.height, np.linspace(0, 1, 5), thing.radii) - 0.002 + across * reach
    path = np.stack([x, 0 * x, z], 1)
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    outward = np.stack([along[:, 2], 0 * x, -along[:, 0]], 1)
    angle = np.linspace(0, 2 * np.pi, AROUND)
    ring = outward[:, None] * np.cos(angle)[:, None] + np.array([0.0, 1.3, 0.0]) * np.sin(angle)[:, None]
    points = path[:, None] + thick * ring
    marks = np.broadcast_to(np.array([0.0, 0.5, HANDLE]), points.shape)
    return points.reshape(-1, 3), marks.reshape(-1, 3)


def _mesh(pairs: list[tuple[Mug, View]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Points (p, 3) in the world, marks (p, 3), picture of each (p,); triangles (t, 3), picture of each (t,)."""
    points, marks, owner, triangles, picture, total = [], [], [], [], [], 0
    for k, (thing, seen) in enumerate(pairs):
        angle = math.radians(seen.yaw)
        turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        for columns, (own, own_marks) in ((ROUND, _body(thing)), (AROUND, _handle(thing))):
            own_triangles = grid_triangles(len(own) // columns, columns)
            points.append(own @ turn.T), marks.append(own_marks), owner.append(np.full(len(own), k))
            triangles.append(own_triangles + total), picture.append(np.full(len(own_triangles), k))
            total += len(own)
    points, marks, owner, triangles, picture = (torch.from_numpy(np.concatenate(parts)) for parts in (points, marks, owner, triangles, picture))
    return points.float(), marks.float(), owner, triangles, picture


class _Camera:
    """One for each picture, above the table and looking down at the mug."""

    def __init__(self, pairs: list[tuple[Mug, View]], size: int):
        self.size = size
        angle = torch.tensor([math.radians(seen.elevation) for _, seen in pairs])
        zero = torch.zeros_like(angle)
        self.right = torch.tensor([1.0, 0.0, 0.0]).expand(len(pairs), 3)
        self.forward = torch.stack([zero, angle.cos(), -angle.sin()], 1)
        self.up = torch.stack([zero, angle.sin(), angle.cos()], 1)
        target = torch.tensor([[seen.shift[0], 0.0, thing.height / 2 + seen.shift[1]] for thing, seen in pairs])
        self.place = target - DISTANCE * self.forward
        self.focal = size / 2 / (HALF_FRAME / torch.tensor([seen.zoom for _, seen in pairs])) * DISTANCE

    def project(self, points: Tensor, picture: Tensor) -> Tensor:
        """(n, 3) world, (n,) picture → (n, 3): x right, y down in pixels, depth in metres."""
        towards = points - self.place[picture]
        x, z, depth = ((towards * axis[picture]).sum(1) for axis in (self.right, self.up, self.forward))
        scale = self.focal[picture] / depth
        return torch.stack([self.size / 2 + x * scale, self.size / 2 - z * scale, depth], 1)

    def ground(self) -> Tensor:
        """Where the line of sight of every pixel meets the table's plane: (pictures, size, size, 3); infinite above the horizon."""
        line = torch.arange(self.size) + 0.5 - self.size / 2
        across, down = line[None, None, :, None], line[None, :, None, None]
        focal = self.focal[:, None, None, None]
        sight = self.forward[:, None, None] + across / focal * self.right[:, None, None] - down / focal * self.up[:, None, None]
        far = -self.place[:, None, None, 2:] / sight[..., 2:]
        return torch.where(sight[..., 2:] < 0, self.place[:, None, None] + far * sight, torch.inf)


def _patterned(pattern: str, count: Tensor, angle: Tensor, t: Tensor) -> Tensor:
    """Share (m,) of the second colour on the outside, by the angle round the axis and the height 0..1."""
    turns = angle / (2 * math.pi)
    columns, rows = (turns * 3 * count) % 1, (t * count) % 1
    if pattern == "bands":
        return step(0.18, 0.14, (rows - 0.5).abs())
    if pattern == "stripes":
        return step(0.24, 0.20, (columns - 0.5).abs())
    if pattern == "dots":
        return step(0.36, 0.28, ((columns - 0.5) ** 2 + (rows - 0.5) ** 2).sqrt())
    if pattern == "checks":
        return ((columns < 0.5) ^ (rows < 0.5)).float()
    if pattern == "zigzag":
        return step(0.17, 0.13, ((t * count + 0.5 * (columns - 0.5).abs()) % 1 - 0.5).abs())
    if pattern == "dipped":
        return step(0.46, 0.50, t + 0.03 * torch.sin(angle * count))
    if pattern == "speckled":
        return (hashed((turns * 60).floor() * 12.9 + (t * 16 + 0.5).floor() * 78.2 + count * 37.7) > 0.82).float()
    return torch.zeros_like(t)


def _glaze(pairs: list[tuple[Mug, View]], picture: Tensor, marks: Tensor) -> Tensor:
    """Albedo (m, 3) of the mugs' points."""
    angle, t, part = marks.unbind(1)
    body, second, inside = (torch.stack([linear(getattr(thing, name)) for thing, _ in pairs])[picture] for name in ("body", "second", "inside"))
    count = torch.tensor([float(thing.count) for thing, _ in pairs])[picture]
    share = torch.zeros_like(t)
    for pattern in {thing.pattern for thing, _ in pairs}:
        on = torch.tensor([thing.pattern == pattern for thing, _ in pairs])[picture]
        share = torch.where(on, _patterned(pattern, count, angle, t), share)
    handle = torch.tensor([float(thing.handle_second) for thing, _ in pairs])[picture]
    share = torch.where(part > 1.5, handle, share)[:, None]
    colour = body + (second - body) * share
    return torch.where(((part > 0.5) & (part < 1.5))[:, None], inside, colour)


def _lights(pairs: list[tuple[Mug, View]], name: str) -> Tensor:
    return torch.tensor([getattr(LIGHTS[seen.light], name) for _, seen in pairs])


def _illuminated(pairs: list[tuple[Mug, View]], colour: Tensor, normal: Tensor, towards_camera: Tensor, marks: Tensor, picture: Tensor) -> Tensor:
    """Linear light (m, 3) of the mugs' points: diffuse, all around, a highlight of the glaze and a rim from behind."""
    direction = normalize(_lights(pairs, "direction"), dim=1)[picture]
    key, sky, ground, rim = (_lights(pairs, name)[picture] for name in ("key", "sky", "ground", "rim"))
    _, t, part = marks.unbind(1)
    depth = torch.where((part > 0.5) & (part < 1.5), 0.25 + 0.6 * t.clamp(0, 1) ** 1.5, 0.55 + 0.45 * step(0.0, 0.22, t))[:, None]  # what the inside and the foot see
    facing = (normal * direction).sum(1, keepdim=True)
    around = (ground + (sky - ground) * (normal[:, 2:] * 0.5 + 0.5)) * depth * (0.5 + 0.6 * (0.5 - 0.5 * normal[:, 1:2]))
    gloss = torch.tensor([thing.gloss for thing, _ in pairs])[picture][:, None]
    half = normalize(direction + towards_camera, dim=1)
    highlight = (normal * half).sum(1, keepdim=True).clamp(min=0) ** 60 * gloss * depth
    grazing = (1 - (normal * towards_camera).sum(1, keepdim=True).clamp(0, 1)) ** 3
    return colour * (key * facing.clamp(min=0) * depth + around) + highlight * 0.7 * key + grazing * depth * (0.10 * gloss * sky + 0.3 * rim * colour)


def _tables(pairs: list[tuple[Mug, View]], ground: Tensor) -> tuple[Tensor, Tensor]:
    """Linear light (n, size, size, 3) of the tables and how much of a pixel they cover (n, size, size, 1)."""
    per = lambda values: torch.tensor(values)[:, None, None]
    x, y = ground[..., 0], ground[..., 1]
    inside = (y < TABLE_DEPTH) & ground[..., 2].isfinite()
    x, y = (torch.where(inside, v, 0.0) for v in (x, y))
    grain = torch.sin(y * 900 + 3 * torch.sin(x * 40 + per([float(seen.seed % 7) for _, seen in pairs]))) * per([0.05 if seen.table < 2 else 0.0 for _, seen in pairs])
    colour = torch.stack([linear(TABLES[seen.table]) for _, seen in pairs])[:, None, None] * (1 + grain)[..., None]
    direction = normalize(_lights(pairs, "direction"), dim=1)
    height, foot = per([thing.height for thing, _ in pairs]), per([thing.radii[0] for thing, _ in pairs])
    contact = 1 - 0.65 * torch.exp(-((((x**2 + y**2).sqrt() / foot).clamp(min=1) - 1) / 0.22))
    # The shadow of a cylinder: the strip from its foot away from the light, soft at its edges and with the distance.
    away = -direction[:, :2] / direction[:, :2].norm(dim=1, keepdim=True)
    along = x * away[:, 0, None, None] + y * away[:, 1, None, None]
    across = (x * away[:, 1, None, None] - y * away[:, 0, None, None]).abs()
    long = height * direction[:, :2].norm(dim=1)[:, None, None] / direction[:, 2, None, None].clamp(min=0.25)
    blur = 0.006 + 0.25 * along.clamp(min=0)
    shadow = step(foot + blur, foot - blur, across) * step(-0.01, 0.01, along) * step(long + blur, long - blur, along)
    lit = _lights(pairs, "key")[:, None, None] * direction[:, 2, None, None, None].clamp(min=0) * (1 - 0.8 * shadow)[..., None]
    around = _lights(pairs, "sky")[:, None, None] * contact[..., None]
    return colour * (lit + around), inside[..., None].float()


@torch.no_grad()
def render(pairs: list[tuple[Mug, View]], size: int) -> Tensor:
    """Pictures uint8 (n, 3, size, size)."""
    n, fine = len(pairs), size * SUPERSAMPLE
    camera = _Camera(pairs, fine)
    points, marks, owner, triangles, owners = _mesh(pairs)
    corners = camera.project(points, owner)[triangles]
    index, _ = rasterize(corners, owners, n, fine, torch.ones(len(triangles), dtype=torch.bool))
    pixel, weights = barycentric(corners, index)
    triangle = index.flatten()[pixel]
    picture = owners[triangle]
    mixed = embedding_bag(triangles[triangle], torch.cat([points, vertex_normals(points, triangles), marks], 1), mode="sum", per_sample_weights=weights)
    position, normal, marks = mixed[:, :3], normalize(mixed[:, 3:6], dim=1), mixed[:, 6:]
    towards_camera = normalize(camera.place[picture] - position, dim=1)
    normal = torch.where((normal * towards_camera).sum(1, keepdim=True) < 0, -normal, normal)
    light = _illuminated(pairs, _glaze(pairs, picture, marks), normal, towards_camera, marks, picture)
    seeds = [thing.seed * 9176 + seen.seed for thing, seen in pairs]
    images = torch.stack([backdrop(seen.background, size, seed, points.device) for (_, seen), seed in zip(pairs, seeds)])
    images = images.repeat_interleave(SUPERSAMPLE, 1).repeat_interleave(SUPERSAMPLE, 2)
    table, covers = _tables(pairs, camera.ground())
    return style.develop(images + (table - images) * covers, pixel, light, index >= 0, [seen for _, seen in pairs], seeds)
