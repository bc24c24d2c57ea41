"""The speed benchmark: all ways of training start from the same loss, leave the base as it was, and count the same work."""

from __future__ import annotations

import json

import pytest
import torch

from metalora import speed

from .conftest import state_hash


def test_all_ways_train_the_same_thing_and_leave_nothing_behind(base):
    before = state_hash(base.transformer)
    case = speed.Case(resolution=base.settings.train_resolution, text_tokens=5, batch=2)
    found = speed.compare(base, [case], list(speed.WAYS), warmup=0, steps=2)["steps"]
    assert state_hash(base.transformer) == before and not base.transformer.is_gradient_checkpointing
    losses = [row["first loss"] for row in found]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)  # Up starts at zero: the first step is the base's
    work = {row["way"]: row["tera-operations a step"] for row in found}
    assert all(work[f"{way}, checkpointing"] > work[way] for way in speed.WAYS if f"{way}, checkpointing" in work)
    assert all(0 < row["share of roofline"] < 1 for row in found)


@pytest.mark.one_family
def test_more_tokens_are_more_work(base):
    cases = [speed.Case(base.settings.train_resolution, text) for text in (4, 12)]
    few, many = speed.compare(base, cases, ["Meta-LoRA"], warmup=0, steps=1)["steps"]
    assert many["tera-operations a step"] > few["tera-operations a step"]


@pytest.mark.parametrize("name", speed.FULL_SIZE)
def test_the_full_size_models_are_built_from_their_configs_alone(monkeypatch, tmp_path, name):
    """The same way in, with their configs made small."""
    family = speed.FULL_SIZE[name]
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(family, "configs", {**family.configs, "transformer": {**family.configs["transformer"], **small}})
    out = tmp_path / "speed.json"
    speed.main(["--base", name, "--resolution", "32", "--text", "4", "--steps", "1", "--warmup", "0", "--device", "cpu", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["dtype"] == str(torch.bfloat16) and len(found["steps"]) == len(speed.WAYS) and "packages" in found["machine"]
