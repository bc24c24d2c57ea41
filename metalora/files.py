"""Reading and writing safetensors without surprises: nothing half-written, no pickle opened, every fault one sentence."""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import FULL, MetaLoraError

if TYPE_CHECKING:
    from torch import Tensor  # which is slow to load, and not needed to look for files

# The files of a Meta-Down's folder.
TENSORS, START, PREDICTOR, CONFIG, CARD = "meta_down.safetensors", "start.safetensors", "predictor.safetensors", "config.json", "README.md"
MORE = {START: "start_sha256", PREDICTOR: "predictor_sha256"}  # those that it may have, and where config.json names their hash
PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, then rename it: `path` is either complete or untouched.

    Raises MetaLoraError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # not the process's number: two machines may have the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise MetaLoraError(disk_sentence(error, path)) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def free(path: Path) -> Path:
    """The path; where something is there already, the same with the first number behind it that is free."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def disk_sentence(error: OSError, path: Path) -> str:
    """What to tell a user whose file could not be written."""
    if error.errno in FULL:
        return f"The disk is full, so {path.name} was not saved; free some space and save again."
    return f"{path} cannot be written ({error.strerror or error}); choose another place."


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file atomically, readable by all like any other file."""
    from safetensors.torch import save as save_bytes

    data = _ordered(save_bytes({name: t.contiguous() for name, t in tensors.items()}, dict(metadata) if metadata else None))
    return write_atomically(path, lambda beside: beside.write_bytes(data))


def _ordered(data: bytes) -> bytes:
    """The same safetensors file with its metadata in the order of the alphabet; safetensors' own order differs from run to run."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if len(header.get("__metadata__", {})) < 2:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def save_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def load_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file; `what` names its kind in messages ("an identity file").

    Raises MetaLoraError where there is no such file, it is a pickle (which is not opened) or it is damaged.
    """
    path = check_tensors(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise MetaLoraError(f"{path.name} is damaged or not {what}; get it afresh.") from error


def check_tensors(path: str | Path, what: str) -> Path:
    """The same refusals, of a file that is not there or a pickle, without reading it."""
    path = Path(path)
    if not path.is_file():
        raise MetaLoraError(f"There is no file {path}; check the name.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise MetaLoraError(f"{path} cannot be read ({error.strerror}); check who may read it.") from error
    # A safetensors file may start with pickle's two bytes too (they are its header's length), but its ninth is a brace.
    pickled = start[:1] == b"\x80" and start[1:2] <= b"\x05" and start[8:] != b"{"
    if path.suffix.lower() in PICKLE_SUFFIXES or start.startswith(b"PK\x03\x04") or pickled:
        raise MetaLoraError(f"{path.name} may hold a pickle, which can run code, so it was not opened; {what} is a .safetensors file.")
    return path


def is_complete(folder: Path) -> bool:
    """Whether all files that a Meta-Down's config.json speaks of are there."""
    if not ((folder / TENSORS).is_file() and (folder / CONFIG).is_file()):
        return False
    config = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    return all((folder / name).is_file() for name, key in MORE.items() if f'"{key}"' in config)
