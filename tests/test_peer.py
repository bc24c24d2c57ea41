"""diffusers' own training script as a peer: fetched once, known by its SHA-256, and run where what it needs is there."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from PIL import Image

from metalora import Personalizer, peer
from metalora.errors import MetaLoraError
from metalora.evaluate import evaluate
from metalora.generate import Person, unload_people, use_people

from .conftest import run
from .parts import write_people


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty folder of the Hub client's, and the address of a server from which the script comes."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "www"))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(peer, "ADDRESS", f"http://127.0.0.1:{server.server_address[1]}/{peer.NAME}")
    yield tmp_path / "www" / peer.NAME
    server.shutdown()


def test_it_is_fetched_once_and_must_be_the_one_that_is_known(shelf, monkeypatch):
    shelf.write_text("print('another script')")
    with pytest.raises(MetaLoraError, match="not the script that this comparison knows; remove it"):
        peer.script()
    found = next(Path(constants.HF_HOME).rglob(peer.NAME))
    monkeypatch.setattr(peer, "SHA256", hashlib.sha256(shelf.read_bytes()).hexdigest())
    shelf.unlink()  # from now on it comes from the folder, or not at all
    assert peer.script() == found
    found.unlink()
    with pytest.raises(MetaLoraError, match=f"cannot be fetched .*404.* at {found}"):
        peer.script()
    assert not list(found.parent.iterdir())


def test_a_dead_network_says_where_to_put_it(shelf, monkeypatch):
    monkeypatch.setattr(peer, "ADDRESS", "http://127.0.0.1:9/" + peer.NAME)
    with pytest.raises(MetaLoraError, match="go online, or put"):
        peer.script()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
@pytest.mark.one_family
def test_what_it_lacks_is_said_first(base, meta_down, tmp_path):
    with pytest.raises(MetaLoraError, match="pip install torchvision"):
        peer.check(base)
    with pytest.raises(MetaLoraError, match="pip install torchvision"):
        next(evaluate(Personalizer(base, meta_down), tmp_path, ["dreambooth-r4"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_it_is_for_one_family(base):
    if base.family.pipeline != "FluxPipeline":
        with pytest.raises(MetaLoraError, match="is of another family; leave it out"):
            peer.check(base)


@pytest.fixture
def ready(base):
    """The base, where the script can run on it."""
    try:
        peer.check(base)
    except MetaLoraError as error:
        pytest.skip(str(error))
    return base


def test_it_learns_a_lora_that_the_base_loads(ready, tmp_path):
    base, photo = ready, Image.effect_noise((48, 40), 64)
    config = peer.PeerConfig(rank=2, steps=2)
    lora = peer.train(base.folder, [photo], "a photo of sks woman", base.settings.train_resolution, base.settings.max_sequence_length, config)
    assert {tensor.shape[0] for name, tensor in lora.items() if "lora_A" in name} == {2}
    use_people(base, [Person(lora, "sks woman", "0" * 64)])
    unload_people(base)
    with pytest.raises(MetaLoraError, match="training script failed"):
        peer.train(tmp_path, [photo], "a photo", 32, 8, config)


@pytest.mark.one_family
def test_it_is_evaluated_like_the_rest(ready, meta_down, tmp_path):
    people = write_people(tmp_path / "people", {"ann": "woman", "bea": "woman"})
    _, summary = run(evaluate(Personalizer(ready, meta_down), people, ["base", "dreambooth-r2:learning_rate=1e-3@2"], tmp_path / "out", limit=1))
    found = summary["methods"]["dreambooth-r2:learning_rate=1e-3@2"]
    assert found["pictures"] == summary["methods"]["base"]["pictures"] and found["parameters"] > 0 and found["learn_seconds"] > 0


def test_it_learns_alone_whatever_launcher_started_us(monkeypatch):
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = peer._environment()
    assert not set(told) & set(environment) and environment["OMP_NUM_THREADS"] == "1"
