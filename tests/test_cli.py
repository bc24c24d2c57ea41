"""The command line as a user and as a program sees it: what is printed where, exit codes, and nothing half done left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from metalora import Identity
from metalora.cli import main
from metalora.terminal import SEVERAL, spread
from metalora.metadown import MetaDown
from metalora.progress import Line
from metalora.train import StepReport

from .conftest import make_meta_down
from .hub_server import HubServer
from .parts import COLOURS, GREY, portrait, write_people

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def meta_downs(base, tmp_path_factory) -> Path:
    """A folder with a Meta-Down for women."""
    folder = tmp_path_factory.mktemp("meta-down")
    make_meta_down(base, base.settings.adapter).save(folder / "woman")
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return write_people(tmp_path_factory.mktemp("people"), {"ann": "woman", "bea": "woman", "max": "man"})


@pytest.fixture
def call(tiny_base, meta_downs, tmp_path, monkeypatch, capsys):
    """Run a command in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.setenv("METALORA_BASE", str(tiny_base))
    monkeypatch.setenv("METALORA_META_DOWN", str(meta_downs))
    monkeypatch.delenv("METALORA_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        return end.value.code or 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def me(tiny_base, meta_downs, people, tmp_path_factory) -> Path:
    """An identity file, made by the command."""
    path = tmp_path_factory.mktemp("me") / "me.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["adapt", str(people / "ann-0.png"), "--domain", "woman", "--output", str(path), "--steps", "5", "--base", str(tiny_base), "--meta-down", str(meta_downs)])
    assert not end.value.code
    return path


# ---- the way from a photo to files


def test_adapt_writes_an_identity_and_says_how_it_went(call, people, me, tmp_path):
    code, out, err = call("adapt", people / "ann-0.png", "--domain", "woman", "--output", "new/me.safetensors", "--steps", 5, "--json")
    result = json.loads(out)
    assert code == 0 and result["steps"] == 5 and result["output"] == "new/me.safetensors"
    assert Identity.load("new/me.safetensors").sha256 == result["sha256"] == Identity.load(me).sha256  # same seed, same person
    assert "step 5/5  loss " in err and "it/s" in err and " left" in err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["me.safetensors"]


@pytest.mark.one_family
def test_held_out_photos_are_scored_with_and_not_learnt_from(call, people, me):
    held_out = [people / "ann-1.png", people / "ann-2.png"]
    code, out, _ = call("adapt", "--held-out", *held_out, "--domain", "woman", people / "ann-0.png", "-o", "me.safetensors", "--steps", 5, "--json")
    assert code == 2 or json.loads(out)["sha256"]  # a photo that follows --held-out is held out: nobody is left to learn from
    code, out, _ = call("adapt", people / "ann-0.png", "--held-out", *held_out, "--domain", "woman", "-o", "me.safetensors", "--steps", 5, "--json")
    result = json.loads(out)
    assert code == 0 and result["sha256"] == Identity.load(me).sha256
    assert set(result["scores"]) == {"face", "similarity", "r_facesim", "copying", "clip_t", "clip_i"}


@pytest.mark.one_family
def test_who_is_learnt_is_kept_whatever_becomes_of_the_scores(call, tiny_base, people, me, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    settings = json.loads((base / "metalora.json").read_text())
    (tmp_path / "no-clip").mkdir()
    (base / "metalora.json").write_text(json.dumps({**settings, "clip": str(tmp_path / "no-clip"), "caption_phrases": [], "face_pack": str(tiny_base.parent / "face")}))
    code, _, err = call("adapt", people / "ann-0.png", "--held-out", people / "ann-1.png", "--domain", "woman", "-o", "me.safetensors", "--steps", 2, "--base", base)
    assert code == 2 and "learnt in 2 steps" in err and "could not be scored: The CLIP model" in err and Identity.load("me.safetensors").steps == 2


@pytest.mark.one_family
def test_a_face_is_chosen_in_the_photos_that_show_several(call, people, tmp_path):
    alone = Image.open(people / "ann-0.png")
    two = Image.new("RGB", (2 * alone.width, alone.height))
    for x, name in ((0, "bea"), (alone.width, "ann")):
        two.paste(Image.open(people / f"{name}-0.png"), (x, 0))
    two.save(tmp_path / "two.png")
    learn = ["adapt", people / "ann-0.png", tmp_path / "two.png", "--domain", "woman", "-o", "me.safetensors", "--steps", 2]
    code, _, err = call(*learn)
    assert code == 2 and "Photo 2 of 2: The photo shows 2 faces" in err
    assert call(*learn, "--face", 2)[0] == 0
    code, _, err = call("score", people / "ann-0.png", "--against", people / "ann-1.png", tmp_path / "two.png")
    assert code == 2 and f"{tmp_path / 'two.png'}: The photo shows several faces; leave it out" in err and "--face" not in err


def test_pictures_come_with_what_made_them(call, me):
    code, out, err = call("generate", me, "a photo of {person} in a red cap", "in the park", "--output", "out", "--count", 2, "--seed", 7, "--size", "48x32", "--json")
    result = json.loads(out)
    assert code == 0 and [Path(p["file"]).name for p in result["pictures"]] == ["01-7.png", "01-8.png", "02-7.png", "02-8.png"]
    first = Path("out/01-7.png").read_bytes()
    code, out, _ = call("generate", me, "in the snow", "--output", "out", "--seed", 7)
    assert code == 0 and out.strip() == "out/01-7-2.png" and Path("out/01-7.png").read_bytes() == first  # nothing is written over
    image = Image.open(result["pictures"][3]["file"])
    assert image.size == (48, 32) and image.info["prompt"] == "sks woman, in the park" and image.info["seed"] == "8"
    assert "picture 4/4" in err
    code, out, _ = call("generate", me, "in the park", "--output", "again", "--seed", 8, "--size", "48x32")
    assert out.split() == ["again/01-8.png"] and Image.open("again/01-8.png").tobytes() == image.tobytes()
    code, out, _ = call("generate", me, "in the park", "--output", "weak", "--seed", 8, "--size", "48x32", "--strength", 0.5)
    assert code == 0 and Image.open(out.strip()).tobytes() != image.tobytes()


@pytest.mark.parametrize("format,key", [("diffusers", "transformer."), ("kohya", "lora_unet_")])
def test_export_writes_an_ordinary_lora(call, me, format, key):
    code, out, _ = call("export", me, "--format", format, "--output", "lora.safetensors")
    assert code == 0 and format in out and "sks" in out and all(name.startswith(key) for name in load_file("lora.safetensors"))


def test_pictures_are_scored_against_photos(call, people):
    code, out, _ = call("score", people / "ann-1.png", people / "bea-1.png", "--against", people / "ann-2.png", "--json")
    one, other = json.loads(out)["pictures"]
    assert code == 0 and one["r_facesim"] > 0.9 > other["r_facesim"] and one["similarity"] is None and one["clip_i"] is None
    code, out, _ = call("score", people / "ann-1.png", "--against", people / "ann-2.png", "--learnt-from", people / "ann-0.png", "--prompt", "a red cap")
    assert code == 0 and all(name in out for name in ("R-FaceSim", "similarity to the photo learnt from", "copying", "CLIP-T", "CLIP-I"))


@pytest.mark.one_family
def test_methods_are_compared(call, people):
    folder = write_people(Path("women"), {"ann": "woman", "bea": "woman"})
    code, out, err = call("evaluate", folder, "--method", "base", "meta-lora", "--steps", 2, "--output", "out", "--limit", 1, "--json")
    assert code == 0 and json.loads(out)["methods"]["meta-lora"]["people"] == 1 and "left" in err
    code, out, _ = call("evaluate", folder, "--method", "base", "--method", "meta-lora", "--steps", 2, "--output", "out", "--degrade", "dark=0.3", "dark=0.98")
    assert code == 0 and "gallery of 2 people, chance 50.0%" in out and Path("out/report.html").is_file()
    assert "meta-lora+dark=0.3 " in out and "no face was found in the degraded photo of 2 people" in out
    code, _, err = call("evaluate", people, "--method", "meta-lora", "--output", "other")
    assert code == 2 and "no Meta-Down for the domain man" in err


def test_a_meta_down_is_trained_and_used(call, people):
    code, out, err = call("meta-train", people, "--domain", "man", "--output", "man", "--rounds", 1, "--name", "mine", "--json")
    assert code == 0 and json.loads(out)["people"] == 1 and "step 8/8" in err
    assert sorted(p.name for p in Path("man").iterdir()) == ["README.md", "config.json", "meta_down.safetensors"]
    assert MetaDown.load("man").name == "mine" and MetaDown.load("man").sha256 == json.loads(out)["sha256"]
    assert call("adapt", people / "max-0.png", "--domain", "man", "-o", "max.safetensors", "--steps", 2, "--meta-down", "man")[0] == 0
    code, _, err = call("meta-train", people, "--domain", "man", "--output", "man")
    assert code == 2 and "holds a Meta-Down already" in err
    code, out, err = call("meta-train", people, "--domain", "man", "--output", "other", "--rounds", 0, "--directions", 9, "--json")
    assert code == 0 and "step 1/1" in err and MetaDown.load("other").sha256 == json.loads(out)["sha256"]
    code, _, err = call("meta-train", people, "--domain", "man", "--output", "none", "--rounds", 0)
    assert code == 2 and "learns nothing" in err and not Path("none").exists()
    code, out, _ = call("meta-train", people, "--domain", "man", "--from", "man", "--output", "further", "--rounds", 1, "--adapt", "steps=3", "--json")
    assert code == 0 and json.loads(out)["sha256"] != MetaDown.load("man").sha256 and MetaDown.load("further").training["began at"].startswith("mine, ")
    assert call("meta-train", people, "--domain", "man", "--from", "further", "--output", "again", "--rounds", 1)[0] == 0
    assert MetaDown.load("again").adapt == {"steps": 3}
    code, _, err = call("meta-train", people, "--domain", "man", "--from", "man", "--directions", 9, "--output", "none")
    assert code == 2 and "--from and --directions both say where to begin" in err
    code, _, err = call("meta-train", people, "--domain", "man", "--from", people, "--output", "none")
    assert code == 2 and "holds no Meta-Down for man" in err and not Path("none").exists()
    code, out, err = call("meta-train", people, "--domain", "man", "--output", "set", "--rounds", 1, "--set", "bucket_steps=3,warmup_steps=1,flow.logit_mean=0.5", "--json")
    assert code == 0 and "step 3/3" in err and MetaDown.load("set").training["flow"]["logit_mean"] == 0.5
    for wrong, says in {"pace=2": "stage 1 has no setting named pace", "bucket_steps": "--set has bucket_steps, which is not understood", "seed=1,seed=2": "twice"}.items():
        code, _, err = call("meta-train", people, "--domain", "man", "--output", "none", "--set", wrong)
        assert code == 2 and says in err.replace("Stage", "stage") and not Path("none").exists()


@pytest.mark.one_family
def test_settings_of_stage_one_that_nothing_can_be_learnt_with_are_refused(call, people):
    train = ["meta-train", people, "--domain", "man", "--output", "none"]
    for wrong in ("checkpoint_every=0", "bucket_size=0", "learning_rate=0", "start_rate=2", "batch_size=0"):
        code, _, err = call(*train, "--set", wrong)
        assert code == 2 and "A setting of stage 1 is out of range" in err, wrong
    code, _, err = call(*train, "--set", "seed=5")
    assert code == 2 and "give it with --seed" in err
    code, _, err = call(*train, "--set", "bucket_steps=3,warmup_steps=3")
    assert code == 2 and "warm-up" in err
    code, _, err = call(*train, "--adapt", "steps=0")
    assert code == 2 and "--adapt: A setting of stage 2 is out of range" in err and not Path("none").exists()


@pytest.mark.one_family
def test_a_meta_down_that_was_not_written_whole_is_written_again(call, people):
    train = ["meta-train", people, "--domain", "man", "--output", "man", "--rounds", 1]
    assert call(*train)[0] == 0
    before = MetaDown.load("man").stamp
    Path("man/config.json").unlink()  # it comes last
    Path("man/heads-0000.safetensors").write_bytes(b"")  # of subjects; nobody is to keep them
    assert call(*train)[0] == 0 and MetaDown.load("man").stamp == before
    assert sorted(path.name for path in Path("man").iterdir()) == ["README.md", "config.json", "meta_down.safetensors"]


@pytest.mark.one_family
def test_a_stopped_meta_training_goes_on_from_its_checkpoint(call, people, monkeypatch):
    train = ["meta-train", people, "--domain", "woman", "--name", "mine", "--json"]
    whole = json.loads(call(*train, "--output", "whole")[1])
    shown: list[int] = []

    def stop(line: Line, report: StepReport) -> None:
        shown.append(report.step)
        if len(shown) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(Line, "step", stop)
    code, out, err = call(*train, "--output", "out")
    assert code == 130 and json.loads(out) == {"error": err.strip()} and [p.name for p in Path("out").iterdir()] == ["checkpoint.safetensors"]
    assert json.loads(call(*train, "--output", "out")[1])["sha256"] == whole["sha256"]
    assert shown == [*range(1, 14), *range(9, 25)]


@pytest.mark.one_family
def test_a_meta_training_is_logged_for_tensorboard(call, people):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = call("meta-train", people, "--domain", "man", "--output", "man", "--rounds", 1, "--log", "log", "--name", "mine")
    log = EventAccumulator("log/mine")
    log.Reload()
    assert code == 0 and [event.step for event in log.Scalars("loss")] == list(range(1, 9)), err


def test_the_doctor_names_what_is_there_and_what_is_not(call, tiny_base):
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["ready"] and found["parts"]["Meta-Down woman"]["domain"] == "woman"
    assert found["packages"]["torch"] and found["memory_gib"] > 0 and found["device"]
    code, out, _ = call("doctor", "--meta-down", "nowhere")
    assert code == 0 and "ok       base" in out and "MISSING  Meta-Down: There is no folder nowhere" in out and "ok       face pack" in out
    code, out, _ = call("doctor", "--base", "/nowhere", "--json")
    found = json.loads(out)
    assert not found["ready"] and "no folder /nowhere" in found["parts"]["base"]["says"]
    shutil.copytree(tiny_base, "damaged")
    Path("damaged/transformer/config.json").write_text("{")
    code, out, _ = call("doctor", "--base", "damaged", "--json")
    assert code == 0 and "cannot be read" in json.loads(out)["parts"]["base"]["says"]


@pytest.mark.one_family
def test_the_doctor_says_what_fits_which_card(call):
    sizes = {80: "folding", 48: "resident", 24: "fp8", 16: "4-bit", 12: "4-bit-checkpointing", 10: "offload"}
    ask = ["doctor", "--base", "black-forest-labs/FLUX.1-dev", "--meta-down", "nowhere", "--memory", *sizes, 6]
    cards = json.loads(call(*ask, "--json")[1])["cards"]
    assert [cards[f"a card of {size} GiB"]["plan"] for size in sizes] == list(sizes.values())
    assert list(cards["a card of 24 GiB"]["passed_over"]) == ["folding", "resident", "lean", "resident-checkpointing", "lean-checkpointing"]
    out = call(*ask)[1]
    assert "ok       a card of 24 GiB: fp8: fp8 weights" in out and "not lean needs 33." in out
    assert "MISSING  a card of 6 GiB: This base needs 8." in out and "close other programs" in out
    assert json.loads(call("doctor", "--json")[1])["parts"]["plan"]["plan"] == "cpu"
    klein = json.loads(call("doctor", "--base", "black-forest-labs/FLUX.2-klein-4B", "--meta-down", "nowhere", "--memory", 24, 16, "--json")[1])["cards"]
    assert [card["plan"] for card in klein.values()] == ["resident", "fp8"]


def test_a_plan_may_be_named(call, people):
    adapt = ["adapt", people / "ann-0.png", "--domain", "woman", "--output", "me.safetensors", "--steps", 1]
    assert call(*adapt, "--plan", "cpu")[0] == 0
    assert "There is no plan fp8 on a CPU" in refused(call, *adapt, "--plan", "fp8")


# ---- what cannot be done


def refused(call, *arguments) -> str:
    """The sentence of a command that must fail as asked, and leave nothing."""
    before = set(Path.cwd().rglob("*"))
    code, out, err = call(*arguments, "--json")
    assert code == 2 and json.loads(out) == {"error": err.strip()} and "\n" not in err.strip()
    assert set(Path.cwd().rglob("*")) == before
    return err


@pytest.mark.one_family
def test_what_cannot_be_done_is_one_sentence_and_exit_two(call, people, me):
    Image.new("RGB", (64, 64), GREY).save("empty.png")
    two = portrait(COLOURS["ann"], (8, 8), 64)
    two.paste(portrait(COLOURS["bea"], (8, 8), 16), (40, 40))
    ann, man = people / "ann-0.png", people / "max-0.png"
    adapt = ["--domain", "woman", "--output", "x.safetensors", "--steps", 1]
    assert "no picture nope.png" in refused(call, "adapt", "nope.png", *adapt)
    assert "No face was found" in refused(call, "adapt", "empty.png", *adapt)
    assert "No face was found" in refused(call, "adapt", ann, "--held-out", "empty.png", *adapt)
    assert "--face can only be 1" in refused(call, "adapt", ann, *adapt, "--face", 2)
    assert "no Meta-Down for the domain man" in refused(call, "adapt", man, "--domain", "man", "-o", "x.safetensors")
    assert "name it x.safetensors" in refused(call, "adapt", ann, "--domain", "woman", "-o", "x.pt")
    assert "no folder" in refused(call, "adapt", ann, "--domain", "woman", "-o", "empty.png/x.safetensors")
    assert "no folder /nowhere" in refused(call, "adapt", ann, *adapt, "--base", "/nowhere")
    assert "prompt is empty" in refused(call, "generate", me, " ", "-o", "out")
    assert "write it like 768x512" in refused(call, "generate", me, "a", "-o", "out", "--size", "big")
    assert "multiples of 16" in refused(call, "generate", me, "a", "-o", "out", "--size", "50x50")
    assert "no file gone.safetensors" in refused(call, "generate", "gone.safetensors", "a", "-o", "out")
    assert "no export format" in refused(call, "export", me, "--format", "onnx", "-o", "x.safetensors")
    assert "known are base" in refused(call, "evaluate", people, "--method", "magic", "-o", "out")
    assert "no setting named rate" in refused(call, "evaluate", people, "--method", "meta-lora:rate=1", "-o", "out")
    assert "write it like blur=2" in refused(call, "evaluate", people, "--method", "meta-lora", "-o", "out", "--degrade", "fog=1")
    assert "nobody of the domain dog" in refused(call, "adapt-all", people, "--domain", "dog", "-o", "out")
    assert "no Meta-Down for the domain man" in refused(call, "adapt-all", people, "-o", "out")
    assert "holds no metadata.jsonl" in refused(call, "meta-train", ".", "--domain", "woman", "-o", "out")
    assert "nobody of the domain dog" in refused(call, "meta-train", people, "--domain", "dog", "-o", "out")
    assert "not a Meta-Down folder" in refused(call, "publish", people, "me/it")


def test_a_wrong_command_line_is_exit_two_with_a_hint(call):
    for arguments in (["adapt"], ["draw"], ["adapt", "a.png", "--domain", "woman", "-o", "x.safetensors", "--steps", "0"], ["score", "a.png"], []):
        code, out, err = call(*arguments)
        assert code == 2 and "Usage: python -m metalora" in err + out and "Traceback" not in err


def test_a_fault_of_ours_is_exit_one_and_shows_itself_on_demand(call, me, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("metalora.cli._open", broken)
    code, out, err = call("export", me, "-o", "x.safetensors", "--json")
    assert code == 1 and "our side" in err and "Traceback" not in err and "error" in json.loads(out)
    monkeypatch.setenv("METALORA_DEBUG", "1")
    assert "Traceback" in call("export", me, "-o", "x.safetensors")[2]


# ---- one of several processes


def test_only_the_first_process_speaks_but_each_of_its_own_faults(call, people, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for command in (["adapt-all", people, "--domain", "woman", "--steps", 1], ["evaluate", people, "--method", "base", "--limit", 1]):
        code, out, err = call(*command, "--output", command[0], "--json")
        assert (code, out) == (0, "") and "%" not in err and "step" not in err
    assert not Path("evaluate/summary.json").exists() and len(list(Path("adapt-all").glob("*.safetensors"))) == 2
    code, out, err = call("adapt-all", "nowhere", "--output", "out", "--json")
    assert (code, out) == (2, "") and err.startswith("Process 2 of 2: The dataset folder nowhere is not there")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metalora.data.load_dataset", stop)
    assert call("adapt-all", people, "--output", "out", "--json") == (130, "", "")


# ---- as processes


def environment(tiny_base, meta_downs, **more: str) -> dict[str, str]:
    return {**os.environ, "METALORA_BASE": str(tiny_base), "METALORA_META_DOWN": str(meta_downs), "PYTHONPATH": str(ROOT), **more}


def test_help_comes_at_once():
    start = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-m", "metalora", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "meta-train" in done.stdout and os.times().children_user - start[1] < 1.5
    loaded = subprocess.run([sys.executable, "-c", "import metalora.cli, sys; print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout.strip() == "False"


@pytest.mark.one_family
def test_a_stop_is_exit_130_and_leaves_nothing(tiny_base, meta_downs, people, tmp_path):
    arguments = ["adapt", str(people / "ann-0.png"), "--domain", "woman", "--output", "me.safetensors", "--steps", "1000000"]
    run = subprocess.Popen([sys.executable, "-m", "metalora", *arguments], cwd=tmp_path, env=environment(tiny_base, meta_downs), stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # tests in the background ignore it, and children inherit that
    try:
        assert "step 1/1000000" in run.stderr.readline()
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Stopped" in err and "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.one_family
def test_publishing_puts_the_folder_on_the_hub(tiny_base, meta_downs, tmp_path):
    server = HubServer({})
    (tmp_path / "private.txt").write_text("not for the Hub")
    env = environment(tiny_base, meta_downs, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1")
    publish = [sys.executable, "-m", "metalora", "publish", str(meta_downs / "woman"), "org/down"]
    env.pop("HF_TOKEN", None)
    done = subprocess.run(publish, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(publish, env={**env, "HF_TOKEN": "hf_x"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"{server.url}/org/down"
    sent = {path.name: path.read_bytes() for path in (meta_downs / "woman").iterdir()}
    assert server.repos["org/down"] == sent
    server.shutdown()
    server.server_close()


# ---- small parts


@given(st.lists(st.sampled_from([*SEVERAL, "--json", "-o", "a", "b.png", "-"])))
def test_spreading_keeps_all_values_in_order(arguments):
    values = [a for a in arguments if not a.startswith("-") or a == "-"]
    out = spread(arguments)
    assert [a for a in out if not a.startswith("-") or a == "-"] == values
    assert spread(out) == out


def test_several_values_may_follow_an_option():
    assert spread(["score", "p", "--against", "a", "b", "--json"]) == ["score", "p", "--against", "a", "--against", "b", "--json"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_on_a_terminal_and_few_lines_elsewhere():
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        with Line(stream) as line:
            for step in range(1, 376):
                line.step(StepReport(step, 375, 0.5, 0.25, 4.0 * (375 - step)))
    lines = file.getvalue().splitlines()
    assert 10 <= len(lines) <= 12 and lines[-1] == "step 375/375  loss 0.5000  4.0 s/it  0 s left" and lines[0].startswith("step 1/375")
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("0 s left\n") and "\r" in terminal.getvalue()
    assert np.all([len(part) < 200 for part in terminal.getvalue().split("\r")])
