"""From a name to a folder, with the real Hub client against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metalora import MetaLoraError, hub

from .hub_server import HubServer

# One process, for the client reads its environment when it is imported: names → folder's files, or the sentence.
SCRIPT = """
import json, sys
from pathlib import Path
from metalora import MetaLoraError, hub
said = {}
for name in sys.argv[1:]:
    kind, _, place = name.partition(":")
    try:
        folder = hub.base_folder(place) if kind == "base" else hub.meta_down_folder(place, "woman")
        said[name] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    except MetaLoraError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def ask(names: list[str], url: str, home: Path, **env: str) -> dict:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        if name not in env:
            environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def server(tiny_base):
    files = {str(p.relative_to(tiny_base)): p.read_bytes() for p in tiny_base.rglob("*") if p.is_file()}
    unneeded = {"flux1-dev.safetensors": b"24 GB", "transformer/pytorch.bin": b"pickle", "images/a.png": b""}
    partial = {k: v for k, v in files.items() if not k.startswith("vae/")}
    downs = {"meta_down.safetensors": b"", "config.json": b"{}", "README.md": b"", "photo.jpg": b""}
    server = HubServer({"org/flux": {**files, **unneeded}, "org/gated": files, "org/partial": partial, "org/down": downs}, {"org/gated"})
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_answers_in_folders_and_sentences(server, tiny_base, tmp_path):
    needed = sorted(str(p.relative_to(tiny_base)) for p in tiny_base.rglob("*") if p.is_file())
    names = ["base:org/flux", "base:org/flux@v9", "base:org/gated", "base:org/none", "base:org/partial", "down:org/down", "base:no such name"]
    said = ask(names, server.url, tmp_path)
    assert said["base:org/flux"] == needed
    assert "no revision v9" in said["base:org/flux@v9"]
    assert "org/gated is gated: accept its licence at " + server.url in said["base:org/gated"] and "HF_TOKEN" in said["base:org/gated"]
    assert "no org/none on the Hub" in said["base:org/none"]
    assert "lacks files" in said["base:org/partial"]
    assert said["down:org/down"] == ["README.md", "config.json", "meta_down.safetensors"]
    assert "no folder no such name" in said["base:no such name"]

    # What is here needs no network; a file that is missing here does, and that is said.
    server.shutdown()
    server.server_close()
    asked = len(server.asked)
    offline = ask(["base:org/flux", "down:org/down", "base:org/none"], server.url, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["base:org/flux"] == needed and len(offline["down:org/down"]) == 3 and len(server.asked) == asked
    assert "cannot be reached because HF_HUB_OFFLINE is set" in offline["base:org/none"]


def test_a_token_opens_the_gate(server, tmp_path):
    assert "model_index.json" in ask(["base:org/gated"], server.url, tmp_path, HF_TOKEN="hf_x")["base:org/gated"]


def test_a_cache_that_lacks_a_shard_is_not_complete(tiny_base, tmp_path):
    assert hub.pipeline_is_complete(tiny_base)
    for path in tiny_base.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(tiny_base)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(tiny_base)).symlink_to(path)
    assert hub.pipeline_is_complete(tmp_path)
    (tmp_path / "transformer" / "x.index.json").write_text(json.dumps({"weight_map": {"a": "x-00001.safetensors"}}))
    assert not hub.pipeline_is_complete(tmp_path)


def test_folders_and_the_catalogue(tiny_base, tmp_path):
    assert hub.base_folder(str(tiny_base)) == tiny_base
    assert set(hub.meta_down_places("miniature")) == {"woman", "man"} and hub.meta_down_places("unknown") == {}
    assert all(Path(place).is_absolute() for place in hub.meta_down_places("miniature").values())
    with pytest.raises(MetaLoraError, match="holds no Meta-Down for man"):
        hub.meta_down_folder(str(tmp_path), "man")
