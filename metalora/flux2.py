"""FLUX.2 [klein]: three layers of Qwen3, latents of 32 channels patched 2x2 and normalised, guidance by a second pass or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import BaseSettings
from .family import Family, Kohya, Latents, Text, Vectors

# Components of FLUX.2-klein-4B. The transformer has the defaults of diffusers' Flux2Transformer2DModel but for the widths and depths
# that are public in its repository on the Hub; the VAE has the defaults of AutoencoderKLFlux2; the text encoder is Qwen/Qwen3-4B.
KLEIN_4B: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560, "guidance_embeds": False},
    "vae": {},
    "text_encoder": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip


def patch(latents: Tensor) -> Tensor:
    """(batch, c, h, w) → (batch, h/2 · w/2, 4c): tokens, each a 2x2 patch with its channels outermost."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


class Flux2Klein(Family):
    """`Flux2KleinPipeline`, in few steps (distilled) or many (base)."""

    pipeline = "Flux2KleinPipeline"
    networks = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2", "text_encoder": "Qwen3ForCausalLM"}
    text_encoders = ("text_encoder",)
    large_text_encoder = "text_encoder"
    known = "black-forest-labs/FLUX.2-klein-4B"
    configs = KLEIN_4B
    dreambooth_script = "train_dreambooth_lora_flux2_klein.py"
    # single block   16   the input of its norm, the output of the fused layer (9: q, k, v and both halves of the SwiGLU), q and k
    #                     after their norms (2), the attention's output, and the SiLU's output (3)
    # double block   17   the same for both streams, and the input of the second norm
    # learning        5   the norm's output, the SwiGLU's (3) and one of the attention, which lies in a concatenation
    vectors = Vectors(single=16, double=17, learning=5, at_work=18, drawing=22)
    kohya = Kohya(
        "networks.lora_flux_2",
        double={
            "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
            "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "img_attn_proj": ["attn.to_out.0"],
            "txt_attn_proj": ["attn.to_add_out"],
            "img_mlp_0": ["ff.linear_in"],
            "img_mlp_2": ["ff.linear_out"],
            "txt_mlp_0": ["ff_context.linear_in"],
            "txt_mlp_2": ["ff_context.linear_out"],
        },
        single={"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]},
    )

    def settings(self, index: Mapping[str, Any]) -> BaseSettings:
        """The steps and the guidance that its makers name for the distilled and for the base models, and texts of the length that both know."""
        steps, guidance = (4, 1.0) if index.get("is_distilled") else (50, 4.0)
        return BaseSettings(inference_steps=steps, guidance=guidance, usual_sequence_length=512)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], device: torch.device, length: int) -> Text:
        embeds, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
        return Text((embeds,))  # (n, tokens, 3 · d_qwen)

    def tokens(self, pipeline: Any, prompt: str) -> int:
        said = [{"role": "user", "content": prompt}]
        text = pipeline.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return len(pipeline.tokenizer(text, verbose=False).input_ids)

    def text_shapes(self, transformer: nn.Module, tokens: int) -> tuple[tuple[int, ...], ...]:
        return ((tokens, transformer.config.joint_attention_dim),)

    def prompts_of_a_picture(self, pipeline: Any, prompt: str, guidance: float) -> list[str]:
        """With guidance every step has a second pass, with an empty prompt. A distilled model knows none."""
        return [prompt, ""] if guidance > 1 and not pipeline.config.is_distilled else [prompt]

    def arguments(self, text: Text) -> dict[str, Tensor | None]:
        return {"prompt_embeds": text.embeds[:1], "negative_prompt_embeds": text.embeds[1:] if len(text.embeds) > 1 else None}

    def encode_images(self, vae: Any, images: Tensor) -> Latents:
        """The statistics of a batch norm take the place of shift and scale, for each channel of a patch."""
        latent = vae.encode(images).latent_dist  # (n, 32, height/8, width/8)
        mean, deviation = vae.bn.running_mean.float(), (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()  # (128,)
        ids = self.image_ids(latent.mean.shape[2] // 2, latent.mean.shape[3] // 2).to(images.device)
        return Latents((patch(latent.mean.float()) - mean) / deviation, patch(latent.std.float()) / deviation, ids)

    def image_ids(self, rows: int, columns: int) -> Tensor:
        """(picture, row, column, word)."""
        nought = torch.zeros(1)
        return torch.cartesian_prod(nought, torch.arange(rows).float(), torch.arange(columns).float(), nought)

    def velocity(self, transformer: nn.Module, tokens: Tensor, sigma: Tensor, text: Text, image_ids: Tensor, guidance: float) -> Tensor:
        """`guidance` plays no part: it is not told to the transformer.

        cuDNN's attention is left out, for the reason that `Flux.prepare` tells; here no module gives its output before it is put beside others.
        """
        text_ids = torch.zeros(text.embeds.shape[1], 4, device=tokens.device)
        text_ids[:, 3] = torch.arange(len(text_ids), device=tokens.device)  # the place of the word
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return transformer(
                hidden_states=tokens,
                timestep=sigma.to(tokens.dtype),
                encoder_hidden_states=text.embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]

    def numbers_of_texts(self, networks: Mapping[str, Any], prompts: int, tokens: int) -> float:
        """Qwen3 holds the output of every layer, and its head, which nobody asks for, the likelihood of every word; then three outputs are
        put side by side."""
        qwen = networks["text_encoder"].config
        return prompts * tokens * ((qwen.num_hidden_layers + 1 + 2 * 3) * qwen.hidden_size + qwen.vocab_size)
