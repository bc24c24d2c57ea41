"""Work that several processes share: each job once, nothing lost when one dies, and the same files as one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from PIL import Image

from metalora import Identity, MetaLoraError, Personalizer
from metalora.data import load_dataset
from metalora.people import adapt_all, file_names
from metalora.processes import CLAIMS, Pace, Process, claim, here, share_out

from .conftest import make_meta_down, run
from .parts import COLOURS, GREY, write_people

ROOT = Path(__file__).parents[1]
STEPS = 60


@pytest.fixture(scope="module")
def meta_downs(base, tmp_path_factory) -> Path:
    """A folder with Meta-Downs for women and men."""
    folder = tmp_path_factory.mktemp("meta-down")
    for domain in ("woman", "man"):
        replace(make_meta_down(base, base.settings.adapter), domain=domain).save(folder / domain)
    return folder


@pytest.fixture(scope="module")
def personalizer(base, meta_downs) -> Personalizer:
    return Personalizer(base, str(meta_downs))


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return write_people(tmp_path_factory.mktemp("people"), {name: "man" if name in ("max", "ned") else "woman" for name in COLOURS})


@pytest.fixture(scope="module")
def alone(tiny_base, meta_downs, people, tmp_path_factory) -> Path:
    """What one process writes, by the command."""
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run(adapt_all_command(people, folder), env=environment(tiny_base, meta_downs), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["people"]) == list(COLOURS) and f"step {STEPS}/{STEPS}" in done.stderr and "left" in done.stderr
    return folder


def environment(tiny_base: Path, meta_downs: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "METALORA_BASE": str(tiny_base), "METALORA_META_DOWN": str(meta_downs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def adapt_all_command(people: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "metalora", "adapt-all", str(people), "--output", str(output), "--steps", str(STEPS), "--json"]


def launched(command: list[str]) -> list[str]:
    """The same command in two processes of accelerate launch, which wants a GPU for that unless it is told that there are several."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, *command[1:]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# ---- who does what


def test_a_process_is_what_its_launcher_says(monkeypatch):
    assert here() == Process(0, 1, 0) and here().first and here().device() is None
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert here() == Process(3, 4, 1) and not here().first
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert here().device() == "cuda:1" and Process().device() is None
    with pytest.raises(MetaLoraError, match="more processes than GPUs on this machine, which has 2"):
        Process(3, 4, 2).device()


def test_every_job_falls_to_one_process(tmp_path, monkeypatch):
    done: set[str] = set()
    one, other = (share_out(list("abcde"), done.__contains__, tmp_path / CLAIMS) for _ in range(2))
    assert [next(one), next(other)] == ["a", "b"]
    done |= {"a", "b"}
    assert [next(other), next(one)] == ["c", "d"]
    done.add("c")
    assert next(other) == "e"
    done |= {"d", "e"}
    assert list(one) == [] == list(other) and not list(tmp_path.iterdir())


def test_the_first_waits_and_takes_over_what_another_left(tmp_path, monkeypatch):
    monkeypatch.setattr("metalora.processes.LOOK_AGAIN", 0)
    done = {"b"}
    with claim(tmp_path / CLAIMS / "a.lock") as mine:
        jobs = share_out(list("abc"), done.__contains__, tmp_path / CLAIMS)
        assert mine and next(jobs) == "c"
        done.add("c")
        assert next(jobs) is None
        monkeypatch.setenv("RANK", "1")
        assert list(share_out(list("abc"), done.__contains__, tmp_path / CLAIMS)) == []  # another than the first does not wait
    assert list(jobs) == ["a"]  # offered once, though it came to nothing


def test_a_claim_ends_with_its_process(tmp_path):
    code = f"import sys, time; from metalora.processes import claim; from pathlib import Path\nwith claim(Path({str(tmp_path / 'x.lock')!r})) as mine: print(mine, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "True\n"
    with claim(tmp_path / "x.lock") as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    with claim(tmp_path / "x.lock") as mine:
        assert mine
    assert not list(tmp_path.iterdir())


def test_pace_counts_units():
    pace = Pace(4)
    pace.before = 1
    report = pace.at(1, "x")
    assert report.done == 0.5 and report.seconds_left > 0 and pace.at(9, "x").done == 1


# ---- many people


def test_each_file_is_the_very_one_that_adapt_writes(alone, personalizer, people, tmp_path):
    assert sorted(files(alone)) == sorted(f"{name}.safetensors" for name in COLOURS) and len(list(alone.iterdir())) == len(COLOURS)
    max_alone = personalizer.adapt(people / "max-0.png", "man", STEPS).save(tmp_path / "max.safetensors")
    assert max_alone.read_bytes() == files(alone)["max.safetensors"]


def test_who_is_there_is_skipped_and_other_settings_are_refused(alone, personalizer, people):
    subjects, before = load_dataset(people).subjects, files(alone)
    progress, learnt = run(adapt_all(personalizer, subjects, alone, steps=STEPS))
    assert progress == [] and list(learnt.files) == list(COLOURS) and learnt.faults == {} and files(alone) == before
    for other, named in (({"steps": 3}, "steps"), ({"steps": STEPS, "seed": 1}, "seed")):
        with pytest.raises(MetaLoraError, match=f"ann.safetensors was made with other settings .{named}.; choose another"):
            run(adapt_all(personalizer, subjects, alone, **other))
    moved = [replace(subjects[0], domain="man")]
    with pytest.raises(MetaLoraError, match="other settings .domain."):
        run(adapt_all(personalizer, moved, alone, steps=STEPS))


def test_one_who_cannot_be_learnt_does_not_stop_the_rest(tiny_base, meta_downs, tmp_path, capsys, monkeypatch):
    from metalora.cli import main

    folder = write_people(tmp_path / "people", {"ann": "woman", "bea": "woman", "cleo": "woman"})
    Image.new("RGB", (32, 32), GREY).save(folder / "bea-0.png")
    with pytest.raises(SystemExit) as end:
        main(["adapt-all", str(folder), "-o", str(tmp_path / "out"), "--steps", "2", "--base", str(tiny_base), "--meta-down", str(meta_downs), "--json"])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert end.value.code == 2 and list(result["people"]) == ["ann", "cleo"] and "No face" in result["faults"]["bea"]
    assert err.index("bea could not be learnt: No face") < err.index("cleo  step 2/2") and "2 of 3 people" in result["error"]
    assert sorted(files(tmp_path / "out")) == ["ann.safetensors", "cleo.safetensors"]


def test_a_base_without_meta_downs_learns_everybody_as_an_ordinary_lora(base, people, tmp_path, monkeypatch):
    monkeypatch.setattr("metalora.hub.meta_down_places", lambda name: {})
    for _ in range(2):
        run(adapt_all(Personalizer(base), load_dataset(people).subjects[:1], tmp_path, steps=2))
    assert Identity.load(tmp_path / "ann.safetensors").is_plain


def test_every_identity_has_a_file_name_of_its_own(people):
    subjects = [replace(load_dataset(people).subjects[0], identity=name) for name in ("ann", "a/b", "a:b", "..", "José", "x" * 300)]
    names = file_names(subjects)
    assert names[0] == "ann.safetensors" and names[4] == "José.safetensors" and len(set(names)) == 6
    assert all("/" not in name and len(name) < 100 and not name.startswith("..") for name in names) and names == file_names(subjects)
    with pytest.raises(MetaLoraError, match="Ann and ann would share a file"):
        file_names([replace(subjects[0], identity=name) for name in ("Ann", "ann")])


# ---- as processes


def test_a_launch_of_two_of_which_one_is_killed_loses_nothing(alone, tiny_base, meta_downs, people, tmp_path):
    """Both work; the kill ends the launch, as launchers do; what was finished stays as it is, and a second launch does the rest."""
    command, env = launched(adapt_all_command(people, tmp_path)), environment(tiny_base, meta_downs)
    launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = wait_for(lambda: len(files(tmp_path)) >= 1 and workers_of(launcher), launcher)
    workers[1].kill()
    out, err = launcher.communicate(timeout=60)
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    assert launcher.returncode and 1 <= len(kept) < len(COLOURS), err
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["people"]) == list(COLOURS)  # one object, of the first process
    assert files(tmp_path) == files(alone) and {path.name for path in tmp_path.iterdir()} == {path.name for path in alone.iterdir()}
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept


def wait_for(there, process: subprocess.Popen):
    """Something that comes true while a process runs."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        found = there()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1] if process.poll() is not None else "it did not come")


def workers_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a launch, by rank."""
    found = [p for p in psutil.Process(launcher.pid).children() if "adapt-all" in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))
