"""The speed benchmark: all ways of training start from the same loss, leave the base as it was, and count the same work."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metalora import MetaLoraError, drawing, graph, growth, speed, standin
from metalora.adapt import adapt
from metalora.adapter import attach_plain, trainable
from metalora.base import Base
from metalora.cache import captioned, merge
from metalora.config import FlowConfig
from metalora.family import Family
from metalora.generate import render, use_people
from metalora.plan import PACKAGES
from metalora.standin import Case
from metalora.train import fit, optimizer

from .conftest import run, state_hash


def test_all_ways_train_the_same_thing_and_leave_nothing_behind(base):
    before = state_hash(base.transformer)
    case, ways = Case(resolution=base.settings.train_resolution, text_tokens=5, batch=2), [name for name, way in speed.WAYS.items() if way.anywhere]
    found = speed.compare(base, [case], ways, warmup=0, steps=1, rounds=2)["steps"]
    assert state_hash(base.transformer) == before and not base.transformer.is_gradient_checkpointing
    losses = [row["first loss"] for row in found]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)  # Up starts at zero: the first step is the base's
    work = {row["way"]: row["tera-operations a step"] for row in found}
    assert all(work[f"{way}, checkpointing"] > work[way] for way in ways if f"{way}, checkpointing" in work)
    assert all(0 < row["share of roofline"] < 1 for row in found)


def test_an_ordinary_lora_learns_along_the_same_curve_as_peft_s(base):
    """Same start, same draws, same optimizer: our layers, loop and gradients against PEFT's, step by step."""
    case, steps = Case(base.settings.train_resolution, 5, batch=2), 12
    data = standin.random_pictures(base, case)
    shape = replace(base.settings.adapter, rank=speed.PEER_RANK)
    with attach_plain(base.transformer, shape, torch.Generator().manual_seed(3)) as adapter:
        start = adapter.down_tensors()
        ours = list(fit(
            base, adapter, data, [optimizer([(list(trainable(adapter)), 1e-4)], weight_decay=0.01)], steps=steps, batch_size=case.batch,
            generator=torch.Generator().manual_seed(1), flow_config=FlowConfig(), max_grad_norm=1.0,
        ))  # fmt: skip
    with speed.peft_lora(base, data, case) as losses:
        for name, down in start.items():
            base.transformer.get_submodule(f"{name}.lora_A.peer").weight.data.copy_(down)
        theirs = [next(losses) for _ in range(steps)]
        losses.close()
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-3)  # of gradients that are nothing but rounding Adam makes steps as of any other


def test_blocks_are_compiled_whole_and_once_for_all_people(base):
    """With the graphs as they are, run without a compiler's own code; what a C++ compiler makes of them is not ours."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    case = Case(base.settings.train_resolution, 5)
    data, before, losses, graphs = standin.random_pictures(base, case), state_hash(base.transformer), [], []
    for compiled in (False, True, True):
        with speed.meta_lora(base, data, case) as steps, base.compiled(backend="aot_eager") if compiled else nullcontext():
            losses.append([next(steps) for _ in range(3)])
            steps.close()
        graphs.append(counters["stats"]["unique_graphs"])
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-4) and graphs[0] == 0 < graphs[1] == graphs[2]
    assert state_hash(base.transformer) == before and all(m._compiled_call_impl is None for m in base.transformer.modules())


@pytest.mark.one_family
def test_what_is_measured_as_compiled_is(base, monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(Base, "compiled", partialmethod(Base.compiled, backend="aot_eager"))
    hastened, compiled = Base.hastened, []
    monkeypatch.setattr(Base, "hastened", lambda self: (compiled.append(self.is_compiled), hastened(self))[1])
    times, found = speed.measure(base, Case(base.settings.train_resolution, 5), "Meta-LoRA, compiled", warmup=0, steps=1)
    assert compiled == [False, True]  # the step that is counted, and those that are measured
    assert len(times) == 1 and counters["stats"]["unique_graphs"] > 0 and found["tera-operations a step"] > 0


@pytest.mark.one_family
def test_a_person_is_learnt_the_same_compiled(base, photo, meta_down, config, monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain = run(adapt(base, meta_down, photo, config))[1]
    with monkeypatch.context() as patch:
        patch.setattr(Base, "compiled", partialmethod(Base.compiled, backend="aot_eager"))
        same = run(adapt(base, meta_down, photo, replace(config, compiled=True)))[1]
    assert counters["stats"]["unique_graphs"] > 0
    for name, (_, up) in plain.factors.items():
        torch.testing.assert_close(same.factors[name][1], up, rtol=1e-3, atol=1e-4)
    half = merge([captioned(base, photo, [("a photo of sks woman", "smiling")] * 3), photo])  # so that in every batch others are under their own caption
    with monkeypatch.context() as patch:
        patch.setattr(Base, "compiled", partialmethod(Base.compiled, backend="aot_eager"))
        assert run(adapt(base, meta_down, half, replace(config, compiled=True, reworded=0.5, batch_size=8, steps=12)))[1].steps == 12
    before = state_hash(base.transformer)
    torch._dynamo.reset()
    nowhere = torch._inductor.config.patch({"force_disable_caches": True, "cpp.cxx": (None, "/no/compiler")})  # which is undone whole, as monkeypatch's is not
    with nowhere, pytest.raises(MetaLoraError, match="takes a C\\+\\+ compiler"):
        run(adapt(base, meta_down, photo, replace(config, compiled=True)))
    assert state_hash(base.transformer) == before and all(m._compiled_call_impl is None for m in base.transformer.modules())


@pytest.mark.one_family
def test_more_tokens_are_more_work(base):
    cases = [Case(base.settings.train_resolution, text) for text in (4, 12)]
    few, many = speed.compare(base, cases, ["Meta-LoRA"], warmup=0, steps=1)["steps"]
    assert many["tera-operations a step"] > few["tera-operations a step"]


def made_small(monkeypatch, name: str) -> Family:
    """The family of a full-size model, its transformer made small."""
    family = speed.FULL_SIZE[name]
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(family, "configs", {**family.configs, "transformer": {**family.configs["transformer"], **small}})
    return family


def measured_small(monkeypatch, out: Path, name: str, *more: str) -> dict[str, Any]:
    """What the command writes of a full-size model, its transformer made small on the way in."""
    made_small(monkeypatch, name)
    sizes = ["--resolution", "32", "--text", "4", "--steps", "1", "--warmup", "0", "--rounds", "1", "--draw", "1"]
    speed.main(["--base", name, *more, *sizes, "--device", "cpu", "--json", str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", speed.FULL_SIZE)
def test_the_full_size_models_are_built_from_their_configs_alone(monkeypatch, tmp_path, name):
    """The same way in, with their configs made small."""
    found = measured_small(monkeypatch, tmp_path / "speed.json", name)
    assert [row["way"] for row in found["pictures"]] == [name for name, way in drawing.WAYS.items() if way.anywhere]
    assert found["dtype"] == str(torch.bfloat16) and len(found["steps"]) == sum(way.anywhere for way in speed.WAYS.values()) and "packages" in found["machine"]


@pytest.mark.one_family
@pytest.mark.parametrize("weights", PACKAGES)
def test_a_full_size_model_learns_and_draws_with_fewer_bits(monkeypatch, tmp_path, weights):
    found = measured_small(monkeypatch, tmp_path / "speed.json", "flux-dev", "--weights", weights)
    assert found["weights"] == weights and [row["way"] for row in found["steps"]] == ["Meta-LoRA", "Meta-LoRA, checkpointing"]
    assert [row["way"] for row in found["pictures"]] == ["the base, nobody", "a person, loaded by diffusers"]


def test_float8_weights_are_for_the_full_size_models():
    with pytest.raises(SystemExit, match="--weights goes with --base flux-dev"):
        speed.main(["--weights", "fp8"])


def test_pictures_are_drawn_in_all_ways_and_nothing_is_left_behind(base):
    before, plan = state_hash(base.transformer), base.plan
    case = Case(base.settings.train_resolution, 5, batch=2, people=2)
    rows = speed.draw(base, [case, replace(case, batch=1, people=1)], warmup=0, pictures=1)
    assert [row["way"] for row in rows] == [name for name, way in drawing.WAYS.items() if way.anywhere] and state_hash(base.transformer) == before and base.plan == plan
    assert rows[0]["over the base"] == 1 and all(row["seconds to switch"] > 0 for row in rows[1:])


@pytest.mark.one_family
def test_folded_and_loaded_people_draw_the_same(base):
    case, text, pictures = Case(32, 5), standin.random_text(base, 5, 1), []
    people = [standin.random_person(base, case.rank, 0)]
    for way in list(drawing.WAYS.values())[:3]:
        with drawing.held(base, way.folds, people):
            pictures.append(np.asarray(render(base, text, 32, 32, 2, 1.0, 0)).astype(int))
    bare, folded, loaded = pictures
    assert abs(folded - loaded).max() <= 1 < abs(folded - bare).max()


@pytest.mark.one_family
def test_float8_layers_are_compiled_and_learn_the_same(monkeypatch):
    base, case, losses = standin.random_base("flux-dev", made_small(monkeypatch, "flux-dev"), torch.device("cpu"), "fp8"), Case(32, 5), []
    data = standin.random_pictures(base, case)
    torch._dynamo.reset()
    for compiled in (False, True):
        with speed.meta_lora(base, data, case) as steps, base.compiled(backend="aot_eager") if compiled else nullcontext():
            losses.append([next(steps) for _ in range(3)])
            steps.close()
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.one_family
def test_a_denoising_step_is_recorded_once_for_all_pictures_of_a_size(base, monkeypatch):
    """What a GPU would record is counted here and done as ever."""
    recordings = []

    class Counted:
        def __init__(self, work):
            recordings.append(work)
            self.work = work

        def __call__(self, inputs):
            return self.work(inputs)

    monkeypatch.setattr(graph, "Recorded", Counted)
    playing, text = graph.Playing(), standin.random_text(base, 5, 1)

    def picture(side, people=None):
        with playing.of(base.transformer, people):
            return render(base, text, side, side, 2, 1.0, 0).tobytes()

    before = render(base, text, 32, 32, 2, 1.0, 0).tobytes()
    assert picture(32) == picture(32) == before and len(recordings) == 1
    picture(64)
    picture(64, [("somebody", 1.0)])
    assert len(recordings) == 3 and "forward" not in vars(base.transformer)
    playing.forget()
    assert picture(32) == before and len(recordings) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records")
def test_pictures_that_are_played_from_a_recording_are_the_same_pictures():
    base = Base.open("miniature", "cuda", plan="folding")
    side, people = base.settings.resolution, [standin.random_person(base, 1, seed) for seed in (0, 1)]
    text, playing = standin.random_text(base, 5, 1), graph.Playing()
    for person in (0, 1, 0):
        use_people(base, [people[person]])
        plain = np.asarray(render(base, text, side, side, 4, 1.0, 0)).astype(int)
        with playing.of(base.transformer, None):
            played = np.asarray(render(base, text, side, side, 4, 1.0, 0)).astype(int)
        assert abs(plain - played).max() <= 2


@pytest.mark.one_family
def test_a_folded_person_changes_and_nothing_is_compiled_anew(base):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    text, people, pictures, graphs = standin.random_text(base, 5, 1), [standin.random_person(base, 1, seed) for seed in (0, 1)], [], []
    with drawing.held(base, True, people), base.compiled(backend="aot_eager"):
        for person in (0, 1, 0):
            use_people(base, [people[person]])
            pictures.append(np.asarray(render(base, text, 32, 32, 2, 1.0, 0)).astype(int))
            graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2]
    assert (pictures[0] == pictures[2]).all() and abs(pictures[0] - pictures[1]).max() > 2


@pytest.mark.one_family
def test_growth_changes_one_thing_at_a_time(base):
    usual = Case(64, 8)
    cases = growth.cases(usual)
    assert cases[0] == usual and len(set(cases)) == len(cases)
    changed = {tuple(key for key, value in vars(case).items() if value != vars(usual)[key]) for case in cases}
    assert changed == {(), *((key,) for key in vars(usual) if key != "people"), ("batch", "people")}
    wanted = {name: {vars(case)[name] for case in cases} for name in growth.AXES}
    ways = ["one way", "another"]
    rows = [{**vars(case), "way": way, "ms a step": 1.0 + i * (100 if case == cases[-1] else 1), "MiB kept for the way back": 2.0} for way in ways for i, case in enumerate(cases)]
    axes = growth.figure(rows, usual).axes
    for panel in axes:
        name = next(name for name, head in growth.AXES.items() if head == panel.get_xlabel())
        assert panel.get_ylim()[0] == 0 and all(0 <= y <= panel.get_ylim()[1] for line in panel.lines for y in line.get_ydata())
        assert [line.get_label() for line in panel.lines] == ways and {x for line in panel.lines for x in line.get_xdata()} == wanted[name]
    assert len(axes) == len(growth.AXES) * len(growth.SCORES)


@pytest.mark.one_family
def test_several_people_at_a_time_start_from_the_same_loss(base):
    rows = speed.compare(base, [Case(32, 5, batch=4, people=people) for people in (1, 4)], ["Meta-LoRA"], warmup=0, steps=1)["steps"]
    assert all(row["first loss"] > 0 and row["MiB kept for the way back"] > 0 for row in rows) and rows[0]["people"] == 1 and rows[1]["people"] == 4


def test_a_plot_without_growth_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="--plot wants --growth"):
        speed.main(["--plot", str(tmp_path / "growth.svg")])
