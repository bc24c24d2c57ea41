"""What every command shares: how it reports, fails and checks, and the reading of the arguments.

Results go to stdout (with --json as one JSON object), progress and faults to stderr. Exit 0: done; 2: it cannot be done as
asked, with a sentence that says what to do; 1: a fault of ours; 130: stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import typer

from .errors import Cancelled, MetaLoraError
from .processes import here

DEBUG = "METALORA_DEBUG"
STOPPED = 130  # exit code
SEVERAL = ("--held-out", "--against", "--learnt-from", "--method", "--memory", "--degrade")  # options after which several values may stand
Result = tuple[dict[str, Any], str]  # for --json, and for people; an empty one is not printed

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help="Meta-LoRA: one photo of a face in, pictures and a LoRA file out.")  # fmt: skip


class Unfinished(MetaLoraError):
    """Some of what was asked for is done, as `result` says, and some cannot be."""

    def __init__(self, sentence: str, result: dict[str, Any]):
        super().__init__(sentence)
        self.result = result


def command(work: Callable[..., Result]) -> Callable[..., None]:
    """Make `work` a command: print its result, and turn every fault into its sentence and exit code."""

    @app.command(name=work.__name__.replace("_", "-"))
    @functools.wraps(work)
    def run(**arguments: Any) -> None:
        as_json = arguments["json"]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
                result, text = work(**arguments)
            if result:
                print(json.dumps(result) if as_json else text, flush=True)
        except (Cancelled, KeyboardInterrupt):
            _end("Stopped; nothing half done was kept.", STOPPED, as_json)
        except Unfinished as error:
            _end(str(error), 2, as_json, error.result)
        except MetaLoraError as error:
            _end(str(error), 2, as_json)
        except BrokenPipeError:  # whoever read our output has gone
            sys.stdout = open(os.devnull, "w")
            raise typer.Exit(1) from None
        except Exception as error:  # the one place that turns a fault of ours into words
            _end(f"Something went wrong on our side ({type(error).__name__}: {error}); set {DEBUG}=1 to see where.", 1, as_json)

    return run


def _end(sentence: str, code: int, as_json: bool, result: dict[str, Any] | None = None) -> None:
    """Leave with a sentence. Of several processes the first speaks for all; another tells its own faults, but not that it was stopped."""
    process = here()
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc(file=sys.stderr)
    if process.first:
        print(sentence, file=sys.stderr, flush=True)
    elif code != STOPPED:
        print(f"Process {process.rank + 1} of {process.world}: {sentence}", file=sys.stderr, flush=True)
    if as_json and process.first:
        print(json.dumps({"error": sentence, **(result or {})}), flush=True)
    raise typer.Exit(code) from None


def finish(run: Generator, show: Callable[[Any], object]) -> Any:
    """Show all that a generator yields; its return value."""
    try:
        while True:
            show(next(run))
    except StopIteration as end:
        return end.value
    finally:
        run.close()


def pair(text: str, between: str, option: str, example: str) -> tuple[int, int]:
    found = re.fullmatch(rf"(\d{{1,6}}){between}(\d{{1,6}})", text)
    if not found:
        raise MetaLoraError(f"{option} {text} is not understood; write it like {example}.")
    return int(found[1]), int(found[2])


def check_file(output: Path) -> None:
    """Say at once, and not after an hour's work, that the result cannot be written."""
    if output.suffix != ".safetensors":
        raise MetaLoraError(f"The result is a .safetensors file; name it {output.with_suffix('.safetensors').name if output.name else 'me.safetensors'}.")
    if output.is_dir():
        raise MetaLoraError(f"{output} is a folder; give the name of a file.")
    check_folder(output.parent)


def check_folder(folder: Path) -> None:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise MetaLoraError(f"{there} is no folder; choose another place for the output.")
    if not os.access(there, os.W_OK):
        raise MetaLoraError(f"{there} cannot be written; choose another place for the output.")


def spread(arguments: Sequence[str]) -> list[str]:
    """`--against A B` as `--against A --against B`, for the options of SEVERAL."""
    out: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-") and len(argument) > 1:
            option = argument if argument in SEVERAL else ""
            out += [] if option else [argument]
        else:
            out += [option, argument] if option else [argument]
    return out


def launch(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    if os.environ.get(DEBUG) != "1":
        warnings.simplefilter("ignore")
        for library in ("DIFFUSERS", "HF_HUB"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our dashes is no fault
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a stop from outside tidies up too
    atexit.register(gc.freeze)  # to look through all that was imported, for what nobody needs any more, takes seconds at the end
    app(spread(sys.argv[1:] if arguments is None else arguments), prog_name="python -m metalora")
