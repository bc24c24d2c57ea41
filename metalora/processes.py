"""The processes that a launcher started side by side: which of them this is, what it runs on, and who does which job.

`accelerate launch` and torchrun tell every process who it is by its environment. To share jobs they need nothing but the
output folder: no message passes between them, so none waits for a slow one, and none hangs where another has died. Processes
that were started by hand share just as well, also from several machines that see the same folder.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import MetaLoraError

CLAIMS = ".claims"  # folder of the locks, in an output folder
WAITING = "waiting for the other processes"
LOOK_AGAIN = 0.5  # seconds, while others are at the last jobs


class Process(NamedTuple):
    """One of `world` processes that share a piece of work."""

    rank: int = 0
    world: int = 1
    local: int = 0  # its number on this machine

    @property
    def first(self) -> bool:
        """Whether it speaks for all: shows the progress, gives the result."""
        return self.rank == 0

    def device(self) -> str | None:
        """The GPU that is this process's own; None where it is alone or there is none, and then the machine's best will do."""
        import torch

        if self.world == 1 or not torch.cuda.is_available():
            return None
        if self.local >= torch.cuda.device_count():
            raise MetaLoraError(f"There are more processes than GPUs on this machine, which has {torch.cuda.device_count()}; start one for each.")
        return f"cuda:{self.local}"

    def join(self, cpu: bool) -> Process:
        """Connect with the others, so that tensors can be summed over all. Sharing jobs does not need it."""
        if self.world > 1:
            import torch.distributed as dist
            from accelerate import PartialState

            state = PartialState(cpu=cpu)
            if dist.get_backend() == "gloo":  # one of its threads may be at work while Python ends, which aborts the process
                atexit.register(state.destroy_process_group)
        return self

    def agree(self, value: int, fault: str) -> None:
        """All of those that are connected have the same number; else MetaLoraError in each, the sentence `fault` with the numbers."""
        if self.world > 1:
            import torch.distributed as dist

            found: list[int] = [value] * self.world
            dist.all_gather_object(found, value)
            if len(set(found)) > 1:
                raise MetaLoraError(f"{fault} (they have {', '.join(map(str, found))}).")


def here() -> Process:
    """This process, as its launcher named it; alone where there was none."""
    return Process(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def share_out(jobs: Sequence[str], done: Callable[[str], bool], folder: Path) -> Iterator[str | None]:
    """The jobs that fall to this process; None now and then while nothing is left but what others are at.

    Whoever is free takes the next that nobody is at. A job is claimed by a lock in `folder`, which ends when the next job is
    asked for, or with the process, however that ends. The first process stays until everything is done and takes over what
    a dead one left; the others leave before. A job that was worked on in vain is not offered to the same process again.
    """
    left, first = list(jobs), here().first
    while left:
        busy = []
        for job in left:
            if not done(job):
                with claim(folder / f"{job}.lock") as mine:
                    if not mine:
                        busy.append(job)
                    elif not done(job):  # since we looked
                        yield job
        left = [job for job in busy if not done(job)] if first else []
        if left:
            yield None
            time.sleep(LOOK_AGAIN)
    if first:
        with suppress(OSError):  # there is none, or another process is still at something
            folder.rmdir()


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether what `path` stands for is this process's, until the block is left; False while it is another's."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # the latter where another process has just removed the folder
        pass
    except OSError as error:
        from .files import disk_sentence

        raise MetaLoraError(disk_sentence(error, path)) from error
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(OSError):  # a system may not let go of an open file; it does no harm there
                path.unlink()
            lock.release()


@dataclass(frozen=True)
class Progress:
    """How far a list of jobs is."""

    done: float  # share of the work, 0 … 1
    what: str
    seconds_left: float
    fault: str = ""  # of the last job, where it came to nothing


class Pace:
    """Work in units, of which `before` are done, and the time the rest will take at the speed so far."""

    def __init__(self, units: float):
        self.units, self.before, self._start = max(units, 1e-9), 0.0, time.perf_counter()

    def at(self, more: float, what: str, fault: str = "") -> Progress:
        """A report with `more` units done beyond `before`."""
        done = min(self.before + more, self.units)
        return Progress(done / self.units, what, (time.perf_counter() - self._start) * (self.units - done) / max(done, 1e-9), fault)


def shown(run: Generator[Any, None, Any], how: Callable[[Any], Any]) -> Generator[Any, None, Any]:
    """What a generator yields, each through `how`; its value is handed on, and so is a stop."""
    try:
        while True:
            yield how(next(run))
    except StopIteration as end:
        return end.value
    finally:
        run.close()
