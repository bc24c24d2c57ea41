"""From a name to a local folder: a folder, a short name of catalog.json, or a Hub id with an optional @revision.

The cache is looked in first, so that what is already here needs no network. Only the files that are needed are fetched, and a
download that was killed goes on where it was. A gated, missing, unreachable, damaged or full-disk case is one sentence that
says what to do. Nothing here loads torch, so that it is said at once. Publishing is in publish.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from .config import SETTINGS_FILE
from .errors import FULL, MetaLoraError
from .files import CARD, CONFIG, PREDICTOR, START, TENSORS, is_complete
from .licence import is_hub_id

CATALOG = Path(__file__).with_name("catalog.json")
PIPELINE_FILES = [
    "model_index.json", SETTINGS_FILE, CARD, "scheduler/*.json", "transformer/*.json", "transformer/*.safetensors", "vae/*.json",
    "vae/*.safetensors", "text_encoder*/*.json", "text_encoder*/*.safetensors", "tokenizer*/*",
]  # fmt: skip
MODEL_FILES = [
    "config.json", "preprocessor_config.json", "processor_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json",
    "special_tokens_map.json", "vocab.json", "merges.txt",
]  # fmt: skip
META_DOWN_FILES = [TENSORS, START, PREDICTOR, CONFIG, CARD]
ANSWER_WITHIN = 3.5  # seconds that the Hub may take for its first answer
SILENCE = 60.0  # seconds without a byte after which a connection counts as dead; the Hub may think for long over an upload
LARGE = 2**30  # bytes; whether a base fits this machine takes longer to find out than to fetch less than that
Answer = TypeVar("Answer")


def catalog() -> dict[str, dict]:
    """Rows of catalog.json: base name → {"path": folder of ours, "revision": commit on the Hub, "licence": its name there, "meta_down": {domain: place}}.

    A row without a revision is not pinned: the newest commit is fetched.
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
Before = Callable[[Path], object]


class NoAccess(MetaLoraError):
    """The Hub does not give something to who asks, but may to who has a token."""


def prepare(
    base: str, meta_down: str | Path | None = None, on_fetch: OnFetch | None = None, token: str | None = None, before: Before | None = None
) -> None:  # fmt: skip
    """Have a base on this machine, and the Meta-Down that was given or the catalogue's, so that opening them asks nothing of the Hub.

    To do it first tells what the Hub refuses before the libraries are loaded that opening needs, which takes seconds. `token`
    is for this only; without one the client takes HF_TOKEN's, or that of `hf auth login`. `before` is called with the folder
    of the base's configs before a long download. MetaLoraError where one cannot be had.
    """
    base_folder(base, on_fetch=on_fetch, token=token, before=before)
    for domain, place in ({"": str(meta_down)} if meta_down else meta_down_places(base)).items():
        if not domains_in(place):
            meta_down_folder(place, domain, on_fetch=on_fetch, token=token)


def base_folder(
    name: str, download: bool = True, on_fetch: OnFetch | None = None, token: str | None = None, before: Before | None = None, weights: bool = True
) -> Path:  # fmt: skip
    """Local folder of a base model; fetched when it must be and may. MetaLoraError where there is none to be had.

    A name of the catalogue has the revision that stands there, one of your own may say its revision after an @. Without `weights`
    its configs will do.
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
    if not weights:
        return fetch(pinned, [file for file in PIPELINE_FILES if file.endswith(".json")], lambda found: (found / "model_index.json").is_file(), download, token=token)
    return fetch(pinned, PIPELINE_FILES, pipeline_is_complete, download, on_fetch, token, before)


def meta_down_places(base: str) -> dict[str, str]:
    """Default Meta-Down of a base for each domain that the catalogue knows, as folders or Hub ids."""
    rows = catalog().get(base, {}).get("meta_down", {})
    return {domain: str((CATALOG.parent / place).resolve()) if place.startswith(".") else place for domain, place in rows.items()}


def learning(base: str, meta_down: object = None) -> Literal["person", "plain"]:
    """What a base is opened for, in plan.Learning's words: people on a Meta-Down, where one is given or known, or as ordinary LoRAs."""
    return "person" if meta_down or meta_down_places(base) else "plain"


def meta_down_folder(place: str, domain: str = "", download: bool = True, on_fetch: OnFetch | None = None, token: str | None = None) -> Path:
    """Local folder of a Meta-Down: `place` itself, its subfolder named after the domain, or a Hub id."""
    folder = Path(place).expanduser()
    for candidate in (folder, folder / domain):
        if (candidate / TENSORS).is_file():
            return candidate
    if folder.is_dir():
        kind = f" for {domain}" if domain else ""
        raise MetaLoraError(f"The folder {folder} holds no Meta-Down{kind}; give a folder with {TENSORS} and {CONFIG}.")
    return fetch(place, META_DOWN_FILES, is_complete, download, on_fetch, token)


def model_folder(place: str, on_fetch: OnFetch | None = None, download: bool = True) -> Path:
    """Local folder of a model of transformers that looks at pictures: `place` itself, or fetched from the Hub."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    return fetch(place, MODEL_FILES, lambda found: any(found.glob("*processor_config.json")) and _part_is_complete(found), download, on_fetch)


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


def fetch(
    name: str, files: list[str], complete: Callable[[Path], bool], download: bool = True, on_fetch: OnFetch | None = None, token: str | None = None,
    before: Before | None = None,
) -> Path:  # fmt: skip
    """Folder of a Hub repository's snapshot that holds `files`; `complete(folder)` says whether the cache has all of them."""
    repo, at, revision = name.partition("@")
    if not is_hub_id(repo) or (at and not re.fullmatch(r"[\w./-]+", revision)):
        if Path(name).is_absolute():
            raise MetaLoraError(f"There is no folder {name}; check the spelling, or get the project's files afresh.")
        raise MetaLoraError(f"There is no folder {name}, and it is no Hub name either (those read owner/model); check the spelling.")

    def cached(*but: str) -> Path | None:
        folder = _cached(repo, revision or None, [file for file in files if file not in but])
        return folder if folder and complete(folder) else None

    if folder := cached(CARD):
        return folder
    bare = cached(CARD, SETTINGS_FILE)  # as another program may have left it; without a network it will do
    try:
        if not download:
            raise MetaLoraError(f"{name} is not on this machine yet; it is fetched on first use.")
        folder = _download(repo, revision or None, files, on_fetch, token, before)
    except MetaLoraError:
        if bare:
            return bare
        raise
    if not complete(folder):
        raise MetaLoraError(f"{name} lacks files that are needed here; check that it is the right repository.")
    return folder


def _cached(repo: str, revision: str | None, files: list[str]) -> Path | None:
    """The snapshot in the client's cache; None where there is none, or it is known to lack some of the repository's `files`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _download(repo: str, revision: str | None, files: list[str], on_fetch: OnFetch | None, token: str | None, before: Before | None) -> Path:
    """The large files one by one, each going on where it was and checked; then the client's own snapshot, which finds them in its cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    with plain_faults(repo, revision):
        ask = HfApi(token=token).model_info
        info = _soon(lambda: ask(repo, revision=revision, files_metadata=True, timeout=ANSWER_WITHIN))  # one try: a dead network is told at once
        large = {f.rfilename: f.lfs for f in info.siblings or [] if f.lfs}
        wanted = list(filter_repo_objects(large, allow_patterns=files))
        bar = silent_bar() if on_fetch else None
        snapshot = partial(snapshot_download, repo, revision=revision, etag_timeout=ANSWER_WITHIN, tqdm_class=bar, token=token)
        if before and sum(large[name].size for name in wanted) > LARGE:
            before(Path(snapshot(allow_patterns=[file for file in files if file.endswith(".json")])))
        _fetch_blobs(repo, info.sha, {name: large[name] for name in wanted}, on_fetch, token)
        return Path(snapshot(allow_patterns=files))


def _soon(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns. TimeoutError where it takes too long.

    The client's own limits do not say how long: each address of a host has its own, and the search for the addresses has none.
    """
    answer: Future[Answer] = Future()
    threading.Thread(target=fulfil, args=(answer, ask), daemon=True).start()
    return answer.result(ANSWER_WITHIN)


def fulfil(promise: Future[Answer], work: Callable[[], Answer]) -> None:
    """Do the work in this thread, and give what comes of it, a fault too, to whoever waits for the promise."""
    try:
        promise.set_result(work())
    except BaseException as error:
        promise.set_exception(error)


def _fetch_blobs(repo: str, commit: str, files: dict[str, Any], on_fetch: OnFetch | None, token: str | None) -> None:
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
        _fetch_missing(repo, commit, files, blobs, on_fetch, token)


def _fetch_missing(repo: str, commit: str, files: dict[str, Any], blobs: Path, on_fetch: OnFetch | None, token: str | None) -> None:
    missing = {lfs.sha256: (name, lfs.size) for name, lfs in files.items() if not (blobs / lfs.sha256).exists()}
    parts = {sha: blobs / f"{sha}.part" for sha in missing}
    for sha, (_, size) in missing.items():
        if parts[sha].exists() and parts[sha].stat().st_size > size:
            parts[sha].unlink()  # there is nothing after its end to ask the server for
    watch = Watch(repo, sum(size for _, size in missing.values()), sum(p.stat().st_size for p in parts.values() if p.exists()), on_fetch)
    for sha, (name, size) in missing.items():
        _fetch_part(repo, commit, name, size, parts[sha], watch, token)
        _check_hash(repo, name, parts[sha], sha)
        os.replace(parts[sha], blobs / sha)


def _fetch_part(repo: str, commit: str, name: str, size: int, part: Path, watch: Watch, token: str | None) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    bar = silent_bar(watch.add) if watch.on_fetch else None
    headers = build_hf_headers(token=token)
    with part.open("ab") as file:
        http_get(hf_hub_url(repo, name, revision=commit), file, resume_size=file.tell(), headers=headers, expected_size=size, tqdm_class=bar)


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


def silent_bar(add: Callable[[int], object] = lambda size: None) -> type:
    """A bar of the client's kind that shows nothing, and tells `add` how many bytes have come."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *given: Any, **more: Any):
            super().__init__(*given, **{**more, "disable": True})

        def update(self, n: float | None = 1) -> None:
            add(int(n or 0))

    return Silent


@cache
def _limit_silence() -> None:
    """Have the client give up connections that fall silent; by itself it waits for most of them for ever."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    limits = {"connect": ANSWER_WITHIN, "read": SILENCE, "write": SILENCE, "pool": SILENCE}

    def limit(request: Any) -> None:  # not as the client's default, for the calls say that they want no limit
        own = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: own.get(kind) or limits[kind] for kind in limits}

    def factory() -> Any:
        client = default_client_factory()
        client.event_hooks["request"].append(limit)
        return client

    set_client_factory(factory)


@contextmanager
def plain_faults(repo: str, revision: str | None) -> Iterator[None]:
    """What goes wrong with the Hub becomes one sentence that says what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    _limit_silence()
    page, access = f"{constants.ENDPOINT}/{repo}", "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise NoAccess(f"{repo} is gated: accept its licence at {page}, then {access} to a token of yours.") from error
    except errors.RevisionNotFoundError as error:
        raise MetaLoraError(f"{repo} has no revision {revision}; see which there are at {page}/commits/main, and check what follows the @.") from error
    except errors.RepositoryNotFoundError as error:
        raise NoAccess(f"There is no {repo} on the Hub, or it is private; check the spelling at {page}, or {access} to the token of somebody who may see it.") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            found = "refuses the token for" if "authorization" in error.response.request.headers else "wants a token for"
            raise NoAccess(f"The Hub {found} {repo}; make one that may at {constants.ENDPOINT}/settings/tokens, then {access} to it.") from error
        raise MetaLoraError(f"The Hub failed with {repo} ({error.response.status_code}); try again later.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        way = " because HF_HUB_OFFLINE is set; unset it" if constants.HF_HUB_OFFLINE else "; go online"
        raise MetaLoraError(f"{repo} is out of reach, for the Hub ({constants.ENDPOINT}) cannot be reached{way} and start again, or give a folder.") from error
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise MetaLoraError(f"A file of {repo} arrived in another size than the Hub names; start again, and it goes on where it was.") from error
        why = "the disk is full" if error.errno in FULL else f"its files cannot be written there ({error.strerror or error})"
        raise MetaLoraError(f"{repo} could not be fetched to {constants.HF_HUB_CACHE}: {why}; make room, or set HF_HOME to another folder, and start again; it goes on where it was.") from error
