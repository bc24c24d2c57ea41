"""FLUX.1: CLIP and T5, latents of 16 channels packed 2x2, a guidance that the transformer is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .config import BaseSettings
from .family import Family, Kohya, Latents, Text, Vectors
from .rotary import turned_norms

# Components of FLUX.1-dev: the defaults of diffusers' FluxTransformer2DModel and, as public in their repositories on the Hub, the
# configs of its VAE, of openai/clip-vit-large-patch14 (text) and of google/t5-v1_1-xxl.
FLUX_DEV: dict[str, dict[str, Any]] = {
    "transformer": {"guidance_embeds": True},
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408},
    "text_encoder_2": {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


class _InOrder(torch.autograd.Function):
    """x, whose gradient lies in memory as x does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _in_order(attention: nn.Module, given: tuple, output: Tensor) -> Tensor:
    return _InOrder.apply(output) if output.requires_grad else output


def pack(latents: Tensor) -> Tensor:
    """(batch, c, h, w) → (batch, h/2 · w/2, 4c): tokens, each a 2x2 patch with its channels outermost."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


class Flux(Family):
    """`FluxPipeline`."""

    pipeline = "FluxPipeline"
    networks = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    text_encoders = ("text_encoder", "text_encoder_2")
    large_text_encoder = "text_encoder_2"
    known = "black-forest-labs/FLUX.1-dev"
    configs = FLUX_DEV
    dreambooth_script = "train_dreambooth_lora_flux.py"
    # single block   11   the input of its norm, q and k before and after their norms (4), v, the attention's output, and the
    #                     input of the GELU (4)
    # double block   12   the same for both streams, and the input of the second norm
    # learning        6   the norm's output, the GELU's (4) and one of the attention, which lies in a concatenation
    vectors = Vectors(single=11, double=12, learning=6, at_work=12, drawing=16)
    kohya = Kohya(
        "networks.lora_flux",
        double={
            "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
            "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "img_attn_proj": ["attn.to_out.0"],
            "txt_attn_proj": ["attn.to_add_out"],
            "img_mlp_0": ["ff.net.0.proj"],
            "img_mlp_2": ["ff.net.2"],
            "txt_mlp_0": ["ff_context.net.0.proj"],
            "txt_mlp_2": ["ff_context.net.2"],
        },
        single={"linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear2": ["proj_out"]},
    )

    def settings(self, index: Mapping[str, Any]) -> BaseSettings:
        return BaseSettings()

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], device: torch.device, length: int) -> Text:
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=device, max_sequence_length=length)
        return Text((embeds, pooled))  # (n, tokens, d_t5), (n, d_clip)

    def tokens(self, pipeline: Any, prompt: str) -> int:
        return len(pipeline.tokenizer_2(prompt, verbose=False).input_ids)

    def text_shapes(self, transformer: nn.Module, tokens: int) -> tuple[tuple[int, ...], ...]:
        return (tokens, transformer.config.joint_attention_dim), (transformer.config.pooled_projection_dim,)

    def prompts_of_a_picture(self, pipeline: Any, prompt: str, guidance: float) -> list[str]:
        return [prompt]

    def arguments(self, text: Text) -> dict[str, Tensor | None]:
        embeds, pooled = text
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_images(self, vae: Any, images: Tensor) -> Latents:
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        latent = vae.encode(images).latent_dist  # (n, 16, height/8, width/8)
        ids = self.image_ids(latent.mean.shape[2] // 2, latent.mean.shape[3] // 2).to(images.device)
        return Latents(pack((latent.mean.float() - shift) * scale), pack(latent.std.float() * scale), ids)

    def image_ids(self, rows: int, columns: int) -> Tensor:
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()

    def velocity(self, transformer: nn.Module, tokens: Tensor, sigma: Tensor, text: Text, image_ids: Tensor, guidance: float) -> Tensor:
        embeds, pooled = text
        return transformer(
            hidden_states=tokens,
            timestep=sigma.to(tokens.dtype),
            guidance=torch.full_like(sigma, guidance) if transformer.config.guidance_embeds else None,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=tokens.device),
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def prepare(self, transformer: nn.Module) -> None:
        """In a single block the gradient of the attention comes as columns of a wider matrix, in a double block it does not.

        PyTorch up to 2.11 at least keeps cuDNN's plan for the way back by the shapes of queries, keys and values, whatever the
        gradient's strides: the plan of a single block then reads past the end of a double block's gradient.
        """
        for block in transformer.single_transformer_blocks:
            block.attn.register_forward_hook(_in_order)

    def hastened(self, transformer: nn.Module) -> AbstractContextManager:
        return turned_norms(transformer)

    def numbers_of_texts(self, networks: Mapping[str, Any], prompts: int, tokens: int) -> float:
        """T5 holds its attention's bias and scores, and the three maps of a feed-forward."""
        t5 = networks["text_encoder_2"].config
        return max(3.0, 1.5 * prompts) * t5.num_heads * tokens**2 + 3 * prompts * tokens * t5.d_ff
