"""`make`: the whole miniature with one command, at toy size."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from metalora.errors import MetaLoraError
from metalora.miniature import base, detector, make
from metalora.miniature.__main__ import TRAININGS, main
from metalora.miniature.assemble import read_parts
from metalora.miniature.launch import wait
from metalora.miniature.training import _command_line
from metalora.personalizer import Personalizer
from tests.conftest import TINY

CONFIG = json.dumps(asdict(TINY) | {"size": 64})
META = json.dumps({"rounds": 1, "bucket_size": 2, "bucket_steps": 2, "warmup_steps": 1, "batch_size": 2})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only watched or measured, made small; blocks are not compiled for two steps."""
    monkeypatch.setattr(detector, "CHECKED_CANVASES", 4)
    monkeypatch.setattr(base, "PREVIEW_STEPS", 1)
    with torch.compiler.set_stance("force_eager"):
        yield


def test_one_command_makes_a_miniature_that_opens_and_does_no_step_twice(tmp_path: Path, quick):
    data, work, output = tmp_path / "data", tmp_path / "work", tmp_path / "assets"
    output.mkdir()
    command = ["make", "--data", str(data), "--work", str(work), "--output", str(output), "--people", "0:50", "--scenes", "1", "--steps", "2",
               "--cores", "1", "--device", "cpu", "--config", CONFIG, "--meta", META]
    assert main(command) == 0
    assert read_parts(work).base == "base-guided"
    personalizer = Personalizer.open(output / "miniature", output / "meta-down", "cpu")
    assert personalizer.base.settings.resolution == 64 and {"woman", "man"} <= set(personalizer.domains)
    before = {path: path.stat().st_mtime_ns for path in work.rglob("result.json")}
    assert len(before) == len(make.SHARES)
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("result.json")}


def test_shares_are_of_known_trainings_and_add_up():
    assert {name.split()[0] for name in make.SHARES} <= set(TRAININGS) and sum(make.SHARES.values()) == pytest.approx(1)
    assert set(make.GPU_BATCHES) == set(make.SHARES)


@pytest.mark.parametrize("order", [1, -1])
def test_a_step_that_fails_ends_the_command(order: int):
    """Of the processes side by side the others are ended too, and nothing waits for them."""
    failing, endless = (subprocess.Popen([sys.executable, "-c", code]) for code in ("raise SystemExit(3)", "import time; time.sleep(600)"))
    with pytest.raises(MetaLoraError, match="give the same command again"):
        wait([failing, endless][::order])
    assert endless.wait(10) != 0


def test_a_card_shows_the_command_without_the_machine_s_folders():
    told = ["vae", "--data", "/home/me/data", "--work=/home/me/work", "--config", '{"a": 1}']
    assert _command_line(told) == "python -m metalora.miniature vae --data DATA --work WORK --config '{\"a\": 1}'"


def test_people_are_shared_out_without_gaps(tmp_path: Path):
    parser_given = make.argparse.Namespace(people="3:50", cores=4, data=tmp_path, scenes=1, config={}, device="cpu")
    ranges = [command[command.index("--people") + 1] for command in make.rendering(parser_given)]
    assert [seed for each in ranges for seed in range(*map(int, each.split(":")))] == list(range(3, 50))
