"""The page's layout, and which event calls which handler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from . import cards
from .handlers import Handlers, Sample
from .studio import Studio

# System fonts only: a page that asks a font server for its letters is slow, or ugly without a network.
THEME = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "Segoe UI", "sans-serif"], font_mono=["ui-monospace", "monospace"])
STYLE = Path(__file__).with_name("page.css")
KEPT = 4 * 3600  # seconds that a session's person and files are kept after they were last touched
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}  # one piece of work at a time, whoever asks
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of use to a browser only
PROMPTS = ["a photo of {person} in a green park", "a photo of {person} wearing a red cap", "a photo of {person} smiling, at the beach"]
INTRO = """# Meta-LoRA
One photo of a face → pictures of that person in any scene, and a small LoRA file to keep."""
LIKENESS = "Likeness is the cosine between face embeddings: 1 is the same picture, strangers are near 0. R-FaceSim compares with photos that were not learnt from."


def build(studio: Studio, samples: list[Sample], prompts: list[str]) -> gr.Blocks:
    """The page. `studio` may still be opening its base; the page says so and waits where it must."""
    do = Handlers(studio, samples)
    with gr.Blocks(title="Meta-LoRA", analytics_enabled=False, fill_width=True, delete_cache=(KEPT // 4, KEPT)) as page:
        learnt = gr.State(None, time_to_live=KEPT)
        with gr.Row(elem_id="head"):
            gr.Markdown(INTRO)
            status = gr.HTML(cards.status("opening the base model", "busy"), elem_id="status")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=4, min_width=340):
                who = _who(samples)
            with gr.Column(scale=6, min_width=340):
                pictures = _pictures(prompts or PROMPTS)
                files = _files()
        _wire(page, do, learnt, status, who, pictures, files)
    return page


def _who(samples: list[Sample]) -> dict[str, gr.Component]:
    """Step 1: choose a person, learn."""
    gr.Markdown("### 1 · Choose a person")
    c: dict[str, gr.Component] = {}
    c["samples"] = gr.Gallery(
        [s.photo for s in samples], label="Sample people (made by a computer)", columns=8, object_fit="cover", height="auto", allow_preview=False,
        buttons=[], interactive=False, visible=bool(samples), elem_id="samples", format="png",
    )  # fmt: skip
    c["photo"] = gr.Image(label="or a photo of yours", type="filepath", sources=["upload", "webcam", "clipboard"], image_mode=None, height=230, buttons=[], elem_id="photo")  # fmt: skip
    # Gradio's own opening of the upload would answer a bad file with a raw fault; ours answers with a sentence.
    c["photo"].preprocess = lambda payload: payload and payload.path
    c["faces"] = gr.Gallery(
        label="Several faces: click the one to learn", columns=6, object_fit="cover", height="auto", allow_preview=False, buttons=[],
        interactive=False, visible=False, elem_id="faces", format="png",
    )  # fmt: skip
    c["face"] = gr.Number(0, label="Face, from the left (0: the only one)", precision=0, minimum=0, visible=False)
    c["domain"] = gr.Radio(["woman", "man"], value="woman", label="This person is a", elem_id="domain")
    with gr.Accordion("More", open=False):
        with gr.Row():
            c["steps"] = gr.Slider(1, 2000, value=375, step=1, label="Learning steps")
            c["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
        c["held_out"] = gr.File(
            label="Other photos of this person, not learnt from: they make R-FaceSim", file_count="multiple", file_types=["image", ".heic", ".heif"], height=120
        )
    c["learn"] = gr.Button("Learn this person", variant="primary", size="lg", elem_id="learn")
    c["stop"] = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop")
    c["card"] = gr.HTML("", elem_id="card")
    return c


def _pictures(prompts: list[str]) -> dict[str, gr.Component]:
    """Step 2: prompts → pictures with their likeness."""
    gr.Markdown("### 2 · Ask for pictures")
    c: dict[str, gr.Component] = {}
    c["prompt"] = gr.Textbox(prompts[0], label="Prompt; {person} is the person", lines=2, max_lines=4, elem_id="prompt")
    gr.Examples([[p] for p in prompts[:8]], c["prompt"], label="Try one of these", cache_examples=False, elem_id="prompts", examples_per_page=8)
    with gr.Accordion("More", open=False):
        with gr.Row():
            c["count"] = gr.Slider(1, 16, value=4, step=1, label="Pictures")
            c["seed"] = gr.Number(0, label="Seed of the first", precision=0, minimum=0)
            c["vary"] = gr.Checkbox(True, label="Other seeds next time")
        with gr.Row():
            c["size"] = gr.Dropdown(["96x96"], value="96x96", label="Size, px", allow_custom_value=True)
            c["steps"] = gr.Slider(1, 100, value=10, step=1, label="Denoising steps")
            c["guidance"] = gr.Slider(0, 10, value=1.0, step=0.1, label="Guidance")
            c["strength"] = gr.Slider(0, 2, value=1.0, step=0.05, label="Adapter strength")
    c["generate"] = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
    c["stop"] = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop-pictures")
    c["summary"] = gr.HTML("", elem_id="summary")
    c["gallery"] = gr.Gallery(label="Pictures", columns=4, object_fit="contain", height="auto", format="png", interactive=False, buttons=["download", "download_all", "fullscreen"], elem_id="pictures")  # fmt: skip
    gr.Markdown(LIKENESS, elem_id="likeness")
    return c


def _files() -> dict[str, gr.Component]:
    """Step 3: the person as files."""
    gr.Markdown("### 3 · Keep the person")
    c: dict[str, gr.Component] = {}
    with gr.Row(elem_id="files"):
        for name, label in (("identity", "Identity file"), ("diffusers", "LoRA for diffusers, ComfyUI"), ("kohya", "LoRA for kohya")):
            c[name] = gr.DownloadButton(label, interactive=False, min_width=150, size="md", elem_id=f"get-{name}")
        c["load"] = gr.UploadButton("Load an identity file", file_types=[".safetensors"], min_width=150, size="md", elem_id="load")
    return c


def _wire(page: gr.Blocks, do: Handlers, learnt: gr.State, status: gr.HTML, who: dict, pictures: dict, files: dict) -> None:
    downloads = [files["identity"], files["diffusers"], files["kohya"]]
    greeted = [status, who["domain"], who["steps"], pictures["size"], pictures["steps"], pictures["guidance"], pictures["gallery"]]
    page.load(do.greet, None, greeted, api_name="status", show_progress="hidden", concurrency_limit=None)

    shown = [who["photo"], who["held_out"], who["faces"], who["face"]]
    who["samples"].select(
        do.take_sample, None, [who["photo"], who["domain"], *shown[1:]], show_progress="hidden", **PRIVATE
    )
    who["photo"].upload(do.look, who["photo"], shown, api_name="look", show_progress="minimal", show_progress_on=who["photo"])
    who["photo"].clear(do.look, gr.State(None), shown, show_progress="hidden", **PRIVATE)
    who["faces"].select(do.choose_face, None, who["face"], show_progress="hidden", **PRIVATE)

    asked = [who[k] for k in ("photo", "face", "domain", "steps", "seed", "held_out")]
    who["learn"].click(
        do.learn, asked, [*downloads, learnt, who["card"], who["learn"], who["stop"]], api_name="learn", show_progress="minimal",
        show_progress_on=who["card"], **GPU,
    )  # fmt: skip
    ordered = [learnt, *(pictures[k] for k in ("prompt", "count", "seed", "vary", "size", "steps", "guidance", "strength"))]
    gr.on(
        [pictures["generate"].click, pictures["prompt"].submit], do.generate, ordered,
        [pictures["gallery"], pictures["summary"], pictures["seed"], pictures["generate"], pictures["stop"]],
        api_name="generate", show_progress="hidden", **GPU,
    )  # fmt: skip
    who["stop"].click(do.stop, None, None, api_name="stop", queue=False, show_progress="hidden")
    pictures["stop"].click(do.stop, None, None, queue=False, show_progress="hidden", **PRIVATE)
    files["load"].upload(do.load, files["load"], [*downloads, learnt], api_name="load", show_progress="minimal", **GPU)
