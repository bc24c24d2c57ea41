"""From a name to a folder, with the real Hub client against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metalora import Identity, MetaLoraError, hub, licence
from metalora.progress import Line
from metalora.publish import publish

from .hub_server import SHA, HubServer
from .parts import COLOURS, portrait, write_people

pytestmark = pytest.mark.one_family

# One process, for the client reads its environment when it is imported: names → folder's files, or the sentence.
SCRIPT = """
import json, sys
from pathlib import Path
from metalora import MetaLoraError, hub
said = {}
for name in sys.argv[1:]:
    kind, _, place = name.partition(":")
    try:
        folder = {"base": hub.base_folder, "down": lambda place: hub.meta_down_folder(place, "woman"), "model": hub.model_folder}[kind](place)
        said[name] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    except MetaLoraError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """That of a process with this Hub and this cache, and no token but one that is given."""
    own = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE") and not k.startswith("METALORA_")}
    return {**own, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **more}


def ask(names: list[str], url: str, home: Path, **env: str) -> dict:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], env=environment(url, home, **env), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def server(tiny_base):
    files = {str(p.relative_to(tiny_base)): p.read_bytes() for p in tiny_base.rglob("*") if p.is_file()}
    unneeded = {"flux1-dev.safetensors": b"24 GB", "transformer/pytorch.bin": b"pickle", "images/a.png": b""}
    partial = {k: v for k, v in files.items() if not k.startswith("vae/")}
    downs = {"meta_down.safetensors": b"", "start.safetensors": b"", "predictor.safetensors": b"", "config.json": b"{}", "README.md": b"", "photo.jpg": b""}
    server = HubServer({"org/flux": {**files, **unneeded}, "org/gated": files, "org/partial": partial, "org/down": downs}, {"org/gated"})
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_answers_in_folders_and_sentences(server, tiny_base, tmp_path):
    needed = sorted(str(p.relative_to(tiny_base)) for p in tiny_base.rglob("*") if p.is_file())
    server.repos["org/dino"] = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}
    names = ["model:org/dino", "base:org/flux", "base:org/flux@v9", "base:org/gated", "base:org/none", "base:org/partial", "down:org/down", "model:org/down", "base:no such name"]
    said = ask(names, server.url, tmp_path)
    assert said["base:org/flux"] == needed
    assert said["model:org/dino"] == ["config.json", "model.safetensors", "preprocessor_config.json"] and "lacks files" in said["model:org/down"]
    assert "no revision v9" in said["base:org/flux@v9"]
    assert "org/gated is gated: accept its licence at " + server.url in said["base:org/gated"] and "HF_TOKEN" in said["base:org/gated"]
    assert "no org/none on the Hub" in said["base:org/none"]
    assert "lacks files" in said["base:org/partial"]
    assert said["down:org/down"] == ["README.md", "config.json", "meta_down.safetensors", "predictor.safetensors", "start.safetensors"]
    assert "no folder no such name" in said["base:no such name"]

    # What is here needs no network; a file that is missing here does, and that is said.
    server.shutdown()
    server.server_close()
    asked = len(server.asked)
    offline = ask(["base:org/flux", "down:org/down", "base:org/none"], server.url, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["base:org/flux"] == needed and offline["down:org/down"] == said["down:org/down"] and len(server.asked) == asked
    assert "cannot be reached because HF_HUB_OFFLINE is set" in offline["base:org/none"]
    assert said["base:org/flux"] == ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"]


def test_a_token_opens_the_gate(server, tmp_path):
    assert "model_index.json" in ask(["base:org/gated"], server.url, tmp_path, HF_TOKEN="hf_x")["base:org/gated"]


def test_the_token_of_a_log_in_is_taken(server, tmp_path):
    server.tokens = {"hf_mine"}
    (tmp_path / "token").write_text("hf_mine\n")  # as `hf auth login` leaves it
    assert "model_index.json" in ask(["base:org/gated"], server.url, tmp_path)["base:org/gated"]


def test_a_cache_that_lacks_a_shard_is_not_complete(tiny_base, tmp_path):
    assert hub.pipeline_is_complete(tiny_base)
    for path in tiny_base.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(tiny_base)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(tiny_base)).symlink_to(path)
    assert hub.pipeline_is_complete(tmp_path)
    (tmp_path / "transformer" / "x.index.json").write_text(json.dumps({"weight_map": {"a": "x-00001.safetensors"}}))
    assert not hub.pipeline_is_complete(tmp_path)


def closed(server: HubServer) -> None:
    server.shutdown()
    server.server_close()


# ---- every fault, through the command line

VAE = "vae/diffusion_pytorch_model.safetensors"
FAULTS = {  # what is asked for, what is wrong with the server, the environment, and what the sentence says, with URL for the server's address
    "gated": ("org/gated", {}, {}, ["org/gated is gated: accept its licence at URL/org/gated, then log in with `hf auth login`, or set HF_TOKEN"]),
    "private": ("org/flux", {"private": {"org/flux"}}, {}, ["no org/flux on the Hub, or it is private", "URL/org/flux,", "`hf auth login`", "HF_TOKEN"]),
    "private, other token": ("org/none", {}, {"HF_TOKEN": "hf_x"}, ["no org/none on the Hub, or it is private", "HF_TOKEN"]),
    "missing": ("org/none", {}, {}, ["no org/none on the Hub, or it is private; check the spelling at URL/org/none,"]),
    "missing revision": ("org/flux@v9", {}, {}, ["org/flux has no revision v9; see which there are at URL/org/flux/commits/main,"]),
    "refused token": ("org/flux", {"tokens": {"hf_x"}}, {"HF_TOKEN": "hf_old"}, ["The Hub refuses the token for org/flux", "URL/settings/tokens", "`hf auth login`"]),
    "weak token": ("org/flux", {"forbidden": {"org/flux"}}, {"HF_TOKEN": "hf_x"}, ["The Hub refuses the token for org/flux; make one that may at URL/settings/tokens,"]),
    "half-downloaded": ("org/flux", {"short": {VAE}}, {}, ["A file of org/flux arrived in another size than the Hub names; start again, and it goes on"]),
    "half a small file": ("org/flux", {"short": {"model_index.json"}}, {}, ["A file of org/flux arrived in another size than the Hub names; start again"]),
    "wrong hash": ("org/flux", {"wrong": {VAE}}, {}, [f"{VAE} of org/flux arrived damaged", "start again"]),
    "silent network": ("org/flux", {"silent": True}, {}, ["org/flux is out of reach, for the Hub (URL) cannot be reached; go online and start again, or give a folder"]),
    "no network": ("org/flux", {"closed": True}, {}, ["org/flux is out of reach, for the Hub (URL) cannot be reached; go online and start again, or give a folder"]),
    "no network, part of it here": ("org/flux", {"part": True, "closed": True}, {}, ["org/flux is out of reach, for the Hub (URL) cannot be reached; go online"]),
}  # fmt: skip
PROGRESS = re.compile(r"\d GB, .* left$")


def spoken(arguments: list[str], env: dict[str, str], folder: Path) -> tuple[int, list[str]]:
    """Exit code and stderr of a command without its progress, in a folder of its own where it leaves nothing.

    It ends within 5 s; other work on the machine may take the cores from it meanwhile, so the clock gets as much again. None of the
    libraries that a base is opened with is loaded for it.
    """
    folder.mkdir()
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-X", "importtime", "-m", "metalora", *arguments], env=env, cwd=folder, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
    seconds = time.monotonic() - start
    lines = [line for line in run.stderr.splitlines() if not PROGRESS.search(line)]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "metalora" in loaded and not loaded & {"diffusers", "transformers", "peft", "insightface"} and seconds < 10, (seconds, run.stderr[-300:])
    assert not list(folder.iterdir())
    return run.returncode, [line for line in lines if not line.startswith("import time:")]


@pytest.fixture
def photo(tmp_path) -> str:
    portrait(COLOURS["ann"]).save(path := tmp_path / "photo.png")
    return str(path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_hub_is_one_sentence_within_five_seconds(server, tmp_path, photo, fault):
    name, wrong, more, says = FAULTS[fault]
    env = environment(server.url, tmp_path / "home", **more)
    if wrong.get("part"):
        server.short = {VAE}
        ask([f"base:{name}"], server.url, tmp_path / "home")
        assert list(tmp_path.glob("home/hub/*/blobs/*"))
    for what, value in wrong.items():
        setattr(server, what, value)
    if wrong.get("closed"):
        closed(server)
    code, said = spoken(["adapt", photo, "--domain", "woman", "--base", name, "--output", "x.safetensors"], env, tmp_path / "here")
    server.silent = False
    assert code == 2 and len(said) == 1 and all(part.replace("URL", server.url) in said[0] for part in says), said


@pytest.mark.parametrize("command", [
    ["generate", "ME", "in the park", "--output", "out"], ["export", "ME", "--output", "x.safetensors"], ["score", "PHOTO", "--against", "PHOTO"],
    ["convert", "ME", "--domain", "woman", "--output", "out"], ["meta-train", "PEOPLE", "--domain", "woman", "--output", "out"],
    ["adapt-all", "PEOPLE", "--output", "out"], ["evaluate", "PEOPLE", "--method", "base", "--output", "out"],
    ["adapt", "PHOTO", "--domain", "woman", "--output", "x.safetensors", "--meta-down", "org/gone"],
    ["evaluate", "PEOPLE", "--method", "base", "--output", "out", "--dino", "org/gone"],
], ids=" ".join)  # fmt: skip
def test_every_command_says_it_as_soon(server, tmp_path, photo, command):
    people = write_people(tmp_path / "people", {"ann": "woman"})
    (tmp_path / "me.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    named = {"PHOTO": photo, "PEOPLE": str(people), "ME": str(tmp_path / "me.safetensors")}
    arguments = [named.get(word, word) for word in command]
    if "org/gone" not in command:
        arguments += ["--base", "org/gone"]
    code, said = spoken(arguments, environment(server.url, tmp_path / "home"), tmp_path / "here")
    assert code == 2 and len(said) == 1 and "no org/gone on the Hub, or it is private" in said[0], said


def test_what_is_pinned_and_here_costs_no_request(server, tmp_path):
    first = ask([f"base:org/flux@{SHA}"], server.url, tmp_path)
    before = server.requests
    assert before > 0 and ask([f"base:org/flux@{SHA}"], server.url, tmp_path) == first and server.requests == before


def test_what_diffusers_has_fetched_opens_without_a_network(server, tmp_path):
    env = environment(server.url, tmp_path)
    fetch = "import sys; from diffusers import DiffusionPipeline; DiffusionPipeline.download('org/flux', revision=sys.argv[1])"
    subprocess.run([sys.executable, "-c", fetch, SHA], env=env, check=True, capture_output=True, timeout=120)
    assert list(tmp_path.glob("hub/*/trees/*")) and not list(tmp_path.rglob("metalora.json"))
    before, name = server.requests, f"base:org/flux@{SHA}"
    assert "model_index.json" in ask([name], server.url, tmp_path, HF_HUB_OFFLINE="1")[name] and server.requests == before
    assert "metalora.json" in ask([name], server.url, tmp_path)[name] and server.requests > before  # with a network, what is missing comes too
    closed(server)
    assert {"model_index.json", "metalora.json"} <= set(ask([name], server.url, tmp_path)[name])


def test_connections_that_are_cut_end_with_the_right_files(server, tiny_base, tmp_path):
    size = (tiny_base / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    rng = random.Random(0)
    server.cuts = [rng.randrange(1, size // 8) for _ in range(20)]
    # The client writes every 10 MB and waits a second after a cut: here less of both.
    code = "import time; from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 100; time.sleep = lambda seconds: None\n" + SCRIPT
    done = subprocess.run([sys.executable, "-c", code, "base:org/flux"], env=environment(server.url, tmp_path), capture_output=True, text=True, timeout=120)
    names = json.loads(done.stdout)["base:org/flux"]
    folder = next(tmp_path.glob("hub/*/snapshots/*"))
    assert not server.cuts and all((folder / name).read_bytes() == (tiny_base / name).read_bytes() for name in names)


def test_a_wrong_hash_is_thrown_away_and_said(server, tmp_path):
    server.wrong = {"vae/diffusion_pytorch_model.safetensors"}
    said = ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"]
    assert "vae/diffusion_pytorch_model.safetensors of org/flux arrived damaged" in said and not list(tmp_path.rglob("*.part"))
    server.wrong = set()
    assert "model_index.json" in ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"]


def test_a_part_that_is_larger_than_its_file_is_dropped(server, tiny_base, tmp_path):
    weights = (tiny_base / VAE).read_bytes()
    part = tmp_path / "hub" / "models--org--flux" / "blobs" / f"{hashlib.sha256(weights).hexdigest()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights + b"more")
    assert "model_index.json" in ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"] and not part.exists()
    assert next(tmp_path.glob(f"hub/*/snapshots/*/{VAE}")).read_bytes() == weights


def test_half_a_file_is_gone_on_with(server, tiny_base, tmp_path):
    server.short = {VAE}
    assert "arrived in another size" in ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"]
    assert list(tmp_path.rglob("*.part")) and not list(tmp_path.glob(f"hub/*/snapshots/*/{VAE}"))
    server.short, server.sent = set(), {}
    assert "model_index.json" in ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"]
    assert server.sent[VAE] == 1 and next(tmp_path.glob(f"hub/*/snapshots/*/{VAE}")).read_bytes() == (tiny_base / VAE).read_bytes()


def test_a_network_that_falls_silent_is_given_up(tiny_base, tmp_path):
    server = HubServer({"org/down": {"config.json": b"{}"}})
    server.silent = True
    code = """
import sys, time
from metalora import MetaLoraError, hub
hub.SILENCE = 0.5
from huggingface_hub import HfApi
for ask in (lambda api: api.create_repo("org/down", exist_ok=True), lambda api: api.model_info("org/down")):
    start = time.monotonic()
    try:
        with hub.plain_faults("org/down", None):
            ask(HfApi(token="hf_x"))
    except MetaLoraError as error:
        print(f"{time.monotonic() - start:.1f} {error}")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(server.url, tmp_path), capture_output=True, text=True, timeout=60)
    server.silent = False
    closed(server)
    assert done.returncode == 0 and done.stdout.count("cannot be reached; go online") == 2, (done.stdout, done.stderr)


def test_a_machine_that_is_too_small_is_told_before_the_weights_come(server, tmp_path):
    code = """
import sys
from metalora import MetaLoraError, hub
from metalora.base import choice_for
from metalora import base
hub.LARGE, base.system_memory = 2**10, lambda: 2**20
try:
    hub.prepare("org/flux", before=lambda configs: choice_for(configs, "cpu"))
except MetaLoraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(server.url, tmp_path), capture_output=True, text=True, timeout=60)
    assert "GiB of system memory, and this machine has 0.0 GiB" in done.stdout, done.stderr
    assert "transformer/config.json" in server.asked and not any(name.endswith(".safetensors") for name in server.asked)


def test_a_killed_download_goes_on_where_it_was(server, tiny_base, tmp_path):
    server.pause = 0.05
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, "base:org/flux"], env=environment(server.url, tmp_path))
    while sum(server.sent.values()) < 2**18:
        time.sleep(0.02)
    run.kill()
    run.wait()
    time.sleep(0.3)
    left, server.pause, server.sent = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()), 0, {}
    assert left >= 2**17 and "model_index.json" in ask(["base:org/flux"], server.url, tmp_path)["base:org/flux"]
    weights = sum(path.stat().st_size for path in tiny_base.rglob("*.safetensors"))
    assert sum(size for name, size in server.sent.items() if name.endswith(".safetensors")) <= weights - 2**17
    folder = next(tmp_path.glob("hub/*/snapshots/*"))
    assert all((folder / path.relative_to(tiny_base)).read_bytes() == path.read_bytes() for path in tiny_base.rglob("*") if path.is_file())


def test_of_two_processes_that_need_the_same_files_one_fetches_them(server, tiny_base, tmp_path):
    server.pause = 0.02
    both = [subprocess.Popen([sys.executable, "-c", SCRIPT, "base:org/flux"], env=environment(server.url, tmp_path), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(each.communicate(timeout=120)[0])["base:org/flux"] for each in both]
    assert said[0] == said[1] and "model_index.json" in said[0]
    weights = sum(path.stat().st_size for path in tiny_base.rglob("*.safetensors"))
    assert sum(size for name, size in server.sent.items() if name.endswith(".safetensors")) == weights


def test_a_download_says_how_far_it_is(server, tiny_base, tmp_path):
    code = "from metalora import hub; hub.base_folder('org/flux', on_fetch=lambda f: print(f.done, f.total, f.rate > 0, f.seconds_left >= 0))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(server.url, tmp_path), capture_output=True, text=True, timeout=60)
    rows = [line.split() for line in done.stdout.splitlines()]
    shares = [int(row[0]) for row in rows]
    weights = sum(path.stat().st_size for path in tiny_base.rglob("*.safetensors"))
    assert shares == sorted(shares) and shares[-1] == int(rows[-1][1]) == weights and all(row[2:] == ["True", "True"] for row in rows)
    out = io.StringIO()
    with Line(out) as line:
        line.fetched(hub.Fetched("org/flux", 3_100_000_000, 33_600_000_000, 52e6))
    assert out.getvalue().strip() == "org/flux: 3.10 of 33.60 GB, 52.0 MB/s, 9 min 47 s left"


def test_the_download_of_a_meta_down_is_told_of_too(server, tmp_path):
    server.repos["org/down"]["meta_down.safetensors"] = b"weights"
    code = "from metalora import hub; hub.prepare('org/flux', 'org/down', lambda f: print(f.name))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(server.url, tmp_path), capture_output=True, text=True, timeout=60)
    assert set(done.stdout.split()) == {"org/flux", "org/down"} and not done.stderr, done.stderr


def test_a_published_person_carries_the_licence_of_the_base(tmp_path, monkeypatch):
    factors = {"transformer_blocks.0.attn.to_q": (torch.ones(1, 4), torch.ones(8, 1))}
    person = Identity(factors, "black-forest-labs/FLUX.1-dev", "f", "mine", "s", rank=1, meta_rank=4, scale=1.0, domain="woman", noun="woman", trigger="sks", steps=1, seed=0)
    person.save(tmp_path / "me.safetensors")
    server = HubServer({})
    env = {**environment(server.url, tmp_path / "home"), "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-m", "metalora", "publish", str(tmp_path / "me.safetensors"), "org/me", "--private"], env=env, capture_output=True, text=True)
    server.repos["org/open"] = {"README.md": b"before"}
    refused = subprocess.run([sys.executable, "-m", "metalora", "publish", str(tmp_path / "me.safetensors"), "org/open", "--private"], env=env, capture_output=True, text=True)
    closed(server)
    assert refused.returncode == 2 and "org/open is there already and public" in refused.stderr and server.repos["org/open"] == {"README.md": b"before"}
    assert done.returncode == 0 and done.stdout.strip() == f"{server.url}/org/me", done.stderr
    assert set(server.repos["org/me"]) == {"identity.safetensors", "README.md"}
    assert server.private == {"org/me"}
    card = server.repos["org/me"]["README.md"].decode()
    assert "license_name: flux-1-dev-non-commercial-license" in card and licence.FLUX_NOTICE in card and "sks woman" in card
    (tmp_path / "back.safetensors").write_bytes(server.repos["org/me"]["identity.safetensors"])
    assert Identity.load(tmp_path / "back.safetensors").sha256 == person.sha256
    assert licence.header("tiny") == {} and licence.notice("miniature") == "" and licence.is_flux_dev("/models/FLUX.1-dev/")


@pytest.mark.parametrize("fault,told", [(errno.ENOSPC, "the disk is full; make room"), (errno.EACCES, "cannot be written there")])
def test_what_cannot_be_kept_is_one_sentence(fault, told):
    with pytest.raises(MetaLoraError, match=f"org/down could not be fetched to .*{told}.*set HF_HOME.*goes on where it was"), hub.plain_faults("org/down", None):
        raise OSError(fault, os.strerror(fault))


def test_folders_and_the_catalogue(tiny_base, tmp_path):
    assert hub.base_folder(str(tiny_base)) == tiny_base
    assert set(hub.meta_down_places("miniature")) == {"woman", "man", "mug"} and hub.meta_down_places("unknown") == {}
    assert all(Path(place).is_absolute() for place in hub.meta_down_places("miniature").values())
    with pytest.raises(MetaLoraError, match="holds no Meta-Down for man"):
        hub.meta_down_folder(str(tmp_path), "man")


@pytest.mark.parametrize("name", ["./miniatur", "../woman", "a--b/c", "caf\u00e9/x", "model", "a/b/c", "-a/b"])
def test_what_is_no_name_on_the_hub_is_one_sentence(name):
    with pytest.raises(MetaLoraError, match="it is no Hub name either"):
        hub.base_folder(name)
    with pytest.raises(MetaLoraError, match="is no name on the Hub"):
        publish("me.safetensors", name)


def test_cards_name_a_base_of_the_hub_and_no_folder(tmp_path):
    assert "base_model: owner/model\n" in licence.front_matter("owner/model@main") + "\n"
    for base in ("miniature", "/home/ann/flux"):
        assert "base_model" not in licence.front_matter(base)
