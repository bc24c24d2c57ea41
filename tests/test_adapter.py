"""The three-factor layer: it changes nothing at the start, equals its collapse, serves rows alone or together, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metalora import MetaLoraError
from metalora.adapter import Route, ThreeFactorLinear, _Sum, attach, attach_plain, collapse, find_targets, random_downs
from metalora.config import AdapterConfig

from .conftest import make_meta_down, state_hash

SIZES = st.integers(1, 9)


def layer_of(d_in: int, d_out: int, rank: int, meta_rank: int, count: int, seed: int = 0) -> ThreeFactorLinear:
    g = torch.Generator().manual_seed(seed)
    config = AdapterConfig(rank, meta_rank, 0.75)
    layer = ThreeFactorLinear(nn.Linear(d_in, d_out), torch.randn(meta_rank, d_in, generator=g), count, config, Route())
    for p in (layer.mid, layer.up):
        p.data = torch.randn(p.shape, generator=g)
    return layer.double()


@settings(max_examples=25, deadline=None)
@given(d_in=SIZES, d_out=SIZES, rank=st.integers(1, 4), meta_rank=SIZES, tokens=SIZES)
def test_the_layer_is_the_formula_and_its_collapse(d_in, d_out, rank, meta_rank, tokens):
    layer = layer_of(d_in, d_out, rank, meta_rank, count=1)
    x = torch.randn(2, tokens, d_in, dtype=torch.float64)
    mid, up, down = layer.mid[0], layer.up[0], layer.down
    formula = layer.base(x) + 0.75 * x @ down.T @ mid.T @ up.T
    a, b = collapse(mid, up, down, 0.75)
    assert a.shape == (rank, d_in) and b.shape == (d_out, rank)
    torch.testing.assert_close(layer(x), formula)
    torch.testing.assert_close(layer.base(x) + x @ a.T @ b.T, formula)


@settings(max_examples=25, deadline=None)
@given(d_in=SIZES, d_out=SIZES, rank=st.integers(1, 3), count=st.integers(1, 4), flat=st.booleans(), data=st.data())
def test_a_mixed_batch_equals_each_subject_alone(d_in, d_out, rank, count, flat, data):
    rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    layer = layer_of(d_in, d_out, rank, 5, count)
    layer.down.requires_grad_(True)
    x = torch.randn(len(rows), *([] if flat else [3]), d_in, dtype=torch.float64)
    alone = [layer.base(r) + 0.75 * r @ layer.down.T @ layer.mid[i].T @ layer.up[i].T for r, i in zip(x, rows)]
    expected = torch.stack(alone)
    wanted = torch.autograd.grad(expected.square().sum(), [layer.mid, layer.up, layer.down])
    layer.route.rows = torch.tensor(rows)
    got = layer(x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(torch.autograd.grad(got.square().sum(), [layer.mid, layer.up, layer.down]), wanted):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("quantised", [False, True])  # then what the base makes of x is given, and its gradient is the base's own
@pytest.mark.parametrize("keep_input", [False, True])
@settings(max_examples=15, deadline=None)
@given(people=st.integers(1, 3), rank=st.integers(1, 3), scale=st.sampled_from([1.0, 0.5]))
def test_gradients_are_those_that_autograd_finds(quantised, keep_input, people, rank, scale):
    g = torch.Generator().manual_seed(people + rank)
    shapes = {"x": (6, 2, 5), "down": (4, 5), "mid": (people, rank, 4), "up": (people, 7, rank)}
    x, down, mid, up = given = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=name != "down" or keep_input) for name, shape in shapes.items()]
    base = nn.Linear(5, 7, dtype=torch.float64).requires_grad_(False)
    low = x.reshape(people, -1, 5) @ down.T @ mid.transpose(1, 2) @ up.transpose(1, 2)
    wanted = base(x) + scale * low.view(6, 2, 7)
    ready = (scale * mid @ down, up, None, None) if keep_input else (scale * mid.detach() @ down, up, scale * mid, down)
    got = _Sum.apply(x, base(x) if quantised else None, *((None, None) if quantised else (base.weight, base.bias)), *ready, None)
    torch.testing.assert_close(got, wanted)
    learn = [t for t in given if t.requires_grad]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), learn) for y in (got, wanted))):
        torch.testing.assert_close(one, other)


def forward(base, data, rows=2):
    sigma = torch.full((rows,), 0.5)
    with torch.no_grad():
        return base.velocity(data.mean[:rows], sigma, data.text.rows(data.caption[:rows]), data.image_ids, 1.0)


@pytest.mark.parametrize("start", ["random", "identity"])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_untrained_adapter_changes_nothing(base, photo, start, rank):
    before = forward(base, photo)
    shape = AdapterConfig(rank, 4, mid_start=start)
    with attach(base.transformer, random_downs(base.transformer, shape, torch.Generator()), shape) as adapter:
        adapter.start(torch.Generator())
        assert torch.equal(forward(base, photo), before)
        assert not torch.equal(next(iter(adapter.layers.values())).mid, torch.zeros(1))


def test_detaching_leaves_the_base_bit_for_bit(base, photo, meta_down):
    before, output = state_hash(base.transformer), forward(base, photo)
    flags = [p.requires_grad for p in base.transformer.parameters()]
    with pytest.raises(KeyError), attach(base.transformer, meta_down.tensors, meta_down.adapter, 3) as adapter:
        fill(adapter)
        adapter.use_rows(torch.tensor([2, 0]))
        assert not torch.equal(forward(base, photo), output)
        raise KeyError
    assert state_hash(base.transformer) == before
    assert torch.equal(forward(base, photo), output)
    assert [p.requires_grad for p in base.transformer.parameters()] == flags
    adapter.detach()


def test_an_adapter_that_is_passed_over_changes_nothing(base, photo, meta_down):
    before = forward(base, photo)
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter:
        fill(adapter)
        changed = forward(base, photo)
        with pytest.raises(KeyError), adapter.passed_over():
            assert torch.equal(forward(base, photo), before)
            raise KeyError
        assert torch.equal(forward(base, photo), changed) and not torch.equal(changed, before)


def fill(adapter, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in adapter.heads():
        p.data = 0.3 * torch.randn(p.shape, generator=g)


def test_every_linear_layer_of_every_block_is_adapted_and_no_other(base):
    found = find_targets(base.transformer, AdapterConfig().targets)
    kohya = base.family.kohya
    named = {f"transformer_blocks.0.{name}" for names in kohya.double.values() for name in names}
    named |= {f"single_transformer_blocks.{i}.{name}" for names in kohya.single.values() for name in names for i in (0, 1)}
    assert set(found) == named


def test_gradient_checkpointing_gives_the_same_gradients(base, photo, meta_down):
    def gradients():
        with attach(base.transformer, meta_down.tensors, meta_down.adapter, 2) as adapter:
            fill(adapter)
            adapter.use_rows(torch.tensor([1, 0]))
            text = photo.text.rows(photo.caption[:2])
            base.velocity(photo.mean[:2], torch.full((2,), 0.5), text, photo.image_ids, 1.0).square().mean().backward()
            return [p.grad for p in adapter.heads()]

    plain = gradients()
    base.transformer.enable_gradient_checkpointing()
    try:
        again = gradients()
    finally:
        base.transformer.disable_gradient_checkpointing()
    assert all(g.abs().max() > 0 for g in plain)
    for one, other in zip(plain, again):
        torch.testing.assert_close(one, other)


def test_factors_go_out_and_in_unchanged(base, photo, meta_down):
    with attach(base.transformer, meta_down.tensors, meta_down.adapter, 2) as adapter:
        fill(adapter)
        adapter.use_rows(torch.tensor([1, 1]))
        wanted, factors = forward(base, photo), adapter.factors(1)
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter:
        adapter.load_factors(factors)
        torch.testing.assert_close(forward(base, photo), wanted)


def test_the_plain_lora_is_a_lora(base, photo):
    before = forward(base, photo)
    with attach_plain(base.transformer, replace(AdapterConfig(), rank=2), torch.Generator()) as adapter:
        assert torch.equal(forward(base, photo), before)
        assert all(layer.down.requires_grad and layer.up.requires_grad and not layer.mid.requires_grad for layer in adapter.layers.values())
        a, b = next(iter(adapter.lora().values()))
        layer = next(iter(adapter.layers.values()))
        assert torch.equal(a, layer.down) and b.shape == (layer.base.out_features, 2)


def test_a_meta_down_of_another_model_is_refused(base, meta_down):
    before = state_hash(base.transformer)
    fewer = dict(list(meta_down.tensors.items())[1:])
    wrong = {**meta_down.tensors, next(iter(meta_down.tensors)): torch.zeros(4, 7)}
    for tensors in (fewer, wrong):
        with pytest.raises(MetaLoraError, match="does not fit"):
            attach(base.transformer, tensors, meta_down.adapter)
    with pytest.raises(MetaLoraError, match="no linear layer"):
        make_meta_down(base, replace(meta_down.adapter, targets="unet"))
    assert state_hash(base.transformer) == before
