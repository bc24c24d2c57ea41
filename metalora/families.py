"""The families that are understood, and which of them a base is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config import BaseSettings
from .errors import MetaLoraError
from .family import Family
from .flux import Flux
from .flux2 import Flux2Klein

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (Flux(), Flux2Klein())}
KNOWN: dict[str, Family] = {family.known: family for family in FAMILIES.values()}  # by the base whose configs are known without its files


def index_of(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline's folder. MetaLoraError where there is none, or it is damaged."""
    try:
        return dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(folder, error) from error


def family_of(folder: Path) -> Family:
    """The family of the pipeline in a folder. MetaLoraError where it is of none."""
    kind = index_of(folder).get("_class_name")
    if kind not in FAMILIES:
        raise MetaLoraError(f"The base in {folder} is a {kind}; only {' and '.join(FAMILIES)} are understood.")
    return FAMILIES[kind]


def settings_of(folder: Path) -> BaseSettings:
    """What the base in a folder wants to be used with: its family's defaults under its own metalora.json."""
    return BaseSettings.load(folder, family_of(folder).settings(index_of(folder)))


def unreadable(folder: Path, error: Exception) -> MetaLoraError:
    """The sentence for a base whose files are damaged."""
    return MetaLoraError(f"The base in {folder} cannot be read ({str(error).splitlines()[0][:120]}); get it afresh.")
