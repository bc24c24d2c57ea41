"""From a name to a local folder: a folder, a short name of catalog.json, or a Hub id with an optional @revision.

The cache is looked in first, so that what is already here needs no network (a dead server costs 24 s of retries). Only
the files that are needed are fetched. A gated, missing, unreachable or full-disk case is one sentence that says what to do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MetaLoraError
from .files import disk_sentence
from .metadown import CONFIG, TENSORS, MetaDown

CATALOG = Path(__file__).with_name("catalog.json")
PIPELINE_FILES = [
    "model_index.json", "metalora.json", "README.md", "scheduler/*.json", "transformer/*.json", "transformer/*.safetensors", "vae/*.json",
    "vae/*.safetensors", "text_encoder*/*.json", "text_encoder*/*.safetensors", "tokenizer*/*",
]  # fmt: skip
META_DOWN_FILES = ["meta_down.safetensors", "config.json", "README.md"]


def catalog() -> dict[str, dict]:
    """Rows of catalog.json: base name → {"path": ..., "meta_down": {domain: place}}."""
    return json.loads(CATALOG.read_text(encoding="utf-8"))


def base_folder(name: str, download: bool = True) -> Path:
    """Local folder of a base model; fetched when it must be and may. MetaLoraError where there is none to be had."""
    place = catalog().get(name, {}).get("path")
    folder = (CATALOG.parent / place).resolve() if place else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise MetaLoraError(f"The folder {folder} holds no diffusers pipeline (no model_index.json); give the folder of a FLUX pipeline.")
        return folder
    if place:
        raise MetaLoraError(f"The base {name} should lie in {folder}, but it is not there; get the project's files afresh.")
    return fetch(name, PIPELINE_FILES, pipeline_is_complete, download)


def meta_down_places(base: str) -> dict[str, str]:
    """Default Meta-Down of a base for each domain that the catalogue knows, as folders or Hub ids."""
    rows = catalog().get(base, {}).get("meta_down", {})
    return {domain: str((CATALOG.parent / place).resolve()) if place.startswith(".") else place for domain, place in rows.items()}


def meta_down_folder(place: str, domain: str = "", download: bool = True) -> Path:
    """Local folder of a Meta-Down: `place` itself, its subfolder named after the domain, or a Hub id."""
    folder = Path(place).expanduser()
    for candidate in (folder, folder / domain):
        if (candidate / TENSORS).is_file():
            return candidate
    if folder.is_dir():
        kind = f" for {domain}" if domain else ""
        raise MetaLoraError(f"The folder {folder} holds no Meta-Down{kind}; give a folder with {TENSORS} and {CONFIG}.")
    return fetch(place, META_DOWN_FILES, lambda found: (found / TENSORS).is_file() and (found / CONFIG).is_file(), download)


def domains_in(place: str | Path) -> list[str]:
    """The domains for which a folder has a subfolder with a Meta-Down; none for a single Meta-Down or a Hub id."""
    return sorted(path.parent.name for path in Path(place).expanduser().glob(f"*/{TENSORS}"))


def pipeline_is_complete(folder: Path) -> bool:
    """True when every component that model_index.json names is here, each shard included."""
    index = folder / "model_index.json"
    if not index.is_file():
        return False
    parts = [k for k, v in json.loads(index.read_text(encoding="utf-8")).items() if isinstance(v, list) and v[0] is not None]
    return all(_part_is_complete(folder / part) for part in parts)


def _part_is_complete(part: Path) -> bool:
    if not part.is_dir() or not any(part.iterdir()):
        return False
    shards = {s for i in part.glob("*.index.json") for s in json.loads(i.read_text(encoding="utf-8"))["weight_map"].values()}
    needs_weights = (part / "config.json").is_file()
    return all((part / shard).is_file() for shard in shards) and (not needs_weights or any(part.glob("*.safetensors")))


def fetch(name: str, files: list[str], complete: Callable[[Path], bool], download: bool = True) -> Path:
    """Folder of a Hub repository's snapshot that holds `files`; `complete(folder)` says whether the cache has all of them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        if Path(name).is_absolute():
            raise MetaLoraError(f"There is no folder {name}; check the spelling, or get the project's files afresh.")
        raise MetaLoraError(f"There is no folder {name}, and it is no Hub name either (those read owner/model); check the spelling.")
    repo, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=files, local_files_only=True))
        if complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass  # nothing of it here yet
    if not download:
        raise MetaLoraError(f"{name} is not on this machine yet; it is fetched on first use.")
    folder = _download(repo, revision or None, files)
    if not complete(folder):
        raise MetaLoraError(f"{name} lacks files that are needed here; check that it is the right repository.")
    return folder


def _download(repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _plain_faults(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))


def publish(folder: str | Path, repo: str, private: bool = False) -> str:
    """Put a Meta-Down folder on the Hub, card and all, and return its address there.

    Raises MetaLoraError where it is no Meta-Down, the name is none, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    MetaDown.load(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise MetaLoraError(f"{repo} is no name on the Hub; those read owner/model.")
    with _plain_faults(repo, None):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, allow_patterns=META_DOWN_FILES, commit_message="Meta-Down").repo_url)


@contextmanager
def _plain_faults(repo: str, revision: str | None) -> Iterator[None]:
    """What goes wrong with the Hub becomes one sentence that says what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise MetaLoraError(f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, then set HF_TOKEN to a token of yours.") from error
    except errors.RevisionNotFoundError as error:
        raise MetaLoraError(f"{repo} has no revision {revision}; check what follows the @.") from error
    except errors.RepositoryNotFoundError as error:
        raise MetaLoraError(f"There is no {repo} on the Hub, or it is private; check the spelling, or set HF_TOKEN.") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise MetaLoraError(f"The Hub does not let you at {repo}; set HF_TOKEN to a token of yours that may.") from error
        raise MetaLoraError(f"The Hub failed with {repo} ({error.response.status_code}); try again later.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.HTTPError, ConnectionError) as error:
        offline = " because HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True") else ""
        raise MetaLoraError(f"{repo} cannot be had, for the Hub cannot be reached{offline}; go online once, or give a folder.") from error
    except OSError as error:
        raise MetaLoraError(disk_sentence(error, Path(constants.HF_HUB_CACHE))) from error
