"""Pictures and captions → what the training steps read: latents and prompt embeddings, computed once.

Latents are kept as mean and deviation, so that every step still draws its own sample, and are paired with their captions by
picture, never by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from .base import Base
from .family import Text
from .plan import PIXELS_AT_ONCE, TOKENS_AT_ONCE

CHUNK = 32  # pictures or prompts encoded at a time, at most
FACE_ROOM = 0.35  # of the box's size, added on every side: hair, ears and chin are the person's too


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """k pictures of n subjects, encoded. Latents are packed as the transformer takes them."""

    mean: Tensor  # (k, tokens, channels)
    std: Tensor  # (k, tokens, channels)
    image_ids: Tensor  # (tokens, axes)
    text: Text  # of the m different captions
    captions: Tensor  # (k, n) int64, rows of `text`: each picture's own, then others that it may be learnt under; see AdaptConfig.reworded
    subject: Tensor  # (k,) int64 in [0, n)
    weight: Tensor | None = None  # (k, tokens) how much each token counts in the loss; None: all the same

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def caption(self) -> Tensor:
        """(k,) int64, the row of `text` that is each picture's own."""
        return self.captions[:, 0]

    @property
    def subjects(self) -> int:
        """Number of subjects, n."""
        return int(self.subject.max()) + 1

    def to(self, device: torch.device, dtype: torch.dtype) -> TrainingSet:
        """The same set on a device; latents stay float32, embeddings take `dtype`."""
        tensors = {name: getattr(self, name) for name in ("mean", "std", "image_ids", "captions", "subject", "weight")}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, text=self.text.to(device, dtype), **moved)

    def select(self, subjects: Sequence[int]) -> TrainingSet:
        """The pictures of these subjects only, renumbered 0, 1, … in the order given."""
        number = torch.full((self.subjects,), -1, device=self.subject.device)
        number[torch.tensor(subjects)] = torch.arange(len(subjects), device=self.subject.device)
        chosen = self.pictures((number[self.subject] >= 0).nonzero().flatten())
        return replace(chosen, subject=number[chosen.subject])

    def pictures(self, kept: Tensor) -> TrainingSet:
        """The pictures at `kept` (k',), of the same subjects."""
        used, captions = self.captions[kept].unique(return_inverse=True)
        weight = None if self.weight is None else self.weight[kept]
        return replace(self, mean=self.mean[kept], std=self.std[kept], text=self.text.rows(used), captions=captions, subject=self.subject[kept], weight=weight)


def join(people: Sequence[TrainingSet]) -> TrainingSet:
    """The pictures of several sets of one subject each and of one size; the subjects are 0, 1, … in the order given."""
    return replace(merge(people), subject=torch.cat([torch.full_like(person.subject, number) for number, person in enumerate(people)]))


def merge(sets: Sequence[TrainingSet]) -> TrainingSet:
    """The pictures of several sets of one size, as pictures of one subject; where one has weights, those of a set without are 1.

    Where one has more captions for a picture, the pictures of the others have their own in the place of those that they lack.
    """
    most = max(each.captions.shape[1] for each in sets)
    captions = [torch.cat([each.captions, each.captions[:, :1].expand(-1, most - each.captions.shape[1])], 1) for each in sets]
    sizes = torch.tensor([len(each.text[0]) for each in sets])
    firsts = (sizes.cumsum(0) - sizes).tolist()  # rows of the joint text at which each one's captions begin
    weights = [torch.ones_like(each.mean[..., 0]) if each.weight is None else each.weight for each in sets]
    return replace(
        sets[0],
        mean=torch.cat([each.mean for each in sets]),
        std=torch.cat([each.std for each in sets]),
        text=Text.cat(each.text for each in sets),
        captions=torch.cat([each + first for each, first in zip(captions, firsts)]),
        subject=torch.cat([torch.zeros_like(each.subject) for each in sets]),
        weight=torch.cat(weights) if any(each.weight is not None for each in sets) else None,
    )


def encode(
    base: Base, images: Tensor, captions: Sequence[str], subjects: Sequence[int] | None = None, masks: Tensor | None = None
) -> TrainingSet:  # fmt: skip
    """Encode (k, 3, height, width) pictures in [-1, 1] with a caption each; all of subject 0 unless told.

    `masks` (k, 1, height, width) in [0, 1] say how much each pixel counts.
    """
    assert len(images) == len(captions) and len(images) > 0, "a caption for each picture"
    pictures = min(CHUNK, max(1, PIXELS_AT_ONCE // images[0, 0].numel()))
    latents = [base.encode_images(chunk) for chunk in images.split(pictures)]
    text, rows = _texts(base, [[caption] for caption in captions])
    grid = (latents[0].image_ids[:, 1:3].max(0).values + 1).int().tolist()  # rows and columns of tokens
    return TrainingSet(
        mean=torch.cat([part.mean for part in latents]),
        std=torch.cat([part.std for part in latents]),
        image_ids=latents[0].image_ids,
        text=text,
        captions=rows,
        subject=torch.tensor(subjects if subjects is not None else [0] * len(captions), device=base.device),
        weight=None if masks is None else F.adaptive_avg_pool2d(masks, grid).flatten(1).to(base.device),
    )


def captioned(base: Base, data: TrainingSet, captions: Sequence[Sequence[str]]) -> TrainingSet:
    """The same pictures with other captions, equally many each, the picture's own first."""
    text, rows = _texts(base, captions)
    return replace(data, text=text, captions=rows)


def _texts(base: Base, captions: Sequence[Sequence[str]]) -> tuple[Text, Tensor]:
    """The m different ones of the captions of k pictures, encoded, and which of them each is, (k, n)."""
    different = list(dict.fromkeys(caption for of_picture in captions for caption in of_picture))
    prompts = min(CHUNK, max(1, TOKENS_AT_ONCE // base.settings.text_tokens))
    texts = [base.encode_prompts(different[i : i + prompts]) for i in range(0, len(different), prompts)]
    number = {caption: i for i, caption in enumerate(different)}
    return Text.cat(texts), torch.tensor([[number[caption] for caption in of_picture] for of_picture in captions], device=base.device)


def mirrored(images: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures, then each of them mirrored."""
    return [*images, *(ImageOps.mirror(image) for image in images)]


def face_mask(size: tuple[int, int], box: Sequence[float], background: float, face: float = 1.0) -> Image.Image:
    """How much each pixel of a (width, height) picture counts: an ellipse round the face at `box` as `face` says, the rest as `background`."""
    mask = Image.new("L", size, round(255 * background))
    across, down = FACE_ROOM * (box[2] - box[0]), FACE_ROOM * (box[3] - box[1])
    ImageDraw.Draw(mask).ellipse((box[0] - across, box[1] - down, box[2] + across, box[3] + down), fill=round(255 * face))
    return mask


def to_weights(masks: Sequence[Image.Image]) -> Tensor:
    """Grey pictures of one size → (n, 1, height, width) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(mask.convert("L"))) for mask in masks])[:, None].float() / 255


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size → (n, 3, height, width) in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
