"""The project's bars, measured on this machine: `python -m metalora.bench [--json FILE]`; see the README."""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import metalora  # noqa: F401  before torch: it sets how threads wait
import numpy as np
import torch
from PIL import Image

from . import hub
from .config import DEFAULT_BASE
from .doctor import machine
from .errors import MetaLoraError
from .generate import seeded, unload_people
from .personalizer import Personalizer
from .prompts import fill
from .samples import read_samples

ROOT = Path(__file__).parents[1]
PICTURES = 4
PROMPT = "a photo of {person} wearing a red cap"
PATIENCE = 600  # seconds until a page that does not answer is given up


def start_seconds(base: str, meta_down: str | None) -> tuple[float, float]:
    """Seconds from `python app.py` to a page that answers, and to a base that is open."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--base", base, "--host", "127.0.0.1", "--port", str(port), *(["--meta-down", meta_down] if meta_down else [])]
    started = time.monotonic()
    app = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/", app)
        page = time.monotonic() - started
        from gradio_client import Client

        Client(f"http://127.0.0.1:{port}", verbose=False).predict(api_name="/status")  # it waits for the base
        return page, time.monotonic() - started
    finally:
        app.terminate()
        app.wait()


def _wait_for(address: str, app: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and app.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(0.1)
    raise MetaLoraError("The app did not start; run `python app.py` to see why.")


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over every tensor, its name included, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor.item()).encode())
    return digest.hexdigest()


def peak_gib() -> float | None:
    """Most memory that this process has held, GiB; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def plain_picture(personalizer: Personalizer, place: str, lora: Path, words: str, seed: int) -> Image.Image:
    """The same picture by diffusers alone: its pipeline, the exported file, the prompt as text."""
    base, s = personalizer.base, personalizer.base.settings
    pipeline = type(base.pipeline).from_pretrained(hub.base_folder(place), dtype=base.dtype, local_files_only=True).to(base.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    prompt = fill(PROMPT, words)
    with seeded(seed, base.device) as generator:
        return pipeline(
            prompt=prompt, width=s.resolution, height=s.resolution, num_inference_steps=s.inference_steps, guidance_scale=s.guidance,
            max_sequence_length=base.encode_for_picture(prompt, s.guidance).embeds.shape[1], generator=generator,
        ).images[0]  # fmt: skip


def measure(base: str, meta_down: str | None, photo: str, domain: str, folder: Path) -> dict[str, Any]:
    """Open, learn with the default steps, generate, export, compare."""
    started = time.monotonic()
    personalizer = Personalizer.open(base, meta_down)
    found: dict[str, Any] = {"seconds to open the base": time.monotonic() - started}
    before = weights_hash(personalizer.base.transformer)
    started = time.monotonic()
    identity = personalizer.adapt(photo, domain)
    found |= {"seconds to learn a person": time.monotonic() - started, "steps": identity.steps}
    started = time.monotonic()
    pictures = personalizer.generate(identity, PROMPT, count=PICTURES)
    found["seconds per picture"] = (time.monotonic() - started) / PICTURES
    found["peak memory, GiB"] = peak_gib()
    if personalizer.base.device.type == "cuda":
        found["peak GPU memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    found["identity file, bytes"] = identity.save(folder / "identity.safetensors").stat().st_size
    lora = personalizer.export(identity, folder / "lora.safetensors", "diffusers")
    found["exported LoRA, bytes"] = lora.stat().st_size
    unload_people(personalizer.base)
    after = weights_hash(personalizer.base.transformer)
    found |= {"base weights before": before, "base weights after": after, "base weights untouched": before == after}
    plain = plain_picture(personalizer, base, lora, identity.prompt_words, 0)
    difference = np.abs(np.asarray(plain, np.int16) - np.asarray(pictures[0], np.int16)).max()
    return found | {"largest pixel difference to plain diffusers, of 255": int(difference)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m metalora.bench", description=__doc__)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--meta-down")
    parser.add_argument("--photo", help="a photo to learn from; the first sample when not given")
    parser.add_argument("--domain", default="woman", help="of that photo")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if not given.photo:
        samples, _ = read_samples()
        if not samples:
            sys.exit("There are no samples in assets; give a --photo and its --domain.")
        given.photo, given.domain = samples[0].photo, samples[0].domain
    try:
        page, ready = start_seconds(given.base, given.meta_down)
        bars: dict[str, Any] = {"seconds to an answering page": page, "seconds to a page with its base open": ready}
        with tempfile.TemporaryDirectory() as folder:
            bars |= measure(given.base, given.meta_down, given.photo, given.domain, Path(folder))
    except MetaLoraError as error:
        sys.exit(str(error))
    for name, value in bars.items():
        print(f"{name:55} {value:.2f}" if isinstance(value, float) else f"{name:55} {value}")
    if given.json:
        given.json.write_text(json.dumps({"base": given.base, "bars": bars, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
