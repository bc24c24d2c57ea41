"""One line on stderr that tells how far a piece of work is, and a log of it for TensorBoard."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from . import cards
from .errors import MetaLoraError
from .processes import here

if TYPE_CHECKING:
    from .hub import Fetched
    from .processes import Progress
    from .train import StepReport

EVERY = 0.1  # seconds between two looks on a terminal
PARTS = 10  # lines over the whole work where there is no terminal


class Line:
    """Rewritten in place on a terminal; elsewhere a line at the start and every tenth of the work. A context manager: leaving it ends the line.

    Of several processes only the first shows anything.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.silent = stream is None and not here().first
        self.terminal = self.stream.isatty()
        self._last, self._part, self._open = 0.0, -1, False
        self._validation = ""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.stream.write("\n")

    def show(self, share: float, text: str) -> None:
        """Show `text`, with `share` of the work done, if it is time to."""
        if self.silent:
            return
        part = int(share * PARTS + 1e-9)
        if self.terminal and (share >= 1 or time.monotonic() - self._last >= EVERY):
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\033[K{text[:width]}")
            self._last, self._open = time.monotonic(), True
        elif not self.terminal and part > self._part:
            self.stream.write(f"{text}\n")
        self._part = part
        self.stream.flush()

    def step(self, report: StepReport) -> None:
        """A step of a training."""
        self.show(report.step / report.steps, f"step {report.step}/{report.steps}  loss {report.loss:.4f}{self._unseen(report)}  {cards.speed(report)}  {cards.clock(report.seconds_left)} left")

    def _unseen(self, report: StepReport) -> str:
        """The last loss on people that were kept out."""
        if report.validation is not None:
            self._validation = f"  on others {report.validation:.4f}"
        return self._validation

    def progress(self, report: Progress) -> None:
        """A piece of a list of jobs; a job that came to nothing has a line of its own."""
        if report.fault and not self.silent:
            self.stream.write(f"\r\033[K{report.fault}\n" if self.terminal else f"{report.fault}\n")
        self.show(report.done, f"{report.done:4.0%}  {report.what}  {cards.clock(report.seconds_left)} left")

    def fetched(self, report: Fetched) -> None:
        """A piece of a download."""
        self.show(report.done / max(report.total, 1), cards.fetched(report))


def tensorboard(folder: Path, name: str) -> Callable[[StepReport], None]:
    """A function that writes every step to a TensorBoard log in folder/name. MetaLoraError where the package is missing."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        raise MetaLoraError("--log needs the package tensorboard; pip install tensorboard, or leave it out.")
    PartialState()
    tracker = TensorBoardTracker(name, folder)
    tracker.start()

    def record(report: StepReport) -> None:
        values = {"loss": report.loss, "steps a second": report.steps_per_second, "loss on people kept out": report.validation}
        tracker.log({key: value for key, value in values.items() if value is not None}, report.step)

    return record
