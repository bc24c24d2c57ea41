"""A peer that nobody here wrote: diffusers' own script for DreamBooth with LoRA on FLUX, run as it is.

It is no part of this project. It is fetched when a comparison asks for it, from diffusers' repository at one fixed commit, and
checked. It wants torchvision, which nothing else here does.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor

from .base import Base
from .errors import MetaLoraError
from .files import load_tensors, write_atomically
from .photo import load_photo
from .processes import here

COMMIT = "c56add8081be60b7e8794e011f1790d0e37aeced"
NAME = "train_dreambooth_lora_flux.py"
ADDRESS = f"https://raw.githubusercontent.com/huggingface/diffusers/{COMMIT}/examples/dreambooth/{NAME}"
SHA256 = "1e7862bbfb16f2d5fa6f3424a93c2d8383ba4b5f1509c6265777e1eb84d070ef"
LORA = "pytorch_lora_weights.safetensors"  # what it writes
ANSWER_WITHIN = 10  # seconds that the server may take for its first answer


@dataclass(frozen=True)
class PeerConfig:
    """What the script is told; all else is as it comes. These are its own defaults, but for the batch, which its guide for FLUX has at 1."""

    rank: int = 16
    steps: int = 500
    learning_rate: float = 1e-4
    batch_size: int = 1
    seed: int = 0


def script() -> Path:
    """The script, fetched once into the Hub client's folder. MetaLoraError where it cannot be had or is not the one we know."""
    path = Path(constants.HF_HOME) / "metalora" / COMMIT / NAME
    if not path.is_file():
        write_atomically(path, lambda beside: beside.write_bytes(_fetch(path)))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise MetaLoraError(f"{path} is not the script that this comparison knows; remove it, and it will be fetched afresh.")
    return path


def _fetch(path: Path) -> bytes:
    try:
        with urllib.request.urlopen(ADDRESS, timeout=ANSWER_WITHIN) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise MetaLoraError(f"diffusers' training script cannot be fetched ({error}); go online, or put {ADDRESS} at {path}.") from error


def check(base: Base) -> None:
    """Say at once, and not after an hour's work, what the script lacks."""
    if base.family.dreambooth_script != NAME:
        raise MetaLoraError(f"diffusers' training script is for FLUX.1, and {base.name} is of another family; leave it out, or take another base.")
    if importlib.util.find_spec("torchvision") is None:
        raise MetaLoraError("diffusers' training script needs torchvision; install the release that fits this torch (pip install torchvision==0.28.0).")
    script()


def train(base: Path, photos: Sequence[Any], prompt: str, resolution: int, tokens: int, config: PeerConfig) -> dict[str, Tensor]:
    """The LoRA, under diffusers' names, that the script learns from the photos for `prompt` on the pipeline in `base`.

    `photos` are whatever load_photo takes; `tokens` is the T5 length. Raises MetaLoraError, with what it said last, where the script fails.
    """
    with tempfile.TemporaryDirectory(prefix="metalora-peer-") as folder:
        pictures, output = Path(folder, "photos"), Path(folder, "output")
        pictures.mkdir()
        for number, photo in enumerate(photos):
            load_photo(photo).save(pictures / f"{number}.png")  # upright, without alpha, whatever the photo's format
        command = [sys.executable, str(script()), *_arguments(base, pictures, output, prompt, resolution, tokens, config)]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=_environment())
        if run.returncode or not (output / LORA).is_file():
            lines = run.stdout.strip().splitlines() or ["it said nothing"]
            raise MetaLoraError(f"diffusers' training script failed ({lines[-1][:200]}); run it by hand to see where: python {script()}.")
        return load_tensors(output / LORA, "a LoRA")[0]


def _environment() -> dict[str, str]:
    """Ours, but for what a launcher told this process: the script is to learn alone, on this process's GPU, and not to wait for other people's."""
    told = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME|ROLE_\w+)|MASTER_\w+|TORCHELASTIC_\w+|ACCELERATE_\w+|FSDP_\w+")
    own = {key: value for key, value in os.environ.items() if not told.fullmatch(key)}
    if here().device():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own["CUDA_VISIBLE_DEVICES"] = visible[here().local] if len(visible) > here().local and visible[0] else str(here().local)
    return own


def seconds_a_step(base: Path, photos: Sequence[Any], resolution: int, tokens: int, config: PeerConfig) -> float:
    """The mean over `config.steps` steps: a training of so many more steps than another takes so much longer, whatever starting costs."""
    few, times = max(1, config.steps // 10), []
    for steps in (few, few + config.steps):
        begin = time.perf_counter()
        train(base, photos, "a photo", resolution, tokens, replace(config, steps=steps))
        times.append(time.perf_counter() - begin)
    return (times[1] - times[0]) / config.steps


def _arguments(base: Path, photos: Path, output: Path, prompt: str, resolution: int, tokens: int, config: PeerConfig) -> list[str]:
    told = {
        "pretrained_model_name_or_path": base, "instance_data_dir": photos, "instance_prompt": prompt, "output_dir": output,
        "resolution": resolution, "max_sequence_length": tokens, "rank": config.rank, "lora_alpha": config.rank, "max_train_steps": config.steps,
        "learning_rate": config.learning_rate, "train_batch_size": config.batch_size, "seed": config.seed, "guidance_scale": 1,
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no", "checkpointing_steps": config.steps + 1,
    }  # fmt: skip
    return [text for key, value in told.items() for text in (f"--{key}", str(value))]
