"""Trains a small face detector with SCRFD's outputs on pictures pasted into canvases.

Two anchors share a cell's centre and are taught alike; suppression of doubles leaves one. Source of the layout:
"Sample and Computation Redistribution for Efficient Face Detection" (Guo et al. 2021) as InsightFace decodes it.
"""

import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from metalora.miniature.facepack import DETECTOR_FILE, Analyser, disturbed, export_onnx, overlaps
from metalora.miniature.shards import Shards, load_shards
from metalora.miniature.training import Job, Trainer, products, write_result
from metalora.train import send

STRIDES, ANCHORS = (8, 16, 32), 2
LEVELS = ((0.0, 30.0), (20.0, 60.0), (44.0, 1e9))  # longer side of the faces, px, that each stride is to find
RADIUS = 0.75  # a cell is to find a face whose centre is within so many strides of its own
CANVASES = (128, 160)
EMPTY_SHARE = 0.12
CHECKED_CANVASES = 300
KEYPOINTS = 16.0  # what their distance weighs in the loss: faces are aligned by them, and a recogniser errs more where they do


def _block(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class Detector(nn.Module):
    """Strided convolutions, one pass back down, and three heads per stride.

    Input (n, 3, h, w) in [-1, 1], h and w multiples of 32. `levels` gives raw maps; `forward` what ONNX is to hold.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 48, 64, 64), neck: int = 48):
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(_block(3, a, 2), _block(a, b, 2), _block(b, b, 1), _block(b, c, 2), _block(c, c, 1))
        self.down = nn.ModuleList([nn.Sequential(_block(c, d, 2), _block(d, d, 1)),
                                   nn.Sequential(_block(d, e, 2), _block(e, e, 1))])
        self.lateral = nn.ModuleList([nn.Conv2d(width, neck, 1) for width in (c, d, e)])
        self.smooth = nn.ModuleList([_block(neck, neck, 1) for _ in STRIDES])
        self.heads = nn.ModuleList([nn.Conv2d(neck, ANCHORS * 15, 1) for _ in STRIDES])
        for head in self.heads:  # faces are rare among cells: start from a score of one in fifty
            nn.init.constant_(head.bias[:ANCHORS], -4.0)

    def levels(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each stride: scores before the sigmoid (n, cells * 2, 1), distances (n, cells * 2, 4) and points
        (n, cells * 2, 10), both in strides from the cell's centre."""
        maps = [self.stem(images)]
        for down in self.down:
            maps.append(down(maps[-1]))
        merged = [lateral(each) for lateral, each in zip(self.lateral, maps, strict=True)]
        for index in (1, 0):
            merged[index] = merged[index] + F.interpolate(merged[index + 1], scale_factor=2.0, mode="nearest")
        outputs = []
        for smooth, head, each in zip(self.smooth, self.heads, merged, strict=True):
            raw = head(smooth(each)).permute(0, 2, 3, 1)  # (n, rows, columns, anchors * 15)
            scores, boxes, points = raw.split([ANCHORS, ANCHORS * 4, ANCHORS * 10], dim=-1)
            outputs.append((scores.flatten(1, 3).unsqueeze(-1), F.softplus(boxes).reshape(len(images), -1, 4),
                            points.reshape(len(images), -1, 10)))
        return outputs

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """SCRFD's nine outputs for one picture: scores, boxes, points, each for strides 8, 16, 32."""
        scores, boxes, points = zip(*self.levels(images), strict=True)
        return (*(score.sigmoid().reshape(-1, 1) for score in scores), *(box.reshape(-1, 4) for box in boxes),
                *(point.reshape(-1, 10) for point in points))


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A training picture (3, size, size) uint8, its faces' boxes (k, 4) and keypoints (k, 5, 2), px."""

    image: torch.Tensor
    boxes: torch.Tensor
    keypoints: torch.Tensor


def _backdrop(shards: Shards, size: int, rng: random.Random) -> torch.Tensor:
    """Black as padding is, one colour, soft noise, or a scrap of some picture's corner, stretched."""
    kind = rng.randrange(4)
    if kind == 0:
        return torch.zeros(3, size, size, dtype=torch.uint8)
    if kind == 3:
        scrap = shards.images[rng.randrange(len(shards)), :, : rng.randint(6, 24), : rng.randint(6, 14)].float()
    else:
        cells = 1 if kind == 1 else rng.choice((3, 8, 24))
        scrap = torch.from_numpy(np.random.default_rng(rng.getrandbits(32)).uniform(0, 255, (3, cells, cells))).float()
    return F.interpolate(scrap[None], size=(size, size), mode="bilinear", align_corners=False)[0].to(torch.uint8)


def _paste(canvas: torch.Tensor, tile: tuple[int, int, int], shards: Shards, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts a random picture at a random size into the square tile (left, top, side), cut at its edges.

    Returns the face's box, cut likewise, and keypoints.
    """
    left, top, side = tile
    index = rng.randrange(len(shards))
    record, source = shards.records[index], shards.images[index]
    edge = max(12, round(side * rng.uniform(0.35, 1.0) * rng.choice((1.0, 1.0, 1.5))))
    scale = edge / source.shape[-1]
    box = torch.tensor(record["box"]) * scale
    points = torch.tensor(record["keypoints"]) * scale
    image = F.interpolate(source[None].float(), size=(edge, edge), mode="bilinear", align_corners=False, antialias=True)[0]
    if rng.random() < 0.5:
        image = image.flip(-1)
        box = torch.stack([edge - box[2], box[1], edge - box[0], box[3]])
        points = torch.stack([edge - points[[1, 0, 2, 4, 3], 0], points[[1, 0, 2, 4, 3], 1]], dim=1)
    x, y = (_offset(side, edge, box[axis].item(), box[axis + 2].item(), rng) for axis in (0, 1))
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + edge, side), min(y + edge, side)
    canvas[:, top + y0:top + y1, left + x0:left + x1] = image[:, y0 - y:y1 - y, x0 - x:x1 - x].to(torch.uint8)
    shift = torch.tensor([left + x, top + y])
    corners = (box + shift.repeat(2)).view(2, 2)
    cut = corners.clamp(torch.tensor([left, top]), torch.tensor([left + side, top + side]))
    return cut.flatten(), points + shift


def _paste_distractors(canvas: torch.Tensor, shards: Shards, rng: random.Random) -> None:
    """Up to three rectangles without a face: a picture on a margin is no face, whatever its colour."""
    size = canvas.shape[-1]
    for _ in range(rng.randrange(4)):
        width, height = (rng.randint(size // 8, size) for _ in range(2))
        left, top = rng.randint(0, size - width), rng.randint(0, size - height)
        canvas[:, top:top + height, left:left + width] = _backdrop(shards, size, rng)[:, :height, :width]


def _offset(side: int, edge: int, low: float, high: float, rng: random.Random) -> int:
    """Where a picture of `edge` px begins so that its face, from `low` to `high`, mostly lies in `side` px."""
    slack = 0.1 * (high - low)
    first, last = -low - slack, side - high + slack
    return round(rng.uniform(min(first, last), max(first, last)))


def draw_canvas(shards: Shards, size: int, rng: random.Random) -> Canvas:
    """One, two, or up to four people on a backdrop; now and then none."""
    canvas = _backdrop(shards, size, rng)
    split = 0 if rng.random() < EMPTY_SHARE else rng.choices((1, 2, 3), (0.65, 0.2, 0.15))[0]
    cells = [(column * size // split, row * size // split, size // split)
             for row in range(split) for column in range(split)]
    _paste_distractors(canvas, shards, rng)
    faces = [_paste(canvas, cell, shards, rng) for cell in rng.sample(cells, min(len(cells), rng.randint(1, 4)))]
    boxes = torch.stack([face[0] for face in faces]) if faces else torch.zeros(0, 4)
    points = torch.stack([face[1] for face in faces]) if faces else torch.zeros(0, 5, 2)
    return Canvas(canvas, boxes, points)


def assign(canvas: Canvas, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell of a stride, the index of the face that it is to find or -1, and the cell's centre (cells, 2) px."""
    stride, (low, high) = STRIDES[level], LEVELS[level]
    count = canvas.image.shape[-1] // stride
    rows, columns = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    centres = torch.stack([columns, rows], dim=-1).reshape(-1, 2).float() * stride
    faces = torch.full((len(centres),), -1)
    for index, box in enumerate(canvas.boxes):
        side = (box[2:] - box[:2]).max()
        if low <= side < high:
            near = (centres - (box[:2] + box[2:]) / 2).abs().amax(dim=1) <= RADIUS * stride
            faces[near] = index
    return faces, centres


def box_overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of distances (n, 4) to left, top, right, bottom from the same centres."""
    common = (torch.minimum(first[:, :2], second[:, :2]) + torch.minimum(first[:, 2:], second[:, 2:])).clamp(min=0)
    areas = [(each[:, :2] + each[:, 2:]).clamp(min=0).prod(dim=1) for each in (first, second)]
    intersection = common.prod(dim=1)
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=1e-6)


def detector_loss(detector: Detector, images: torch.Tensor, canvases: list[Canvas]) -> torch.Tensor:
    """Focal loss of the scores, overlap of the boxes, distance of the keypoints in box sizes."""
    total, positives = torch.zeros(()), 0
    with products(images.device):
        levels = detector.levels(images)
    for level, maps in enumerate(levels):
        scores, boxes, points = (each.float().cpu() for each in maps)  # where the targets are made
        stride = STRIDES[level]
        assigned = [assign(canvas, level) for canvas in canvases]
        faces = torch.stack([face for face, _ in assigned]).repeat_interleave(ANCHORS, dim=1)  # (n, cells * 2)
        centres = assigned[0][1].repeat_interleave(ANCHORS, dim=0)
        wanted = (faces >= 0).float()
        raw = scores.squeeze(-1)
        entropy = F.binary_cross_entropy_with_logits(raw, wanted, reduction="none")
        total = total + (entropy * (wanted - raw.sigmoid()).abs().square()).sum() * 4
        rows, cells = (faces >= 0).nonzero(as_tuple=True)
        positives += len(rows)
        if not len(rows):
            continue
        true_box = torch.stack([canvases[r].boxes[faces[r, c]] for r, c in zip(rows.tolist(), cells.tolist(), strict=True)])
        true_points = torch.stack([canvases[r].keypoints[faces[r, c]]
                                   for r, c in zip(rows.tolist(), cells.tolist(), strict=True)])
        centre = centres[cells]
        distances = torch.cat([centre - true_box[:, :2], true_box[:, 2:] - centre], dim=1) / stride
        total = total + (1 - box_overlap(boxes[rows, cells], distances)).sum() * 2
        total = total + (boxes[rows, cells] - distances).abs().mean(dim=1).sum() * 0.1
        size = (true_box[:, 2:] - true_box[:, :2]).mean(dim=1, keepdim=True) / stride
        offsets = (true_points - centre[:, None]).flatten(1) / stride
        total = total + ((points[rows, cells] - offsets).abs() / size).mean(dim=1).sum() * KEYPOINTS
    return total / max(positives, 1)


def export_detector(detector: Detector, folder: Path) -> None:
    """Writes det.onnx; height and width stay free."""
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    dynamic = {"input": {2: "height", 3: "width"}} | {name: {0: f"cells_{name}"} for name in names}
    export_onnx(detector, folder / DETECTOR_FILE, 128, names, dynamic)


def check_detector(folder: Path, validation: Shards, size: int) -> dict[str, float]:
    """Through InsightFace on fresh canvases of unseen people: share of faces found at overlap .5, wrong finds."""
    analyser, rng = Analyser(folder, size), random.Random(0)
    faces = hits = wrong = 0
    for _ in range(CHECKED_CANVASES):
        canvas = draw_canvas(validation, size, rng)
        found = analyser.find(canvas.image).boxes
        right = [overlaps(found, box.numpy()) >= 0.5 for box in canvas.boxes] if len(found) else []
        faces, hits = faces + len(canvas.boxes), hits + sum(bool(r.any()) for r in right)
        wrong += int((~np.any(right, axis=0)).sum()) if len(right) else len(found)
    plain = [analyser.find(image).boxes for image in validation.images[:CHECKED_CANVASES]]
    truth = [record["box"] for record in validation.records[:CHECKED_CANVASES]]
    alone = np.mean([bool((overlaps(found, np.array(box)) >= 0.5).any()) for found, box in zip(plain, truth, strict=True)])
    return {"found_on_canvases": round(hits / faces, 4), "wrong_per_canvas": round(wrong / CHECKED_CANVASES, 4),
            "found_on_portraits": round(float(alone), 4), "canvases": CHECKED_CANVASES}


def train_detector(job: Job) -> dict:
    """Trains the detector and writes work/face-detector with det.onnx; checked on unseen people through InsightFace."""
    training, validation = load_shards(*job.data).split()
    torch.manual_seed(job.seed)
    detector, folder = Detector().to(job.device), job.work / "face-detector"
    config = job.training(learning_rate=3e-3, batch_size=32, ema=0.99, clip_norm=5.0)
    trainer = Trainer("face-detector", detector, folder, config)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, list[Canvas]]:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        size = rng.choice(CANVASES)
        canvases = [draw_canvas(training, size, rng) for _ in range(config.batch_size)]
        return disturbed(send(torch.stack([canvas.image for canvas in canvases]), trainer.device).float(), generator), canvases

    result = trainer.run(lambda drawn: detector_loss(detector, *drawn), draw=draw)
    export_detector(detector.cpu(), folder)
    figures = job.figures(result, config) | check_detector(folder, validation, job.model.size)
    write_result(folder, detector, figures)
    return figures
