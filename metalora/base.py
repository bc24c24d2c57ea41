"""The base model: a diffusers pipeline, opened from a folder or the Hub, with the few calls that training needs."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import Tensor

from . import hub
from .adapter import ThreeFactorLinear
from .config import ZERO_GPU, BaseSettings
from .errors import MetaLoraError, compiling
from .families import family_of, settings_of, unreadable
from .family import Family, Latents, Text
from .fold import Fold
from .frozen import freeze
from .graph import Playing
from .packed import packed_products
from .plan import Choice, Learning, Model, Plan, Precision, Work, card, choose, describe, numbered, system_memory
from .quantise import configs_for

OUT_OF_MEMORY = "The GPU has not enough free memory for this; close other programs that use it, choose a smaller size, or a smaller base."
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass
class Base:
    """A pipeline on a device, with its settings. Its weights are never written to, but for people that are folded in and come out again."""

    pipeline: DiffusionPipeline | None  # None until it is loaded
    family: Family
    settings: BaseSettings
    name: str  # as users know it: the catalogue's or the Hub's name
    fingerprint: str  # SHA-256 of its architecture and a sample of its weights
    device: torch.device
    folder: Path
    choice: Choice  # the plan it was opened with, and why
    plan: Plan  # the one it follows now
    precision: Precision | None = None  # of the weights that are here; None while there are none
    notice: str = ""  # that the plan had to be changed or a prompt cut, until whoever shows things to the user has taken it
    fold: Fold = field(default_factory=Fold)  # who is in the weights now
    playing: Playing = field(default_factory=Playing)  # a denoising step as it was last recorded
    _at_work: Counter[str] = field(default_factory=Counter)  # components that a piece of work needs on the device now

    @classmethod
    def open(
        cls, name: str, device: str | None = None, plan: str | None = None, learning: Learning = "person", on_fetch: hub.OnFetch | None = None
    ) -> Base:  # fmt: skip
        """Open a folder, a short name of the catalogue or a Hub id: float32 on a CPU, on a GPU after the plan that fits it.

        `plan` takes the plan of that name; `learning` says what the memory must do for; `on_fetch` sees how far a download is.
        Raises MetaLoraError where it cannot be had, is of no family that is understood or does not fit the device.
        """
        place = _place(device)
        if place.type == "cuda" and not ZERO_GPU:
            torch.cuda.set_device(place)  # bitsandbytes loads to the current one
        folder = hub.base_folder(str(name), on_fetch=on_fetch)
        _quiet()
        family, settings = family_of(folder), settings_of(folder)
        choice = choice_for(folder, device, plan, learning)
        known = folder.name if Path(name).expanduser().is_dir() else str(name)  # files name the base: no path of this machine goes into them
        base = cls(None, family, settings, settings.name or known, fingerprint(folder), place, folder, choice, choice.plan)
        base.persevere(base._follow)
        return base

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.dtype

    @contextmanager
    def resident(self, *components: str) -> Iterator[None]:
        """Have these components on the device meanwhile; those that the plan keeps there stay."""
        self._at_work.update(components)
        try:
            self._settle()
            yield
        finally:
            self._at_work.subtract(components)
            self._settle()

    def _follow(self) -> None:
        """Weights and places as the plan has them."""
        if self.precision != self.plan.precision:
            self.precision = None
            self.playing.forget()
            for part in self.family.networks if self.pipeline else ():
                _release(getattr(self.pipeline, part))
            self.pipeline, self.precision = _load_pipeline(self.folder, self.family, self.plan), self.plan.precision
        self._settle()

    def _settle(self) -> None:
        """Every component where it belongs now. Those that leave the device go first."""
        parts = self.family.networks
        here = {part for part in parts if part in self.plan.stays or self._at_work[part]}
        for part in sorted(parts, key=here.__contains__):
            module, place = getattr(self.pipeline, part), self.device if part in here else torch.device("cpu")
            if any(p.device != place for p in module.parameters()):
                module.to(place)
        if self.plan.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if self.device.type == "cuda" and len(here) < len(parts):
            torch.cuda.empty_cache()

    def persevere(self, work: Callable[[], Result], again: Callable[[], None] = lambda: None) -> Result:
        """`work()`. Where the GPU runs out of memory, free it, go one plan down, say so, call `again` and repeat the work.

        Raises MetaLoraError where no plan is below.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                fault: RuntimeError | None = _of_memory(error)
            while fault:
                fault = self._step_down(fault)
            again()

    def _step_down(self, fault: RuntimeError) -> RuntimeError | None:
        """Go one plan down; the fault where the memory does not even do for the change."""
        below = self.choice.below(self.plan)
        if below is None:
            raise MetaLoraError(OUT_OF_MEMORY) from fault
        self.notice = f"The GPU ran out of memory with the plan {self.plan.name}; going on with {below.name}: {describe(below)}."
        logger.warning(self.notice)
        before, self.plan = self.plan, below
        self.playing.forget()
        gc.collect()
        if before.folds != below.folds:
            self.fold.take_out(self.transformer)
        try:
            self._follow()
        except RuntimeError as error:
            return _of_memory(error)
        return None

    @contextmanager
    def compiled(self, **how: Any) -> Iterator[None]:
        """Every kind of the transformer's blocks compiled meanwhile, in one piece and for the sizes that come. Who comes next, to be learnt or folded in, finds it compiled.

        Raises MetaLoraError inside, at the first pass, where a CPU has no C++ compiler.
        """
        try:
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, **how)
            with compiling("leave compiled at false"):
                yield
        finally:
            for module in self.transformer.modules():
                module.__dict__.pop("_compiled_call_impl", None)  # as it came: what was compiled is looked at again where a module has one more attribute

    def played(self, people: object = None) -> AbstractContextManager:
        """On a GPU denoising steps are played from a recording meanwhile (graph.py). `people` tells who is there where they are not in the weights."""
        recorded = self.device.type == "cuda" and "transformer" in self.plan.stays and self.plan.precision != "4-bit"
        return self.playing.of(self.transformer, people) if recorded else nullcontext()

    @property
    def is_compiled(self) -> bool:
        """Whether any of the transformer's blocks is, as inside `compiled`."""
        return any(module._compiled_call_impl is not None for module in self.transformer.modules())

    @contextmanager
    def hastened(self) -> Iterator[None]:
        """The transformer's steps take less meanwhile, with the same result to rounding; see rotary.py and packed.py. What is compiled is left to the compiler."""
        with ExitStack() as stack:
            if self.device.type == "cpu" and not self.is_compiled:
                stack.enter_context(packed_products(self.transformer))
            if self.device.type == "cpu" or not self.is_compiled:
                stack.enter_context(self.family.hastened(self.transformer))
            yield

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], length: int | None = None) -> Text:
        """Embeddings of n prompts, of so many tokens; of the usual number unless told."""

        def encode() -> Text:
            with self.resident(*self.family.text_encoders):
                return self.family.encode_prompts(self.pipeline, prompts, self.device, length or self.settings.text_tokens)

        return self.persevere(encode)

    def encode_for_picture(self, prompt: str, guidance: float) -> Text:
        """Embeddings of all that a picture of that prompt needs; of a prompt that is longer than usual they are of the greatest length.

        What is longer than that is left out, of which there is a notice then.
        """
        prompts, usual, most = self.family.prompts_of_a_picture(self.pipeline, prompt, guidance), self.settings.text_tokens, self.settings.max_sequence_length
        tokens = max(self.family.tokens(self.pipeline, each) for each in prompts)
        if tokens > most:
            self.notice = f"The prompt is longer than this base reads: the last {tokens - most} of its {tokens} tokens are left out. Say it in fewer words."
            logger.warning(self.notice)
        return self.encode_prompts(prompts, usual if tokens <= usual else most)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Latents:
        """Latents of (n, 3, height, width) pictures in [-1, 1]."""

        def encode() -> Latents:
            with self.resident("vae"):
                return self.family.encode_images(self.vae, images.to(self.device, self.dtype))

        return self.persevere(encode)

    def velocity(self, tokens: Tensor, sigma: Tensor, text: Text, image_ids: Tensor, guidance: float) -> Tensor:
        """What the transformer predicts for latents (batch, tokens, channels) at noise levels (batch,)."""
        return self.family.velocity(self.transformer, tokens, sigma, text, image_ids, guidance)


def choice_for(folder: Path, device: str | None = None, plan: str | None = None, learning: Learning = "person") -> Choice:
    """The plan for the base whose configs are in `folder`; its weights need not be there. MetaLoraError where none fits."""
    return choose(card(_place(device)), system_memory(), Model.of(folder).needs(Work.of(settings_of(folder), learning)), plan)


def _place(device: str | None) -> torch.device:
    """The device of that name; the best one where none is named."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise MetaLoraError("There is no usable GPU on this machine; leave the device out, or choose cpu.")
    return numbered(place)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the transformer's config and the first MiB of each of its weight files: which model this is."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def _quiet() -> None:
    """Keep the libraries' bars for the reading of each component off the screen; downloads still show theirs."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _load_pipeline(folder: Path, family: Family, plan: Plan) -> DiffusionPipeline:
    configs = configs_for(plan.precision, plan.dtype, family)
    common = dict(dtype=plan.dtype, local_files_only=True, use_safetensors=True)
    parts: dict[str, torch.nn.Module] = {}
    try:
        if (text := family.large_text_encoder) in configs:  # before the transformer and out of its way, for bitsandbytes makes both on the card
            kind = getattr(transformers, family.networks[text])
            parts[text] = kind.from_pretrained(folder / text, quantization_config=configs.pop(text), **common)
            parts[text].to("cpu")
        quantised = PipelineQuantizationConfig(quant_mapping=configs) if configs else None
        pipeline = getattr(diffusers, family.pipeline).from_pretrained(folder, quantization_config=quantised, **parts, **common)
    except torch.OutOfMemoryError:
        raise  # it is for the plan below
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise unreadable(folder, error) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    freeze(pipeline.transformer)
    family.prepare(pipeline.transformer)
    return pipeline


def _of_memory(error: RuntimeError) -> RuntimeError:
    """The error, if it says that a GPU has not enough memory, without its frames, for these hold what is to be freed; else it is raised."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return error.with_traceback(None)
    raise error


def _release(component: torch.nn.Module) -> None:
    """Free a component's weights, whoever still holds its layers; what an attached adapter has learnt stays."""
    for module in component.modules():
        if not isinstance(module, ThreeFactorLinear):
            for name, _ in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
