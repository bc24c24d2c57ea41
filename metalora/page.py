"""The page's layout, and which event calls which handler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from . import cards
from .handlers import DOMAINS, Handlers, Sample
from .studio import Studio

# System fonts only: a page that asks a font server for its letters is slow, or ugly without a network.
THEME = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "Segoe UI", "sans-serif"], font_mono=["ui-monospace", "monospace"])
STYLE = Path(__file__).with_name("page.css")
KEPT = 4 * 3600  # seconds that a session's person and files are kept after they were last touched
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}  # one piece of work at a time, whoever asks
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of use to a browser only
PROMPTS = ["a photo of {person} in a green park", "a photo of {person} wearing a red cap", "a photo of {person} smiling, at the beach"]
INTRO = "# Meta-LoRA\nOne photo of a face becomes a small LoRA file, and pictures of that person in any scene."
LIKENESS = (
    "Both are cosines between face embeddings: the same face is near 1, strangers are near 0. The similarity is to the photo that was learnt from. "
    "R-FaceSim is to other photos of the person, so that copying the photo does not raise it. "
    "For a thing, whole pictures are compared in place of faces, by a DINO model."
)


def build(studio: Studio, samples: list[Sample], prompts: list[str]) -> gr.Blocks:
    """The page. `studio` may still be opening its base; the page says so and waits where it must."""
    do = Handlers(studio, samples)
    with gr.Blocks(title="Meta-LoRA", analytics_enabled=False, fill_width=True, delete_cache=(KEPT // 4, KEPT)) as page:
        learnt = gr.State(None, time_to_live=KEPT)
        with gr.Row(elem_id="head"):
            gr.Markdown(INTRO)
            status = gr.HTML(cards.status("opening the base model", "busy"), elem_id="status")
        access = _access()
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, min_width=340):
                with gr.Column(elem_classes="step"):
                    who = _photo(samples)
                with gr.Column(elem_classes="step"):
                    learning = _learning()
            with gr.Column(scale=6, min_width=340):
                with gr.Column(elem_classes="step"):
                    pictures = _pictures(prompts or PROMPTS)
                with gr.Column(elem_classes="step"):
                    files = _files()
        _wire(page, do, learnt, access | {"status": status}, who | learning, pictures, files)
    return page


def _access() -> dict[str, gr.Component]:
    """The field for a token, where the Hub wants one for the base."""
    c: dict[str, gr.Component] = {}
    with gr.Row(elem_id="access"):
        c["token"] = gr.Textbox(
            type="password", label="Hugging Face token", info="Give yours here, for this download only; it is not kept.", placeholder="hf_...", lines=1, scale=4,
            visible=False, elem_id="token",
        )  # fmt: skip
        c["again"] = gr.Button("Try again", variant="primary", scale=1, min_width=120, visible=False, elem_id="try-again")
    return c


def _photo(samples: list[Sample]) -> dict[str, gr.Component]:
    """Step 1: a sample person or a photo, and which of its faces."""
    gr.HTML(cards.heading(1, "Choose a photo"), padding=False)
    c: dict[str, gr.Component] = {}
    with gr.Row(elem_id="choose"):
        with gr.Column(scale=3, min_width=240, visible=bool(samples)):
            gr.HTML(cards.line("A person or a mug, made by a computer"), padding=False)
            c["samples"] = gr.Gallery(
                [s.photo for s in samples], show_label=False, columns=4, object_fit="cover", height="auto", allow_preview=False,
                buttons=[], interactive=False, elem_id="samples", elem_classes="tiles", format="png",
            )  # fmt: skip
        with gr.Column(scale=2, min_width=180):
            gr.HTML(cards.line("or a photo of yours"), padding=False)
            c["photo"] = gr.Image(
                show_label=False, type="filepath", sources=["upload", "webcam", "clipboard"], image_mode=None, height=214, buttons=[], elem_id="photo",
                placeholder="Drop a photo\nor click",
            )  # fmt: skip
    # Gradio's own opening of the upload would answer a bad file with a raw fault; ours answers with a sentence.
    c["photo"].preprocess = lambda payload: payload and payload.path
    c["which"] = gr.HTML('<p class="ask">The photo shows several faces. Click the one to learn.</p>', visible=False, padding=False)
    c["faces"] = gr.Gallery(
        show_label=False, columns=6, object_fit="cover", height="auto", allow_preview=False, buttons=[], interactive=False, visible=False,
        elem_id="faces", elem_classes="tiles", format="png",
    )  # fmt: skip
    c["face"] = gr.Number(0, label="Face, from the left (0: the only one)", precision=0, minimum=0, visible=False)
    return c


def _learning() -> dict[str, gr.Component]:
    """Step 2: learn the person, and see how it goes."""
    gr.HTML(cards.heading(2, "Learn the person"), padding=False)
    c: dict[str, gr.Component] = {}
    c["domain"] = gr.Radio(list(DOMAINS), value=DOMAINS[0], label="The photo shows a", elem_id="domain")
    c["domain"].preprocess = lambda payload: payload  # the base says which there are, not the list that the page began with
    c["learn"] = gr.Button("Learn this person", variant="primary", size="lg", elem_id="learn")
    c["stop"] = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop")
    c["card"] = gr.HTML("", elem_id="card", padding=False)
    with gr.Accordion("More settings", open=False, elem_classes="more"):
        with gr.Row():
            c["steps"] = gr.Slider(1, 2000, value=375, step=1, label="Learning steps", elem_id="learning-steps")
            c["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
        gr.HTML(cards.line("Other photos of this person. Nothing is learnt from them; the pictures are compared with them (R-FaceSim)."), padding=False)
        c["held_out"] = gr.File(show_label=False, file_count="multiple", height=130, file_types=["image", ".heic", ".heif"])
    return c


def _pictures(prompts: list[str]) -> dict[str, gr.Component]:
    """Step 3: prompts → pictures with their likeness."""
    gr.HTML(cards.heading(3, "Ask for pictures"), padding=False)
    c: dict[str, gr.Component] = {}
    c["prompt"] = gr.Textbox(prompts[0], show_label=False, info="{person} stands for the person.", lines=1, max_lines=4, elem_id="prompt")
    gr.Examples([[p] for p in prompts[:8]], c["prompt"], label="Or click one of these", cache_examples=False, elem_id="prompts", examples_per_page=8)
    c["words"] = gr.HTML("", elem_id="words", padding=False)
    c["generate"] = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
    c["stop"] = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop-pictures")
    c["summary"] = gr.HTML(cards.line("The pictures come here, each with its likeness under it."), elem_id="summary", padding=False)
    c["gallery"] = gr.Gallery(
        show_label=False, columns=4, object_fit="contain", height="auto", format="png", interactive=False,
        buttons=["download", "download_all", "fullscreen"], elem_id="pictures", elem_classes="tiles",
    )  # fmt: skip
    c["likeness"] = gr.HTML(cards.line(LIKENESS), elem_id="likeness", padding=False)
    with gr.Accordion("More settings", open=False, elem_classes="more"):
        with gr.Row():
            c["count"] = gr.Slider(1, 16, value=4, step=1, label="Pictures")
            c["seed"] = gr.Number(0, label="Seed of the first", precision=0, minimum=0)
            c["vary"] = gr.Checkbox(True, label="Other seeds next time")
        with gr.Row():
            c["size"] = gr.Dropdown(["96x96"], value="96x96", label="Size, px", allow_custom_value=True)
            c["steps"] = gr.Slider(1, 100, value=10, step=1, label="Denoising steps")
        with gr.Row():
            c["guidance"] = gr.Slider(0, 10, value=1.0, step=0.1, label="Guidance")
            c["strength"] = gr.Slider(0, 2, value=1.0, step=0.05, label="Strength")
    return c


def _files() -> dict[str, gr.Component]:
    """Step 4: the person as files."""
    gr.HTML(cards.heading(4, "Keep the person"), padding=False)
    c: dict[str, gr.Component] = {}
    with gr.Row(elem_id="files"):
        for name, label in (("identity", "Identity file"), ("diffusers", "LoRA: diffusers"), ("kohya", "LoRA: kohya")):
            c[name] = gr.DownloadButton(label, interactive=False, min_width=130, size="md", elem_id=f"get-{name}")
        c["load"] = gr.UploadButton("Load a person", file_types=[".safetensors"], min_width=130, size="md", elem_id="load")
    gr.HTML(cards.line("The identity file belongs to this base and is loaded here again. The LoRA files work in other programs, ComfyUI among them (the one for diffusers), and need nothing of ours."), padding=False)
    return c


def _wire(page: gr.Blocks, do: Handlers, learnt: gr.State, base: dict, who: dict, pictures: dict, files: dict) -> None:
    downloads = [files["identity"], files["diffusers"], files["kohya"]]
    controls = [who["domain"], who["steps"], pictures["size"], pictures["steps"], pictures["guidance"], pictures["gallery"], pictures["words"]]
    greeted = [base["status"], *controls, base["token"], base["again"]]
    suited = (do.choose_domain, [who["domain"], who["steps"]], [who["steps"], who["learn"]])
    page.load(do.greet, None, greeted, api_name="status", show_progress="hidden", concurrency_limit=None).then(*suited, show_progress="hidden", **PRIVATE)
    gr.on(
        [base["again"].click, base["token"].submit], do.unlock, base["token"], greeted, api_name="unlock", show_progress="hidden", concurrency_limit=None
    ).then(*suited, show_progress="hidden", **PRIVATE)

    shown = [who["photo"], who["held_out"], who["which"], who["faces"], who["face"], who["samples"]]
    who["samples"].select(do.take_sample, None, [*shown[:-1], who["domain"]], show_progress="hidden", **PRIVATE)
    who["photo"].upload(do.look, who["photo"], shown, api_name="look", show_progress="minimal", show_progress_on=who["photo"])
    who["photo"].clear(do.look, gr.State(None), shown, show_progress="hidden", **PRIVATE)
    who["faces"].select(do.choose_face, None, who["face"], show_progress="hidden", **PRIVATE)

    who["domain"].change(*suited, show_progress="hidden", **PRIVATE)

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
