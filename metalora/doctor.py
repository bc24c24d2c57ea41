"""What is here and what is not: versions, device, memory and the plan for it, base, Meta-Downs, face pack, CLIP. Fetches nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hub
from .config import PICTURE, BaseSettings
from .errors import MetaLoraError
from .metadown import MetaDown

if TYPE_CHECKING:
    from .plan import Learning

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "insightface", "onnxruntime", "gradio")


def examine(base: str, meta_down: str | None, cards: Sequence[float] = ()) -> dict[str, Any]:
    """All findings; every part that is looked for has `ok` and `says`, and `ready` is whether all parts are ok.

    For each of `cards`, GPU memory in GiB, what the plan would be.
    """
    from .families import KNOWN, settings_of

    parts: dict[str, dict[str, Any]] = {}
    _look(parts, "base", lambda: _base(base))
    folder = parts["base"].get("folder")
    settings = BaseSettings()
    if folder:
        _look(parts, "settings", lambda: {"says": settings_of(Path(folder)).name or "of its family"})
        if parts["settings"]["ok"]:
            settings = settings_of(Path(folder))
    known = hub.meta_down_places(settings.name or base)
    plans: dict[str, dict[str, Any]] = {}
    if folder or base in KNOWN:
        learning = "person" if known or meta_down else "plain"
        _look(parts, "plan", lambda: _plan(base, folder, settings, learning, None))
        for size in cards:
            _look(plans, f"a card of {size:g} GiB", lambda: _plan(base, folder, settings, learning, size))
    places = {domain: meta_down for domain in hub.domains_in(meta_down) or [""]} if meta_down else known
    for domain, place in places.items():
        _look(parts, f"Meta-Down {domain}".strip(), lambda: _meta_down(place, domain, folder))
    if not places:
        plain = f"people are learnt as ordinary LoRAs of rank {settings.plain_rank} in {settings.plain.steps} steps"
        parts["Meta-Down"] = {"ok": True, "says": f"none for {base}, so {plain}; make one with meta-train, or give one with --meta-down"}
    _look(parts, "face pack", lambda: _face_pack(settings))
    _look(parts, "CLIP", lambda: _model("CLIP", settings.clip))
    if any(part.get("subject") == PICTURE for part in parts.values()):
        _look(parts, "DINO", lambda: _model("DINO", settings.dino))
    return {
        "ready": all(part["ok"] for part in parts.values()), "python": platform.python_version(), "system": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES}, **device(), "parts": parts, "cards": plans,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> str:
    """The findings as text."""
    versions = ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items())
    memory = f"{found['memory_gib']:.0f} GiB memory, {found['disk_free_gib']:.0f} GiB free on the disk"
    head = [f"Python {found['python']} on {found['system']}", versions, f"device: {found['device']}; {memory}"]
    return "\n".join([*head, *(line for kind in ("parts", "cards") for name, part in found[kind].items() for line in _lines(name, part))])


def _lines(name: str, part: dict[str, Any]) -> list[str]:
    return [f"{'ok     ' if part['ok'] else 'MISSING'}  {name}: {part['says']}", *(f"         not {reason}" for reason in part.get("passed_over", {}).values())]


def _look(parts: dict[str, dict[str, Any]], name: str, look: Callable[[], dict[str, Any]]) -> None:
    try:
        parts[name] = {"ok": True, **look()}
    except MetaLoraError as error:
        parts[name] = {"ok": False, "says": str(error)}


def _base(name: str) -> dict[str, Any]:
    from .base import fingerprint

    folder = hub.base_folder(name, download=False)
    licence = hub.catalog().get(name, {}).get("licence")
    return {"says": f"{name} in {folder}{f', under {licence}' if licence else ''}", "folder": str(folder), "fingerprint": fingerprint(folder)}


def _plan(base: str, folder: str | None, settings: BaseSettings, learning: Learning, card: float | None) -> dict[str, Any]:
    """The plan for a card of `card` GiB, or for this machine."""
    import torch

    from . import plan

    model = plan.Model.of(Path(folder)) if folder else plan.Model.known(base)
    needs = model.needs(plan.Work.of(settings, learning))
    if card is None:
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        choice = plan.choose(plan.card(here), plan.system_memory(), needs)
    else:
        choice = plan.choose(int(card * plan.GIB), None, needs)
    return {"says": choice.says, "plan": choice.plan.name, "passed_over": choice.passed_over, "gpu_bytes": choice.needs[choice.plan.name].gpu}


def _meta_down(place: str, domain: str, base: str | None) -> dict[str, Any]:
    from .base import fingerprint
    from .families import settings_of

    found = MetaDown.load(hub.meta_down_folder(place, domain, download=False))
    if base:
        found.check_base(settings_of(Path(base)).name or base, fingerprint(Path(base)))
    return {"says": f"{found.name} for {found.domain}, rank {found.adapter.meta_rank}, {found.sha256[:8]}{''.join(f', with {name}' for name in found.more)}", "sha256": found.sha256, "domain": found.domain, "subject": found.subject}


def _face_pack(settings: BaseSettings) -> dict[str, Any]:
    from .face import INSIGHTFACE, FaceFinder

    known = INSIGHTFACE / settings.face_pack
    if os.sep not in settings.face_pack and not Path(settings.face_pack).is_dir() and not known.is_dir():
        raise MetaLoraError(f"{settings.face_pack} is not on this machine yet; it is fetched on first use.")
    FaceFinder.of(settings)
    return {"says": settings.face_pack}


def _model(kind: str, place: str) -> dict[str, Any]:
    if not (hub.model_folder(place, download=False) / "config.json").is_file():
        raise MetaLoraError(f"The {kind} model {place} has no config.json; get it afresh.")
    return {"says": place}


def device() -> dict[str, Any]:
    """The device that would be used, the machine's memory and the free disk."""
    import torch

    from .plan import system_memory

    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB" if properties else f"CPU, {os.cpu_count()} cores"
    memory = system_memory() or 0
    return {"device": name, "gpu": gpu, "memory_gib": memory / 2**30, "disk_free_gib": shutil.disk_usage(Path.cwd()).free / 2**30}


def machine() -> dict[str, Any]:
    """What a measurement was made on: device, memory, cores, threads and versions."""
    import torch

    versions = {name: version(name) for name in PACKAGES}
    return {**device(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(), "packages": versions}


def version(package: str) -> str | None:
    """Installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
