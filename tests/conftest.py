"""Fixtures that all tests share: a tiny pipeline of each family with random weights, built once, and what hangs on it."""

from __future__ import annotations

import metalora  # noqa: F401  before torch: it sets how threads wait
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metalora.adapter import attach, random_downs
from metalora.base import Base
from metalora.cache import encode
from metalora.config import AdaptConfig, AdapterConfig
from metalora.metadown import MetaDown
from metalora.miniature.pipeline import MiniatureConfig, build_pipeline, save_pipeline, write_settings

from .parts import build_klein, build_pack, build_small_clip

WORDS = "a photo of sks woman man smiling in the green park red cap".split()
TINY = MiniatureConfig(size=32, vae_widths=(8, 8, 8, 8), heads=2, double_blocks=1, single_blocks=2, t5_width=32, t5_layers=1, clip_width=32, clip_layers=1, clip_heads=2)


FAMILIES = {"flux": (build_pipeline, 1.0), "flux2": (build_klein, 2.0)}  # with its guidance


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that needs a base runs with a base of every family, but for those marked `one_family`."""
    if "tiny_base" in metafunc.fixturenames:
        families = list(FAMILIES)[: 1 if metafunc.definition.get_closest_marker("one_family") else None]
        metafunc.parametrize("tiny_base", families, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model with random weights: 32 px, 4 image tokens; beside it a face pack and a CLIP."""
    build, guidance = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("base") / "tiny"
    pipeline = build(TINY, WORDS, seed=1)
    torch.manual_seed(1)
    # diffusers starts the modulation and output layers such that much of the network is silent; give all of it a voice.
    for p in pipeline.transformer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    save_pipeline(pipeline, folder)
    build_pack(folder.parent / "face")
    build_small_clip(folder.parent / "clip", TINY, WORDS)
    write_settings(folder, TINY, "sks", name="tiny", adapter={"rank": 1, "meta_rank": 4, "scale": 0.75}, inference_steps=3, guidance=guidance,
                   meta={"rounds": 3, "bucket_size": 2, "bucket_steps": 8, "warmup_steps": 3})
    return folder


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Base:
    """The tiny base, opened on the CPU. A test leaves it as it found it."""
    return Base.open(str(tiny_base), device="cpu")


@pytest.fixture(scope="session")
def meta_down(base: Base) -> MetaDown:
    """A Meta-Down of random values for the tiny base."""
    return make_meta_down(base, base.settings.adapter)


def make_meta_down(base: Base, shape: AdapterConfig, seed: int = 0) -> MetaDown:
    downs = random_downs(base.transformer, shape, torch.Generator().manual_seed(seed))
    return MetaDown(downs, shape, f"tiny-{seed}", "woman", base.name, base.fingerprint)


@pytest.fixture(scope="session")
def people(base: Base):
    """Six subjects with three pictures of noise each, encoded."""
    images = torch.rand(18, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    captions = [f"a photo of sks woman {'smiling' if i % 2 else 'in the green park'}" for i in range(18)]
    return encode(base, images, captions, [i // 3 for i in range(18)])


@pytest.fixture(scope="session")
def photo(people):
    """One subject's pictures."""
    return people.select([0])


@pytest.fixture(scope="session")
def config() -> AdaptConfig:
    """A short stage 2."""
    return replace(AdaptConfig(), steps=6, batch_size=2, learning_rate=0.05, warmup_steps=1)


def state_hash(module: torch.nn.Module) -> list[tuple[str, int]]:
    """Every tensor of a module, bit for bit."""
    return [(name, hash(t.numpy().tobytes())) for name, t in module.state_dict().items()]


def run(generator):
    """All that a generator yields, and its return value."""
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as end:
            return seen, end.value


def in_processes(count: int, folder: Path, code: str, *arguments: str) -> list[list[str]]:
    """Runs `code` in so many processes of torchrun, of one thread each, and returns the words that each printed.

    Each prints to a file of its own: on one pipe their words could run together.
    """
    script = folder / "process.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--redirects", "1", "--log-dir", str(folder / "log"), str(script), *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [path.read_text().split() for path in sorted(folder.glob("log/**/stdout.log"))]


def learnt(base, photo, meta_down):
    """The output, and the gradient of every factor, of three pictures."""
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter:
        for p in adapter.heads():
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        text = photo.text.rows(photo.caption[:3])
        y = base.velocity(photo.mean[:3], torch.tensor([0.2, 0.5, 0.9]), text, photo.image_ids, 1.0)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in adapter.heads())]
