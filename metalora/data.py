"""Folders of pictures of many people → subjects with their photos.

The layout is the Hub's image folder: `metadata.jsonl` with one JSON object a line (file_name, text, identity, domain, role:
reference or other), the pictures beside it or in subfolders, and `prompts.txt` with one prompt a line for an evaluation.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import MetaLoraError
from .photo import load_photo

METADATA, PROMPTS = "metadata.jsonl", "prompts.txt"
KEYS = ("file_name", "text", "identity", "domain", "role")
ROLES = ("reference", "other")
KEPT_EVERY = 25  # of the people, to judge a training by
MOST_LISTED = 40  # faults in one message


@dataclass(frozen=True)
class Item:
    """A picture and its caption, in which `{person}` may stand for the person."""

    path: Path
    text: str


@dataclass(frozen=True)
class Subject:
    """One person: the photos to learn from, and others that are never learnt from."""

    identity: str
    domain: str
    references: list[Item] = field(default_factory=list)
    others: list[Item] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All photos of the person."""
        return [*self.references, *self.others]


@dataclass(frozen=True)
class Dataset:
    """People in the order in which they first appear, and the prompts to judge them by."""

    subjects: list[Subject]
    prompts: list[str]

    def of_domain(self, domain: str) -> list[Subject]:
        """The people of one domain. MetaLoraError where there is none."""
        found = [s for s in self.subjects if s.domain == domain]
        if not found:
            known = ", ".join(sorted({s.domain for s in self.subjects}))
            raise MetaLoraError(f"The dataset holds nobody of the domain {domain}; it has {known}.")
        return found


def load_dataset(folder: str | Path, *, need_prompts: bool = False, need_others: bool = False, open_pictures: bool = False) -> Dataset:
    """Read a dataset folder. The pictures themselves are opened only with `open_pictures`, once, to see whether they can be.

    Raises one MetaLoraError that lists every fault at once: lines that are no JSON object, missing keys, unknown roles,
    pictures that are not there, lie outside the folder or come twice, a person of two domains or without a reference, and,
    where they are needed, missing prompts, people without other photos and pictures that cannot be read.
    """
    folder = Path(folder).expanduser()
    if not (folder / METADATA).is_file():
        what = "holds no" if folder.is_dir() else "is not there, and so not its"
        raise MetaLoraError(f"The dataset folder {folder} {what} {METADATA}; give a folder of pictures with that file.")
    faults: list[str] = []
    subjects: dict[str, Subject] = {}
    seen: set[PurePosixPath] = set()
    for number, line in enumerate(_lines(folder / METADATA, faults), 1):
        if line.strip():
            wrong = _add(line, folder, subjects, seen)
            faults += [f"{METADATA} line {number}: {fault}" for fault in wrong]
    faults += [f"{s.identity} has no photo with the role reference" for s in subjects.values() if not s.references]
    if need_others:
        faults += [f"{s.identity} has no photo with the role other" for s in subjects.values() if not s.others]
    prompts = [line.strip() for line in _lines(folder / PROMPTS, faults) if line.strip()] if (folder / PROMPTS).is_file() else []
    if need_prompts and not prompts:
        faults.append(f"{PROMPTS} is missing or empty; write one prompt a line")
    if open_pictures:
        faults += _unreadable([item.path for s in subjects.values() for item in s.items])
    if not subjects and not faults:
        faults.append(f"{METADATA} is empty")
    if faults:
        raise MetaLoraError(_listed(folder, faults))
    return Dataset(list(subjects.values()), prompts)


def kept_out(subjects: list[Subject], most: int) -> tuple[list[Subject], list[Subject]]:
    """Those to learn from, and every 25th, `most` at most, to judge the training by. Who is judged by needs two photos."""
    judged = [s for s in subjects[KEPT_EVERY - 1 :: KEPT_EVERY] if len(s.items) > 1][:most]
    return [s for s in subjects if s not in judged], judged


def _lines(path: Path, faults: list[str]) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        faults.append(f"{path.name} is not UTF-8 text")
    except OSError as error:
        faults.append(f"{path.name} cannot be read ({error.strerror})")
    return []


def _add(line: str, folder: Path, subjects: dict[str, Subject], seen: set[PurePosixPath]) -> list[str]:
    """Take one line in, or say all that is wrong with it."""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return ["not valid JSON"]
    if not isinstance(row, dict):
        return ["not a JSON object"]
    faults = [f"{key} is missing" for key in KEYS if key not in row]
    faults += [f"{key} must be a text that is not empty" for key in KEYS if key in row and not (isinstance(row[key], str) and row[key].strip())]
    if faults:
        return faults
    name = PurePosixPath(row["file_name"])
    # By the name, not by where it leads to: in the Hub's cache every file is a link to somewhere else.
    if name.is_absolute() or ".." in name.parts:
        faults.append(f"{name} lies outside the folder")
    elif not os.path.isfile(folder / name):  # Path.is_file raises on names that are too long
        faults.append(f"there is no picture {name}")
    elif name in seen:
        faults.append(f"{name} comes twice")
    if row["role"] not in ROLES:
        faults.append(f"the role {row['role']} is unknown; it is reference or other")
    subject = subjects.setdefault(row["identity"], Subject(row["identity"], row["domain"]))
    if subject.domain != row["domain"]:
        faults.append(f"{subject.identity} is of the domain {row['domain']} here and {subject.domain} before")
    seen.add(name)
    # A faulty line counts as far as it goes, so that one fault is not told twice.
    (subject.others if row["role"] == "other" else subject.references).append(Item(folder / name, row["text"]))
    return faults


def _unreadable(paths: list[Path]) -> list[str]:
    """What is wrong with the pictures that cannot be read; those that are not there have been told of."""

    def fault(path: Path) -> str | None:
        try:
            load_photo(path)
        except MetaLoraError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(fault, (path for path in paths if os.path.isfile(path))) if found]


def _listed(folder: Path, faults: list[str]) -> str:
    shown = faults[:MOST_LISTED] + ([f"and {len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else [])
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"The dataset in {folder} has {count}; mend them and start again:\n" + "\n".join(f"  - {fault}" for fault in shown)
