"""The two exceptions that the package raises on purpose, what makes one of a machine that cannot compile, and where work without steps may be stopped."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT)  # what an OSError of a full disk says
Pause = Callable[[], object]  # called now and then in longer work that has no steps; raise Cancelled in it to stop


class MetaLoraError(Exception):
    """What was asked cannot be done as asked. ``str(error)`` is one plain sentence for the user that says what to do."""


class Cancelled(Exception):
    """Raise it in an ``on_step`` callback to stop a training; nothing half done is kept."""


def go_on() -> None:
    """The pause of who does not mean to stop."""


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Around what is done with one of several: the sentence of a fault begins with which it is."""
    try:
        yield
    except MetaLoraError as error:
        raise MetaLoraError(f"{what}: {error}") from error


@contextmanager
def compiling(otherwise: str) -> Iterator[None]:
    """Around what ``torch.compile`` compiles: MetaLoraError where a CPU has no C++ compiler for it, with what to do ``otherwise``."""
    try:
        yield
    except RuntimeError as error:
        if "No working C++ compiler" in str(error):
            raise MetaLoraError(f"To compile for a CPU takes a C++ compiler such as g++; install one, or {otherwise}.") from error
        raise
