"""Pictures of people: geometry, camera, depth buffer, shadows, shading, background; and shards of them on disk."""

import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metalora.errors import MetaLoraError, compiling
from metalora.miniature import clothes, hair, headwear, shade, style
from metalora.miniature.backdrop import backdrop
from metalora.miniature.fused import Fused
from metalora.miniature.head import ACTIONS, PARTS, HeadModel, load_head, vertex_normals
from metalora.miniature.people import Person, Scene, person, scene, seeds
from metalora.miniature.props import CENTRE, Prop
from metalora.miniature.raster import barycentric, rasterize
from metalora.miniature.style import SUPERSAMPLE

EXPRESSIONS = {
    "neutral": dict(mouthSmileLeft=0.12, mouthSmileRight=0.12, eyeWideLeft=0.3, eyeWideRight=0.3),
    "smile": dict(eyeWideLeft=0.25, eyeWideRight=0.25, mouthSmileLeft=0.9, mouthSmileRight=0.9, cheekSquintLeft=0.4, cheekSquintRight=0.4),
    "laugh": dict(eyeWideLeft=0.2, eyeWideRight=0.2, mouthSmileLeft=1.0, mouthSmileRight=1.0, jawOpen=0.42, cheekSquintLeft=0.7, cheekSquintRight=0.7,
                  eyeSquintLeft=0.5, eyeSquintRight=0.5, mouthUpperUpLeft=0.55, mouthUpperUpRight=0.55),
    "surprised": dict(jawOpen=0.45, browInnerUp=0.8, browOuterUpLeft=0.8, browOuterUpRight=0.8, eyeWideLeft=0.7, eyeWideRight=0.7),
    "angry": dict(browDownLeft=1.4, browDownRight=1.4, eyeSquintLeft=0.3, eyeSquintRight=0.3, noseSneerLeft=0.45,
                  noseSneerRight=0.45, mouthPressLeft=0.5, mouthPressRight=0.5, mouthFrownLeft=0.4, mouthFrownRight=0.4),
    "sad": dict(eyeWideLeft=0.2, eyeWideRight=0.2, browInnerUp=1.1, mouthFrownLeft=0.9, mouthFrownRight=0.9, eyeSquintLeft=0.15, eyeSquintRight=0.15)}
PIVOT, CAMERA_DISTANCE, TARGET, HALF_FRAME = (0.0, -0.02, 0.615), 1.25, (0.0, -0.05, 0.655), 0.140
SHADOW_SIZE, SHADOW_REACH = 128, 0.22
# Template places of the five landmarks that recognisers align by: eyes and mouth corners as seen from the front.
NOSE_TIP, MOUTH_CORNERS = (0.0, -0.165, 0.663), ((-0.025, -0.135, 0.632), (0.025, -0.135, 0.632))


def rotation(yaw: float, pitch: float, roll: float) -> Tensor:
    """Degrees -> (3, 3): roll about the view axis, then pitch, then yaw about the vertical."""
    y, p, r = (math.radians(v) for v in (yaw, pitch, roll))
    about_z = torch.tensor([[math.cos(y), -math.sin(y), 0], [math.sin(y), math.cos(y), 0], [0, 0, 1]])
    about_x = torch.tensor([[1, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
    about_y = torch.tensor([[math.cos(r), 0, math.sin(r)], [0, 1, 0], [-math.sin(r), 0, math.cos(r)]])
    return about_z @ about_x @ about_y


def turn(by: Tensor, points: Tensor, picture: Tensor) -> Tensor:
    """The points (n, 3) times the matrix (3, 3) of their picture, which they come in the order of.

    A CPU would take longer to read a matrix a point; a GPU would take longer to be told how many points each picture has.
    """
    if points.is_cuda:
        return shade.turned(by[picture], points)
    return torch.cat([part @ matrix.T for part, matrix in zip(points.split(picture.bincount(minlength=len(by)).tolist()), by)])


class Stage:
    """The posed geometry of a batch in one list of vertices and one of triangles."""

    def __init__(self, pairs: list[tuple[Person, Scene]], head: HeadModel):
        self.pairs, self.head, self.device = pairs, head, head.template.device
        rest = self._rest()
        drawn = head.parts != PARTS.index("cloth")
        base, part = head.triangles[drawn], head.parts[drawn]
        kind = torch.tensor([shade.SKIN, shade.EYE, shade.LASH, shade.TEETH, -1], device=self.device)[part]
        points, places, triangles, materials, pictures, weights, occlusion, masks, along, owner = ([] for _ in range(10))
        total, plain = 0, torch.zeros(1, device=self.device)
        for k, (who, view) in enumerate(pairs):
            pieces = [(rest[k], head.template, base, kind, head.head_weight, head.occlusion, head.masks, plain.expand(len(rest[k])))]
            for prop, material in self._props(who, view):
                prop = prop.to(self.device)
                n = len(prop.points)
                weight = self._weight(prop, material)
                pieces.append((prop.on(rest[k] - head.template), prop.points, prop.triangles, torch.full((len(prop.triangles),), material, device=self.device),
                               weight, torch.full((n,), 0.9, device=self.device), prop.grain, prop.shade))
            for piece in pieces:
                points.append(piece[0]); places.append(piece[1]); triangles.append(piece[2] + total); materials.append(piece[3])
                weights.append(piece[4]); occlusion.append(piece[5]); masks.append(piece[6]); along.append(piece[7])
                pictures.append(torch.full((len(piece[2]),), k, device=self.device)); owner.append(torch.full((len(piece[0]),), k, device=self.device))
                total += len(piece[0])
        self.place, self.triangles, self.material = torch.cat(places), torch.cat(triangles), torch.cat(materials)
        self.picture, self.owner = torch.cat(pictures), torch.cat(owner)
        self.extra = torch.cat([torch.cat(occlusion)[:, None], torch.cat(masks), torch.cat(along)[:, None]], 1)
        self._pose(torch.cat(points), torch.cat(weights))

    def _rest(self) -> Tensor:
        """Vertices with shape, expression and the thickness of clothes, before the pose: (n, v, 3)."""
        head, device = self.head, self.device
        attributes = torch.tensor([who.attributes for who, _ in self.pairs], device=device)
        vertices = head.vertices(attributes, torch.tensor([who.shape for who, _ in self.pairs], device=device))
        drive = torch.zeros(len(self.pairs), len(ACTIONS))
        for k, (_, view) in enumerate(self.pairs):
            for action, amount in EXPRESSIONS[view.expression].items():
                drive[k, ACTIONS.index(action)] = amount
        vertices = vertices + (drive.to(device) @ head.actions.flatten(1)).view_as(vertices)
        outward = vertex_normals(head.template, head.triangles)
        lifted = {}
        for top in {view.top for _, view in self.pairs}:
            below = shade.step(-0.002, 0.004, clothes.neckline(top, head.template) - head.template[:, 2])
            lifted[top] = outward * (below * clothes.THICKNESS[top])[:, None]
        return vertices + torch.stack([lifted[view.top] for _, view in self.pairs])

    def _props(self, who: Person, view: Scene):
        if view.hair in hair.STYLES:
            variant = (who.seed * 7 + view.seed // 3) % hair.VARIANTS
            yield (headwear.hair_under_hat if view.hat else hair.hair)(view.hair, variant), shade.HAIR
        if view.glasses:
            yield headwear.glasses(view.glasses), shade.GLASSES
        if view.hat:
            yield headwear.hat(view.hat), shade.HAT
        if (pieces := clothes.pieces(view.top)) is not None:
            yield pieces, shade.CLOTH

    def _weight(self, prop: Prop, material: int) -> Tensor:
        """How much a thing turns with the head: hair that falls on the shoulders less, clothes as the neck beneath."""
        if material == shade.CLOTH:
            return self.head.head_weight[prop.anchors].mean(1)
        return 1 - 0.6 * ((0.62 - prop.points[:, 2]) / 0.10).clamp(0, 1) if material == shade.HAIR else torch.ones_like(prop.shade)

    def _pose(self, points: Tensor, weight: Tensor) -> None:
        """Turns heads on their necks and bodies a little with them, and finds eyes and landmarks."""
        pivot = torch.tensor(PIVOT, device=self.device)
        turn_head = torch.stack([rotation(v.yaw * 0.62, v.pitch, v.roll) for _, v in self.pairs]).to(self.device)
        turn_body = torch.stack([rotation(v.yaw * 0.38, 0, 0) for _, v in self.pairs]).to(self.device)
        def pose(p, w, k):
            turned = turn(turn_head, p - pivot, k) + pivot
            return turn(turn_body, p + w[:, None] * (turned - p), k)
        self.points = pose(points, weight, self.owner)
        self.normals = vertex_normals(self.points, self.triangles)
        n, v = len(self.pairs), len(self.head.template)
        starts = torch.searchsorted(self.owner, torch.arange(n, device=self.device))
        own = points[(starts[:, None] + torch.arange(v, device=self.device)).flatten()].view(n, v, 3)
        eye, template = self.head.vertices_of("eye"), self.head.template
        left, right = eye[template[eye, 0] > 0], eye[template[eye, 0] < 0]
        marks = [own[:, left].mean(1), own[:, right].mean(1)]
        for place in (NOSE_TIP, *MOUTH_CORNERS):
            near = (template - torch.tensor(place, device=self.device)).norm(dim=1).topk(4, largest=False).indices
            marks.append(own[:, near].mean(1))
        face = template[self.head.vertices_of("skin")]
        chosen = self.head.vertices_of("skin")[(face[:, 2] > 0.60) & (face[:, 2] < 0.775) & (face[:, 1] < -0.03) & (face[:, 0].abs() < 0.075)]
        everything = torch.cat([torch.stack(marks, 1), own[:, chosen]], 1)  # (n, 5 + f, 3)
        k = torch.arange(n, device=self.device).repeat_interleave(everything.shape[1])
        posed = pose(everything.flatten(0, 1), torch.ones(len(k), device=self.device), k).view(n, -1, 3)
        self.eyes, self.marks, self.face = posed[:, :2], posed[:, :5], posed[:, 5:]
        whole = turn_body @ turn_head
        gaze = torch.tensor([[-math.sin(v.gaze[0]), -math.cos(v.gaze[0]) * math.cos(v.gaze[1]), math.sin(v.gaze[1])] for _, v in self.pairs], device=self.device)
        self.gaze = torch.nn.functional.normalize((whole @ gaze[..., None])[..., 0], dim=1)
        self.turn, self.up = whole, whole[:, :, 2]
        self._drop_hidden_hair()

    def _drop_hidden_hair(self) -> None:
        """Leaves out the strands at the back of the head, which nobody sees from the front; they are half of all triangles."""
        corner = self.triangles[:, 0]
        outward = (self.turn[self.owner[corner], 1] * (self.place[corner] - torch.tensor(CENTRE, device=self.device, dtype=torch.float32))).sum(1)
        kept = (self.material != shade.HAIR) | (outward < 0.025) | (self.place[corner, 2] < 0.69)
        self.triangles, self.material, self.picture = self.triangles[kept], self.material[kept], self.picture[kept]


class Camera:
    """A long lens in front of each person: world metres -> pixels and depth."""

    def __init__(self, pairs: list[tuple[Person, Scene]], size: int, device: torch.device):
        self.size = size
        shift = torch.tensor([[v.shift[0], 0.0, v.shift[1]] for _, v in pairs], device=device)
        self.place = torch.tensor(TARGET, device=device) + shift + torch.tensor([0.0, -CAMERA_DISTANCE, 0.02], device=device)
        zoom = torch.tensor([v.zoom for _, v in pairs], device=device)
        self.focal = size / 2 / (HALF_FRAME / zoom) * CAMERA_DISTANCE

    def project(self, points: Tensor, picture: Tensor) -> Tensor:
        """(n, 3) world, (n,) picture -> (n, 3) x right, y down in pixels, depth in metres."""
        x, depth, z = (points - self.place[picture]).unbind(1)
        scale = self.focal[picture] / depth
        return torch.stack([self.size / 2 + x * scale, self.size / 2 - z * scale, depth], 1)


def _shadows(stage: Stage, palette: shade.Palette, position: Tensor, normal: Tensor, picture: Tensor) -> Tensor:
    """Share of the light's disc that a point sees (m, 1): a shadow map per picture, read at nine places."""
    n = len(stage.pairs)
    towards = palette.light_direction
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([[0.0, 0, 1]], device=stage.device).expand(n, 3), towards), dim=1)
    upward = torch.linalg.cross(towards, right)
    centre = torch.tensor([0.0, -0.03, 0.66], device=stage.device)
    axes = torch.stack([right, upward, towards], 1)
    def look(points, k):
        x, y, near = turn(axes, points - centre, k).unbind(1)
        return torch.stack([(x / SHADOW_REACH * 0.5 + 0.5) * SHADOW_SIZE, (y / SHADOW_REACH * 0.5 + 0.5) * SHADOW_SIZE, 2.0 - near], 1)
    solid = stage.material != shade.GLASSES
    seen = look(stage.points, stage.owner)[stage.triangles[solid]]
    _, depth = rasterize(seen, stage.picture[solid], n, SHADOW_SIZE, torch.ones(len(seen), dtype=torch.bool, device=stage.device))
    return _reached(look(position + normal * 0.004, picture), depth, picture)


@Fused
def _reached(here: Tensor, depth: Tensor, picture: Tensor) -> Tensor:
    """The share (m, 1) of nine places of the shadow map `depth` (n, y, x) around `here` (m, 3) at which nothing is nearer to the light."""
    total = torch.zeros(len(here), device=here.device)
    for dx in (-1.2, 0.0, 1.2):
        for dy in (-1.2, 0.0, 1.2):
            x, y = ((here[:, k] + d).long().clamp(0, SHADOW_SIZE - 1) for k, d in ((0, dx), (1, dy)))
            total += here[:, 2] - 0.007 < depth[picture, y, x]
    return total[:, None] / 9


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # a GPU's convolutions would round to 10 bits, and pencil lines are 14 times a difference
def render(pairs: list[tuple[Person, Scene]], size: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pictures uint8 (n, 3, size, size), face boxes (n, 4) and five landmarks (n, 5, 2), both in pixels."""
    stage = Stage(pairs, load_head(device))
    fine = size * SUPERSAMPLE
    camera, palette = Camera(pairs, fine, stage.device), shade.Palette(pairs, stage.device)
    corners = camera.project(stage.points, stage.owner)[stage.triangles]
    two_sided = stage.material >= shade.HAIR
    index, _ = rasterize(corners, stage.picture, len(pairs), fine, two_sided)
    pixel, weights = barycentric(corners, index)
    triangle = index.flatten()[pixel]
    vertex = stage.triangles[triangle]
    table = torch.cat([stage.points, stage.normals, stage.place, stage.extra], 1)
    mixed = torch.nn.functional.embedding_bag(vertex, table, mode="sum", per_sample_weights=weights)  # interpolates without temporaries
    picture, normal = stage.picture[triangle], torch.nn.functional.normalize(mixed[:, 3:6], dim=1)
    view = torch.nn.functional.normalize(camera.place[picture] - mixed[:, :3], dim=1)
    normal = torch.where(((normal * view).sum(1) < 0)[:, None] & two_sided[triangle][:, None], -normal, normal)
    material = shade.dressed(mixed[:, 6:9], picture, stage.material[triangle], [v.top for _, v in pairs])
    surface = shade.Surface(picture, material, mixed[:, :3], mixed[:, 6:9], normal, view, mixed[:, 9:10],
                            mixed[:, 10:14], mixed[:, 14], _shadows(stage, palette, mixed[:, :3], normal, picture))
    colour, gloss, glow = shade.albedo(surface, palette, stage.eyes, stage.gaze, stage.up, stage.turn)
    light = shade.illuminate(surface, palette, colour, gloss, glow)
    seeds = [who.seed * 9176 + v.seed for who, v in pairs]
    images = torch.stack([backdrop(v.background, size, seed, stage.device) for (_, v), seed in zip(pairs, seeds)])
    images = images.repeat_interleave(SUPERSAMPLE, 1).repeat_interleave(SUPERSAMPLE, 2)
    return style.develop(images, pixel, light, index >= 0, [v for _, v in pairs], seeds), *_annotate(stage, camera)


def _annotate(stage: Stage, camera: Camera) -> tuple[Tensor, Tensor]:
    n = len(stage.pairs)
    def project(points):
        k = torch.arange(n, device=stage.device).repeat_interleave(points.shape[1])
        return camera.project(points.flatten(0, 1), k).view(n, -1, 3)[..., :2] / SUPERSAMPLE
    face, marks = project(stage.face), project(stage.marks)
    marks = torch.cat([marks[:, [1, 0]], marks[:, 2:]], 1)  # the person's right eye is on the picture's left
    return torch.cat([face.amin(1), face.amax(1)], 1), marks


def write_shards(output: Path, people: range, scenes: int, size: int, device: str, per_shard: int = 400,
                 first_scene: int = 0) -> None:
    """Renders every scene of every person into shards; goes on where an earlier run stopped."""
    output.mkdir(parents=True, exist_ok=True)
    jobs = [(p, s) for s in range(first_scene, first_scene + scenes) for p in people]
    at_once = 8 if device == "cpu" else 64  # a processor's cache is small
    begin = time.time()
    for number, start in enumerate(range(0, len(jobs), per_shard)):
        target = output / f"part-{people.start:07d}-{first_scene:03d}-{number:05d}.safetensors"
        wanted = jobs[start:start + per_shard]
        if target.exists():
            _check_same(target, wanted, size)
            continue
        images, lines = [], []
        for low in range(0, len(wanted), at_once):
            pairs = [(who := person(p), scene(who, s)) for p, s in wanted[low:low + at_once]]
            pictures, boxes, marks = render(pairs, size, device)
            images.append(pictures.cpu())
            lines += [json.dumps({"person": w.seed, "domain": w.sex, "scene": v.seed, "box": [round(x, 2) for x in b],
                                  "keypoints": [[round(x, 2) for x in m] for m in k], "attributes": v.attributes})
                      for (w, v), b, k in zip(pairs, boxes.tolist(), marks.tolist())]
        target.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
        save_file({"images": torch.cat(images)}, target.with_suffix(".part"))
        os.replace(target.with_suffix(".part"), target)
        done = start + len(wanted)
        print(f"{done}/{len(jobs)} pictures, {done / (time.time() - begin):.1f}/s", flush=True)


def _check_same(shard: Path, wanted: list[tuple[int, int]], size: int) -> None:
    """MetaLoraError where the shard of an earlier run is of other people, scenes or sizes than are wanted now."""
    records = [json.loads(line) for line in shard.with_suffix(".jsonl").read_text().splitlines()]
    with safe_open(shard, "pt") as file:
        side = file.get_slice("images").get_shape()[-1]
    if side != size or [(record["person"], record["scene"]) for record in records] != [(p, scene(person(p), s).seed) for p, s in wanted]:
        raise MetaLoraError(f"{shard} holds other people, scenes or sizes than are to be rendered; choose another folder, or remove it.")


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature render`: see --help."""
    import argparse
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature render", description=write_shards.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--people", required=True, metavar="FIRST:END", help="seeds; from 1000000 on they are held out")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--first-scene", type=int, default=0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="compile the renderer first: worth it from some hundred pictures on; takes a C++ compiler")
    given = parser.parse_args(arguments)
    Fused.compiling = given.compiled
    torch.set_num_threads(given.threads)
    with compiling("leave out --compiled"):
        write_shards(given.output, seeds(given.people), given.scenes, given.size, given.device, first_scene=given.first_scene)
