"""Generation with ordinary LoRAs: equal to the factored adapter, repeatable, switchable, and marked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from metalora import Cancelled, Identity, MetaLoraError, Personalizer
from metalora import generate as generation
from metalora.adapter import attach
from metalora.base import Base
from metalora.fold import factors
from metalora.generate import GenerateConfig, Person, generate, render, save_png, seeded, unload_people, use_people

from .conftest import make_meta_down, run, state_hash
from .test_identity import make

PROMPT = "a photo of {person} in a red cap"


@pytest.fixture
def bare(base):
    """The base, with every person taken out afterwards."""
    yield base
    unload_people(base)


def person_of(base, meta_down, seed=0, weight=1.0) -> Person:
    identity = make(base, meta_down, seed)
    return Person(identity.to_lora(meta_down), identity.prompt_words, identity.sha256, weight)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def pictures(base, people=(), prompts=(PROMPT,), **config):
    return [pixels(i) for i in generate(base, list(prompts), people, GenerateConfig(**config))]


def test_a_collapsed_person_looks_like_the_factored_one_in_a_plain_pipeline(base, meta_down, tiny_base, tmp_path):
    identity = make(base, meta_down)
    text = base.encode_prompts(["a photo of sks woman"])
    alone = pixels(render(base, text, 32, 32, 3, 1.0, 0))
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter:
        adapter.load_factors(identity.factors)
        factored = pixels(render(base, text, 32, 32, 3, 1.0, 0))
    plain = type(base.pipeline).from_pretrained(tiny_base, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(identity.export(tmp_path / "lora.safetensors", meta_down, base.family)))
    with seeded(0, base.device) as generator:
        image = plain(prompt="a photo of sks woman", height=32, width=32, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=32,
                      generator=generator).images[0]  # fmt: skip
    assert abs(pixels(image) - factored).max() <= 2
    assert abs(alone - factored).max() > 2


def test_a_picture_depends_on_its_seed_and_not_on_torch_s_own_numbers(base):
    """The miniature's scheduler adds noise at every step, which it draws from these."""
    text, pictures = base.encode_prompts(["a park"]), []
    for before, seed in ((0, 7), (1, 7), (0, 8)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        pictures.append(pixels(render(base, text, 32, 32, 3, 1.0, seed)))
        assert torch.equal(torch.get_rng_state(), state)
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


def test_people_come_and_go_and_the_base_stays(bare, meta_down):
    before, alone = state_hash(bare.transformer), pictures(bare)[0]
    one, two = person_of(bare, meta_down, 1), person_of(bare, meta_down, 2)
    first = pictures(bare, [one])[0]
    assert abs(first - alone).max() > 2
    assert abs(pictures(bare, [two])[0] - first).max() > 2
    assert np.array_equal(pictures(bare, [one])[0], first)
    assert np.array_equal(pictures(bare)[0], alone)
    unload_people(bare)
    assert state_hash(bare.transformer) == before


def test_weights_count_and_zero_is_nobody(bare, meta_down):
    one = person_of(bare, meta_down, 1)
    alone = pictures(bare, [], ["sks woman, in the park"])[0]
    assert np.array_equal(pictures(bare, [replace(one, weight=0.0)], ["in the park"])[0], alone)
    full = pictures(bare, [one], ["in the park"])[0]
    halves = pictures(bare, [replace(one, weight=0.5), replace(one, weight=0.5, words="")], ["in the park"])[0]
    assert abs(full - alone).max() > 2 and abs(halves - full).max() <= 1


@pytest.fixture(params=["folded", "loaded"])
def held(request, bare, monkeypatch):
    """The base, with people in its weights or beside them."""
    monkeypatch.setattr(bare, "plan", replace(bare.plan, folds=request.param == "folded"))
    yield bare
    unload_people(bare)


def test_people_count_as_they_are_weighted_wherever_they_are(held, meta_down):
    one, two = person_of(held, meta_down, 1), person_of(held, meta_down, 2)
    layer = held.transformer.get_submodule(next(iter(meta_down.tensors)))
    x = torch.randn(3, layer.in_features)
    alone, parts = layer(x), []
    for person in (one, two):
        a, b = factors(person.lora)[next(iter(meta_down.tensors))]
        parts.append(x @ a.T @ b.T)
    for people, wanted in [
        ([replace(one, weight=0.5), two], alone + 0.5 * parts[0] + parts[1]),
        ([one], alone + parts[0]),
        ([one, replace(one, weight=-0.25)], alone + 0.75 * parts[0]),
        ([], alone),
    ]:
        use_people(held, people)
        torch.testing.assert_close(held.transformer.get_submodule(next(iter(meta_down.tensors)))(x), wanted, rtol=1e-4, atol=1e-5)


def test_folded_and_loaded_people_look_the_same(bare, meta_down, monkeypatch):
    people = [person_of(bare, meta_down, 1), person_of(bare, meta_down, 2, weight=0.5)]
    assert bare.plan.folds
    folded = pictures(bare, people)[0]
    unload_people(bare)
    monkeypatch.setattr(bare, "plan", replace(bare.plan, folds=False))
    assert abs(pictures(bare, people)[0] - folded).max() <= 1


def test_a_broken_fold_is_mended_by_the_next(bare, meta_down):
    before, one = state_hash(bare.transformer), person_of(bare, meta_down, 1)
    names = list(factors(one.lora))
    bad = dict(one.lora) | {f"transformer.{names[-1]}.lora_A.weight": torch.zeros(1, 1)}
    with pytest.raises(RuntimeError):
        use_people(bare, [replace(one, lora=bad)])
    assert state_hash(bare.transformer) != before
    use_people(bare, [])
    assert state_hash(bare.transformer) == before


def test_only_so_many_people_stay_loaded(bare, meta_down, monkeypatch):
    monkeypatch.setattr(generation, "KEPT_LOADED", 2)
    monkeypatch.setattr(bare, "plan", replace(bare.plan, folds=False))
    for seed in range(4):
        use_people(bare, [person_of(bare, meta_down, seed)])
    assert len(bare.transformer.peft_config) <= 2
    assert person_of(bare, meta_down, 3).adapter_name in bare.transformer.peft_config


def test_a_picture_depends_on_its_prompt_and_seed_alone(bare, meta_down):
    one = person_of(bare, meta_down)
    together = pictures(bare, [one], [PROMPT, "in the green park"], count=3, seed=5)
    assert len(together) == 6
    assert np.array_equal(together[4], pictures(bare, [one], ["in the green park"], seed=6)[0])
    assert not np.array_equal(together[0], together[1])


def test_sizes_are_width_and_height(bare):
    assert next(generate(bare, ["a park"], config=GenerateConfig(size=(48, 32)))).size == (48, 32)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"size": (33, 32)}, "multiples of 16"), ({"size": (0, 32)}, "multiples"), ({"steps": 0}, "Steps"), ({"guidance": -1.0}, "guidance"),
     ({"count": 0}, "Count"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_values_out_of_range_are_a_sentence(base, config, words):
    with pytest.raises(MetaLoraError, match=words):
        next(generate(base, ["a park"], config=GenerateConfig(**config)))


def test_an_empty_prompt_is_a_sentence(base):
    with pytest.raises(MetaLoraError, match="empty"):
        next(generate(base, ["a park", " "]))


def test_steps_are_told_and_may_stop(base):
    told = []
    list(generate(base, ["a", "b"], config=GenerateConfig(count=2, steps=2), on_step=lambda done, of: told.append((done, of))))
    assert told == [(i, 8) for i in range(1, 9)]

    def stop(done, of):
        raise Cancelled

    with pytest.raises(Cancelled):
        next(generate(base, ["a"], on_step=stop))


def test_the_png_says_what_made_it(bare, meta_down, tmp_path):
    one = person_of(bare, meta_down)
    prompt = "a photo of {person}, ünïcode"
    image = next(generate(bare, [prompt], [one], GenerateConfig(seed=7)))
    with Image.open(save_png(image, tmp_path / "a.png")) as again:
        info = again.info
        assert np.array_equal(pixels(again), pixels(image))
    assert info["Comment"] == "AI-generated" and info["prompt"] == prompt.replace("{person}", "sks woman") and info["seed"] == "7"
    assert bare.fingerprint in info["base"] and json.loads(info["identity"]) == {one.sha256: 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# ---- base


def test_opening_a_pipeline_of_no_known_family_is_a_sentence(tiny_base, tmp_path):
    with pytest.raises(MetaLoraError, match="no diffusers pipeline"):
        Base.open(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(MetaLoraError, match="StableDiffusionPipeline; only FluxPipeline and Flux2KleinPipeline are"):
        Base.open(str(tmp_path))
    (tmp_path / "model_index.json").write_text((tiny_base / "model_index.json").read_text())
    with pytest.raises(MetaLoraError, match="cannot be read"):
        Base.open(str(tmp_path))


# ---- personalizer


class OneFace:
    """Stands in for the face finder: the face fills the middle of every photo."""

    whole, box, embedding = False, (8, 8, 24, 24), np.eye(1, 512, dtype=np.float32)[0]

    def pick(self, image, face=None):
        return self


@pytest.fixture
def personalizer(bare, meta_down, config):
    quick = replace(bare, settings=replace(bare.settings, adapt=replace(config, crops=3)))
    made = Personalizer(quick, meta_down)
    made._finders["face"] = OneFace()
    return made


@pytest.fixture(scope="module")
def snapshot():
    return Image.effect_noise((32, 40), 90).convert("RGB")


def test_photo_to_identity_to_pictures(personalizer, snapshot, tmp_path):
    reports = []
    identity = personalizer.adapt(snapshot, domain="woman", seed=3, on_step=reports.append)
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6] and identity.seed == 3
    one = personalizer.generate(identity, PROMPT, count=2)
    again = personalizer.adapt([snapshot], "woman", seed=3)
    assert again.sha256 == identity.sha256
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, personalizer.generate(again, PROMPT, count=2)))
    both = personalizer.generate([identity, (again, 0.5)], "two people")
    assert len(both) == 1 and len(personalizer.generate(None, "a park")) == 1
    assert personalizer.export(identity, tmp_path / "k.safetensors", format="kohya").is_file()


def test_a_photo_is_encoded_once(personalizer, snapshot):
    config = personalizer.base.settings.adapt
    first = personalizer.encode([snapshot], "woman", config)
    assert personalizer.encode([snapshot.copy()], "woman", replace(config, steps=9)) is first
    for photos, seed in (([snapshot.rotate(180)], 0), ([snapshot], 1), ([snapshot, snapshot], 0), ([snapshot.resize((40, 32))], 0)):
        other = personalizer.encode(photos, "woman", replace(config, seed=seed))
        assert other is not first
    again = personalizer.encode([snapshot], "woman", config)
    assert again is not first and torch.equal(again.mean, first.mean)


def test_without_a_meta_down_a_person_is_an_ordinary_lora(bare, config, snapshot, tiny_base, tmp_path):
    plain = replace(config, crops=2, steps=4, learning_rate=0.05)
    personalizer = Personalizer(replace(bare, settings=replace(bare.settings, plain=plain, plain_rank=3)))
    personalizer._finders["face"] = OneFace()
    assert personalizer.is_plain and not personalizer.domains
    reports = []
    identity = personalizer.adapt(snapshot, "cat", on_step=reports.append)
    assert len(reports) == 4 and identity.is_plain and identity.rank == 3 and identity.prompt_words == "sks cat"
    identity = Identity.load(identity.save(tmp_path / "cat.safetensors"))
    shown = pixels(personalizer.generate(identity, "a photo of {person}")[0])
    assert (shown != pixels(personalizer.generate(None, "a photo of sks cat")[0])).any()
    alone = type(bare.pipeline).from_pretrained(tiny_base, dtype=torch.float32)
    alone.load_lora_weights(str(personalizer.export(identity, tmp_path / "lora.safetensors")))
    s = personalizer.base.settings
    with seeded(0, personalizer.base.device) as generator:
        there = alone(prompt="a photo of sks cat", width=s.resolution, height=s.resolution, num_inference_steps=s.inference_steps,
                      guidance_scale=s.guidance, max_sequence_length=s.max_sequence_length, generator=generator).images[0]  # fmt: skip
    assert abs(shown - pixels(there)).max() <= 2


def test_cancelling_keeps_nothing(personalizer, snapshot):
    unload_people(personalizer.base)
    before = state_hash(personalizer.base.transformer)

    def stop(report):
        if report.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        personalizer.adapt(snapshot, "woman", on_step=stop)
    assert state_hash(personalizer.base.transformer) == before


def test_a_training_left_behind_ends_when_other_work_starts(personalizer, snapshot):
    unload_people(personalizer.base)
    before = state_hash(personalizer.base.transformer)
    left = personalizer.adapt_steps(snapshot, "woman", preview_every=2)
    assert next(left).preview is None and next(left).preview.size == (32, 32)
    personalizer.generate(None, "a park")
    assert state_hash(personalizer.base.transformer) == before


def test_a_preview_that_the_memory_does_not_do_for_is_left_out(personalizer, snapshot, monkeypatch):
    def render(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("metalora.personalizer.render", render)
    monkeypatch.setattr(personalizer.base, "notice", "")
    reports, identity = run(personalizer.adapt_steps(snapshot, "woman", 3, preview_every=1))
    assert [report.preview for report in reports] == [None] * 3 and identity.steps == 3
    assert "no memory for a preview" in personalizer.base.notice


def test_the_domain_must_fit_the_meta_down(personalizer, snapshot):
    assert personalizer.domains == ["woman"]
    with pytest.raises(MetaLoraError, match="for the domain woman, not man"):
        personalizer.adapt(snapshot, "man")
    with pytest.raises(MetaLoraError, match="Steps must be"):
        personalizer.adapt(snapshot, "woman", steps=0)


def test_meta_downs_are_found_in_a_folder_of_several(bare, tmp_path):
    with pytest.raises(MetaLoraError, match="no Meta-Down for the domain woman of the base tiny"):
        Personalizer(bare).meta_down("woman")
    made = make_meta_down(bare, bare.settings.adapter)
    made.save(tmp_path / "woman")
    opened = Personalizer(bare, str(tmp_path))
    assert opened.domains == ["woman"] and opened.meta_down("woman").sha256 == made.sha256
    assert Personalizer(bare, str(tmp_path / "woman")).meta_down("woman").sha256 == made.sha256
    with pytest.raises(MetaLoraError, match="domain man in .*; it has woman"):
        opened.meta_down("man")
    with pytest.raises(MetaLoraError, match="for the domain woman, not man"):
        Personalizer(bare, str(tmp_path / "woman")).meta_down("man")


def test_opening_checks_the_meta_down_against_the_base(tiny_base, bare, tmp_path):
    made = make_meta_down(bare, bare.settings.adapter)
    made.save(tmp_path / "fits")
    assert Personalizer.open(str(tiny_base), str(tmp_path / "fits"), "cpu").domains == ["woman"]
    replace(made, base="other", base_fingerprint="0" * 64).save(tmp_path / "strange")
    with pytest.raises(MetaLoraError, match="learnt on the base other"):
        Personalizer.open(str(tiny_base), str(tmp_path / "strange"), "cpu")


def test_an_identity_of_another_base_is_refused(personalizer, meta_down):
    stranger = replace(make(personalizer.base, meta_down), base="other", base_fingerprint="0" * 64)
    for act in (lambda: personalizer.generate(stranger, "a park"), lambda: personalizer.export(stranger, "x.safetensors")):
        with pytest.raises(MetaLoraError, match="made on the base other"):
            act()
