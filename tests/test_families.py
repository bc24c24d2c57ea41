"""Each family's own file against the pipeline of diffusers: the same tokens, positions, latents and predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from metalora.config import BaseSettings
from metalora.families import FAMILIES, settings_of
from metalora.flux import pack
from metalora.flux2 import patch
from metalora.generate import seeded

from .test_identity import make

HALVES = st.integers(1, 5).map(lambda n: 2 * n)


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 4), h=HALVES, w=HALVES)
def test_tokens_and_their_positions_are_those_of_diffusers(b, c, h, w):
    x = torch.randn(b, c, h, w)
    patches = Flux2KleinPipeline._patchify_latents(x)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, b, c, h, w))
    assert torch.equal(patch(x), Flux2KleinPipeline._pack_latents(patches))
    flux, flux2 = (FAMILIES[name].image_ids(h // 2, w // 2) for name in ("FluxPipeline", "Flux2KleinPipeline"))
    assert torch.equal(flux, FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32))
    assert torch.equal(flux2, Flux2KleinPipeline._prepare_latent_ids(patches)[0].float())


def test_a_step_predicts_what_the_pipeline_predicts(base):
    """The very call that the pipeline makes, seen at the transformer."""
    seen = []
    hook = base.transformer.register_forward_hook(lambda module, given, named, result: seen.append((named, result[0])), with_kwargs=True)
    text = base.encode_prompts(["a photo of sks woman"])
    base.pipeline(**base.family.arguments(text), width=48, height=32, num_inference_steps=3, guidance_scale=1.0)
    hook.remove()
    for named, predicted in seen:
        with torch.no_grad():
            ours = base.velocity(named["hidden_states"], named["timestep"], text, base.family.image_ids(2, 3), 1.0)
        torch.testing.assert_close(ours, predicted)
    assert len(seen) == 3


def test_latents_are_what_the_pipeline_draws(base, monkeypatch):
    """Handed to the pipeline as the end of its way, they come out as the VAE's own picture of them."""
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = base.encode_images(images)
    assert latents.mean.shape == latents.std.shape == (2, 6, base.transformer.config.in_channels) and (latents.std > 0).all()
    monkeypatch.setattr(base.pipeline.scheduler, "step", lambda *given, **more: (latents.mean[:1],))
    drawn = base.pipeline(
        **base.family.arguments(base.encode_prompts(["a park"])), width=48, height=32, num_inference_steps=1, guidance_scale=1.0, output_type="pt"
    ).images
    with torch.no_grad():
        mean = base.vae.decode(base.vae.encode(images[:1]).latent_dist.mean).sample
    torch.testing.assert_close(drawn, (mean / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_guidance_takes_the_prompts_that_it_needs(base):
    given = base.family.arguments(base.encode_for_picture("a park", 3.0))
    alone = base.family.arguments(base.encode_for_picture("a park", 1.0))
    torch.testing.assert_close(given["prompt_embeds"], alone["prompt_embeds"], atol=1e-4, rtol=1e-4)
    picture = dict(width=32, height=32, num_inference_steps=2, max_sequence_length=32, output_type="pt")

    def draw(what):
        with seeded(0, base.device) as generator:
            return base.pipeline(**what, guidance_scale=3.0, generator=generator, **picture).images

    ours, plain = draw(given), draw({"prompt": "a park"})
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)


def test_a_prompt_that_is_longer_than_usual_takes_more_tokens(base):
    prompt = "a photo of a woman in the park"
    tokens = base.family.tokens(base.pipeline, prompt)

    def embeds(usual: int) -> torch.Tensor:
        return replace(base, settings=replace(base.settings, usual_sequence_length=usual)).encode_for_picture(prompt, 1.0).embeds

    fits, longer, whole = embeds(tokens), embeds(tokens - 1), base.encode_for_picture(prompt, 1.0).embeds
    assert fits.shape[1] == tokens and torch.equal(longer, whole) and longer.shape[1] == base.settings.max_sequence_length > tokens


def test_a_family_has_defaults_of_its_own(base, tmp_path):
    (tmp_path / "model_index.json").write_text((base.folder / "model_index.json").read_text())
    assert settings_of(tmp_path) == base.family.settings({"is_distilled": False})
    assert settings_of(base.folder) == base.settings  # metalora.json lies over them
    assert FAMILIES["FluxPipeline"].settings({}) == BaseSettings()
    klein = FAMILIES["Flux2KleinPipeline"]
    assert [(s.inference_steps, s.guidance) for s in map(klein.settings, ({"is_distilled": True}, {"is_distilled": False}))] == [(4, 1.0), (50, 4.0)]


def test_what_diffusers_reads_of_kohya_names_is_the_same_lora(base, meta_down, tmp_path):
    if isinstance(base.pipeline, FluxPipeline):
        pytest.skip("its reader knows layers of FLUX.1-dev's width only")
    identity = make(base, meta_down)
    path = identity.export(tmp_path / "lora.safetensors", meta_down, base.family, "kohya")
    read, wanted = type(base.pipeline).lora_state_dict(str(path)), identity.to_lora(meta_down)
    assert read.keys() == wanted.keys() and all(torch.equal(read[key], wanted[key]) for key in read) and len(load_file(path)) > 0


def test_of_a_prompt_that_is_longer_than_the_base_reads_there_is_a_notice(base):
    opened = replace(base)
    opened.encode_for_picture("a park", 1.0)
    assert not opened.notice
    opened.encode_for_picture("a park " * base.settings.max_sequence_length, 1.0)
    assert "are left out. Say it in fewer words." in opened.notice
