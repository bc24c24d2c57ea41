"""What fits a card: bytes by config against bytes that are there, the plan that follows, and going down when memory runs out."""

from __future__ import annotations

import importlib.metadata
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.cuda._utils import _get_device_index
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.float8.inference import Float8MMConfig
from torchao.quantization.quantize_.workflows import Float8Tensor, QuantizeTensorToFloat8Kwargs
from transformers import Qwen3Config, Qwen3ForCausalLM

import metalora.base
from metalora import MetaLoraError, frozen, plan
from metalora.adapt import adapt, adapt_plain
from metalora.adapter import attach, find_targets, trainable
from metalora.base import Base, _load_pipeline
from metalora.config import AdapterConfig, BaseSettings
from metalora.families import KNOWN
from metalora.family import Text
from metalora.flat import AtOnce, end_to_end
from metalora.fold import Fold
from metalora.generate import GenerateConfig, Person, generate, unload_people
from metalora.plan import GIB, PLANS, Model, Work, choose
from metalora.quantise import configs_for

from .conftest import run
from .parts import qwen_tokenizer

BY_NAME = {p.name: p for p in PLANS}


class Peak(TorchDispatchMode):
    """Bytes of the tensors that come to be while it is on: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.alive | given:
                size = tensor.untyped_storage().nbytes()
                self.alive.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self.gone, key, size)
        return result

    def gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.fixture(scope="module", params=KNOWN, ids=lambda name: name.rpartition("/")[2])
def known(request) -> Model:
    """Each full-size model whose configs stand in the code."""
    return Model.known(request.param)


@pytest.fixture(scope="module")
def needs(known) -> dict[str, dict[str, plan.Needs]]:
    """What it needs for each kind of learning."""
    return {kind: known.needs(work) for kind, work in WORK.items()}


FLUX_DEV, KLEIN_4B = KNOWN  # the names
WORK = {kind: Work.of(BaseSettings(), kind) for kind in ("person", "plain", "stage 1")}


def on_gpu(base: Base, name: str) -> Base:
    """The tiny base as if a card had it under that plan; only that its card is the CPU."""
    model = Model.of(base.folder)
    chosen = choose(0, None, model.needs(Work.of(base.settings)), name)
    carded = replace(base, pipeline=_load_pipeline(base.folder, base.family, chosen.plan), choice=chosen, plan=chosen.plan, precision=chosen.plan.precision, fold=Fold(), _at_work=Counter())
    carded._settle()
    return carded


# ---- bytes


# Transformer and large text encoder. The latter two, and the roundings 12 and 4 billion of the former, are their makers' own figures.
PARAMETERS = {FLUX_DEV: (11_901_408_320, 4_762_310_656), KLEIN_4B: (3_875_544_576, 4_022_468_096)}


def test_full_size_models_have_the_parameters_that_their_makers_name(known):
    parameters = [sum(p.numel() for p in known.modules[part].parameters()) for part in ("transformer", known.family.large_text_encoder)]
    assert tuple(parameters) == PARAMETERS[known.family.known]
    assert all(p.is_meta for module in known.modules.values() for p in module.parameters())
    assert known.tokens(1024) == 4096 and known.width == 3072


def test_predicted_weights_are_those_that_are_loaded(base):
    model = Model.of(base.folder)
    for part in base.family.networks:
        loaded = sum(p.numel() * p.element_size() for p in getattr(base.pipeline, part).parameters())
        assert model.weights(part, "float32") == loaded == 2 * model.weights(part, "bf16")


def test_fewer_bits_take_fewer_bytes(known):
    sizes = [known.weights("transformer", precision) for precision in ("float32", "bf16", "fp8", "4-bit")]
    assert sizes == sorted(sizes, reverse=True) and 0.5 < sizes[2] / sizes[1] < 0.51 and 0.25 < sizes[3] / sizes[1] < 0.26
    assert known.weights("vae", "4-bit") == known.weights("vae", "bf16") == known.weights("vae", "fp8")
    text = known.family.large_text_encoder
    assert known.weights(text, "4-bit") < known.weights(text, "fp8") == known.weights(text, "bf16")


def test_predicted_fp8_weights_are_those_that_torchao_makes(base):
    transformer = on_gpu(base, "fp8").transformer
    parts = [*transformer.parameters(), *(layer.scale for layer in transformer.modules() if isinstance(layer, frozen.FrozenLinear))]
    assert Model.of(base.folder).weights("transformer", "fp8") == sum(t.numel() * t.element_size() for t in parts)


def test_predicted_4_bit_weights_are_those_that_bitsandbytes_makes():
    layer = bnb.nn.Linear4bit(512, 768, quant_type="nf4", compress_statistics=True).to("cpu")
    state = [t for t in layer.weight.quant_state.as_dict().values() if isinstance(t, torch.Tensor)]
    bytes_there = sum(t.numel() * t.element_size() for t in [layer.weight, *state]) + 4  # an offset beside the tables
    assert plan.count(nn.Sequential(nn.Linear(512, 768, bias=False))).size("4-bit") == bytes_there


# ---- activations


class CardsNorm(torch.autograd.Function):
    """Keeps what the RMS norm of a card keeps. The meta device knows only the one that is put together from small steps."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), None


def the_step(model: Model, transformer: nn.Module, work: Work, device: str, dtype: torch.dtype, checkpointing: bool) -> tuple[int, int, int]:
    """Bytes at most in a training step with zeros; those predicted without the adapter; those of its gradients, which come while the rest goes."""
    shape = AdapterConfig(work.rank, work.meta_rank)
    downs = {n: torch.zeros(work.meta_rank, layer.in_features, device=device) for n, layer in find_targets(transformer, work.targets).items()}
    b, side = work.batch, work.train_resolution // 16
    zeros = partial(torch.zeros, device=device, dtype=dtype)
    text = Text(zeros(b, *shape) for shape in model.family.text_shapes(transformer, work.caption_tokens))
    given = zeros(b, side**2, transformer.config.in_channels), zeros(b), text, model.family.image_ids(side, side).to(device), 1.0
    with attach(transformer, downs, shape) as heads, model.family.hastened(transformer):
        heads.train_down(work.learns_down)
        at_once = AtOnce(heads, [end_to_end(list(trainable(heads)))], dtype)
        with Peak() as watched, at_once():
            model.family.velocity(transformer, *given).float().square().mean().backward()
        learns = sum(4 * p.numel() for p in trainable(heads))
    return watched.most, model.step(work, checkpointing, dtype.itemsize) - model._adapter(work, 0), learns


@pytest.mark.parametrize("learns_down", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_of_full_size_takes_what_is_predicted(known, monkeypatch, learns_down, checkpointing):
    """With its real widths and lengths and a fifth of its blocks on the meta device, through the kernels that a card would choose."""
    fewer = {"num_layers": 4, "num_single_layers": 8}
    full = Model(known.family, {**known.configs, "transformer": {**known.configs["transformer"], **fewer}})
    flash = lambda query, key, value, **more: torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]  # noqa: E731
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight=None, eps=None: CardsNorm.apply(x, weight))
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    transformer = full.modules["transformer"].to(torch.bfloat16)
    getattr(transformer, f"{'en' if checkpointing else 'dis'}able_gradient_checkpointing")()
    work = replace(WORK["person"], learns_down=learns_down, batch=4 if learns_down else 1)  # as stage 1 and stage 2 have it
    measured, predicted, gradients = the_step(full, transformer, work, "meta", torch.bfloat16, checkpointing)
    assert (0.85 if checkpointing else 0.98) * predicted < measured < 1.03 * predicted + gradients  # rather too much than too little


@pytest.mark.parametrize("double,single,tokens,batch", [(1, 1, 64, 1), (3, 1, 32, 2), (1, 3, 128, 1)])
def test_a_training_step_of_any_shape_takes_what_is_predicted(base, double, single, tokens, batch):
    """Computed, not only watched: on the CPU, where layer inputs are kept whatever learns."""
    config = {**base.transformer.config, "num_layers": double, "num_single_layers": single, "num_attention_heads": 8}
    model = Model(base.family, {**Model.of(base.folder).configs, "transformer": config})
    transformer = type(base.transformer).from_config(config)
    work = Work(512, 512, tokens, tokens, batch, 1, 1, 4, True, WORK["person"].targets)
    measured, predicted, gradients = the_step(model, transformer, work, "cpu", torch.float32, False)
    assert 0.85 * predicted < measured < 1.1 * predicted + gradients


def test_encoding_texts_with_qwen_takes_what_is_predicted():
    """With more words than anything else holds, as at full size."""
    shape = dict(vocab_size=4000, hidden_size=64, intermediate_size=256, num_hidden_layers=28, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    qwen = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    with torch.no_grad(), Peak() as watched:
        Flux2KleinPipeline._get_qwen3_prompt_embeds(qwen, qwen_tokenizer(["park"]), ["a park"] * 3, max_sequence_length=64)
    assert 0.95 * watched.most < 4 * KNOWN[KLEIN_4B].numbers_of_texts({"text_encoder": qwen}, 3, 64) < 1.05 * watched.most


# ---- choosing


@pytest.mark.parametrize("kind", WORK)
@given(gigabytes=st.floats(1, 200), more=st.floats(0, 50))
def test_a_larger_card_never_gets_a_slower_plan_and_none_is_overfilled(needs, kind, gigabytes, more):
    chosen = []
    for size in (gigabytes * GIB, (gigabytes + more) * GIB):
        try:
            choice = choose(size, None, needs[kind])
        except MetaLoraError:
            chosen.append(len(PLANS))
            continue
        need = choice.needs[choice.plan.name]
        assert need.gpu == max(need.phases.values()) + plan.RESERVE <= size
        assert list(choice.passed_over) == [p.name for p in PLANS[: PLANS.index(choice.plan)]]
        chosen.append(PLANS.index(choice.plan))
    assert chosen[1] <= chosen[0]


CARDS = {  # GiB → the plan for it
    FLUX_DEV: {80: "folding", 48: "resident", 40: "resident", 24: "fp8", 16: "4-bit", 12: "4-bit-checkpointing", 10: "offload"},
    KLEIN_4B: {32: "folding", 24: "resident", 16: "fp8", 12: "4-bit", 8: "4-bit", 6: "offload"},
}


def test_cards_of_every_size(known, needs):
    for card, name in CARDS[known.family.known].items():
        choice = choose(card * GIB, None, needs["person"])
        assert choice.plan == BY_NAME[name] and choice.says.startswith(f"{name}: ")
        for passed, reason in choice.passed_over.items():
            assert reason.startswith(f"{passed} needs ") and reason.endswith(f"{card}.0 GiB are there.")


def test_a_card_too_small_a_machine_too_small_and_a_cpu(known, needs):
    card, least, machine = {FLUX_DEV: (6, 8, 32), KLEIN_4B: (4, 5, 16)}[known.family.known]
    with pytest.raises(MetaLoraError, match=rf"needs {least}\.\d GiB of free memory on the card at the least, and {card}\.0 GiB are free; close other programs"):
        choose(card * GIB, None, needs["person"])
    with pytest.raises(MetaLoraError, match="and this machine has 16.0 GiB; use --base miniature"):
        choose(None, 16 * GIB, needs["person"])
    assert choose(None, 128 * GIB, needs["person"]).plan == plan.ON_CPU
    assert choose(80 * GIB, machine * GIB, needs["person"]).plan.name == "fp8"  # for bf16 weights come through system memory


def test_a_named_plan_is_taken_and_an_unknown_one_is_not(needs):
    assert choose(80 * GIB, None, needs["person"], "4-bit").plan == BY_NAME["4-bit"]
    with pytest.raises(MetaLoraError, match="no plan quick for a GPU; choose folding, resident, lean"):
        choose(80 * GIB, None, needs["person"], "quick")
    with pytest.raises(MetaLoraError, match="no plan fp8 on a CPU; choose cpu"):
        choose(None, None, needs["person"], "fp8")


def test_every_step_down_needs_less(needs):
    choice, at = choose(80 * GIB, None, needs["plain"]), PLANS[0]
    seen = []
    while at:
        seen.append(sum(choice.needs[at.name].phases.values()))
        at = choice.below(at)
    assert seen == sorted(set(seen), reverse=True) and len(seen) > 4
    assert choice.below(plan.ON_CPU) is None


def without(monkeypatch, *packages: str) -> None:
    """Nothing of these is installed."""
    version = importlib.metadata.version

    def found(name: str) -> str:
        if name in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", found)


def test_a_plan_whose_library_is_missing_is_passed_over(needs, known, monkeypatch):
    card = {FLUX_DEV: 24, KLEIN_4B: 16}[known.family.known] * GIB
    assert choose(card, None, needs["person"]).plan.name == "fp8"
    without(monkeypatch, "torchao")
    choice = choose(card, None, needs["person"])
    assert choice.plan.precision == "4-bit" and choice.passed_over["fp8"] == "fp8 needs torchao; run `pip install torchao==0.18.0`."
    assert all(BY_NAME[name].precision != "fp8" for name in [choice.plan.name, choice.below(BY_NAME["lean-checkpointing"]).name])
    without(monkeypatch, "torchao", "bitsandbytes")
    with pytest.raises(MetaLoraError, match="fp8 needs torchao; run"):
        choose(card, None, needs["person"])


def test_the_limit_is_set_for_the_gpu_in_use(monkeypatch):
    """torch takes a GPU without a number there for a mistake."""
    limits = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6, 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.update({_get_device_index(device): share}))
    assert plan.card(torch.device("cuda")) == 8 and plan.card(torch.device("cuda:3")) == 8 and limits == {1: 0.4, 3: 0.4}


def test_a_container_has_the_memory_that_it_may_take(tmp_path, monkeypatch):
    whole, limit = plan.system_memory(), tmp_path / "memory.max"
    monkeypatch.setattr(plan, "CONTAINER_LIMITS", (str(tmp_path / "none"), str(limit)))
    for said, memory in (("max\n", whole), ("1048576\n", 2**20), (f"{2**63 - 4096}\n", whole)):
        limit.write_text(said)
        assert plan.system_memory() == memory


def test_a_missing_library_is_a_sentence(monkeypatch):
    family = KNOWN[FLUX_DEV]
    without(monkeypatch, "torchao", "bitsandbytes")
    with pytest.raises(MetaLoraError, match="pip install bitsandbytes=="):
        configs_for("4-bit", torch.bfloat16, family)
    with pytest.raises(MetaLoraError, match="pip install torchao=="):
        configs_for("fp8", torch.bfloat16, family)
    assert configs_for("bf16", torch.bfloat16, family) == {}


# ---- going down


def fail_at(base: Base, monkeypatch, calls: list[int]):
    """The transformer runs out of memory at these calls of it."""
    velocity, seen = Base.velocity, []

    def failing(self, *given):
        seen.append(self.plan.name)
        predicted = velocity(self, *given)
        if len(seen) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predicted

    monkeypatch.setattr(Base, "velocity", failing)
    return seen


def test_memory_that_runs_out_while_learning_loses_nothing(base, meta_down, photo, config, monkeypatch, caplog):
    carded = on_gpu(base, "resident")
    _, whole = run(adapt(carded, meta_down, photo, config))
    seen = fail_at(carded, monkeypatch, [3, 6])
    reports, identity = run(adapt(carded, meta_down, photo, config))
    assert len(reports) == config.steps and len(set(seen)) == 3 and seen[0] == "resident" and carded.plan.name == seen[-1]
    assert identity.sha256 == whole.sha256  # bf16 under all of these plans, and checkpointing computes the same
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "ran out of memory with the plan resident; going on with " in said[0]


def test_memory_that_does_not_even_do_for_the_next_plan_s_weights_goes_down_further(base, meta_down, photo, config, monkeypatch, caplog):
    carded = on_gpu(base, "lean-checkpointing")
    load, precisions = metalora.base._load_pipeline, []

    def loading(folder, family, plan):
        precisions.append(plan.precision)
        if plan.precision == "fp8":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(folder, family, replace(plan, precision="bf16"))  # 4-bit weights are made on a card alone

    monkeypatch.setattr(metalora.base, "_load_pipeline", loading)
    fail_at(carded, monkeypatch, [2])
    hastened, which = Base.hastened, []
    monkeypatch.setattr(Base, "hastened", lambda self: (which.append(self.transformer), hastened(self))[1])
    reports, identity = run(adapt(carded, meta_down, photo, config))
    assert len(reports) == config.steps and identity.steps == config.steps
    assert len(which) == 2 and which[0] is not which[1] is carded.transformer
    assert precisions[0] == "fp8" and precisions[-1] == carded.precision == carded.plan.precision == "4-bit"
    assert [record.message for record in caplog.records][-1].endswith("checkpointing.")


def test_memory_that_runs_out_below_the_last_plan_is_a_sentence(base, meta_down, photo, config, monkeypatch):
    fail_at(base, monkeypatch, [2])
    with pytest.raises(MetaLoraError, match="not enough free memory"):
        run(adapt(base, meta_down, photo, config))
    assert all(isinstance(m, nn.Linear) for m in find_targets(base.transformer, base.settings.adapter.targets).values())


def test_going_down_to_fewer_bits_keeps_what_was_learnt(base, meta_down, photo, config, monkeypatch):
    carded = on_gpu(base, "lean-checkpointing")
    short = replace(config, steps=4)
    _, whole = run(adapt(carded, meta_down, photo, short))
    fail_at(carded, monkeypatch, [4])
    _, identity = run(adapt(carded, meta_down, photo, short))
    assert carded.plan.precision == "fp8" and not any(p.is_meta for p in carded.transformer.parameters())
    for name, (mid, up) in whole.factors.items():  # three of four steps are the same, the last differs by the weights' rounding
        torch.testing.assert_close(identity.factors[name][1], up, rtol=0.3, atol=0.02)
        assert torch.nn.functional.cosine_similarity(identity.factors[name][1].flatten(), up.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(("name", "below"), [("folding", "resident"), ("resident", "lean")])
def test_a_picture_that_the_memory_does_not_do_for_is_drawn_again(base, meta_down, photo, config, monkeypatch, name, below):
    carded = on_gpu(base, name)
    _, identity = run(adapt(base, meta_down, photo, config))
    person = Person(identity.to_lora(meta_down), "sks woman", identity.sha256)
    draw = partial(generate, carded, ["a photo of {person}"], [person], GenerateConfig(count=2))
    whole = [np.asarray(image).astype(int) for image in draw()]
    decode, calls, steps = carded.vae.decode, [], []

    def failing(*given, **more):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*given, **more)

    monkeypatch.setattr(carded.vae, "decode", failing)
    images = draw(on_step=lambda done, every: steps.append(done / every))
    again = [np.asarray(image).astype(int) for image in images]
    assert carded.plan.name == below and max(steps) == 1
    for one, other in zip(again, whole):  # folded into bf16 weights, and beside them, a person differs by the rounding
        assert abs(one - other).max() <= (12 if name == "folding" else 0)
    unload_people(carded)


# ---- fewer bits


def test_a_frozen_fp8_layer_has_the_gradient_of_its_weights_and_keeps_none(base):
    layer = find_targets(on_gpu(base, "fp8").transformer, base.settings.adapter.targets)["transformer_blocks.0.attn.to_q"]
    weight, x = layer.dequantised(), torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert isinstance(layer, frozen.FrozenLinear) and torch.equal(y, F.linear(x, weight, layer.bias))
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr(), layer.scale.data_ptr()}
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ weight)


def fp8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8 with a float32 scale for every row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def test_a_gradient_through_float8_products_is_that_of_the_weights():
    torch.manual_seed(0)
    data, scale = fp8_rows(torch.randn(48, 32) * torch.logspace(-2, 2, 48)[:, None])  # rows of very different size
    grad = torch.randn(2, 5, 48) * torch.logspace(-6, 0, 10).view(2, 5, 1)  # tokens too
    exact = grad @ (data.float() * scale)
    found = frozen.fp8_gradient(grad.bfloat16(), data, scale).float()
    assert found.shape == (2, 5, 32)
    assert torch.cosine_similarity(found, exact, dim=-1).min() > 0.998
    torch.testing.assert_close(found.norm(dim=-1), exact.norm(dim=-1), rtol=0.03, atol=0)
    assert (frozen.fp8_gradient(torch.zeros(3, 48), data, scale) == 0).all()


def test_a_layer_that_multiplies_float8_numbers_learns_through_them():
    """torchao makes such a layer on a card only; its tensor is at home on a CPU too."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    x, grad = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(7, 32, dtype=torch.bfloat16)
    wanted = torch.autograd.grad(layer(x), x, grad)[0]
    inputs = QuantizeTensorToFloat8Kwargs(mm_config=Float8MMConfig(use_fast_accum=True))
    weight = Float8Tensor.from_hp(layer.weight, mm_config=inputs.mm_config, act_quant_kwargs=inputs)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    frozen.freeze(layer)
    y = layer(x)
    assert isinstance(layer, frozen.FrozenLinear)
    found = torch.autograd.grad(y, x, grad)[0]
    assert torch.cosine_similarity(found.float(), wanted.float(), dim=-1).min() > 0.99


@pytest.mark.parametrize("plain", [False, True])
def test_a_person_is_learnt_through_float8_products(base, meta_down, photo, config, plain):
    """All linear layers are as a card that multiplies float8 numbers has them, those that nobody adapts too."""
    carded = on_gpu(base, "resident")
    inputs = QuantizeTensorToFloat8Kwargs(mm_config=Float8MMConfig(use_fast_accum=True))
    for layer in find_targets(carded.transformer, "").values():
        weight = Float8Tensor.from_hp(layer.weight, mm_config=inputs.mm_config, act_quant_kwargs=inputs)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    frozen.freeze(carded.transformer)
    work = adapt_plain(carded, carded.settings.adapter, "woman", photo, config) if plain else adapt(carded, meta_down, photo, config)
    reports, identity = run(work)
    assert reports[0].loss > 0 and any(up.abs().max() > 0 for _, up in identity.factors.values())


def in_four_bits(base: Base) -> Base:
    """As `on_gpu` under the plan 4-bit. diffusers makes such weights on a card alone, so they are made from those of 16 bits here."""
    carded = on_gpu(base, "resident")
    for name, layer in find_targets(carded.transformer, "").items():
        held = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4")
        held.load_state_dict(layer.state_dict())
        carded.transformer.set_submodule(name, held.to("cpu"))
    carded.transformer.requires_grad_(False)
    return carded


@pytest.mark.parametrize("name", ["fp8", "fp8-checkpointing", "4-bit"])
def test_a_person_is_learnt_and_drawn_with_fewer_bits(base, meta_down, photo, config, name):
    carded = in_four_bits(base) if name == "4-bit" else on_gpu(base, name)
    assert carded.transformer.is_gradient_checkpointing == name.endswith("checkpointing")
    reports, identity = run(adapt(carded, meta_down, photo, config))
    _, plain = run(adapt_plain(carded, carded.settings.adapter, "woman", photo, config))
    assert reports[0].loss > 0 and any(up.abs().max() > 0 for _, up in identity.factors.values()) and plain.is_plain
    person = Person(identity.to_lora(meta_down), "sks woman", identity.sha256)
    alone, with_person = (next(generate(carded, ["a photo"], people)) for people in ([], [person]))
    assert alone.tobytes() != with_person.tobytes()
    unload_people(carded)
    assert next(generate(carded, ["a photo"])).tobytes() == alone.tobytes()
