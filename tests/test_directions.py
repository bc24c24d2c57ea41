"""Where stage 1 may begin: the directions found by sketches hold nearly what the best of all directions would of the gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from metalora.adapter import find_targets, random_downs
from metalora.config import FlowConfig, MetaConfig
from metalora.directions import _leading, leading_directions
from metalora.meta import meta_train
from metalora.train import Clock, Share, flow_loss

from .conftest import in_processes, run, state_hash

RANK = 4


def covariances(base, people, draws=64):
    """Σ GᵀG of every layer over the people, G the gradient of its weights."""
    layers, found = find_targets(base.transformer, base.settings.adapter.targets), {}
    generator = torch.Generator().manual_seed(5)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    try:
        for subject in range(people.subjects):
            data = people.select([subject])
            flow_loss(base, data, torch.randint(len(data), (draws,), generator=generator), generator, FlowConfig()).backward()
            for name, layer in layers.items():
                found[name] = found.get(name, 0) + layer.weight.grad.T @ layer.weight.grad
                layer.weight.grad = None
    finally:
        for layer in layers.values():
            layer.weight.requires_grad_(False)
    return found


def held(downs, covariance):
    """Which share of the gradients' energy lies in the rows of Down, in the mean over layers."""
    shares = []
    for name, c in covariance.items():
        rows = torch.linalg.qr(downs[name].T)[0]
        shares.append((torch.trace(rows.T @ c @ rows) / torch.trace(c)).item())
    return sum(shares) / len(shares)


def test_they_hold_nearly_what_the_best_would(base, people):
    before, shape = state_hash(base.transformer), replace(base.settings.adapter, meta_rank=RANK)
    reports, downs = run(leading_directions(base, range(people.subjects), people.select, shape, MetaConfig(balanced=False), Clock(people.subjects), Share()))
    assert [r.step for r in reports] == list(range(1, people.subjects + 1))
    assert state_hash(base.transformer) == before
    covariance = covariances(base, people)
    best = {name: torch.linalg.eigh(c)[1].T[-RANK:] for name, c in covariance.items()}
    most, got, random = (held(d, covariance) for d in (best, downs, random_downs(base.transformer, shape, torch.Generator())))
    assert most > got > 0.8 * most and got - random > 0.6 * (most - random)
    assert all(torch.allclose(rows.norm(dim=1), torch.ones(RANK), atol=1e-4) for rows in downs.values())


def test_leading_rows_are_singular_vectors_times_singular_values():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    _, values, right = torch.linalg.svd(rows)
    torch.testing.assert_close(_leading(rows, 3).abs(), (values[:3, None] * right[:3]).abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.one_family
def test_a_stage_1_that_begins_there_resumes_as_any(base, people, tmp_path):
    config = MetaConfig(rounds=2, bucket_size=3, bucket_steps=4, warmup_steps=1, direction_people=4)
    _, whole = run(meta_train(base, people.subjects, people.select, "woman", config, name="x"))
    first = replace(config, rounds=1)
    run(meta_train(base, people.subjects, people.select, "woman", first, name="x", folder=tmp_path))
    reports, resumed = run(meta_train(base, people.subjects, people.select, "woman", config, name="x", folder=tmp_path))
    assert [r.step for r in reports] == [9, 10, 11, 12] and reports[0].steps == 12
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)


@pytest.mark.one_family
def test_directions_that_are_found_are_not_looked_for_again(base, people, tmp_path):
    def begun():
        return meta_train(base, people.subjects, people.select, "woman", MetaConfig(rounds=0, direction_people=3), name="x", folder=tmp_path)

    reports, whole = run(begun())
    again, resumed = run(begun())
    assert len(reports) == 3 and not again and resumed.sha256 == whole.sha256


def test_balanced_rows_are_the_same_directions_along_which_inputs_are_of_one_size(base, people):
    config = MetaConfig(direction_people=3, batch_size=4)
    find = lambda config: run(leading_directions(base, range(3), people.select, base.settings.adapter, config, Clock(3), Share()))[1]  # noqa: E731
    plain, balanced = find(replace(config, balanced=False)), find(config)
    sizes: dict[str, list[torch.Tensor]] = {}

    def see(name, rows):
        return lambda layer, given: sizes.setdefault(name, []).append(given[0].flatten(0, -2) @ rows.T)

    layers = find_targets(base.transformer, base.settings.adapter.targets)
    hooks = [layer.register_forward_pre_hook(see(name, balanced[name])) for name, layer in layers.items()]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(16):
            flow_loss(base, people, torch.randint(len(people), (8,), generator=generator), generator, config.flow)
    for hook in hooks:
        hook.remove()
    for name, rows in plain.items():
        torch.testing.assert_close(torch.nn.functional.normalize(balanced[name], dim=1), rows, rtol=1e-4, atol=1e-5)
        spread = [torch.log(size).std() for size in (torch.cat(sizes[name]).square().mean(0).sqrt(), 1 / balanced[name].norm(dim=1))]
        assert spread[0] < 0.35 * spread[1] or spread[0] < 0.1  # what is left is of other draws


PROCESS = """
import sys, torch
from metalora.base import Base
from metalora.cache import encode
from metalora.config import MetaConfig
from metalora.meta import meta_train
base = Base.open(sys.argv[1], "cpu")
people = encode(base, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1, ["a photo of sks woman"] * 4, [0, 1, 2, 3])
run = meta_train(base, 4, people.select, "woman", MetaConfig(rounds=0, direction_people=3, batch_size=4), name="t")
while True:
    try:
        next(run)
    except StopIteration as end:
        downs = end.value.tensors.values()
        print(sum((down @ torch.linspace(-1, 1, down.shape[1])).norm().item() for down in downs), end.value.sha256)  # however the rows are turned
        break
"""


@pytest.mark.one_family
def test_two_processes_find_what_one_does(tiny_base, tmp_path):
    (along, sha), (_, other) = in_processes(2, tmp_path, PROCESS, str(tiny_base))
    (tmp_path / "alone").mkdir()
    ((alone, _),) = in_processes(1, tmp_path / "alone", PROCESS, str(tiny_base))
    assert sha == other and float(along) == pytest.approx(float(alone), rel=1e-4)
