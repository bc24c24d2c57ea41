"""What goes beyond the paper: each variant is neutral by default, does what it says, and a learnt start travels whole."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metalora import MetaLoraError, Personalizer
from metalora.adapt import adapt, adapt_plain
from metalora.adapter import attach, find_targets, without_first
from metalora.config import AdaptConfig, AdapterConfig, FlowConfig, MetaConfig
from metalora.face import Face, FaceFinder
from metalora.files import START, is_complete
from metalora.hub import META_DOWN_FILES
from metalora.identity import Identity
from metalora.meta import meta_train
from metalora.metadown import MetaDown
from metalora.train import flow_loss, two_rates

from .conftest import make_meta_down, run, state_hash
from .parts import write_people

META = MetaConfig(rounds=3, bucket_size=2, bucket_steps=4, warmup_steps=2, batch_size=3, learning_rate=0.05, down_learning_rate=0.05, start_rate=0.5)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, y) for k in one for x, y in zip(one[k], other[k]))


def change(identity, downs):
    """What an identity adds to the weights of all layers, in one row."""
    return torch.cat([(identity.scale * up @ mid @ downs[n]).flatten() for n, (mid, up) in identity.factors.items()])


@pytest.fixture(scope="module")
def started(base, people) -> MetaDown:
    """A Meta-Down with a start."""
    return run(meta_train(base, 6, people.select, "woman", META, name="t"))[1]


# ---- the learnt start


def test_without_a_start_rate_stage_one_learns_no_start(base, people, tmp_path):
    plain = run(meta_train(base, 6, people.select, "woman", replace(META, start_rate=0.0, rounds=1), name="t"))[1]
    assert plain.start == {} and plain.stamp == plain.sha256
    plain.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "meta_down.safetensors"]
    assert "start_sha256" not in json.loads((tmp_path / "config.json").read_text()) and is_complete(tmp_path)


def test_the_start_moves_from_the_first_towards_the_mean_of_the_heads(base, people):
    """At rate 1 it is the mean itself; at half the rate, after one bucket, half of the way there."""
    first, half, whole = (
        run(meta_train(base, 6, people.select, "woman", replace(META, rounds=1, start_rate=rate), name="t"))[1].start for rate in (1e-9, 0.5, 1.0)
    )
    for name in first:
        for part in (0, 1):
            torch.testing.assert_close(half[name][part], (first[name][part] + whole[name][part]) / 2)
    assert all(up.abs().max() < 1e-6 for _, up in first.values()) and all(up.abs().max() > 1e-3 for _, up in whole.values())


@pytest.mark.parametrize("stop", [4, 6])
def test_a_start_goes_on_from_a_checkpoint_exactly(base, people, started, tmp_path, stop):
    broken = meta_train(base, 6, people.select, "woman", META, name="t", folder=tmp_path)
    for _ in range(stop):
        next(broken)
    broken.close()
    _, resumed = run(meta_train(base, 6, people.select, "woman", META, name="t", folder=tmp_path))
    assert resumed.stamp == started.stamp and equal(resumed.start, started.start)


def test_a_start_travels_with_its_folder_and_leaves_the_hash_alone(started, tmp_path):
    bare = replace(started, start={})
    assert bare.sha256 == started.sha256 != started.stamp != bare.stamp
    again = MetaDown.load(started.save(tmp_path))
    assert equal(again.start, started.start) and again.stamp == started.stamp
    assert started.more[START][1] in (tmp_path / "README.md").read_text() and START in META_DOWN_FILES and is_complete(tmp_path)
    other = {name: (mid + 1, up) for name, (mid, up) in started.start.items()}
    replace(started, start=other).save(tmp_path / "other")
    (tmp_path / "other" / START).replace(tmp_path / START)
    with pytest.raises(MetaLoraError, match="damaged: start.safetensors"):
        MetaDown.load(tmp_path)
    (tmp_path / START).unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(MetaLoraError, match="no file .*start.safetensors"):
        MetaDown.load(tmp_path)


def test_a_person_begins_at_the_start_as_far_as_is_asked(base, photo, started, config):
    """With no share of it a person is who they are without it, bit for bit; with all of it and no learning, the start."""
    bare = run(adapt(base, replace(started, start={}), photo, config))[1]
    none = run(adapt(base, started, photo, replace(config, start_mid=0.0, start_up=0.0)))[1]
    some = run(adapt(base, started, photo, config))[1]
    assert equal(bare.factors, none.factors) and none.meta_down_sha256 == some.meta_down_sha256 == started.sha256
    still = run(adapt(base, started, photo, replace(config, steps=1, learning_rate=1e-30)))[1]
    mid_only = run(adapt(base, started, photo, replace(config, steps=1, learning_rate=1e-30, start_up=0.0)))[1]
    for name, (mid, up) in started.start.items():
        torch.testing.assert_close(still.factors[name], (mid, up))
        torch.testing.assert_close(mid_only.factors[name], (mid, torch.zeros_like(up)))


def test_every_resident_identity_gets_the_start(base, started):
    with attach(base.transformer, started.tensors, started.adapter, 3) as adapter:
        adapter.start(torch.Generator())
        adapter.start_at(started.start)
        assert all(equal(adapter.factors(i), started.start) for i in range(3))


# ---- rank, rates, scale, blocks, prior


def test_a_person_of_another_rank_than_the_meta_down_begins_fresh(base, photo, started, config, tmp_path):
    bare = replace(started, start={}, adapter=replace(started.adapter, rank=3))
    wanted = run(adapt(base, bare, photo, config))[1]
    got = run(adapt(base, started, photo, replace(config, rank=3)))[1]
    assert started.adapter.rank != 3 == got.rank and equal(got.factors, wanted.factors)
    got.save(tmp_path / "me.safetensors")
    lora = got.to_lora(started)
    assert all(t.shape[0 if "lora_A" in name else 1] == 3 for name, t in lora.items())
    assert equal(run(adapt(base, started, photo, replace(config, rank=started.adapter.rank)))[1].factors, run(adapt(base, started, photo, config))[1].factors)


def test_a_person_of_fewer_rows_is_one_of_a_meta_down_that_has_no_more(base, photo, meta_down, started, config, tmp_path):
    cut = replace(meta_down, tensors={name: down[:2] for name, down in meta_down.tensors.items()}, adapter=replace(meta_down.adapter, meta_rank=2))
    wanted, got = run(adapt(base, cut, photo, config))[1], run(adapt(base, meta_down, photo, replace(config, meta_rank=2)))[1]
    assert got.meta_rank == 2 < meta_down.adapter.meta_rank and equal(got.factors, wanted.factors)
    lora, of_cut = Identity.load(got.save(tmp_path / "me.safetensors")).to_lora(meta_down), wanted.to_lora(cut)
    assert lora.keys() == of_cut.keys() and all(torch.equal(lora[name], of_cut[name]) for name in lora)
    assert AdaptConfig(meta_rank=2).ranks(AdapterConfig(12, 64)) == (2, 2) and AdaptConfig(rank=4).ranks(AdapterConfig(12, 64)) == (4, 64)
    most, all_of_them = (run(adapt(base, meta_down, photo, replace(config, meta_rank=rows)))[1] for rows in (99, 0))
    assert most.meta_rank == meta_down.adapter.meta_rank and equal(most.factors, all_of_them.factors)
    fresh, bare = (run(adapt(base, each, photo, replace(config, meta_rank=2)))[1] for each in (started, replace(started, start={})))
    assert equal(fresh.factors, bare.factors)  # a learnt start is of all rows


@pytest.mark.parametrize("up_rate", [1.0, 4.0])
def test_up_alone_has_the_other_rate(base, meta_down, up_rate):
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter:
        mids, ups = two_rates(adapter, 0.5, 0.0, up_rate).param_groups
        assert (mids["lr"], ups["lr"]) == (0.5, 0.5 * up_rate)
        mids["params"][0].data.fill_(2), ups["params"][0].grad.fill_(3)  # what happens to a whole happens to the layers' factors
        assert all((layer.mid == 2).all() and (layer.up == 0).all() and (layer.up.grad == 3).all() for layer in adapter.layers.values())


def test_a_larger_scale_is_a_larger_rate_of_up(base, photo, meta_down, config):
    """As config.py says of rsLoRA: with Adam, from Up = 0 and without clipping, the two are the same."""
    free = replace(config, max_grad_norm=1e9)
    scaled, faster = (run(adapt(base, meta_down, photo, replace(free, **{key: 3.0})))[1] for key in ("scale", "up_rate"))
    assert scaled.scale == 3 * meta_down.adapter.scale and faster.scale == meta_down.adapter.scale
    one, other, plain = (change(i, meta_down.tensors) for i in (scaled, faster, run(adapt(base, meta_down, photo, free))[1]))
    assert (one - other).norm() < 0.03 * one.norm() and (one - plain).norm() > 0.3 * one.norm()


def test_the_person_kept_is_the_moving_average_over_the_steps(base, photo, meta_down, config):
    """Previews and the person at every step are of it too, and it changes no step."""
    name = next(iter(meta_down.tensors))

    def learn(ema):
        shown = []

        def preview():
            shown.append(base.transformer.get_submodule(name).up[0].detach().clone())
            return "picture"

        learning = adapt(base, meta_down, photo, replace(config, ema=ema), preview=preview, preview_every=1)
        reports = [(report.loss, report.learnt().factors[name][1]) for report in learning]
        return [loss for loss, _ in reports], [up for _, up in reports], shown

    losses, steps, _ = learn(0.0)
    averaged_losses, averages, shown = learn(0.5)
    assert losses == averaged_losses and all(map(torch.equal, averages, shown))
    average = torch.zeros_like(steps[0])  # Up's start
    for step, (raw, kept) in enumerate(zip(steps, averages, strict=True), 1):
        average = average.lerp(raw, 1 - min(0.5, (1 + step) / (10 + step)))
        torch.testing.assert_close(kept, average)
    assert torch.equal(run(adapt(base, meta_down, photo, replace(config, ema=0.5)))[1].factors[name][1], averages[-1])


@pytest.mark.parametrize("share, kept", [(0.0, 3), (0.34, 2), (0.67, 1), (0.99, 1)])
def test_the_last_blocks_are_kept(base, share, kept):
    shape = without_first(base.transformer, AdapterConfig(), share)
    names = find_targets(base.transformer, shape.targets)
    blocks = list(dict.fromkeys(".".join(n.split(".")[:2]) for n in names))
    assert blocks == ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"][-kept:]
    assert set(names) == {n for n in find_targets(base.transformer, AdapterConfig().targets) if ".".join(n.split(".")[:2]) in blocks}


def test_a_person_of_late_blocks_is_a_person_like_any(base, photo, meta_down, config, tmp_path):
    before = state_hash(base.transformer)
    late = replace(config, skip_blocks=0.67)
    for identity in (run(adapt(base, meta_down, photo, late))[1], run(adapt_plain(base, base.settings.adapter, "woman", photo, late))[1]):
        assert all(name.startswith("single_transformer_blocks.1.") for name in identity.factors)
        lora = identity.to_lora(None if identity.is_plain else meta_down)
        assert len(lora) == 2 * len(identity.factors) and identity.export(tmp_path / "k.safetensors", meta_down, base.family, "kohya").is_file()
    assert state_hash(base.transformer) == before


@pytest.mark.parametrize("background", [1.0, 0.1])
def test_pictures_of_others_are_learnt_along_without_their_faces(base, meta_down, tmp_path, monkeypatch, background):
    personalizer = Personalizer(base, meta_down)
    picture = write_people(tmp_path, {"ann": "woman"}) / "ann-0.png"
    config = AdaptConfig(steps=2, crops=1, batch_size=2, learning_rate=0.05, background=background)
    sets, before = [], state_hash(base.transformer)
    monkeypatch.setattr(personalizer, "_learn_meta", lambda meta_down, data, config, **more: iter(sets.append(data) or ()))
    found = Face((1.5, 1.5, 14.5, 14.5), np.zeros((5, 2)), 1.0, np.zeros(512))
    seen = iter([[found], [], [found, found]])  # by the detector, in the pictures that the base makes
    personalizer.encode([picture], "woman", replace(config, prior_pictures=3))
    monkeypatch.setattr(personalizer.finder, "detect", lambda image: next(seen))
    run(personalizer.adapt_meta_steps(picture, "woman", replace(config, prior_pictures=3)))
    run(personalizer.adapt_meta_steps(picture, "woman", replace(config, prior_pictures=3)))  # made once
    one, other = sets
    assert len(one) == len(other) == 2 + 2 and one.subjects == 1 and torch.equal(one.mean, other.mean)
    grid = one.weight.view(4, *2 * [round(one.weight.shape[1] ** 0.5)])
    assert all(own[0, 0] == 0 and own[-1, -1] > 0.99 for own in grid[2:])  # the faces of others do not count, the rest of the picture does
    assert torch.equal(grid[0], torch.ones(2, 2)) == (background == 1) and state_hash(base.transformer) == before


def test_a_person_learnt_along_with_others_is_the_same_again(base, meta_down, tmp_path, monkeypatch):
    picture = write_people(tmp_path, {"ann": "woman"}) / "ann-0.png"
    config = AdaptConfig(steps=2, crops=1, batch_size=2, learning_rate=0.05)
    monkeypatch.setattr(FaceFinder, "detect", lambda self, image: [Face((8.0, 8.0, 24.0, 24.0), np.zeros((5, 2)), 1.0, np.eye(1, 512, dtype=np.float32)[0])])
    alone, one, other = (run(Personalizer(base, meta_down).adapt_meta_steps(picture, "woman", replace(config, prior_pictures=n)))[1].sha256 for n in (0, 8, 8))
    assert one == other != alone


def test_a_meta_down_without_a_start_is_todays(base, photo, config):
    """The settings of the start do nothing where there is none."""
    meta_down = make_meta_down(base, base.settings.adapter)
    one, other = (run(adapt(base, meta_down, photo, replace(config, start_mid=s, start_up=s)))[1] for s in (1.0, 0.3))
    assert equal(one.factors, other.factors)


def test_a_start_is_closer_to_people_never_seen_than_none(base, people):
    """Before a single step of learning, the loss on people who were kept out is lower where the start is that of others."""
    config = replace(META, rounds=6, bucket_size=4, bucket_steps=8, learning_rate=0.03, down_learning_rate=1e-3)
    meta_down = run(meta_train(base, 4, people.select, "woman", config, name="t"))[1]
    unseen = people.select([4, 5])

    def loss(start) -> float:
        with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter, torch.no_grad():
            adapter.start(torch.Generator().manual_seed(0))
            adapter.start_at(start)
            return sum(flow_loss(base, unseen, torch.arange(len(unseen)), torch.Generator().manual_seed(s), FlowConfig()).item() for s in range(10)) / 10

    assert loss(meta_down.start) < 0.98 * loss({})
