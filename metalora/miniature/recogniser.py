"""Trains a small face recogniser: an aligned crop of a face in, a direction in 512 dimensions out.

It learns to name the training people from crops that are cut as InsightFace cuts them, at a margin that keeps people
apart who were never seen. Light, colour, sharpness and the detector's slips change at each draw, and the renderer changes
hair and glasses from scene to scene, so what stays is the face. Sources: "CosFace: Large Margin Cosine Loss for Deep Face
Recognition" (Wang et al. 2018) for the loss; "ArcFace" (Deng et al. 2019) for the alignment and the flattened last map.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from metalora.miniature.facepack import DETECTOR_FILE, RECOGNISER_FILE, check_pack, disturbed, export_onnx, separation
from metalora.miniature.shards import Shards, load_shards
from metalora.miniature.training import Job, Trainer, products, write_result
from metalora.train import send

INPUT, DIMENSIONS = 112, 512
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))  # ArcFace's, px
SLIP = 0.12  # most that the detector errs by at a keypoint, one deviation, in distances between the eyes
GREY_SHARE = 0.2
SCALE, MARGIN, MARGIN_FROM = 28.0, 0.3, 0.25  # of the cosines; share of the budget after which the margin is whole


def _block(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels))


class Residual(nn.Module):
    """Two convolutions round which the input is carried."""

    def __init__(self, channels: int):
        super().__init__()
        self.inside = nn.Sequential(_block(channels, channels, 1), nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                                    nn.BatchNorm2d(channels))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.inside(maps)


class Recogniser(nn.Module):
    """Crops (n, 3, 112, 112) in [-1, 1] to embeddings (n, 512) of any length.

    A face of the miniature is some fifty pixels wide, so the crop is halved at once; `embed` takes it at that size. A crop has the sum
    of its own embedding and its mirror image's, as ArcFace is evaluated: what errs with the side of the light, or with a keypoint, evens out.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128), last: int = 24):
        super().__init__()
        a, b, c, d = widths
        self.maps = nn.Sequential(_block(3, a, 1), _block(a, b, 2), Residual(b), _block(b, c, 2), Residual(c),
                                  _block(c, d, 2), Residual(d), nn.Conv2d(d, last, 1, bias=False), nn.BatchNorm2d(last))
        self.head = nn.Linear(last * (INPUT // 16) ** 2, DIMENSIONS, bias=False)

    def embed(self, halves: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, 512) of crops (n, 3, 56, 56)."""
        return self.head(self.maps(halves).flatten(1))  # the last map is (n, last, 7, 7)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        halves = F.avg_pool2d(crops, 2)
        return self.embed(halves) + self.embed(halves.flip(-1))


class Names(nn.Module):
    """For training only: a direction for each of the people, which the embeddings of their crops are to take."""

    def __init__(self, people: int):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(people, DIMENSIONS) * 0.05)

    def loss(self, embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
        """CosFace: the right person's cosine must lead by `margin`. embeddings: (n, 512) float32, labels: (n,)."""
        cosines = F.normalize(embeddings) @ F.normalize(self.directions).T  # (n, people)
        return F.cross_entropy(SCALE * (cosines - margin * F.one_hot(labels, len(self.directions))), labels)


def similarity_transform(points: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares turn, scale and shift from points (n, 5, 2) onto target (5, 2), as complex factors and shifts (n,).

    With points as complex numbers it is target = factor * point + shift; Umeyama's estimate, which InsightFace takes, is the same.
    """
    source, goal = torch.view_as_complex(points.contiguous()), torch.view_as_complex(target.contiguous())
    mean, goal_mean = source.mean(dim=1, keepdim=True), goal.mean()
    centred = source - mean
    factor = (centred.conj() * (goal - goal_mean)).sum(dim=1) / centred.abs().square().sum(dim=1)
    return factor, goal_mean - factor * mean[:, 0]


def aligned(images: torch.Tensor, keypoints: torch.Tensor, step: int = 1) -> torch.Tensor:
    """Crops by five keypoints as InsightFace's norm_crop cuts them: (n, 3, 112 / step, 112 / step), the range of `images`.

    Args:
        images: (n, 3, h, w) floats. keypoints: (n, 5, 2) px, on the CPU.
        step: of each square of step x step px of the crop only the middle is sampled.
    """
    factor, shift = similarity_transform(keypoints, torch.tensor(TEMPLATE))
    axis = torch.arange(INPUT // step) * step + (step - 1) / 2
    goal = torch.complex(axis.expand(len(axis), -1), axis[:, None].expand(-1, len(axis)))  # rows of x + iy
    source = torch.view_as_real((goal - shift.view(-1, 1, 1)) / factor.view(-1, 1, 1))  # (n, rows, columns, 2) px
    height, width = images.shape[-2:]
    grid = 2 * source / torch.tensor([width - 1, height - 1]) - 1
    return F.grid_sample(images, send(grid, images.device), mode="bilinear", padding_mode="zeros", align_corners=True)


@dataclasses.dataclass(frozen=True)
class NamingTask:
    """Random crops of random people, disturbed, to be named."""

    recogniser: Recogniser
    names: Names
    shards: Shards
    batch_size: int

    def __post_init__(self):
        object.__setattr__(self, "labels", self.shards.persons.unique(return_inverse=True)[1])  # (n,)
        object.__setattr__(self, "keypoints", self.shards.keypoints)  # (n, 5, 2)

    def crops(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Half-size crops (batch, 3, 56, 56) of the pictures `chosen`, as a detector that errs would have them cut, on the model's device."""
        device = self.names.directions.device
        points = self.keypoints[chosen]
        eyes = (points[:, 1] - points[:, 0]).norm(dim=1).view(-1, 1, 1)
        slip = SLIP * torch.rand(len(chosen), 1, 1, generator=generator) * torch.randn(points.shape, generator=generator)
        crops = aligned(send(self.shards.images[chosen], device).float(), points + eyes * slip, step=2)
        mirror, grey = (send((torch.rand(len(chosen), generator=generator) < share).nonzero().flatten(), device) for share in (0.5, GREY_SHARE))
        crops[mirror] = crops[mirror].flip(-1)
        crops[grey] = crops[grey].mean(dim=1, keepdim=True)
        return disturbed(crops, generator)

    @torch.no_grad()
    def place_names(self) -> None:
        """Points each direction where the pictures of the person lie by now, for a recogniser that has learnt on others before."""
        generator, found = torch.Generator().manual_seed(0), []
        for chosen in torch.arange(len(self.shards)).split(self.batch_size):
            with products(self.names.directions.device):
                found.append(F.normalize(self.recogniser.embed(self.crops(chosen, generator)).float()))
        sums = torch.zeros_like(self.names.directions).index_add_(0, send(self.labels, self.names.directions.device), torch.cat(found))
        self.names.directions.copy_(F.normalize(sums) * self.names.directions.norm(dim=1, keepdim=True))

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops and whose they are."""
        chosen = torch.randint(len(self.shards), (self.batch_size,), generator=generator)
        return self.crops(chosen, generator), send(self.labels[chosen], self.names.directions.device)

    def loss(self, drawn: tuple[torch.Tensor, torch.Tensor], progress: float) -> torch.Tensor:
        halves, labels = drawn
        with products(halves.device):
            embeddings = self.recogniser.embed(halves)
        return self.names.loss(embeddings.float(), labels, MARGIN * min(1.0, progress / MARGIN_FROM))


def export_recogniser(recogniser: Recogniser, folder: Path) -> None:
    """Writes rec.onnx for one or more crops of 112 px."""
    export_onnx(recogniser, folder / RECOGNISER_FILE, INPUT, ["embedding"], {"input": {0: "n"}, "embedding": {0: "n"}})


def check_recogniser(folder: Path, validation: Shards) -> dict[str, float]:
    """How well InsightFace, given rec.onnx and the true keypoints, tells unseen people apart."""
    from insightface.app.common import Face
    from insightface.model_zoo import ArcFaceONNX

    model = ArcFaceONNX(str(folder / RECOGNISER_FILE))
    pictures = np.ascontiguousarray(validation.images.permute(0, 2, 3, 1).numpy()[..., ::-1])  # (n, h, w, 3) BGR
    embeddings = np.stack([model.get(picture, Face(kps=points))
                           for picture, points in zip(pictures, validation.keypoints.numpy(), strict=True)])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return separation(embeddings, validation.persons.numpy())


def check_with_detector(detector: Path, recogniser: Path, validation: Shards) -> dict[str, float]:
    """The same with the faces that the trained detector finds."""
    with tempfile.TemporaryDirectory() as pack:
        for file in (detector, recogniser):
            shutil.copy(file, pack)
        return check_pack(Path(pack), validation, validation.images.shape[-1])


def train_recogniser(job: Job) -> dict:
    """Trains the recogniser and writes work/face-recogniser with rec.onnx; the figures are on unseen people.

    Where the detector is trained already, the two are checked together too.
    """
    training, validation = load_shards(*job.data).split()
    torch.manual_seed(job.seed)
    recogniser, names = Recogniser().to(job.device), Names(len(training.persons.unique())).to(job.device)
    folder = job.work / "face-recogniser"
    config = job.training(learning_rate=4e-3, batch_size=64, weight_decay=0.05, ema=0.995, clip_norm=5.0)
    task = NamingTask(recogniser, names, training, config.batch_size)
    trainer = Trainer("face-recogniser", recogniser, folder, config, helper=names)
    if trainer.earlier and not trainer.step:
        task.place_names()
    result = trainer.run(lambda drawn: task.loss(drawn, trainer.progress), draw=task.draw)
    export_recogniser(recogniser.eval().cpu(), folder)
    figures = job.figures(result, config) | {"people": len(names.directions), "pictures": len(training)}
    figures["unseen_people"] = check_recogniser(folder, validation)
    detector = job.work / "face-detector" / DETECTOR_FILE
    if detector.exists():
        figures["unseen_people_with_detector"] = check_with_detector(detector, folder / RECOGNISER_FILE, validation)
    write_result(folder, recogniser, figures)
    return figures
