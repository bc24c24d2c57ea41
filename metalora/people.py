"""Many people learnt, by one process or by several side by side: from a dataset's photos to a folder of identity files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data import Subject
from .errors import MetaLoraError
from .identity import Identity
from .personalizer import Personalizer
from .processes import CLAIMS, WAITING, Pace, Progress, share_out, shown


@dataclass(frozen=True)
class Learnt:
    """What became of the people."""

    files: dict[str, Path]  # identity → identity file
    faults: dict[str, str]  # identity → why there is none


def adapt_all(
    personalizer: Personalizer, subjects: Sequence[Subject], folder: str | Path, *, steps: int | None = None, seed: int = 0
) -> Generator[Progress, None, Learnt]:
    """Learn everybody from their reference photos into `folder`, each as `Personalizer.adapt` does it with the same seed.

    Who has a file there already is skipped, so a run that was stopped goes on. Under `accelerate launch`, or started several
    times, the processes share the people. Who cannot be learnt is told of, and the others are learnt all the same.
    Raises MetaLoraError where a Meta-Down is missing or a file in the folder is of other settings.
    """
    folder = Path(folder)
    by_file = {name: subject for name, subject in zip(file_names(subjects), subjects)}
    _check(personalizer, by_file, folder, steps, seed)
    faults: dict[str, str] = {}

    def left() -> int:
        return sum(not (folder / name).is_file() for name in by_file) - len(faults)

    pace = Pace(left())
    for name in share_out(list(by_file), lambda name: (folder / name).is_file(), folder / CLAIMS):
        pace.before = pace.units - left()
        if name is None:
            yield pace.at(0, WAITING)
            continue
        subject = by_file[name]
        try:
            identity = yield from _learn(personalizer, subject, steps, seed, pace)
        except MetaLoraError as error:
            faults[subject.identity] = str(error)
            yield pace.at(1, subject.identity, f"{subject.identity} could not be learnt: {error}")
        else:
            identity.save(folder / name)
    return Learnt({s.identity: folder / name for name, s in by_file.items() if s.identity not in faults}, faults)


def _learn(personalizer: Personalizer, subject: Subject, steps: int | None, seed: int, pace: Pace) -> Generator[Progress, None, Identity]:
    photos = [item.path for item in subject.references]
    run = personalizer.adapt_steps(photos, subject.domain, steps, seed)
    return (yield from shown(run, lambda report: pace.at(report.step / report.steps, f"{subject.identity}  step {report.step}/{report.steps}  loss {report.loss:.4f}")))


def file_names(subjects: Sequence[Subject]) -> list[str]:
    """A file name for each identity: its own where a file may be called so, else with a few digits that make it one of a kind.

    Raises MetaLoraError where two of them differ in nothing but large and small letters, for not every disk tells these apart.
    """
    names: list[str] = []
    known: dict[str, str] = {}
    for identity in (s.identity for s in subjects):
        plain = re.sub(r"[^\w.-]", "_", identity).strip(".")[:50]
        names.append((plain if plain == identity else f"{plain}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}") + ".safetensors")
        other = known.setdefault(names[-1].casefold(), identity)
        if other != identity:
            raise MetaLoraError(f"The identities {other} and {identity} would share a file; call one of them something else in the dataset.")
    return names


def _check(personalizer: Personalizer, by_file: dict[str, Subject], folder: Path, steps: int | None, seed: int) -> None:
    """Before the first step: a Meta-Down for every domain, and no file that was learnt in another way."""
    base, plain = personalizer.base, personalizer.base.settings.plain_rank
    for name, subject in by_file.items():
        down = None if personalizer.is_plain else personalizer.meta_down(subject.domain)
        if not (folder / name).is_file():
            continue
        config = personalizer.adapt_config(subject.domain)
        rank, rows = config.ranks(down.adapter) if down else (plain, plain)
        wanted = {
            "base_fingerprint": base.fingerprint, "meta_down_sha256": down.sha256 if down else "", "domain": subject.domain,
            "rank": rank, "meta_rank": rows, "trigger": base.settings.trigger, "steps": config.steps if steps is None else steps, "seed": seed,
        }  # fmt: skip
        wanted |= {"scale": config.scale * down.adapter.scale} if down else {}
        found = Identity.load(folder / name)
        other = [key for key, value in wanted.items() if getattr(found, key) != value]
        if other:
            raise MetaLoraError(f"{folder / name} was made with other settings ({', '.join(other)}); choose another output folder, or remove it.")
