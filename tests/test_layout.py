"""FLUX.1-dev's files as its repository has them, made small with random weights, through the same door as the real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metalora import Identity, hub, licence
from metalora.adapt import adapt_plain
from metalora.base import Base
from metalora.cache import encode
from metalora.config import AdaptConfig
from metalora.generate import GenerateConfig, Person, generate, render, unload_people
from metalora.miniature.pipeline import build_pipeline, save_pipeline

from . import hub_server
from .conftest import TINY, WORDS, run
from .parts import COLOURS, build_pack, portrait
from .test_plan import in_four_bits, on_gpu

pytestmark = pytest.mark.one_family
NAME = "black-forest-labs/FLUX.1-dev"
PARTS = {  # component → its class, as that repository's model_index.json names them
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"), "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"), "transformer": ("diffusers", "FluxTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
}  # fmt: skip
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
             "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}  # fmt: skip


def sharded(file: Path, stem: str, count: int) -> None:
    """A file of weights as so many shards and their index."""
    weights = load_file(file)
    names, index = sorted(weights), {}
    for number in range(count):
        shard = f"{stem}-{number + 1:05}-of-{count:05}.safetensors"
        save_file({name: weights[name] for name in names[number::count]}, file.parent / shard)
        index |= dict.fromkeys(names[number::count], shard)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    (file.parent / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    file.unlink()


def write_layout(folder: Path) -> Path:
    """What `save_pipeline` writes, turned into what the repository holds."""
    save_pipeline(build_pipeline(TINY, WORDS, seed=1), folder)
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0", **{part: list(names) for part, names in PARTS.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    sharded(folder / "transformer" / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model", 3)
    sharded(folder / "text_encoder_2" / "model.safetensors", "model", 2)
    clip = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(clip).items()}, clip)
    _old_clip_tokenizer(folder / "tokenizer")
    config = json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer", "model_max_length": 512}))
    (folder / "LICENSE.md").write_text("FLUX.1 [dev] Non-Commercial License")
    for unneeded in ("flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg"):
        (folder / unneeded).write_bytes(b"24 GB")
    return folder


def _old_clip_tokenizer(folder: Path) -> None:
    """Words and merges in files of their own, as tokenizers were written then."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n")
    (folder / "tokenizer.json").unlink()


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    return write_layout(tmp_path_factory.mktemp("layout") / "FLUX.1-dev")


@pytest.fixture(scope="module")
def opened(layout) -> Base:
    return Base.open(str(layout), device="cpu")


def test_it_is_the_pipeline_that_it_was_made_from(opened, layout, tmp_path):
    save_pipeline(build_pipeline(TINY, WORDS, seed=1), tmp_path / "plain")
    text, wanted = (base.encode_prompts(["a photo of sks woman in the green park"], 32) for base in (opened, Base.open(str(tmp_path / "plain"), device="cpu")))
    assert all(torch.equal(one, other) for one, other in zip(text, wanted))
    theirs = load_file(tmp_path / "plain" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, theirs[name].to(tensor.dtype)) for name, tensor in opened.transformer.state_dict().items())
    assert opened.settings.resolution == 1024 and opened.settings.text_tokens == 256


@pytest.mark.parametrize("plan", ["cpu", "resident", "fp8", "fp8-checkpointing", "4-bit"])
def test_a_person_is_learnt_drawn_and_exported_in_every_precision(opened, tmp_path, plan):
    base = {"cpu": lambda: opened, "4-bit": lambda: in_four_bits(opened)}.get(plan, lambda: on_gpu(opened, plan))()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    photo = encode(base, images, ["a photo of sks woman"] * 2)
    assert photo.text.embeds.shape[1] == 256
    config = replace(AdaptConfig(), steps=3, learning_rate=0.05, warmup_steps=1)
    reports, identity = run(adapt_plain(base, replace(base.settings.adapter, rank=2), "woman", photo, config))
    assert len(reports) == 3 and reports[0].loss > 0
    lora = load_file(identity.export(tmp_path / "lora.safetensors", None, base.family))
    person, small = Person(identity.to_lora(None), "", identity.sha256), GenerateConfig(size=(32, 32), steps=2)
    alone, ours = (next(generate(base, ["a photo"], people, small)) for people in ([], [person]))
    unload_people(base)
    base.pipeline.load_lora_weights(lora)
    theirs = render(base, base.encode_prompts(["a photo"]), 32, 32, 2, base.settings.guidance, 0)  # the file as diffusers reads it
    base.pipeline.unload_lora_weights()
    alone, ours, theirs = (np.asarray(image).astype(int) for image in (alone, ours, theirs))
    assert abs(theirs - ours).max() <= 2 < abs(ours - alone).max()


def test_the_commands_take_it_from_the_hub(layout, tmp_path, monkeypatch):
    """Gated and at the catalogue's revision; the face pack lies where InsightFace keeps its own."""
    revision = hub.catalog()[NAME]["revision"]
    monkeypatch.setattr(hub_server, "SHA", revision)
    files = {str(path.relative_to(layout)): path.read_bytes() for path in layout.rglob("*") if path.is_file()}
    server = hub_server.HubServer({NAME: files}, {NAME})
    build_pack(tmp_path / ".insightface" / "models" / "buffalo_l")
    portrait(COLOURS["ann"], at=(320, 320), size=640).save(tmp_path / "photo.png")
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": "hf_x", "HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip

    def call(*arguments: str) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, "-m", "metalora", *arguments, "--base", NAME], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    said = call("adapt", "photo.png", "--domain", "woman", "--output", "me.safetensors", "--steps", "2")
    assert not {"flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg"} & set(server.asked) and "LoRA" in said.stderr
    requests = server.requests
    call("generate", "me.safetensors", "a photo of {person}", "--size", "32x32", "--steps", "1", "--output", "pictures")
    assert Image.open(next((tmp_path / "pictures").glob("*.png"))).size == (32, 32) and server.requests == requests
    for format in ("diffusers", "kohya"):
        call("export", "me.safetensors", "--format", format, "--output", f"{format}.safetensors")
        with safe_open(tmp_path / f"{format}.safetensors", "pt") as file:
            assert file.metadata()["license"].startswith(licence.FLUX_NOTICE) and len(list(file.keys())) > 0
    learnt = Identity.load(tmp_path / "me.safetensors")
    assert learnt.base == NAME and learnt.is_plain and learnt.rank == 16 and re.fullmatch(r"[0-9a-f]{64}", learnt.base_fingerprint)
    server.shutdown()
    server.server_close()
