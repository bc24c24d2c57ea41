"""The app as a program sees it: the live server through gradio_client, on a small base of random weights."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import app
from metalora import Identity, MetaLoraError, cards
from metalora.config import BaseSettings
from metalora.errors import Cancelled
from metalora.handlers import Handlers, parse_size, sizes
from metalora.personalizer import Personalizer
from metalora.studio import Order, StopFlag, Studio, _received, _sent

from .conftest import make_meta_down
from .hub_server import HubServer
from .parts import COLOURS, GREY, portrait

pytestmark = pytest.mark.one_family
ROOT = Path(__file__).parents[1]
STEPS = 5
LONG = 2000  # steps that no test waits for
WORK = {"prompt": "a photo of {person} in the green park", "count": 2, "seed": 3, "vary": True, "size": "32x32", "steps": 3, "guidance": 1.0, "strength": 1.0}


@contextmanager
def served(*arguments: str):
    """The app's address, while it is served from this process."""
    page = app.start(app.settings(["--host", "127.0.0.1", *arguments]))
    try:
        yield page.local_url
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def address(tiny_base, base, tmp_path_factory):
    """A page on the tiny base, with a Meta-Down each for women and men."""
    downs = tmp_path_factory.mktemp("meta-down")
    for seed, domain in enumerate(("man", "woman")):
        replace(make_meta_down(base, base.settings.adapter, seed), domain=domain).save(downs / domain)
    with served("--base", str(tiny_base), "--meta-down", str(downs)) as url:
        yield url


@pytest.fixture
def connect(address):
    """Makes clients, each a session of its own."""
    return lambda: Client(address, verbose=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, str]:
    """Name → photo of that person."""
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        portrait(colour).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in COLOURS}


def learn(client: Client, photo: str, domain: str = "woman", steps: int = STEPS, seed: int = 0, face: int = 0, held_out=()):
    """Start to learn; the job."""
    return client.submit(
        photo=handle_file(photo), face=face, domain=domain, steps=steps, seed=seed, held_out=[handle_file(p) for p in held_out], api_name="/learn"
    )


def files_of(job) -> list[Path]:
    """The three files that a learning gives."""
    return [Path(part["value"] if isinstance(part, dict) else part) for part in job.result(timeout=120)[:3]]


def generate(client: Client, **changes):
    return client.predict(**WORK | changes, api_name="/generate")


def wait_until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


# ---- from a photo to files and pictures


def test_status_names_the_base_and_sets_the_controls(connect, tiny_base):
    status, domain, steps, size, denoising, guidance, *_ = connect().predict(api_name="/status")
    wanted = BaseSettings.load(tiny_base)
    assert "tiny" in status and "32×32" in status and "ready" in status
    assert [value for _, value in domain["choices"]] == ["man", "woman"]
    assert (steps["value"], size["value"], denoising["value"], guidance["value"]) == (wanted.adapt.steps, "32x32", wanted.inference_steps, wanted.guidance)


def test_learn_generate_download(connect, photos):
    client = connect()
    job = learn(client, photos["ann"])
    identity, diffusers, kohya = files_of(job)
    assert Identity.load(identity).steps == STEPS and Identity.load(identity).domain == "woman"
    assert all(key.startswith("transformer.") for key in load_file(diffusers)) and all(key.startswith("lora_unet_") for key in load_file(kohya))
    with safe_open(identity, "numpy") as file:
        assert "ann" not in str(file.metadata())  # no file name of the user's
    assert any("likeness" in str(update) and f"of {STEPS}" in str(update) for update in job.outputs())

    gallery, summary, seed, *_ = generate(client)
    assert "2 pictures" in summary and seed == WORK["seed"] + WORK["count"]
    for number, shown in enumerate(gallery):
        image = Image.open(shown["image"])
        assert image.size == (32, 32) and image.info["AI-generated"] == "true"
        assert image.info["prompt"] == "a photo of sks woman in the green park" and image.info["seed"] == str(WORK["seed"] + number)
        assert f"seed {WORK['seed'] + number}" in shown["caption"]


def test_the_same_seed_gives_the_same_file(connect, photos):
    one, other = (files_of(learn(connect(), photos["bea"], seed=7))[0].read_bytes() for _ in range(2))
    assert one == other != files_of(learn(connect(), photos["bea"], seed=8))[0].read_bytes()


def test_an_identity_file_is_loaded_again(connect, photos):
    identity = files_of(learn(connect(), photos["max"], "man"))[0]
    fresh = connect()
    again = [Path(part["value"]) for part in fresh.predict(handle_file(str(identity)), api_name="/load")[:3]]
    assert again[0].read_bytes() == identity.read_bytes() and load_file(again[1])
    gallery, *_ = generate(fresh)
    assert Image.open(gallery[0]["image"]).info["prompt"] == "a photo of sks man in the green park"


def test_other_photos_are_compared_with_and_not_learnt_from(connect, photos):
    client = connect()
    with_others = files_of(learn(client, photos["ann"], held_out=[photos["ann"], photos["bea"]]))[0].read_bytes()
    assert with_others == files_of(learn(connect(), photos["ann"]))[0].read_bytes()


def test_of_several_faces_one_is_chosen(connect, photos, tmp_path):
    two = Image.new("RGB", (64, 32), GREY)
    for x, name in ((0, "ann"), (32, "bea")):
        two.paste(portrait(COLOURS[name]), (x, 0))
    two.save(path := str(tmp_path / "two.png"))
    client = connect()
    found = client.predict(handle_file(path), api_name="/look")
    faces = next(part["value"] for part in found if isinstance(part, dict) and part.get("value") and isinstance(part["value"], list))
    assert [shown["caption"] for shown in faces] == ["face 1", "face 2"]
    with pytest.raises(AppError, match="The photo shows several faces; click the one to learn."):
        learn(client, path).result(timeout=60)
    with pytest.raises(AppError, match="two.png: The photo shows several faces; leave it out, or cut it to the one"):
        learn(client, photos["ann"], held_out=[photos["ann"], path]).result(timeout=60)
    left, right = (files_of(learn(connect(), path, face=number))[0].read_bytes() for number in (1, 2))
    assert left != right


# ---- stopping


def test_stop_ends_a_learning_at_once_and_keeps_what_was_there(connect, photos):
    client = connect()
    identity = files_of(learn(client, photos["ann"]))[0]
    job = learn(client, photos["bea"], steps=LONG)
    wait_until(lambda: any("step " in str(update) for update in job.outputs()))
    asked = time.monotonic()
    client.predict(api_name="/stop")
    job.result(timeout=30)
    assert time.monotonic() - asked < 2.5  # a second, and what a busy machine adds
    assert "Stopped" in str(job.outputs()[-1]) and identity.is_file()
    gallery, *_ = generate(client, count=1)  # the person before is still there
    assert Image.open(gallery[0]["image"]).info["identity"] == f'{{"{Identity.load(identity).sha256}": 1.0}}'


def test_stop_ends_pictures_and_keeps_those_that_are_done(connect, photos):
    client = connect()
    files_of(learn(client, photos["ann"]))
    job = client.submit(**WORK | {"count": 16, "steps": 100}, api_name="/generate")
    wait_until(lambda: any(update[0] for update in job.outputs() if isinstance(update[0], list)))
    client.predict(api_name="/stop")
    gallery, summary, *_ = job.result(timeout=30)
    assert 1 <= len(gallery) < 16 and "Stopped" in summary


# ---- several at once


def test_sessions_do_not_see_each_other(connect, photos):
    people = {"ann": "woman", "max": "man", "bea": "woman"}
    clients = {name: connect() for name in people}
    jobs = {name: learn(client, photos[name], people[name], steps=20) for name, client in clients.items()}
    identities = {name: Identity.load(files_of(job)[0]) for name, job in jobs.items()}
    assert len({person.sha256 for person in identities.values()}) == 3
    pictures = {name: client.submit(**WORK, api_name="/generate") for name, client in clients.items()}
    for name, job in pictures.items():
        shown = job.result(timeout=120)[0]
        assert identities[name].sha256 in Image.open(shown[0]["image"]).info["identity"]
    with pytest.raises(AppError, match="Learn a person first"):
        generate(connect())


def test_one_stops_and_the_other_goes_on(connect, photos):
    first, second = connect(), connect()
    running, queued = learn(first, photos["ann"], steps=LONG), learn(second, photos["bea"])
    wait_until(lambda: any("step " in str(update) for update in running.outputs()))
    second.predict(api_name="/stop")  # before its turn has come: nobody else is stopped
    assert not running.done()
    first.predict(api_name="/stop")
    assert not wait([running.future], timeout=30).not_done and "Stopped" in str(running.outputs()[-1])
    assert Identity.load(files_of(queued)[0]).steps == STEPS


# ---- faults: one sentence each, and the page goes on


def test_faults_are_one_sentence(connect, photos, tmp_path):
    client = connect()
    grey, broken, text = tmp_path / "grey.png", tmp_path / "broken.png", tmp_path / "text.safetensors"
    Image.new("RGB", (32, 32), GREY).save(grey)
    broken.write_bytes(Path(photos["ann"]).read_bytes()[:60])
    text.write_text("no tensors here")
    files_of(learn(client, photos["ann"]))
    asked = {
        "No face": lambda: learn(client, str(grey)).result(timeout=60),
        "cut off or damaged": lambda: learn(client, str(broken)).result(timeout=60),
        "no Meta-Down for the domain cat": lambda: learn(client, photos["ann"], "cat").result(timeout=60),
        "prompt is empty": lambda: generate(client, prompt="  "),
        "not a size": lambda: generate(client, size="large"),
        "multiples of 16": lambda: generate(client, size="33x32"),
        "at most 64x64 pixels": lambda: generate(client, size="80x64"),
        "seed must be a whole number": lambda: learn(client, photos["ann"], seed=2**63).result(timeout=60),
        "safetensors|identity": lambda: client.predict(handle_file(str(text)), api_name="/load"),
    }
    for words, ask in asked.items():
        with pytest.raises(AppError, match=words) as fault:
            ask()
        assert "Traceback" not in str(fault.value) and str(fault.value).count("\n") == 0
    assert generate(client, count=1, seed=None)[0]  # and on it goes


def test_a_base_that_cannot_be_had_is_said_on_the_page(tmp_path):
    with served("--base", str(tmp_path)) as url:
        client = Client(url, verbose=False)
        status = client.predict(api_name="/status")[0]
        assert "fault" in status and "no diffusers pipeline" in status


def test_without_a_meta_down_the_page_says_how_people_are_learnt(tiny_base, photos):
    with served("--base", str(tiny_base)) as url:
        client = Client(url, verbose=False)
        status, domain, steps, *_ = client.predict(api_name="/status")
        assert "ready" in status and "ordinary LoRAs of rank 16 (make one with python -m metalora meta-train, or give one with --meta-down)" in status
        assert [value for _, value in domain["choices"]] == ["woman", "man"] and steps["value"] == 1000
        assert "value" not in domain  # who chose a sample meanwhile keeps its domain
        assert Identity.load(files_of(learn(client, photos["ann"]))[0]).is_plain


# ---- a base from the Hub


@pytest.fixture
def gated(tiny_base):
    """A server whose base needs the token hf_mine."""
    files = {str(p.relative_to(tiny_base)): p.read_bytes() for p in tiny_base.rglob("*") if p.is_file()}
    files["metalora.json"] = files["metalora.json"].replace(b'"../', f'"{tiny_base.parent}/'.encode())  # the face pack and CLIP lie beside it
    server = HubServer({"org/base": files}, {"org/base"})
    server.tokens = {"hf_mine"}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def gated_app(gated, tmp_path):
    """The address of `python app.py` on that base, and a folder with all that it writes: its cache, its temporary files, its logs."""
    with running("org/base", tmp_path, HF_ENDPOINT=gated.url, METALORA_DEBUG="1", HF_DEBUG="1") as (address, _):
        yield address, tmp_path


@contextmanager
def running(base: str, folder: Path, **env: str):
    """The address of `python app.py`, which writes nothing outside the folder, and its process, which is stopped afterwards as a container's would be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("home", "temp"):
        (folder / name).mkdir()
    own = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE") and not k.startswith("METALORA_")}
    env = {**own, "HF_HOME": str(folder / "home"), "TMPDIR": str(folder / "temp"), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    with (folder / "log").open("w") as log:
        run = subprocess.Popen([sys.executable, str(ROOT / "app.py"), "--base", base, "--host", "127.0.0.1", "--port", str(port)], env=env, stdout=log, stderr=log)
        try:
            wait_until(lambda: answers(port), 120)
            yield f"http://127.0.0.1:{port}", run
        finally:
            run.terminate()
            run.wait(30)


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_token_of_the_page_opens_a_gated_base_and_stays_nowhere(gated, gated_app):
    address, folder = gated_app
    client = Client(address, verbose=False)
    status, *_, token = client.predict(api_name="/status")
    assert f'accept its licence at <a href="{gated.url}/org/base"' in status and token["visible"]
    with pytest.raises(AppError, match="That is no token"):
        client.predict("two words\n", api_name="/unlock")
    status, *_, token = client.predict("hf_other", api_name="/unlock")
    assert "refuses the token" in status and f'href="{gated.url}/settings/tokens"' in status and token["visible"] and token["value"] == ""
    assert "is gated" in Client(address, verbose=False).predict(api_name="/status")[0]  # nobody else has it

    gated.pause = 0.2
    job = client.submit(" hf_mine ", api_name="/unlock")
    status, *_, token = job.result(timeout=120)
    assert "tiny" in status and "ready" in status and not token["visible"] and token["value"] == ""
    assert any("fetching org/base: 0.00 of 0.00 GB" in update[0] for update in job.outputs())
    assert "ready" in Client(address, verbose=False).predict(api_name="/status")[0]  # the base is there for all

    kept = [path for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in (b"hf_mine", b"hf_other"))]
    assert (folder / "log").stat().st_size and list(folder.rglob("*.safetensors")) and not kept


def test_a_stop_from_outside_takes_along_what_was_uploaded(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "mine.png")
    with running(str(tmp_path), tmp_path) as (address, run):
        visitor = Client(address, verbose=False)  # stays, as a browser does
        with pytest.raises(AppError, match="no diffusers pipeline"):
            visitor.predict(handle_file(tmp_path / "mine.png"), api_name="/look")
        assert list((tmp_path / "temp").rglob("mine.png"))
        run.terminate()
        assert run.wait(30) == 0 and not list((tmp_path / "temp").rglob("mine.png"))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_stop_from_outside_does_not_wait_for_a_download(gated, tmp_path):
    gated.gated, gated.pause = set(), 5
    with running("org/base", tmp_path, HF_ENDPOINT=gated.url) as (_, run):
        wait_until(lambda: any(name.endswith(".safetensors") for name in gated.asked))
        run.terminate()
        assert run.wait(15) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_download_of_a_base_is_shown(gated, gated_app):
    gated.gated, gated.pause = set(), 0.2
    job = Client(gated_app[0], verbose=False).submit(api_name="/status")
    assert "ready" in job.result(timeout=120)[0]
    assert any("busy" in update[0] and "fetching org/base: " in update[0] for update in job.outputs())


# ---- settings


def test_settings_come_from_the_command_line_or_the_environment(monkeypatch):
    for name, value in {"BASE": "a/b", "META_DOWN": "c/d@e", "PLAN": "lean", "HOST": "0.0.0.0", "PORT": "1234", "SHARE": "true"}.items():
        monkeypatch.setenv(f"METALORA_{name}", value)
    of_environment = {"base": "a/b", "meta_down": "c/d@e", "plan": "lean", "host": "0.0.0.0", "port": 1234, "share": True}
    assert vars(app.settings([])) == of_environment
    assert vars(app.settings(["--base", "x", "--port", "5", "--plan", "fp8"])) == {**of_environment, "base": "x", "port": 5, "plan": "fp8"}


def test_a_taken_port_is_said_in_one_sentence(address):
    port = re.search(r":(\d+)", address)[1]
    found = subprocess.run(
        [sys.executable, str(ROOT / "app.py"), "--base", "nowhere", "--host", "127.0.0.1", "--port", port], capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert found.returncode == 1 and found.stderr.strip().splitlines()[-1].startswith(f"The page cannot be served on 127.0.0.1:{port}: the port is taken") and "Traceback" not in found.stderr


# ---- parts


@pytest.mark.parametrize("resolution,grid,expected", [(96, 16, ["96x96", "64x96", "96x64"]), (1024, 16, ["1024x1024", "768x1024", "1024x768"]), (16, 16, ["16x16"] * 3)])
def test_sizes_are_on_the_grid(resolution, grid, expected):
    assert sizes(resolution, grid) == expected
    assert all(side % grid == 0 for text in expected for side in parse_size(text))


@pytest.mark.parametrize("seconds,text", [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (125, "2 min 05 s"), (4200, "1 h 10 min")])
def test_clock(seconds, text):
    assert cards.clock(seconds) == text


@pytest.mark.parametrize("cosine,text", [(0.876, "0.88"), (-0.001, "0.00"), (-0.25, "-0.25")])
def test_figures_have_two_digits(cosine, text):
    assert cards.figure(cosine) == text


def test_words_of_users_and_bases_are_shown_as_text():
    assert "<b>" not in cards.words([["<b>red</b>", "blue"]]) and "<script" not in cards.status("<script>")


def test_addresses_in_a_sentence_are_links_and_nothing_else_is():
    text = cards.sentence('at https://hub/a/b?c=1&d, (http://127.0.0.1:9) & <a href="x">. See https://hub/"onclick="x javascript:x')
    links = re.findall(r"<a href=.*?</a>", text)
    assert [re.sub(r"<.*?>", "", link) for link in links] == ["https://hub/a/b?c=1&amp;d", "http://127.0.0.1:9", "https://hub/"]
    assert re.sub(r"<a href=\S+ target=\"_blank\" rel=\"noopener\">|</a>", "", text).count("<") == 0


def test_stop_flags_are_apart():
    one, other = StopFlag.of("session-one"), StopFlag.of("session-two")
    one.raise_()
    try:
        assert one.is_set() and not other.is_set()
    finally:
        one.clear()
    assert not one.is_set()


def test_what_the_user_should_know_of_the_base_is_shown_once(base, monkeypatch):
    import gradio

    opened, said = Future(), []
    opened.set_result(Personalizer(replace(base, notice="going on with lean."), None))
    monkeypatch.setattr(gradio, "Warning", lambda text, **more: said.append(text))
    do = Handlers(Studio("tiny", _opened=opened), [])
    do._tell()
    do._tell()
    assert said == ["going on with lean."]
    do.studio.notice = "The GPU ran out of memory."
    assert "; The GPU ran out of memory." in do._greeting(opened.result())[0]


def test_who_has_no_name_in_kohya_s_format_is_learnt_all_the_same(base, photos, monkeypatch):
    shape, opened, said = replace(base.settings.adapter, targets=r"attn\.to_(q|v)$"), Future(), []
    opened.set_result(Personalizer(base, make_meta_down(base, shape)))
    monkeypatch.setattr(gr, "Warning", lambda text, **more: said.append(text))
    monkeypatch.setattr(base, "notice", "The prompt of somebody else was too long.")
    request = type("Request", (), {"session_hash": "kohya"})()
    *_, (identity, diffusers, kohya, learnt, *_) = Handlers(Studio("tiny", _opened=opened), []).learn(photos["ann"], 0, "woman", 2, 0, [], request)
    assert Identity.load(identity.value["path"] if isinstance(identity.value, dict) else identity.value).sha256 == learnt.identity.sha256
    assert identity.interactive and diffusers.interactive and diffusers.value and not kohya.interactive and kohya.value is None
    assert not said  # what another was to know


def test_handlers_of_a_sample(photos):
    from metalora.handlers import Sample

    event = type("Event", (), {"index": 0})()
    taken = Handlers(None, [Sample(photos["ann"], "woman", [photos["bea"]])]).take_sample(event)
    assert taken[0] == photos["ann"] and taken[1] == [photos["bea"]] and taken[-1] == "woman"


def test_a_fault_of_ours_in_opening_a_base_is_one_sentence_on_the_page(tmp_path, monkeypatch, capsys):
    studio = Studio(str(tmp_path))
    monkeypatch.setattr(Studio, "_open", lambda self: 1 / 0)
    *_, (status, *rest) = Handlers(studio, []).greet()
    assert "fault" in status and "Something went wrong on our side" in status and "ZeroDivisionError" in capsys.readouterr().err
    assert not studio.is_open


def test_a_photo_stays_where_the_base_is_at_fault(photos, tmp_path):
    """It is no worse for that, and will do when the base is there."""
    with pytest.raises(gr.Error, match="no diffusers pipeline"):
        Handlers(Studio(str(tmp_path)), []).look(photos["ann"])


def test_what_crosses_to_another_process_can_be_pickled(base, meta_down, photos, tmp_path, monkeypatch):
    """As on ZeroGPU, whose workers send what a generator yields, and of exceptions the name alone."""
    studio, stop = Studio("tiny"), StopFlag(tmp_path / "stop")
    studio._opened = Future()
    studio._opened.set_result(Personalizer(base, meta_down))
    do = Handlers(studio, [])
    sent = _sent(do._train)(photos["ann"], "woman", None, 2, 0, [], stop)
    *reports, learnt = _received(pickle.loads(pickle.dumps(found)) for found in sent)
    assert [report.step for report in reports] == [1, 2] and learnt.identity.steps == 2 and reports[0].learnt is None
    order = Order("in a park", 1, 0, 1, 1.0, (32, 32), 1.0)
    (picture,) = _received(pickle.loads(pickle.dumps(found)) for found in _sent(do._draw)(learnt, order, tmp_path, stop))
    assert picture.path.is_file()
    for domain, wanted, kind in (("cat", False, MetaLoraError), ("woman", True, Cancelled)):
        stop.raise_() if wanted else stop.clear()
        with pytest.raises(kind):
            list(_received(pickle.loads(pickle.dumps(found)) for found in _sent(do._train)(photos["ann"], domain, None, 2, 0, [], stop)))


def test_one_piece_of_work_waits_for_another_that_nobody_waits_for(base, meta_down, photos, tmp_path):
    """A client that has given up leaves its work running for a while."""
    studio, stop = Studio("tiny"), StopFlag(tmp_path / "stop")
    studio._opened = Future()
    studio._opened.set_result(Personalizer(base, meta_down))
    settings = dict(face=None, steps=2, seed=0, held_out=[], stop=stop, preview_every=0)
    first = studio.learn(photos["ann"], "woman", **settings)
    next(first)
    second = Thread(target=lambda: found.extend(studio.learn(photos["bea"], "woman", **settings)), daemon=True)
    found: list = []
    second.start()
    second.join(0.5)
    assert second.is_alive() and not found
    first.close()
    second.join(60)
    assert len(found) == 2
    assert studio.personalizer._encoded is None  # no photo is left behind
