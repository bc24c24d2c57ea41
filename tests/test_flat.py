"""All layers' factors at once: the same gradients as each layer by itself, in far fewer operations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from metalora.adapter import ThreeFactorLinear, attach, find_targets, random_downs, trainable
from metalora.config import AdapterConfig
from metalora.family import Text
from metalora.flat import AtOnce, end_to_end
from metalora.plan import Model
from metalora.speed import Launches


def gradients(base, photo, shape, at_once, learns_down, rows, count):
    """The output and the gradients of every factor that learns."""
    g = torch.Generator().manual_seed(3)
    with attach(base.transformer, random_downs(base.transformer, shape, g), shape, count) as adapter:
        for p in adapter.heads():
            p.data = 0.3 * torch.randn(p.shape, generator=g)
        adapter.train_down(learns_down)
        adapter.use_rows(rows)
        heads, downs = adapter.heads(), [p for p in adapter.downs() if p.requires_grad]
        wholes = [end_to_end(group) for group in (heads, downs) if group]
        with AtOnce(adapter, wholes, base.dtype)() if at_once else nullcontext():
            y = base.velocity(photo.mean[:3], torch.tensor([0.2, 0.5, 0.9]), photo.text.rows(photo.caption[:3]), photo.image_ids, 1.0)
            y.square().mean().backward()
        assert all(layer.ready is None for layer in adapter.layers.values())
        assert all(torch.equal(whole.grad, torch.cat([p.grad.flatten() for p in whole.parts])) for whole in wholes)
        return [y.detach(), *(p.grad for p in trainable(adapter))]


@pytest.mark.parametrize("keeps_input", [False, True])
@pytest.mark.parametrize("learns_down,rows,count", [(False, None, 1), (False, None, 2), (False, [2, 0, 2], 3), (True, [1, 1, 0], 2)])
def test_at_once_is_what_each_layer_does_by_itself(base, photo, monkeypatch, keeps_input, learns_down, rows, count):
    if learns_down and not keeps_input:
        pytest.skip("Down learns from the input alone")
    monkeypatch.setattr(ThreeFactorLinear, "keeps_input", keeps_input)
    shape, rows = replace(base.settings.adapter, rank=2, meta_rank=5, scale=0.7), None if rows is None else torch.tensor(rows)
    alone, together = (gradients(base, photo, shape, at_once, learns_down, rows, count) for at_once in (False, True))
    assert all(g.abs().max() > 0 for g in together)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_learns_is_cast_and_multiplied_for_all_layers_at_once(base):
    """A layer on a GPU takes seven operations there and back beyond the base's own, counted at the widths of the real model."""
    counts = {}
    for adapted, singles in ((False, 1), (False, 3), (True, 1), (True, 3)):
        full = Model(base.family, {**base.family.configs, "transformer": {**base.family.configs["transformer"], "num_layers": 1, "num_single_layers": singles}})
        transformer = full.modules["transformer"].to(torch.bfloat16).requires_grad_(False)
        counts[adapted, singles] = launches(base.family, transformer, adapted), len(find_targets(transformer, AdapterConfig().targets))
    (bare, _), (bare_more, _), (few, layers), (more, more_layers) = counts.values()
    assert more - few == bare_more - bare + 7 * (more_layers - layers) and more_layers > layers


def launches(family, transformer, adapted: bool) -> int:
    """Operations of a step on the meta device, in 16 bits."""
    device, tokens, shape = "meta", torch.zeros(1, 64, transformer.config.in_channels, device="meta", dtype=torch.bfloat16), AdapterConfig()
    text = Text(torch.zeros(1, *size, device=device, dtype=torch.bfloat16) for size in family.text_shapes(transformer, 16))
    downs = {name: torch.zeros(shape.meta_rank, layer.in_features, device=device) for name, layer in find_targets(transformer, shape.targets).items()}
    with attach(transformer, downs, shape) as adapter, adapter.passed_over() if not adapted else nullcontext():
        at_once = AtOnce(adapter, [end_to_end(adapter.heads())], torch.bfloat16)
        with Launches() as counted, at_once():
            y = family.velocity(transformer, tokens.requires_grad_(not adapted), torch.zeros(1, device=device), text, family.image_ids(8, 8).to(device), 1.0)
            y.square().mean().backward()
    return counted.count
