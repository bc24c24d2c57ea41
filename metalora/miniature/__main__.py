"""`python -m metalora.miniature COMMAND`: renders the portrait world and trains the embedded miniature on it.

`make` gives the commands in their order: render, vae, clip, attributes, base, base --distill-guidance, face-detector, face-recogniser,
assemble, meta-down. `likeness` trains what judges things, which have no faces, and stands beside them. Each training takes a time
budget, can be killed and started again with the same command, and leaves its files in WORK/NAME.
With `torchrun --nproc-per-node N -m metalora.miniature …` N processes train together; on a CPU, as many as it has cores and
with `--threads 1`, for that is faster than one process of many threads.
"""

import argparse
import ctypes
import importlib
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from metalora.errors import MetaLoraError
from metalora.miniature.pipeline import MiniatureConfig
from metalora.miniature.training import Job

TRAININGS = {"vae": ("vae", "train_vae"), "vae-refined": ("vae", "train_refined"), "clip": ("clip", "train_clip"), "base": ("base", "train_base"),
             "attributes": ("attributes", "train_attributes"),
             "face-detector": ("detector", "train_detector"), "face-recogniser": ("recogniser", "train_recogniser"),
             "likeness": ("likeness", "train_likeness")}
ELSEWHERE = {"make": "the whole miniature, from the first portrait to the Meta-Downs, but for vae-refined and likeness",
             "render": "draw the portrait world into shards",  # commands whose arguments their own modules read
             "dataset": "people, or mugs, as an image folder for evaluate and meta-train",
             "sheet": "a contact sheet of the portrait world",
             "world-check": "what is trained on photographs, tried on the portrait world",
             "attribute-check": "how much of what captions name is in the pictures that a base draws",
             "measure": "the tables of learnt people and mugs, each with one command",
             "meta-down": "stage 1: learn the Meta-Down of a domain on the assembled base"}
MINUTES = {"vae": 30, "vae-refined": 30, "clip": 12, "base": 180, "attributes": 12, "face-detector": 8, "face-recogniser": 14, "likeness": 30}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    for name in TRAININGS:
        command = commands.add_parser(name, help=f"train: {name}")
        kind = "image folder of things, as dataset writes it" if name == "likeness" else "folder of shards"
        command.add_argument("--data", type=Path, action="append", required=True, help=f"{kind}; repeatable")
        command.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
        command.add_argument("--minutes", type=float, default=MINUTES[name], help="time budget (%(default)s)")
        command.add_argument("--steps", type=int, help="a budget of steps instead")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (%(default)s)")
        command.add_argument("--learning-rate", type=float)
        command.add_argument("--batch-size", type=int)
        command.add_argument("--config", type=json.loads, default={}, metavar="JSON",
                             help='sizes other than the default, such as \'{"heads": 8}\'')
        if name == "base":
            command.add_argument("--distill-guidance", action="store_true",
                                 help="second phase: learn the guided output of the first phase's model")
    command = commands.add_parser("assemble", help="put the trained parts together as assets")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--output", type=Path, default=Path("assets"))
    command = commands.add_parser("disassemble", help="take assets apart again, to train on from their weights")
    command.add_argument("--assets", type=Path, default=Path("assets"))
    command.add_argument("--work", type=Path, required=True)
    return parser


def _train(arguments: argparse.Namespace, argv: list[str]) -> dict:
    torch.set_num_threads(arguments.threads)
    job = Job(data=tuple(arguments.data), work=arguments.work, minutes=arguments.minutes, seed=arguments.seed,
              threads=arguments.threads, steps=arguments.steps, learning_rate=arguments.learning_rate,
              batch_size=arguments.batch_size, device=arguments.device, model=MiniatureConfig.of(arguments.config), arguments=tuple(argv))
    module, function = TRAININGS[arguments.command]
    train = getattr(importlib.import_module(f"metalora.miniature.{module}"), function)
    more = {"distill": True} if getattr(arguments, "distill_guidance", False) else {}
    return train(job, **more)


def _keep_memory() -> None:
    """Has glibc keep freed memory: a picture's tensors are of megabytes, which it hands back to the system and asks for anew each time.

    Measured on a CPU: 1.25 times as many pictures a second are rendered. Without glibc nothing is done.
    """
    trim_threshold, mmap_max = -1, -4  # numbers of malloc.h
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    set_option(trim_threshold, 2**31 - 1)
    set_option(mmap_max, 0)


def run_command(argv: list[str]) -> None:
    """Runs one command, given by its name and arguments."""
    if argv and argv[0] in ELSEWHERE:
        importlib.import_module(f"metalora.miniature.{argv[0].replace('-', '_')}").main(argv[1:])
        return
    arguments = _parser().parse_args(argv)
    if arguments.command == "assemble":
        from metalora.miniature.assemble import assemble

        print(json.dumps(assemble(arguments.work, arguments.output)))
    elif arguments.command == "disassemble":
        from metalora.miniature.assemble import disassemble

        print(json.dumps(disassemble(arguments.assets, arguments.work)))
    else:
        figures = _train(arguments, argv)
        if PartialState(cpu=True).is_main_process:
            print(json.dumps(figures))


def main(argv: list[str] | None = None) -> int:
    """Runs one command; what it found is printed as one JSON object. Returns 2 where it cannot be done as asked."""
    _keep_memory()
    try:
        run_command(sys.argv[1:] if argv is None else argv)
    except MetaLoraError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
