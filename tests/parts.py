"""Small real parts for tests: a face pack that needs no training, a CLIP and a FLUX.2 of random weights, pictures and datasets that fit.

A "face" here is a saturated square with grey round it, and who it is is its colour. The networks are written by hand, but
they are ONNX files with the shapes of any other pack, so all that lies between, InsightFace included, is the real thing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from metalora.miniature.clip import build_clip, build_processor
from metalora.miniature.facepack import DETECTOR_FILE, RECOGNISER_FILE, export_onnx
from metalora.miniature.pipeline import MiniatureConfig, byte_pair_merges, clip_tokenizer

SIDE = 16  # px of a face, in pictures of the detector's size
COLOURS = {"ann": (255, 0, 0), "bea": (0, 255, 0), "cleo": (0, 0, 255), "max": (255, 255, 0), "ned": (255, 0, 255)}
GREY = (128, 128, 128)


class HandDetector(nn.Module):
    """SCRFD's nine outputs; only stride 8 ever finds anything: squares of 16 px that are more colourful than their surroundings."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        colourful = (image.amax(1, keepdim=True) - image.amin(1, keepdim=True)) / 2  # (1, 1, h, w) in [0, 1]
        inner = F.avg_pool2d(colourful, 16, 8, 8, count_include_pad=False)[..., :-1, :-1]  # round the points 8 i
        outer = F.avg_pool2d(colourful, 32, 8, 16, count_include_pad=False)[..., :-1, :-1]
        contrast = inner - (4 * outer - inner) / 3
        maps = [torch.sigmoid(20 * (contrast - 0.1)), 0 * inner[..., ::2, ::2], 0 * inner[..., ::4, ::4]]
        scores = [torch.stack([m.flatten(), 0 * m.flatten()], 1).reshape(-1, 1) for m in maps]  # the second anchor is never used
        box = torch.full((1, 4), 1.5)
        points = torch.tensor([[-0.45, -0.4, 0.45, -0.4, 0.0, 0.0, -0.4, 0.5, 0.4, 0.5]])
        return (*scores, *(0 * s + box for s in scores), *(0 * s + points for s in scores))


class HandRecogniser(nn.Module):
    """Crops (n, 3, 112, 112) → (n, 512): the colours of their middle, turned."""

    def __init__(self):
        super().__init__()
        mixed = torch.randn(512, 12, generator=torch.Generator().manual_seed(0))
        self.turn = nn.Parameter(torch.linalg.qr(mixed)[0])

    def forward(self, crops: Tensor) -> Tensor:
        colours = F.avg_pool2d(crops[..., 28:84, 28:84], 28).flatten(1)  # (n, 12)
        return (colours + 0.01) @ self.turn.T


def build_pack(folder: Path) -> Path:
    """A face pack for FaceAnalysis."""
    names = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in (8, 16, 32)]
    dynamic = {"input": {2: "height", 3: "width"}} | {name: {0: f"cells_{name}"} for name in names}
    export_onnx(HandDetector(), folder / DETECTOR_FILE, 64, names, dynamic)
    export_onnx(HandRecogniser(), folder / RECOGNISER_FILE, 112, ["embedding"], {"input": {0: "n"}, "embedding": {0: "n"}})
    return folder


def build_small_clip(folder: Path, config: MiniatureConfig, words: list[str]) -> Path:
    """A CLIP of random weights."""
    tokenizer = clip_tokenizer(words, config.clip_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_clip(config, tokenizer).save_pretrained(folder)
    build_processor(config, tokenizer).save_pretrained(folder)
    return folder


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def qwen_tokenizer(words: list[str]) -> Qwen2TokenizerFast:
    """Qwen's byte-pair tokenizer, trained on the words: each is one token, with a space before it and without; bytes spell the rest."""
    merges = byte_pair_merges([form for word in [*words, "user", "assistant"] for form in (word, f"\u0120{word}")], end="")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return Qwen2TokenizerFast(vocab=vocabulary, merges=merges, additional_special_tokens=special[1:], chat_template=CHAT)


def build_klein(config: MiniatureConfig, words: list[str], seed: int) -> Flux2KleinPipeline:
    """A Flux2KleinPipeline of random weights, of the sizes of a FLUX.1 miniature. It is not distilled, so guidance is a second pass.

    Its Qwen3 has 28 layers, for the pipeline reads the 9th, 18th and 27th.
    """
    tokenizer = qwen_tokenizer(words)
    width = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=28, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
        ))  # fmt: skip
        vae = AutoencoderKLFlux2(
            block_out_channels=config.vae_widths, layers_per_block=config.vae_layers_per_block, latent_channels=config.latent_channels,
            norm_num_groups=config.vae_groups, sample_size=config.size,
        )  # fmt: skip
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * config.latent_channels, num_layers=config.double_blocks, num_single_layers=config.single_blocks,
            attention_head_dim=config.head_width, num_attention_heads=config.heads, joint_attention_dim=3 * width,
            axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
        )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=vae.eval(),
        text_encoder=text_encoder.eval(), tokenizer=tokenizer, transformer=transformer.eval(), is_distilled=False,
    )  # fmt: skip
def build_small_dino(folder: Path) -> Path:
    """A DINOv2 of random weights, with its image processor."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def portrait(colour: tuple[int, int, int], at: tuple[int, int] = (16, 16), size: int | tuple[int, int] = 32, side: int = SIDE) -> Image.Image:
    """A picture with a face of that colour round the point `at`, px."""
    image = Image.new("RGB", (size, size) if isinstance(size, int) else size, GREY)
    half = side // 2
    ImageDraw.Draw(image).rectangle((at[0] - half, at[1] - half, at[0] + half - 1, at[1] + half - 1), fill=colour)
    return image


def write_people(folder: Path, names: dict[str, str], others: int = 2, prompts: tuple[str, ...] = ("a photo of {person} in a red cap",)) -> Path:
    """A dataset of these people (name → domain): a reference each, and others that differ a little."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, domain in names.items():
        for number in range(1 + others):
            file = f"{name}-{number}.png"
            shade = tuple(max(0, c - 20 * number) for c in COLOURS[name])
            portrait(shade, at=(16, 16) if number == 0 else (8 * (1 + number % 2), 16)).save(folder / file)
            role = "other" if number else "reference"
            rows.append({"file_name": file, "text": "a photo of {person}, smiling", "identity": name, "domain": domain, "role": role})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return folder
