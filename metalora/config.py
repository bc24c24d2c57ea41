"""Every setting and its default in one place, as frozen dataclasses.

The defaults are those of FLUX.1-dev; a family of base models may replace some. A base model may carry a ``metalora.json`` beside
its ``model_index.json`` that replaces any of them; nothing else in the package knows one base from another of its family.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .errors import MetaLoraError, naming

FORMAT_VERSION = 1
DEFAULT_BASE = "miniature"
ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))  # a Space whose GPUs come and go: the process that opens the base has none of its own
SETTINGS_FILE = "metalora.json"
# Attention and feed-forward layers of every block. Anchored on the blocks: the bare suffix `proj_out` would also hit the final layer.
BLOCK_LINEARS = r"^(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp|proj_out)\b"
OUT_OF_RANGE = "out of range: counts are 1 or more, rates above 0, shares 0 to 1"
FACE, PICTURE = SUBJECTS = ("face", "picture")  # what a domain's photos are of: a face in each; or, where the domain is of things, the whole picture


@dataclass(frozen=True)
class AdapterConfig:
    """Shape of the three-factor adapter  y = W x + scale · Up · Mid · Down · x."""

    rank: int = 1  # r, of Mid and Up
    meta_rank: int = 16  # r_m, of Meta-Down
    scale: float = 1.0  # s
    targets: str = BLOCK_LINEARS  # regular expression; the linear layers it finds are adapted
    mid_start: str = "random"  # "random": normal, variance 1/r_m; "identity": the first r rows of Meta-Down


@dataclass(frozen=True)
class FlowConfig:
    """How noise levels are drawn while training."""

    logit_mean: float = 0.0  # positive means less noise: the draw indexes descending timesteps
    logit_std: float = 1.0


@dataclass(frozen=True)
class AdaptConfig:
    """Stage 2: one person, one photo or a few. The last ones go beyond the paper, each neutral unless it is set."""

    steps: int = 375
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 1
    crops: int = 8  # different crops round the face, each also mirrored
    margin: tuple[float, float] = (0.6, 1.6)  # least and most room round the face box, in face heights
    warmup_steps: int = 10  # of the learning rate
    max_grad_norm: float = 1.0
    background: float = 1.0  # how much what lies outside the face counts in the loss; 0: it is not learnt at all
    flow: FlowConfig = field(default_factory=FlowConfig)
    seed: int = 0
    start_mid: float = 1.0  # how far Mid begins at the Meta-Down's learnt start, where it has one; 0: as if it had none
    start_up: float = 1.0  # the same of Up; 0: the untrained adapter changes nothing
    start_face: float = 1.0  # how far that start is the one which the face tells, where the Meta-Down can predict it; 0: the same for all
    up_rate: float = 1.0  # learning rate of Up, in that of the others [LoRA+, arXiv 2402.12354, section 4]
    # Factor on the adapter's scale; 1/sqrt(rank) is rsLoRA's [arXiv 2312.03732, section 3]. With Adam and an Up that begins at
    # zero it is the same as up_rate: gradients of Up grow by the factor, which Adam does not see, and its steps count for so much more.
    scale: float = 1.0
    # The person is the moving average over steps of this decay, 0: the last step [Polyak's averaging; a batch of few draws makes steps noisy].
    ema: float = 0.0
    rank: int = 0  # of the person; 0: the Meta-Down's. Another begins with a fresh Mid and Up, since a learnt start is of the Meta-Down's rank
    # Rows of Meta-Down that are used, from the first; 0: all. Those that stage 1 found as directions are in order, the leading one first.
    meta_rank: int = 0
    skip_blocks: float = 0.0  # share of the transformer's blocks, from the input on, that are left as they are
    # Pictures that the base itself makes of others of the class, learnt along under the person's words, but for the face: prompts keep
    # what they mean. [Ours, after the prior preservation of DreamBooth, arXiv 2208.12242, section 3.2, which learns them whole and under other words]
    prior_pictures: int = 0
    # Draws of noise by which the base itself is asked which of its `asked_phrases` are true of the photo, for the caption; 0: it is not asked.
    asked_draws: int = 0
    # Part of the pictures, on average, that is learnt under a caption that says something else than is true of the photo: what they are to be is then
    # changed by as much as the base, without the person, changes its own picture between the two. So what is asked for is not overruled by what the
    # photo shows. [Ours; the difference of two captions as what is to be learnt is from Concept Sliders, arXiv 2311.12092, section 4]
    reworded: float = 0.0
    # The blocks are compiled first. It takes about a minute once; after that a step on a GPU is a quarter shorter, and on a CPU, where it
    # takes a C++ compiler, a sixth.
    compiled: bool = False

    def __post_init__(self) -> None:
        counts = min(self.steps, self.batch_size, self.crops) >= 1
        rates = min(self.learning_rate, self.max_grad_norm, self.flow.logit_std, self.up_rate, self.scale) > 0
        rest = min(self.weight_decay, self.warmup_steps, self.prior_pictures, self.asked_draws, self.rank, self.meta_rank) >= 0
        shares = (self.background, self.start_mid, self.start_up, self.start_face, self.skip_blocks, self.ema, self.reworded)
        whole = all(0 <= share <= 1 for share in shares) and max(self.skip_blocks, self.ema) < 1
        margin = len(self.margin) == 2 and 0 <= self.margin[0] <= self.margin[1]
        if not (counts and rates and rest and whole and margin):
            raise MetaLoraError(f"A setting of stage 2 is {OUT_OF_RANGE}, a margin goes from less to more.")

    def ranks(self, adapter: AdapterConfig) -> tuple[int, int]:
        """Rank of a person with that Meta-Down, and how many of its rows are theirs; a higher rank than rows is worth nothing."""
        rows = min(self.meta_rank or adapter.meta_rank, adapter.meta_rank)
        return min(self.rank or adapter.rank, rows), rows


@dataclass(frozen=True)
class MetaConfig:
    """Stage 1: many subjects, once per domain."""

    rounds: int = 60  # buckets to go through
    bucket_size: int = 16  # subjects resident at a time
    bucket_steps: int = 200  # steps on one bucket, warm-up included
    warmup_steps: int = 60  # of them, steps with Down held
    batch_size: int = 4
    learning_rate: float = 1e-3  # of Mid and Up
    down_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 1  # buckets
    validation_every: int = 5  # buckets; 0: never
    validation_people: int = 8  # kept out of the training, at most
    validation_steps: int = 60  # that each learns of its photos, with Down held, before the others are looked at
    background: float = 1.0  # how much what lies outside the largest face counts in the loss; in stage 2 see AdaptConfig
    flow: FlowConfig = field(default_factory=FlowConfig)
    seed: int = 0
    direction_people: int = 0  # at the leading directions of whose gradients Down begins (see directions.py); 0: at random
    balanced: bool = True  # these are scaled until inputs are as large along each; else they have unit length, and inputs are largest along the first
    start_rate: float = 0.0  # how far the start goes towards the mean of each bucket's heads; 0: none is learnt
    predict_rank: int = 0  # directions of the start that faces tell; 0: no predictor is fitted
    predict_steps: int = 200  # that every bucket of people learns, with Down held, for the predictor to be fitted on
    # One of SUBJECTS. Not in the repr, by which a checkpoint is told from those of other settings, for Down is learnt in the same way of both.
    subject: str = field(default=FACE, repr=False)

    def __post_init__(self) -> None:
        if self.subject not in SUBJECTS:
            raise MetaLoraError(f"The subject of a domain is {' or '.join(SUBJECTS)}, not {self.subject}; give one of these.")
        counts = min(self.bucket_size, self.bucket_steps, self.batch_size, self.checkpoint_every) >= 1
        rates = min(self.learning_rate, self.down_learning_rate, self.max_grad_norm, self.flow.logit_std) > 0
        rest = min(self.rounds, self.warmup_steps, self.weight_decay, self.validation_every, self.validation_people, self.validation_steps,
                   self.direction_people, self.predict_rank, self.predict_steps) >= 0  # fmt: skip
        if not (counts and rates and rest and 0 <= self.background <= 1 and 0 <= self.start_rate <= 1):
            raise MetaLoraError(f"A setting of stage 1 is {OUT_OF_RANGE}.")


@dataclass(frozen=True)
class BaseSettings:
    """What a base model wants to be used with; read from its metalora.json."""

    name: str = ""
    resolution: int = 1024  # px, width and height of generated pictures
    train_resolution: int = 512  # px; the same as resolution when only that is given
    inference_steps: int = 28
    guidance: float = 3.5
    train_guidance: float = 1.0
    max_sequence_length: int = 512  # text tokens of the longest prompt
    usual_sequence_length: int = 256  # that captions and shorter prompts are padded to, as ComfyUI does for FLUX.1: a sixth less work at 512 px
    trigger: str = "sks"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    plain_rank: int = 16  # of the ordinary LoRA that a person becomes where there is no Meta-Down for the base
    plain: AdaptConfig = AdaptConfig(steps=1000, learning_rate=2e-4)  # its training: more numbers, so more and smaller steps
    meta: MetaConfig = field(default_factory=MetaConfig)
    face_pack: str = "buffalo_l"  # folder, or a name that InsightFace knows
    clip: str = "openai/clip-vit-large-patch14"
    dino: str = "facebook/dinov2-small"  # folder or Hub id; judges likeness in domains whose subject is no face
    det_size: int = 640
    caption_phrases: tuple[tuple[str, ...], ...] = ()  # groups, one of each of which describes what in a photo is not the person
    asked_phrases: tuple[tuple[str, ...], ...] = ()  # more such groups, for which the base itself is asked (phrases.py), of photos of people
    thing_phrases: tuple[tuple[str, ...], ...] = ()  # the same for photos of domains whose subject is no face
    prompt_phrases: tuple[tuple[str, ...], ...] = ()  # groups of what prompts may say, for the page

    @property
    def text_tokens(self) -> int:
        """Of captions and usual prompts."""
        return min(self.usual_sequence_length, self.max_sequence_length)

    @classmethod
    def load(cls, folder: str | Path, defaults: BaseSettings | None = None) -> BaseSettings:
        """Settings of the base in `folder`: `defaults` under its metalora.json; relative paths in that start there.

        Raises MetaLoraError for a file that is not JSON or names a setting that does not exist.
        """
        path = Path(folder) / SETTINGS_FILE
        if not path.is_file():
            return defaults or cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MetaLoraError(f"{path} is not valid JSON ({error}); mend or remove it.") from error
        if not isinstance(values, dict):
            raise MetaLoraError(f"{path} must hold one JSON object; mend or remove it.")
        if "resolution" in values:
            values.setdefault("train_resolution", values["resolution"])
        for key in ("face_pack", "clip", "dino"):
            local = Path(folder) / str(values.get(key, ""))
            if values.get(key) and local.is_dir():
                values[key] = str(local.resolve())
        return overlay(defaults or cls(), values, str(path))


def overlay(config: Any, values: Mapping[str, Any], where: str = "the settings") -> Any:
    """`config` with `values` laid over it, nested dataclasses too; MetaLoraError for a name that does not exist, or a value that the setting cannot have."""
    known = {f.name for f in fields(config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise MetaLoraError(f"{where} has no setting named {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    changes = {k: _convert(getattr(config, k), v, f"{k} in {where}") for k, v in values.items()}
    with naming(where):
        return replace(config, **changes)


def read_settings(text: str, where: str) -> dict[str, Any]:
    """"learning_rate=2e-3,flow.logit_mean=0.5" as the nested values that `overlay` takes.

    Values are numbers, true or false, lists as [0.6,1.6]. MetaLoraError, which begins with `where`, for anything else and for what is given twice.
    """
    settings: dict[str, Any] = {}
    for part in setting_parts(text):
        key, _, value = part.partition("=")
        *outer, last = key.split(".")
        inner = settings
        for each in outer:
            inner = inner.setdefault(each, {})
            if not isinstance(inner, dict):
                raise MetaLoraError(f"{where} gives {each} twice; leave out one.")
        if last in inner:
            raise MetaLoraError(f"{where} gives {key} twice; leave out one.")
        inner[last] = _value(value, part, where)
    return settings


def setting_parts(text: str) -> list[str]:
    """The parts between commas, but for those of a list."""
    return re.split(r",(?![^\[]*\])", text)


def _value(text: str, part: str, where: str) -> Any:
    try:
        value = json.loads(text, parse_constant=float)
    except ValueError:
        value = None
    several = value if isinstance(value, list) else [value]
    if not several or not all(type(v) in (int, float, bool) and abs(v) < 1e9 for v in several):
        raise MetaLoraError(f"{where} has {part}, which is not understood; write it like learning_rate=2e-3 or margin=[0.6,1.6].")
    return value


def _convert(old: Any, new: Any, where: str) -> Any:
    if is_dataclass(old) and isinstance(new, Mapping):
        return overlay(old, new, where)
    if isinstance(old, tuple) and isinstance(new, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in new)
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    if type(old) is not type(new):
        raise MetaLoraError(f"{where} must be a {type(old).__name__}, not {new!r}.")
    return new
