"""Trains a small DINOv2 that judges whether two pictures show the same thing: for things, what the recogniser is for faces.

The class token learns to find, among a batch's pictures, the other one of the same thing. Place, size, light and sharpness change
at each draw, and a dataset's pictures show a thing in other scenes, so what stays is the thing: its form, its colours, what is
printed on it. Sources: "Supervised Contrastive Learning" (Khosla et al. 2020) for the loss, with two pictures of each thing; "DINOv2:
Learning Robust Visual Features without Supervision" (Oquab et al. 2023) for the network alone, so that what reads a DINO reads this one.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from metalora.clip import unit_rows
from metalora.data import KEPT_EVERY, Subject, kept_out, load_dataset
from metalora.errors import MetaLoraError
from metalora.miniature.clip import softened
from metalora.miniature.facepack import separation
from metalora.miniature.training import Job, Trainer, generator_on, products, read_result, write_result
from metalora.miniature.vae import to_floats
from metalora.photo import load_photo
from metalora.train import send

NAME = "likeness"  # of the training
WIDTH, LAYERS, HEADS, PATCH = 128, 4, 4, 16
TEMPERATURE = 0.1  # of the cosines
NEAREST, FARTHEST, SHIFT = 0.75, 1.1, 0.15  # side of the part of a picture that is seen, and its shift, in the picture's and its half
LIGHT, WARMTH, NOISE = 0.25, 0.06, 0.04  # most that light and contrast, red against blue, and single pixels change by


def build_dino(size: int) -> Dinov2Model:
    """A DINOv2 of random weights for pictures of `size` px. Nothing is masked in this training, so it has no token for that."""
    # By default weights start as those of a network of 768 or more suit; here the class token would for long be the same for all pictures.
    return Dinov2Model(Dinov2Config(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, patch_size=PATCH, image_size=size,
                                    use_mask_token=False, initializer_range=WIDTH**-0.5))


def build_processor(size: int) -> BitImageProcessorPil:
    """The preprocessing that fits: whole pictures at the model's size, in [-1, 1]."""
    square = {"height": size, "width": size}
    return BitImageProcessorPil(size=square, do_center_crop=False, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@dataclasses.dataclass(frozen=True)
class Things:
    """Pictures of things.

    Args:
        images: (n, 3, size, size) uint8, those of a thing together.
        labels: (n,), which thing each shows, from 0 without gaps.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def pairs(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Numbers of two pictures each of `count` things, (2, count), or of all where there are fewer; of one picture twice the same."""
        sizes = self.labels.bincount()
        things = torch.randperm(len(sizes), generator=generator)[:count]
        size, drawn = sizes[things], torch.rand(2, len(things), generator=generator)
        one = (drawn[0] * size).long()
        other = (one + 1 + (drawn[1] * (size - 1)).long()) % size
        return (sizes.cumsum(0) - sizes)[things] + torch.stack([one, other])


def read_things(subjects: list[Subject], size: int) -> Things:
    """All pictures of the subjects, as the processor gives them to the model. MetaLoraError where one cannot be read."""
    processor = build_processor(size)
    paths = [(item.path, label) for label, subject in enumerate(subjects) for item in subject.items]
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for image, (path, _) in zip(images, paths, strict=True):
        image.copy_(processor(load_photo(path), do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0])
    return Things(images, torch.tensor([label for _, label in paths]))


def load_things(folders: tuple[Path, ...], size: int) -> tuple[Things, Things]:
    """Training and validation things of image folders; of the same name and domain in two folders, a thing is one.

    Raises:
        MetaLoraError: a folder cannot be read, or has too few things.
    """
    subjects: dict[tuple[str, str], Subject] = {}
    for subject in (each for folder in folders for each in load_dataset(folder).subjects):
        known = subjects.setdefault((subject.domain, subject.identity), Subject(subject.identity, subject.domain))
        known.references.extend(subject.references)
        known.others.extend(subject.others)
    learnt, judged = kept_out(list(subjects.values()), most=len(subjects))
    if len(judged) < 2:
        raise MetaLoraError(f"{len(subjects)} things are too few to train and validate on; render {2 * KEPT_EVERY} or more, each in several pictures.")
    return read_things(learnt, size), read_things(judged, size)


def seen_anew(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (n, 3, size, size) uint8 as another photographer would have them, in [-1, 1].

    Nearer or farther, shifted, half of them mirrored, some soft, in other light; colours change little, for they are the thing's.
    """
    n, device = len(images), images.device
    drawn = torch.rand(7, n, generator=generator) * 2 - 1
    views = torch.zeros(n, 2, 3)
    views[:, 0, 0] = views[:, 1, 1] = (NEAREST + FARTHEST) / 2 + (FARTHEST - NEAREST) / 2 * drawn[0]
    views[drawn[1] < 0, 0, 0] *= -1
    views[:, :, 2] = SHIFT * drawn[2:4].T
    grid = F.affine_grid(send(views, device), list(images.shape), align_corners=False)
    pixels = F.grid_sample(to_floats(images), grid, padding_mode="reflection", align_corners=False)
    light, contrast, warmth = send(drawn[4:], device).view(3, n, 1, 1, 1)
    pixels = softened(pixels, generator) + 1  # from 0, which is black
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = (pixels - mean) * (1 + LIGHT * contrast) + mean * (1 + LIGHT * light)
    pixels = pixels * (1 + WARMTH * warmth * torch.tensor([1.0, 0.0, -1.0], device=device).view(3, 1, 1))
    noise = torch.randn(pixels.shape, generator=generator_on(device, generator), device=device)
    return (pixels + NOISE * noise).clamp(0, 2) - 1


def contrast(embeddings: torch.Tensor) -> torch.Tensor:
    """The loss of embeddings (2 n, d) of any length, whose rows k and n + k are of one thing. Cosines in float32."""
    directions = F.normalize(embeddings.float())
    itself = torch.eye(len(directions), dtype=torch.bool, device=directions.device)
    logits = (directions @ directions.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device).roll(len(logits) // 2))


@dataclasses.dataclass(frozen=True)
class LikenessTask:
    """Pairs of pictures of random things, seen anew, that are to find one another."""

    dino: Dinov2Model
    things: Things
    batch_size: int

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """A picture of each of the batch's things and then another of each, in [-1, 1]."""
        chosen = self.things.pairs(self.batch_size // 2, generator).flatten()
        return seen_anew(send(self.things.images[chosen], self.dino.device), generator)

    def loss(self, pixels: torch.Tensor) -> torch.Tensor:
        with products(pixels.device):
            embeddings = self.dino(pixels).last_hidden_state[:, 0]
        return contrast(embeddings)


def check_likeness(dino: Dinov2Model, things: Things) -> dict[str, float]:
    """How well the class token tells things apart: see `separation`."""
    rows: np.ndarray = unit_rows(things.images, lambda some: dino(to_floats(some.to(dino.device))).last_hidden_state[:, 0].cpu())
    return separation(rows, things.labels.numpy())


def trained_dino(job: Job) -> Dinov2Model:
    """The DINO of this work folder."""
    dino = build_dino(job.model.size)
    dino.load_state_dict(read_result(job.work / NAME)[0])
    return dino.eval()


def train_likeness(job: Job) -> dict:
    """Trains the DINO and writes work/likeness, which `metalora.dino.Dino` reads; the figures are on things kept out of training."""
    training, validation = load_things(job.data, job.model.size)
    torch.manual_seed(job.seed)
    dino = build_dino(job.model.size).to(job.device)
    config, folder = job.training(learning_rate=3e-3, batch_size=64, warmup_steps=30, weight_decay=0.05, ema=0.995), job.work / NAME
    task = LikenessTask(dino, training, config.batch_size)
    trainer = Trainer(NAME, dino, folder, config)
    result = trainer.run(task.loss, lambda t: print(f"{NAME}: step {t.step}, {check_likeness(dino, validation)}", flush=True), task.draw)
    figures = job.figures(result, config) | {"things": int(training.labels.max()) + 1, "pictures": len(training.labels)}
    figures["unseen_things"] = check_likeness(dino, validation)
    write_result(folder, dino, figures)
    if trainer.is_first:
        dino.config.save_pretrained(folder)
        build_processor(job.model.size).save_pretrained(folder)
    return figures
