"""Pictures of the portrait world as the renderer wrote them, in memory."""

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from metalora.errors import MetaLoraError
from metalora.miniature.captions import TRIGGER, caption
from metalora.miniature.people import HELD_OUT
from metalora.prompts import mirrored

VALIDATION_EVERY = 25  # of the people before HELD_OUT, each 25th is kept out of training to watch it


@dataclasses.dataclass(frozen=True)
class Shards:
    """Pictures and what is known of them.

    Args:
        images: (n, 3, size, size) uint8.
        records: n records as the renderer writes them: person, domain, scene, box, keypoints, attributes.
    """

    images: torch.Tensor
    records: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def persons(self) -> torch.Tensor:
        return torch.tensor([record["person"] for record in self.records])  # (n,)

    @functools.cached_property
    def boxes(self) -> torch.Tensor:
        return torch.tensor([record["box"] for record in self.records], dtype=torch.float32)  # (n, 4) px

    @property
    def keypoints(self) -> torch.Tensor:
        return torch.tensor([record["keypoints"] for record in self.records], dtype=torch.float32)  # (n, 5, 2) px

    def pictures(self, chosen: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """The pictures at `chosen` (n,), those mirrored for which `mirrored` (n,) holds: (n, 3, size, size) uint8."""
        images = self.images[chosen]
        images[mirrored] = images[mirrored].flip(-1)
        return images

    def select(self, mask: torch.Tensor) -> "Shards":
        """The pictures for which `mask` (n,) holds."""
        keep = mask.nonzero().flatten()
        return Shards(self.images[keep], [self.records[i] for i in keep.tolist()])

    @property
    def of_validation(self) -> torch.Tensor:
        """Which pictures are of people who are kept out of training, (n,) bool."""
        persons = self.persons
        return (persons >= HELD_OUT) | (persons % VALIDATION_EVERY == VALIDATION_EVERY - 1)

    def split(self) -> tuple["Shards", "Shards"]:
        """Training and validation pictures; no person is in both, and held-out people are never in the first.

        Raises:
            MetaLoraError: one of the two would be empty.
        """
        validation = self.of_validation
        if validation.all() or not validation.any():
            raise MetaLoraError(f"{self.persons.unique().numel()} people are too few to train and validate on; render people "
                             f"0:{2 * VALIDATION_EVERY} or more")
        return self.select(~validation), self.select(validation)


def load_shards(*folders: Path) -> Shards:
    """Reads all part-*.safetensors and the part-*.jsonl beside them.

    Raises:
        MetaLoraError: a folder has no parts, or a part's pictures and lines differ in number.
    """
    parts = [part for folder in folders for part in sorted(Path(folder).glob("part-*.safetensors"))]
    if not parts:
        raise MetaLoraError(f"no part-*.safetensors in {', '.join(map(str, folders))}; run the render command first")
    images, records = [], []
    for part in parts:
        with safe_open(part, "pt") as file:
            images.append(file.get_tensor("images"))
        lines = [json.loads(line) for line in part.with_suffix(".jsonl").read_text().splitlines()]
        if len(lines) != len(images[-1]):
            raise MetaLoraError(f"{part} has {len(images[-1])} pictures and {len(lines)} lines; render it again")
        records += lines
    return Shards(torch.cat(images), records)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Random pictures with captions: indices (n,), which of them are mirrored (n,) bool, and n captions."""

    chosen: torch.Tensor
    mirrored: torch.Tensor
    captions: list[str]

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the pictures are in a table (2, n, ...) of all as drawn and all mirrored."""
        return self.mirrored.long(), self.chosen


def draw_captioned(records: list[dict[str, Any]], count: int, generator: torch.Generator, trigger_share: float = 0.0,
                   dropped_share: float = 0.0) -> Batch:
    """Draws pictures with replacement, each with a fresh caption of what it shows; a mirrored one's says so.

    Args:
        trigger_share: share of captions in which "sks woman" or "sks man" stands for the person's looks.
        dropped_share: share of empty captions, from which a model learns the unguided velocity.
    """
    chosen = torch.randint(len(records), (count,), generator=generator)
    mirror = torch.rand(count, generator=generator) < 0.5
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    texts = []
    for index, flipped in zip(chosen.tolist(), mirror.tolist(), strict=True):
        record = records[index]
        person = f"{TRIGGER} {record['domain']}" if rng.random() < trigger_share else None
        text = caption(record["attributes"], rng, person) if rng.random() >= dropped_share else ""
        texts.append(mirrored(text) if flipped else text)
    return Batch(chosen, mirror, texts)
