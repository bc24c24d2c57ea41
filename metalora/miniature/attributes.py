"""Trains a classifier that reads the attribute record off a picture: the judge of whether generated pictures show what was asked.

It learns from true renders alone and is no part of the miniature, so that what the miniature was trained with does not judge it.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from metalora.miniature import captions
from metalora.miniature.clip import UNSEEN, loss_of_groups, softened
from metalora.miniature.shards import Shards, load_shards
from metalora.miniature.training import Job, Trainer, generator_on, products, read_result, write_result
from metalora.miniature.vae import to_floats
from metalora.train import send

NAME = "attributes"  # of the training
NONE = "none"  # nothing is worn
HEADS: dict[str, tuple[str, ...]] = {
    "sex": ("woman", "man"), "age": captions.AGES, "skin": captions.SKINS, "hair": captions.HAIR_WORDS, "hair_colour": captions.HAIR_COLOURS,
    "beard": (NONE, *captions.BEARDS), "glasses": (NONE, "glasses"), "hat": (NONE, *captions.HATS), "hat_colour": captions.CLOTH_COLOURS,
    "top": tuple(captions.TOPS), "top_colour": captions.CLOTH_COLOURS, "expression": tuple(captions.EXPRESSIONS),
    "turn": (NONE, *captions.TURNS), "background": tuple(captions.BACKGROUNDS), "style": tuple(captions.OPENINGS)}
WORN = ("beard", "glasses", "hat", "turn")  # of these, None in a record says that there is none
WIDTHS = (32, 64, 96, 128)


def label(attributes: dict, head: str) -> int:
    """The class of a record under a head; UNSEEN where the picture does not show it."""
    value = attributes[head]
    if head == "glasses":
        value = "glasses" if value else NONE
    elif value is None and head in WORN:
        value = NONE
    return HEADS[head].index(value) if value is not None else UNSEEN


def labels(shards: Shards) -> torch.Tensor:
    """Classes of all pictures and their mirrors, (2, n, heads)."""
    rows = [[label(record["attributes"], head) for head in HEADS] for record in shards.records]
    turned = [[label({**r["attributes"], "turn": captions.MIRRORED.get(r["attributes"]["turn"])}, head) for head in HEADS] for r in shards.records]
    return torch.tensor([rows, turned])


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, at half the size (He et al. 2016)."""

    def __init__(self, given: int, made: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(given, made, 3, 2, 1), nn.Conv2d(made, made, 3, 1, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, made), nn.GroupNorm(8, made)])
        self.shortcut = nn.Conv2d(given, made, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """Pictures (n, 3, size, size) in [-1, 1] -> logits of all classes (n, sum of the heads' classes)."""

    def __init__(self, size: int):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 4, 2, 1)
        self.blocks = nn.Sequential(*(Block(*pair) for pair in zip(WIDTHS, WIDTHS[1:], strict=False)))
        cells = (size // 2 ** len(WIDTHS)) ** 2
        self.read = nn.Sequential(nn.Conv2d(WIDTHS[-1], 32, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * cells, 256), nn.SiLU())
        self.heads = nn.Linear(256, sum(map(len, HEADS.values())))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.heads(self.read(self.blocks(F.silu(self.stem(pixels)))))

    @torch.no_grad()
    def read_off(self, images: torch.Tensor) -> torch.Tensor:
        """The most probable class under each head, (n, heads), of uint8 pictures (n, 3, size, size)."""
        logits = torch.cat([self(to_floats(part)) for part in images.split(64)])
        return torch.stack([part.argmax(1) for part in logits.split([len(c) for c in HEADS.values()], 1)], 1)


@dataclasses.dataclass(frozen=True)
class AttributeTask:
    """Cross-entropy of every head that a picture has a class for; some pictures are mirrored, some softened as generated ones are."""

    classifier: Classifier
    shards: Shards
    true: torch.Tensor
    batch_size: int

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures, and on the CPU what is true of them."""
        device = self.classifier.heads.weight.device
        chosen = torch.randint(len(self.shards), (self.batch_size,), generator=generator)
        mirror = torch.rand(self.batch_size, generator=generator) < 0.5
        images = softened(to_floats(send(self.shards.pictures(chosen, mirror), device)), generator)
        images = images + 0.04 * torch.randn(images.shape, generator=generator_on(device, generator), device=device)
        return images.to(memory_format=torch.channels_last), self.true[mirror.long(), chosen]

    def loss(self, drawn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, true = drawn
        with products(images.device):
            logits = self.classifier(images).float()
        return loss_of_groups(logits.split([len(classes) for classes in HEADS.values()], 1), true, label_smoothing=0.05)


def accuracy(found: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Share of right classes under each head among pictures that have one; found, true: (n, heads)."""
    shown = true != UNSEEN
    return dict(zip(HEADS, (((found == true) & shown).sum(0) / shown.sum(0).clamp(min=1)).tolist(), strict=True))


def trained_classifier(job: Job) -> Classifier:
    """The classifier of this work folder."""
    classifier = Classifier(job.model.size)
    classifier.load_state_dict(read_result(job.work / NAME)[0])
    return classifier.eval()


def train_attributes(job: Job) -> dict:
    """Trains the classifier and writes work/attributes; the figures are its accuracies on unseen people."""
    training, validation = load_shards(*job.data).split()
    torch.manual_seed(job.seed)
    classifier = Classifier(job.model.size).to(job.device, memory_format=torch.channels_last)
    config = job.training(learning_rate=3e-3, batch_size=32, weight_decay=0.05, ema=0.995)
    task = AttributeTask(classifier, training, labels(training), config.batch_size)
    trainer, unseen = Trainer(NAME, classifier, job.work / NAME, config), labels(validation)[0]

    def right(count: int) -> dict[str, float]:
        return accuracy(classifier.read_off(validation.images[:count].to(job.device)).cpu(), unseen[:count])

    result = trainer.run(task.loss, lambda t: print(f"{NAME}: step {t.step}, {sum(right(400).values()) / len(HEADS):.1%}", flush=True), task.draw)
    found = right(len(validation))
    figures = job.figures(result, config) | {"right": {head: round(share, 4) for head, share in found.items()}}
    figures["mean_right"] = round(sum(found.values()) / len(found), 4)
    write_result(job.work / NAME, classifier, figures)
    return figures
