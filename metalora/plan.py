"""What fits a card: bytes of every component per precision and of every piece of work, and the plan that follows from them.

Nothing is loaded for it: the components are built on the meta device from their configs. A plan says in which precision the
weights are, which of them stay on the card, and whether a training step keeps its activations or computes them again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .adapter import find_targets
from .config import ZERO_GPU, BaseSettings
from .errors import MetaLoraError
from .families import KNOWN, family_of, unreadable
from .family import Family

GIB = 2**30
RESERVE = 5 * GIB // 4  # bytes for the CUDA context, the libraries' work spaces and what the allocator cannot use
PYTHON = 3 * GIB  # bytes of system memory for the program itself
PIXELS_AT_ONCE = 2**19  # that the VAE encodes in one call: two pictures of 512x512
TOKENS_AT_ONCE = 2**12  # that the text encoders take in one call: eight prompts of 512
Precision = Literal["float32", "bf16", "fp8", "4-bit"]
Learning = Literal["person", "plain", "stage 1"]  # Mid and Up; an ordinary LoRA; all three factors of many people
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # in the kernel's second and first way to say it
PACKAGES = {"fp8": ("torchao", "0.18.0"), "4-bit": ("bitsandbytes", "0.50.2")}  # what a precision needs, and the version it was made with

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")  # all that a base of any family has
KEEP_BITS = ("wo", "lm_head")  # linear layers that transformers does not quantise: of T5, which does not bear it, and the head of a language model


@dataclass(frozen=True)
class Plan:
    """How a base lies in memory while it works."""

    name: str
    precision: Precision
    stays: tuple[str, ...]  # components that stay on the device; the others come only while they are at work
    checkpointing: bool = False  # a training step keeps the input of each block only, and computes the rest again
    folds: bool = False  # while people are drawn they are in the weights, and a copy of the adapted layers' weights lies beside

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, whatever the weights are kept in."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16


# The fastest first. Bits are given up last of all, and moving the transformer for every prompt is worse than that.
PLANS = (
    Plan("folding", "bf16", COMPONENTS, folds=True),
    Plan("resident", "bf16", COMPONENTS),
    Plan("lean", "bf16", ("transformer",)),
    Plan("resident-checkpointing", "bf16", COMPONENTS, True),
    Plan("lean-checkpointing", "bf16", ("transformer",), True),
    Plan("fp8", "fp8", ("transformer",)),
    Plan("fp8-checkpointing", "fp8", ("transformer",), True),
    Plan("4-bit", "4-bit", ("transformer",)),
    Plan("4-bit-checkpointing", "4-bit", ("transformer",), True),
    Plan("offload", "4-bit", (), True),
)
ON_CPU = Plan("cpu", "float32", COMPONENTS, folds=True)


@dataclass(frozen=True)
class Work:
    """What must fit: the largest training step and the largest picture."""

    resolution: int  # px, of generated pictures
    train_resolution: int  # px
    text_tokens: int  # of the longest prompt
    caption_tokens: int  # of a training step
    batch: int
    identities: int  # resident at a time
    rank: int
    meta_rank: int
    learns_down: bool
    targets: str

    @classmethod
    def of(cls, settings: BaseSettings, learning: Learning = "person") -> Work:
        """The work that a base's settings ask for."""
        a, common = settings.adapter, (settings.resolution, settings.train_resolution, settings.max_sequence_length, settings.text_tokens)
        if learning == "stage 1":
            return cls(*common, settings.meta.batch_size, settings.meta.bucket_size, a.rank, a.meta_rank, True, a.targets)
        if learning == "plain":
            return cls(*common, settings.plain.batch_size, 1, settings.plain_rank, settings.plain_rank, True, a.targets)
        return cls(*common, settings.adapt.batch_size, 1, a.rank, a.meta_rank, False, a.targets)


class Weights(NamedTuple):
    """What a component consists of."""

    linear: int  # numbers in the matrices that can be quantised
    rows: int  # of these matrices
    layers: int
    rest: int  # numbers that keep 16 bits whatever the plan

    def size(self, precision: Precision) -> int:
        """Bytes. fp8 has a float32 scale for every row. 4-bit (NF4) has an 8-bit scale for every 64 numbers, a float32
        one for every 256 of these, and two tables of 16 and 256 float32 and an offset for every matrix."""
        linear = {
            "float32": 4 * self.linear,
            "bf16": 2 * self.linear,
            "fp8": self.linear + 4 * self.rows,
            "4-bit": self.linear // 2 + self.linear // 64 + self.linear // (64 * 64) + 4 * (16 + 256 + 1) * self.layers,
        }  # fmt: skip
        return linear[precision] + (4 if precision == "float32" else 2) * self.rest


class Model:
    """A base's components by their configs alone, without weights."""

    def __init__(self, family: Family, configs: Mapping[str, Mapping[str, Any]]):
        self.family, self.configs = family, configs
        self.modules = _build(family, configs)
        self.counts = {part: count(module) for part, module in self.modules.items()}

    @classmethod
    def of(cls, folder: Path) -> Model:
        """That of the pipeline in a folder. MetaLoraError where its configs cannot be read."""
        family = family_of(folder)
        try:
            return cls(family, {part: json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in family.networks})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(folder, error) from error

    @classmethod
    def known(cls, name: str) -> Model:
        """That of a base of families.KNOWN, which need not be here."""
        return cls(KNOWN[name], KNOWN[name].configs)

    def weights(self, component: str, precision: Precision) -> int:
        """Bytes of a component in a plan of that precision. Only the transformer is ever in fp8, and the large text encoder too in 4 bits."""
        quantised = component == "transformer" or (component == self.family.large_text_encoder and precision == "4-bit")
        return self.counts[component].size(precision if quantised or precision == "float32" else "bf16")

    @property
    def width(self) -> int:
        """d, of the transformer's tokens."""
        return self.modules["transformer"].inner_dim

    def tokens(self, resolution: int) -> int:
        """Image tokens of a square picture: the VAE makes a latent of 2x2 px smaller sides per level, 2x2 latents are a token."""
        return (resolution // 2 ** len(self.modules["vae"].config.block_out_channels)) ** 2

    def step(self, work: Work, checkpointing: bool, number: int) -> int:
        """Bytes that a training step adds to the weights, `number` bytes each number.

        With one token's vector of the transformer's width as the unit, the family says how many autograd keeps of a block,
        where the base is frozen and only the small factors learn. It keeps no input of a linear layer, for neither W nor
        Down has a gradient; of each layer it keeps Down·x (r_m) and Mid·Down·x (r). Where Down learns too, layer inputs come
        to that. Other vectors live while a block is gone through, forward or backward. With checkpointing every block keeps
        its input only (1), and the block at work all. To that comes the adapter: weight, gradient and two moments in float32
        of what learns, and Down; and what a step makes of these for all layers at once (flat.py), in its own precision.
        """
        config, vectors = self.modules["transformer"].config, self.family.vectors
        tokens = work.batch * (self.tokens(work.train_resolution) + work.caption_tokens)
        more = vectors.learning if work.learns_down else 0
        single, double = vectors.single + more, vectors.double + more
        blocks = config.num_single_layers + config.num_layers
        kept = blocks + double if checkpointing else single * config.num_single_layers + double * config.num_layers
        factors = (len(self._targets(work)) // blocks if checkpointing else len(self._targets(work))) * (work.rank + work.meta_rank)
        return number * tokens * ((kept + vectors.at_work) * self.width + factors) + self._adapter(work, number)

    def _targets(self, work: Work) -> dict[str, nn.Linear]:
        return find_targets(self.modules["transformer"], work.targets)

    def _adapter(self, work: Work, number: int) -> int:
        layers = self._targets(work).values()
        wide = sum(layer.in_features for layer in layers)
        heads, down = work.identities * work.rank * sum(layer.out_features + work.meta_rank for layer in layers), work.meta_rank * wide
        at_once = heads + down + work.rank * wide  # Mid and Up, Down, and Mid · Down; gradients come as activations go
        return 16 * heads + (16 if work.learns_down else 4) * down + number * at_once

    def phases(self, work: Work, plan: Plan) -> dict[str, tuple[tuple[str, ...], int]]:
        """Each piece of work: the components it needs, and the bytes it adds to their weights.

        Read off the networks: the first level of the VAE's encoder holds 5 maps of its width at once, the last of its decoder 3 of
        the width of the level below.
        """
        number = 4 if plan.precision == "float32" else 2
        widths = self.modules["vae"].config.block_out_channels
        texts = self.family.numbers_of_texts(self.modules, max(1, TOKENS_AT_ONCE // work.text_tokens), work.text_tokens)
        pixels = max(PIXELS_AT_ONCE, work.train_resolution**2)
        forward = self.family.vectors.drawing * self.width * (self.tokens(work.resolution) + work.text_tokens)
        copies = sum(layer.weight.numel() for layer in self._targets(work).values()) if plan.folds else 0
        return {
            "encoding texts": (self.family.text_encoders, int(number * texts)),
            "encoding photos": (("vae",), number * 5 * widths[0] * pixels),
            "learning": (("transformer",), self.step(work, plan.checkpointing, number)),
            "drawing": (("transformer", "vae"), number * (max(forward, 3 * widths[1] * work.resolution**2) + copies)),
        }

    def needs(self, work: Work) -> dict[str, Needs]:
        """What every plan needs."""
        return {plan.name: self._needs(work, plan) for plan in (*PLANS, ON_CPU)}

    def _needs(self, work: Work, plan: Plan) -> Needs:
        size = {part: self.weights(part, plan.precision) for part in self.counts}
        phases = {
            name: sum(size[part] for part in size if part in plan.stays or part in parts) + more for name, (parts, more) in self.phases(work, plan).items()
        }  # fmt: skip
        if plan == ON_CPU:
            return Needs(0, max(phases.values()) + PYTHON, phases)
        through = set(size) - ({"transformer"} if plan.precision == "4-bit" and plan.stays else set())  # 4-bit weights are made on the card
        return Needs(max(phases.values()) + RESERVE, sum(size[part] for part in through) + PYTHON, phases)


class Needs(NamedTuple):
    """Bytes that a plan takes; on a CPU all of them are system memory."""

    gpu: int
    system: int
    phases: dict[str, int]  # of each piece of work, without the reserve


@dataclass(frozen=True)
class Choice:
    """The plan that was chosen, what each would need, and why the faster ones were passed over."""

    plan: Plan
    needs: dict[str, Needs]
    passed_over: dict[str, str]  # plan → one sentence

    @property
    def says(self) -> str:
        """One sentence."""
        need = self.needs[self.plan.name]
        where = f"up to {need.gpu / GIB:.1f} GiB on the card and {need.system / GIB:.1f} GiB" if need.gpu else f"up to {need.system / GIB:.1f} GiB"
        return f"{self.plan.name}: {describe(self.plan)}; {where} of system memory"

    def below(self, plan: Plan) -> Plan | None:
        """The next plan that can be followed here and needs less of the card for some piece of work and more for none; None where there is none."""
        later, now = PLANS[PLANS.index(plan) + 1 :] if plan in PLANS else (), self.needs[plan.name].phases
        phases = {other: self.needs[other.name].phases for other in later}
        less = (other for other, then in phases.items() if then != now and all(then[phase] <= now[phase] for phase in now))
        return next((other for other in less if lacking(other.precision) is None), None)


def describe(plan: Plan) -> str:
    """A plan in words."""
    if plan == ON_CPU:
        return "all in float32 on the CPU"
    where = {COMPONENTS: "all on the card", ("transformer",): "text encoders and VAE on the card only while at work"}.get(
        plan.stays, "each part on the card only while at work"
    )
    people = ", people folded into the weights" if plan.folds else ""
    return f"{plan.precision} weights, {where}, {'with' if plan.checkpointing else 'without'} checkpointing{people}"


def choose(gpu: int | None, system: int | None, needs: dict[str, Needs], name: str | None = None) -> Choice:
    """The fastest plan that fits `gpu` bytes of a card (None: a CPU) and `system` bytes of system memory (None: not looked at).

    `needs` are a Model's. `name` takes the plan of that name, whether it fits or not.
    Raises MetaLoraError where nothing fits or the name is none.
    """
    plans = {plan.name: plan for plan in (PLANS if gpu is not None else (ON_CPU,))}
    if name:
        if name not in plans:
            raise MetaLoraError(f"There is no plan {name} {'for a GPU' if gpu is not None else 'on a CPU'}; choose {', '.join(plans)}, or leave --plan out.")
        return Choice(plans[name], needs, {})
    passed: dict[str, str] = {}
    would_do = None  # why the first plan that would fit cannot be followed
    for plan in plans.values():
        lacks, reason = lacking(plan.precision), _too_much(plan.name, needs[plan.name], gpu, system)
        if reason is None and lacks is None:
            return Choice(plan, needs, passed)
        passed[plan.name] = reason or f"{plan.name} needs {lacks}."
        would_do = would_do or (None if reason else passed[plan.name])
    raise MetaLoraError(would_do or _nothing_fits([needs[name] for name in plans], gpu, system))


def lacking(precision: Precision) -> str | None:
    """What is to be installed for weights of that precision; None where it is there."""
    if precision not in PACKAGES:
        return None
    package, version = PACKAGES[precision]
    try:
        importlib.metadata.version(package)
        return None
    except importlib.metadata.PackageNotFoundError:
        return f"{package}; run `pip install {package}=={version}`"


def _too_much(name: str, need: Needs, gpu: int | None, system: int | None) -> str | None:
    """Why a plan does not fit; None where it does."""
    if gpu is not None and need.gpu > gpu:
        phase = max(need.phases, key=need.phases.__getitem__)
        return f"{name} needs {need.gpu / GIB:.1f} GiB on the card for {phase}, and {gpu / GIB:.1f} GiB are there."
    if system is not None and need.system > system:
        return f"{name} needs {need.system / GIB:.1f} GiB of system memory, and {system / GIB:.1f} GiB are there."
    return None


def _nothing_fits(needs: Sequence[Needs], gpu: int | None, system: int | None) -> str:
    least = min(needs, key=lambda need: (need.gpu, need.system))
    if gpu is not None and least.gpu > gpu:
        return (
            f"This base needs {least.gpu / GIB:.1f} GiB of free memory on the card at the least, and {gpu / GIB:.1f} GiB are free; "
            "close other programs that use the card, take a larger one, or use --base miniature."
        )
    return f"This base needs {least.system / GIB:.1f} GiB of system memory, and this machine has {(system or 0) / GIB:.1f} GiB; use --base miniature."


def count(module: nn.Module) -> Weights:
    """The numbers of a component."""
    linears = [m for name, m in module.named_modules() if isinstance(m, nn.Linear) and name.rpartition(".")[2] not in KEEP_BITS]
    linear = sum(m.weight.numel() for m in linears)
    return Weights(linear, sum(m.out_features for m in linears), len(linears), sum(p.numel() for p in module.parameters()) - linear)


def _build(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    import diffusers
    import transformers

    def build(name: str, config: Mapping[str, Any]) -> nn.Module:
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_config(dict(config))
        network = getattr(transformers, name)
        return network(network.config_class(**config))

    with torch.device("meta"):
        return {part: build(name, configs[part]) for part, name in family.networks.items()}


def numbered(device: torch.device) -> torch.device:
    """A GPU by its number, where only the kind is said: the one that this process uses. A CPU as it is."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def card(device: torch.device) -> int | None:
    """Bytes of a GPU that this process has or can have; None for a CPU. Sets the limit, so that none is taken from system memory."""
    if device.type != "cuda":
        return None
    device = numbered(device)  # the limit wants it so
    free, total = torch.cuda.mem_get_info(device)
    ours = min(total, free + torch.cuda.memory_reserved(device))
    if not ZERO_GPU:
        torch.cuda.set_per_process_memory_fraction(ours / total, device)
    return ours


def system_memory() -> int | None:
    """Bytes of this machine's memory, or of this container's share of it; None where it does not say."""
    if not hasattr(os, "sysconf"):
        return None
    limits = (Path(path) for path in CONTAINER_LIMITS)
    shares = [int(limit) for path in limits if path.is_file() and (limit := path.read_text().strip()).isdigit()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *shares])
