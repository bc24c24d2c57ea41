"""`python -m metalora.miniature make`: the whole miniature, from the first portrait to the Meta-Downs, with one command.

It gives the other commands one after another, each with its share of the time. It can be killed and given again: what has finished
is left out, what had begun goes on. Pictures are rendered by a process a core, and on a CPU a training has as many, which is quicker
than one of many threads; a GPU trains in one.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from metalora.miniature.launch import side_by_side
from metalora.miniature.people import seeds

SHARES = {"vae": 0.10, "clip": 0.08, "attributes": 0.06, "base": 0.53, "base --distill-guidance": 0.10, "face-detector": 0.04, "face-recogniser": 0.09}
GPU_BATCHES = {"vae": 64, "clip": 256, "attributes": 256, "base": 512, "base --distill-guidance": 512, "face-detector": 64, "face-recogniser": 256}
COMPILED_FROM = 2000  # pictures for which it is worth compiling the renderer
DOMAINS = ("woman", "man")
Run = Callable[[list[str]], None]  # the arguments of a command, in this process


def training(name: str, given: argparse.Namespace) -> list[str]:
    """The arguments of the training `name`, a key of SHARES."""
    command = [*name.split(), "--data", str(given.data), "--work", str(given.work), "--device", given.device, "--config", json.dumps(given.config)]
    # A GPU has one process, whose batches are made on all cores.
    command += ["--threads", "1"] if given.device == "cpu" else ["--threads", str(given.cores), "--batch-size", str(GPU_BATCHES[name])]
    return command + (["--steps", str(given.steps)] if given.steps else ["--minutes", f"{given.minutes * SHARES[name]:.1f}"])


def finished(name: str, work: Path) -> bool:
    """Whether the training has ended since its last checkpoint; a result alone may be what it is to begin from."""
    folder = work / ("base-guided" if "--distill-guidance" in name else name)
    checkpoint, result = folder / "checkpoint.pt", folder / "result.json"
    return checkpoint.exists() and result.exists() and result.stat().st_mtime >= checkpoint.stat().st_mtime


def rendering(given: argparse.Namespace) -> list[list[str]]:
    """The commands that render the people in as many equal parts as there are cores."""
    people, parts = seeds(given.people), given.cores
    compiled = ["--compiled"] if len(people) * given.scenes >= COMPILED_FROM else []
    bounds = [people.start + len(people) * part // parts for part in range(parts + 1)]
    return [["render", "--output", str(given.data), "--people", f"{first}:{end}", "--scenes", str(given.scenes), "--size", str(given.config.get("size", 128)),
             "--device", "cpu", *compiled] for first, end in zip(bounds, bounds[1:], strict=False)]


def make(given: argparse.Namespace, run: Run) -> None:
    """All the steps, in their order."""
    _each(rendering(given), given, run)
    for name in SHARES:
        if not finished(name, given.work):
            print(f"make: {name}", file=sys.stderr, flush=True)
            _training(training(name, given), given, run)
    run(["assemble", "--work", str(given.work), "--output", str(given.output)])
    _each([["meta-down", "--data", str(given.data), "--base", str(given.output / "miniature"), "--domain", domain, "--work", str(given.work / domain),
            "--output", str(given.output / "meta-down" / domain), "--config", json.dumps(given.meta)] for domain in DOMAINS], given, run)


def _training(arguments: list[str], given: argparse.Namespace, run: Run) -> None:
    if given.cores == 1 or given.device != "cpu":
        run(arguments)
    else:
        side_by_side([["torch.distributed.run", "--standalone", "--nproc-per-node", str(given.cores), "-m", "metalora.miniature", *arguments]])


def _each(commands: list[list[str]], given: argparse.Namespace, run: Run) -> None:
    """Runs the commands, at once where there are several cores."""
    if given.cores == 1:
        for command in commands:
            run(command)
    else:
        side_by_side([["metalora.miniature", *command] for command in commands])


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature make`: see --help."""
    from metalora.miniature.__main__ import run_command

    parser = argparse.ArgumentParser(prog="python -m metalora.miniature make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--output", type=Path, default=Path("assets"))
    parser.add_argument("--minutes", type=float, default=300, help="for all trainings together; pictures and Meta-Downs come on top (%(default)s)")
    parser.add_argument("--steps", type=int, help="a budget of steps for each training instead")
    parser.add_argument("--people", default="0:2200", metavar="FIRST:END", help="seeds of the people who are learnt from (%(default)s)")
    parser.add_argument("--scenes", type=int, default=6, help="pictures of each (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="to use (%(default)s)")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help='sizes other than the default, such as \'{"heads": 8}\'')
    parser.add_argument("--meta", type=json.loads, default={}, metavar="JSON", help='settings of stage 1 other than the default, such as \'{"rounds": 40}\'')
    make(parser.parse_args(arguments), run_command)
