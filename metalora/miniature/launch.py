"""Commands of this project as processes of a thread each: on a CPU several such are quicker than one of many threads."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from metalora.errors import MetaLoraError


def side_by_side(commands: Sequence[Sequence[str]]) -> None:
    """Runs them all at once; each is a module and its arguments.

    Waits for all, and ends the rest when one fails or this process is stopped. Raises MetaLoraError where one failed, which has said why itself.
    """
    processes = [subprocess.Popen([sys.executable, "-m", *command], env=os.environ | {"OMP_NUM_THREADS": "1"}) for command in commands]
    wait(processes)


def wait(processes: Sequence[subprocess.Popen]) -> None:
    """For all of them, as `side_by_side` does."""
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
        if any(codes):
            raise MetaLoraError("A step failed, as it says above; give the same command again when that is mended.")
    finally:
        for process in processes:
            process.terminate()
