"""From a name to a local folder: a folder, a short name of catalog.json, or a Hub id with an optional @revision.

The cache is looked in first, so that what is already here needs no network. Only the files that are needed are fetched, and a
download that was killed goes on where it was. A gated, missing, unreachable, damaged or full-disk case is one sentence that
says what to do. Publishing is in publish.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MetaLoraError
from .files import disk_sentence
from .metadown import CONFIG, TENSORS, is_complete

CATALOG = Path(__file__).with_name("catalog.json")
PIPELINE_FILES = [
    "model_index.json", "metalora.json", "README.md", "scheduler/*.json", "transformer/*.json", "transformer/*.safetensors", "vae/*.json",
    "vae/*.safetensors", "text_encoder*/*.json", "text_encoder*/*.safetensors", "tokenizer*/*",
]  # fmt: skip
ANSWER_WITHIN = 4  # seconds that the Hub may take for its first answer
MODEL_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
META_DOWN_FILES = ["meta_down.safetensors", "start.safetensors", "predictor.safetensors", "config.json", "README.md"]


def catalog() -> dict[str, dict]:
    """Rows of catalog.json: base name → {"path": folder of ours, "revision": commit on the Hub, "licence": its name there, "meta_down": {domain: place}}.

    A row without a revision, as FLUX.2-klein-4B's, is not pinned: the newest commit is fetched. Pin it once it was tried.
    """
    return json.loads(CATALOG.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Fetched:
    """How far a download is, for whoever shows it."""

    name: str  # of the repository
    done: int  # bytes of all its large files
    total: int
    rate: float  # bytes a second since the download began or went on

    @property
    def seconds_left(self) -> float:
        """At the same rate."""
        return (self.total - self.done) / max(self.rate, 1.0)


OnFetch = Callable[[Fetched], object]


def base_folder(name: str, download: bool = True, on_fetch: OnFetch | None = None) -> Path:
    """Local folder of a base model; fetched when it must be and may. MetaLoraError where there is none to be had.

    A name of the catalogue has the revision that stands there, one of your own may say its revision after an @.
    """
    row = catalog().get(name, {})
    place = row.get("path")
    folder = (CATALOG.parent / place).resolve() if place else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise MetaLoraError(f"The folder {folder} holds no diffusers pipeline (no model_index.json); give the folder of a FLUX.1 or FLUX.2 klein pipeline.")
        return folder
    if place:
        raise MetaLoraError(f"The base {name} should lie in {folder}, but it is not there; get the project's files afresh.")
    pinned = f"{name}@{row['revision']}" if "revision" in row else name
    return fetch(pinned, PIPELINE_FILES, pipeline_is_complete, download, on_fetch)


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
    return fetch(place, META_DOWN_FILES, is_complete, download)


def model_folder(place: str, on_fetch: OnFetch | None = None) -> Path:
    """Local folder of a model of transformers that looks at pictures: `place` itself, or fetched from the Hub."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    return fetch(place, MODEL_FILES, lambda found: (found / "preprocessor_config.json").is_file() and _part_is_complete(found), on_fetch=on_fetch)


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


def fetch(name: str, files: list[str], complete: Callable[[Path], bool], download: bool = True, on_fetch: OnFetch | None = None) -> Path:
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
    folder = _download(repo, revision or None, files, on_fetch)
    if not complete(folder):
        raise MetaLoraError(f"{name} lacks files that are needed here; check that it is the right repository.")
    return folder


def _download(repo: str, revision: str | None, files: list[str], on_fetch: OnFetch | None) -> Path:
    """The large files one by one, each going on where it was and checked; then the client's own snapshot, which finds them in its cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    with plain_faults(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN)  # one try: a dead network is told at once
        large = {f.rfilename: f.lfs for f in info.siblings or [] if f.lfs}
        wanted = list(filter_repo_objects(large, allow_patterns=files))
        _fetch_blobs(repo, info.sha, {name: large[name] for name in wanted}, on_fetch)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, etag_timeout=ANSWER_WITHIN))


def _fetch_blobs(repo: str, commit: str, files: dict[str, Any], on_fetch: OnFetch | None) -> None:
    """Put files into the client's cache under their SHA-256. What an earlier download left there is used.

    Of several processes one fetches; the others wait, and find it there.
    """
    from filelock import FileLock
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache, name = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    locks, blobs = cache / ".locks" / name, cache / name / "blobs"
    for folder in (locks, blobs):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "metalora.lock"):
        _fetch_missing(repo, commit, files, blobs, on_fetch)


def _fetch_missing(repo: str, commit: str, files: dict[str, Any], blobs: Path, on_fetch: OnFetch | None) -> None:
    missing = {lfs.sha256: (name, lfs.size) for name, lfs in files.items() if not (blobs / lfs.sha256).exists()}
    parts = {sha: blobs / f"{sha}.part" for sha in missing}
    watch = Watch(repo, sum(size for _, size in missing.values()), sum(p.stat().st_size for p in parts.values() if p.exists()), on_fetch)
    for sha, (name, size) in missing.items():
        _fetch_part(repo, commit, name, size, parts[sha], watch)
        _check_hash(repo, name, parts[sha], sha)
        os.replace(parts[sha], blobs / sha)


def _fetch_part(repo: str, commit: str, name: str, size: int, part: Path, watch: Watch) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with part.open("ab") as file:
        http_get(hf_hub_url(repo, name, revision=commit), file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size, tqdm_class=watch.bar())


def _check_hash(repo: str, name: str, part: Path, sha: str) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha:
        part.unlink()
        raise MetaLoraError(f"{name} of {repo} arrived damaged (its SHA-256 is not the one that the Hub names), so it was thrown away; start again.")


class Watch:
    """Turns the client's progress bars into Fetched reports."""

    def __init__(self, name: str, total: int, done: int, on_fetch: OnFetch | None):
        self.name, self.total, self.done, self.on_fetch = name, total, done, on_fetch
        self._before, self._start = done, time.monotonic()

    def add(self, size: int) -> None:
        """So many bytes more; fewer where the server made the client start over."""
        self.done += size
        if self.on_fetch:
            self.on_fetch(Fetched(self.name, self.done, self.total, (self.done - self._before) / max(time.monotonic() - self._start, 1e-3)))

    def bar(self) -> type | None:
        """A bar of the client's kind that only reports; the client's own where nobody listens."""
        if self.on_fetch is None:
            return None
        from huggingface_hub.utils import tqdm

        add = self.add

        class Silent(tqdm):
            def __init__(self, *given: Any, **more: Any):
                super().__init__(*given, **{**more, "disable": True})

            def update(self, n: float | None = 1) -> None:
                add(int(n or 0))

        return Silent


@contextmanager
def plain_faults(repo: str, revision: str | None) -> Iterator[None]:
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
        if "Consistency check failed" in str(error):
            raise MetaLoraError(f"A file of {repo} arrived in another size than the Hub names; start again, and it goes on where it was.") from error
        raise MetaLoraError(disk_sentence(error, Path(constants.HF_HUB_CACHE))) from error
