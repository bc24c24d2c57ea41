"""The seam between the rest of the package and a family of base models: all in which one family differs from another.

A family is a file of its own (flux.py, flux2.py) and a row of the table in families.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import BaseSettings

Fused = Mapping[str, Sequence[str]]  # kohya's name of a layer → diffusers' names, in the order in which their outputs stand


class Text(tuple[Tensor, ...]):
    """Prompts as a transformer takes them: its family's tensors, each (n, ...), the embeddings (n, tokens, d) first."""

    __slots__ = ()

    @property
    def embeds(self) -> Tensor:
        """(n, tokens, d)."""
        return self[0]

    def rows(self, index: Tensor) -> Text:
        """The prompts at `index` (batch,)."""
        return Text(t[index] for t in self)

    def to(self, device: torch.device, dtype: torch.dtype) -> Text:
        """The same elsewhere."""
        return Text(t.to(device, dtype) for t in self)

    @classmethod
    def cat(cls, texts: Iterable[Text]) -> Text:
        """The prompts of all, one after the other."""
        return cls(torch.cat(parts) for parts in zip(*texts))


class Latents(NamedTuple):
    """Pictures of one size as a transformer takes them."""

    mean: Tensor  # (n, tokens, channels)
    std: Tensor  # (n, tokens, channels)
    image_ids: Tensor  # (tokens, axes), positions for the rotary embedding


class Vectors(NamedTuple):
    """Vectors of the transformer's width that a token costs; see plan.Model.step."""

    single: int  # that autograd keeps of a single-stream block
    double: int  # of a double-stream block
    learning: int  # more of either where Down learns
    at_work: int  # that live besides while a block is gone through in a training step
    drawing: int  # that live in a pass without gradients


class Kohya(NamedTuple):
    """How kohya's programs name the layers of the blocks."""

    module: str  # that reads such a LoRA
    double: Fused
    single: Fused


class Family(ABC):
    """One family of base models. It has no state: the networks come as arguments."""

    pipeline: str  # class in diffusers, as model_index.json names it
    networks: Mapping[str, str]  # component → class in diffusers or transformers, of all that has weights
    text_encoders: tuple[str, ...]
    large_text_encoder: str  # the one that is worth fewer bits where the transformer has fewer
    known: str  # Hub id of a base whose configs stand here, for plans before it is fetched
    configs: Mapping[str, Mapping[str, Any]]  # of that base: component → what its class is built from
    vectors: Vectors
    kohya: Kohya
    dreambooth_script: str  # diffusers' own for DreamBooth with LoRA

    @abstractmethod
    def settings(self, index: Mapping[str, Any]) -> BaseSettings:
        """Defaults of a base with that model_index.json."""

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], device: torch.device, length: int) -> Text:
        """Embeddings of n prompts of at most `length` tokens."""

    @abstractmethod
    def tokens(self, pipeline: Any, prompt: str) -> int:
        """How many text tokens a prompt has."""

    @abstractmethod
    def text_shapes(self, transformer: nn.Module, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of one prompt of so many tokens, without n."""

    @abstractmethod
    def prompts_of_a_picture(self, pipeline: Any, prompt: str, guidance: float) -> list[str]:
        """The prompts that a picture of `prompt` needs the embeddings of."""

    @abstractmethod
    def arguments(self, text: Text) -> dict[str, Tensor | None]:
        """The embeddings of these prompts, as arguments of the pipeline's call."""

    @abstractmethod
    def encode_images(self, vae: Any, images: Tensor) -> Latents:
        """Mean and deviation of the latents of (n, 3, height, width) pictures in [-1, 1], float32."""

    @abstractmethod
    def image_ids(self, rows: int, columns: int) -> Tensor:
        """Positions of the tokens of a picture, (rows · columns, axes), float32."""

    @abstractmethod
    def velocity(self, transformer: nn.Module, tokens: Tensor, sigma: Tensor, text: Text, image_ids: Tensor, guidance: float) -> Tensor:
        """What the transformer predicts for latents (batch, tokens, channels) at noise levels (batch,)."""

    def prepare(self, transformer: nn.Module) -> None:
        """What a transformer that was just loaded needs so that it learns soundly on every device."""

    def hastened(self, transformer: nn.Module) -> AbstractContextManager:
        """Inside, a frozen transformer takes fewer operations, where the family knows how; the result is the same to rounding."""
        return nullcontext()

    @abstractmethod
    def numbers_of_texts(self, networks: Mapping[str, Any], prompts: int, tokens: int) -> float:
        """Numbers that live while so many prompts of so many tokens are encoded."""
