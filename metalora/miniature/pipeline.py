"""A miniature `FluxPipeline` with random weights: diffusers' and transformers' own classes, a few million parameters.

Everything that works on FLUX.1-dev works on this folder too, because only the numbers in the configs differ.
"""

import collections
import dataclasses
import itertools
import json
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

SETTINGS_FILE = "metalora.json"
LETTERS = string.ascii_letters + string.digits + string.punctuation


@dataclasses.dataclass(frozen=True)
class MiniatureConfig:
    """Sizes of the miniature; the names follow the configs of diffusers and transformers.

    Args:
        size: edge of a picture in px. The VAE halves it once per width but the last, the transformer packs 2 x 2.
        axes_dims_rope: parts of a head's width that encode (index, row, column); even, they sum to the head's width.
        clip_tokens: length to which prompts are padded for the CLIP text tower; as FLUX.1 has it, for training scripts that count on it.
    """

    size: int = 128
    vae_widths: tuple[int, ...] = (16, 32, 64, 64)
    vae_layers_per_block: int = 1
    vae_groups: int = 8
    latent_channels: int = 16
    heads: int = 6
    head_width: int = 32
    double_blocks: int = 2
    single_blocks: int = 4
    axes_dims_rope: tuple[int, int, int] = (4, 14, 14)
    t5_width: int = 128
    t5_layers: int = 2
    t5_heads: int = 4
    clip_width: int = 96
    clip_layers: int = 2
    clip_heads: int = 4
    clip_tokens: int = 77
    max_sequence_length: int = 32

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.head_width or any(width % 2 for width in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope {self.axes_dims_rope} must be even and sum to head_width {self.head_width}")
        if self.size % (2 * self.vae_factor):
            raise ValueError(f"size {self.size} must be a multiple of {2 * self.vae_factor}")

    @classmethod
    def of(cls, values: dict[str, Any]) -> "MiniatureConfig":
        """The sizes that JSON gave, in which tuples are lists."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae_widths) - 1)

    @property
    def latent_size(self) -> int:
        return self.size // self.vae_factor


def _merge_pair(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def byte_pair_merges(words: Iterable[str], end: str = "</w>") -> list[tuple[str, str]]:
    """Merges, in order, after which byte-pair encoding makes one token of each of the (ASCII) words.

    The most frequent pair first, as ever, but ties by spelling: the trainer of `tokenizers` breaks them differently
    from run to run. `end` marks the last letter of a word.
    """
    spelt = [(*word[:-1], f"{word[-1]}{end}") for word in sorted(set(words))]
    merges = []
    while any(len(pieces) > 1 for pieces in spelt):
        counts = collections.Counter(pair for pieces in spelt for pair in itertools.pairwise(pieces))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        spelt = [_merge_pair(pieces, best) for pieces in spelt]
        merges.append(best)
    return merges


def clip_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer in which each run of letters in `words` is one token; bytes spell the rest.

    Start and end are 0 and 1: an end of 2 switches transformers to an old pooling that reads the wrong row.
    """
    merges = byte_pair_merges(run for word in words for run in re.findall(r"[a-z]+|[^a-z0-9]+|[0-9]", word.lower()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def t5_tokenizer(words: Iterable[str], max_length: int) -> T5TokenizerFast:
    """T5's unigram tokenizer in which each of `words` is one token; other words are spelt in letters.

    A word comes in small letters and with a capital, for T5 tells them apart.
    """
    words = sorted({word.lower() for word in words})
    words = list(dict.fromkeys(words + [word.capitalize() for word in words]))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -5.0) for word in words]
    pieces += [(letter, -10.0) for letter in ["▁", *LETTERS]]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


class Spelling:
    """What a tokenizer makes of texts of few words, put together from what it makes of each word, which is asked for once.

    Both tokenizers cut a text at its spaces before all else. Measured on 512 captions: a tenth of the time.
    """

    def __init__(self, tokenizer: CLIPTokenizer | T5TokenizerFast, length: int):
        self.tokenizer, self.length = tokenizer, length
        *self.begin, self.end = tokenizer("").input_ids
        self.words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str], whole: bool = False) -> torch.Tensor:
        """Token ids (n, longest), cut at `length`; (n, length) where they are to be padded to the `whole` of it."""
        rows = [[*self.begin, *self._tokens(text)[: self.length - len(self.begin) - 1], self.end] for text in texts]
        width = self.length if whole else max(map(len, rows))
        return torch.from_numpy(np.array([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]))

    def _tokens(self, text: str) -> list[int]:
        words = text.split()
        for word in words:
            if word not in self.words:
                self.words[word] = self.tokenizer(word, add_special_tokens=False).input_ids
        return [token for word in words for token in self.words[word]]


def clip_text_config(config: MiniatureConfig, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Config of the CLIP text tower; the pipeline's and the one of the CLIP model that scores pictures."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=config.clip_width, intermediate_size=4 * config.clip_width,
        num_hidden_layers=config.clip_layers, num_attention_heads=config.clip_heads, projection_dim=config.clip_width,
        max_position_embeddings=config.clip_tokens, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def build_vae(config: MiniatureConfig) -> AutoencoderKL:
    """An AutoencoderKL of the config's widths; scaling and shift are measured after its training."""
    blocks = len(config.vae_widths)
    return AutoencoderKL(
        latent_channels=config.latent_channels, block_out_channels=config.vae_widths,
        layers_per_block=config.vae_layers_per_block, norm_num_groups=config.vae_groups, sample_size=config.size,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False)


def build_transformer(config: MiniatureConfig) -> FluxTransformer2DModel:
    """A FluxTransformer2DModel with a guidance embedding, like FLUX.1-dev."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * config.latent_channels, num_layers=config.double_blocks,
        num_single_layers=config.single_blocks, attention_head_dim=config.head_width,
        num_attention_heads=config.heads, joint_attention_dim=config.t5_width, pooled_projection_dim=config.clip_width,
        guidance_embeds=True, axes_dims_rope=config.axes_dims_rope)


def build_t5(config: MiniatureConfig, tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 encoder without dropout: it learns together with the transformer, which has none either."""
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=config.t5_width, d_kv=config.t5_width // config.t5_heads,
        d_ff=2 * config.t5_width, num_layers=config.t5_layers, num_heads=config.t5_heads, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        is_encoder_decoder=False, use_cache=False))


def build_pipeline(config: MiniatureConfig, words: Iterable[str], seed: int = 0) -> FluxPipeline:
    """A FluxPipeline of random fp32 weights whose tokenizers know each of `words` as one token.

    The same arguments give the same weights; the global random state is left as it was.
    """
    words = list(words)
    tokenizer = clip_tokenizer(words, config.clip_tokens)
    tokenizer_2 = t5_tokenizer(words, config.max_sequence_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            scheduler=build_scheduler(),
            vae=build_vae(config).eval(), transformer=build_transformer(config).eval(),
            text_encoder=CLIPTextModel(clip_text_config(config, tokenizer)).eval(), tokenizer=tokenizer,
            text_encoder_2=build_t5(config, tokenizer_2).eval(), tokenizer_2=tokenizer_2)


def build_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ for the stochastic equation (Lu et al. 2022, arXiv 2211.01095), with FLUX's shift of the noise levels.

    A small model errs, and the noise that is added at every step gives it the chance to mend what it has drawn. By Euler's method,
    as FLUX.1 has it, the two halves of a face come out as of two people.
    """
    return DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True,
        use_dynamic_shifting=True, time_shift_type="exponential")


def save_pipeline(pipeline: FluxPipeline, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the pipeline in `dtype`, readable by all (diffusers writes weights for the owner only)."""
    pipeline.to(dtype).save_pretrained(folder)
    pipeline.to(torch.float32)
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """Gives every file below `folder` mode 644."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def write_settings(folder: Path, config: MiniatureConfig, trigger: str, **more: Any) -> None:
    """Writes `metalora.json`: how the app is to use this base. `more` adds keys or replaces them."""
    settings = {
        "name": "miniature", "resolution": config.size, "inference_steps": 20, "guidance": 1.0, "train_guidance": 1.0,
        "max_sequence_length": config.max_sequence_length, "trigger": trigger,
        "adapter": {"rank": 12, "meta_rank": 64, "scale": 1.0, "mid_start": "identity"},
        "face_pack": "../face", "clip": "../clip", "dino": "../dino", "det_size": config.size} | more
    Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")
