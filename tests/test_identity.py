"""Identity files and Meta-Down folders: exact round trips, exact exports, and one plain sentence for each fault."""

from __future__ import annotations

import errno
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metalora import Identity, MetaLoraError
from metalora import files
from metalora.config import AdapterConfig
from metalora.identity import kohya_names
from metalora.metadown import MetaDown

from .conftest import make_meta_down


def make(base, meta_down, seed=0) -> Identity:
    g = torch.Generator().manual_seed(seed)
    shape = meta_down.adapter
    factors = {}
    for name, down in meta_down.tensors.items():
        out = base.transformer.get_submodule(name).out_features
        factors[name] = (torch.randn(shape.rank, shape.meta_rank, generator=g), 0.2 * torch.randn(out, shape.rank, generator=g))
    return Identity(
        factors, meta_down.base, meta_down.base_fingerprint, meta_down.name, meta_down.sha256, shape.rank, shape.meta_rank, shape.scale,
        "woman", "woman", "sks", 5, seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def person(base, meta_down) -> Identity:
    return make(base, meta_down)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k]))


def wrapped(tensors):
    return {name: (tensor,) for name, tensor in tensors.items()}


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(1, 3), meta_rank=st.integers(1, 5), layers=st.integers(1, 4), trigger=st.text(min_size=1, max_size=9), plain=st.booleans(), data=st.data())
def test_saving_and_loading_is_exact(tmp_path_factory, rank, meta_rank, layers, trigger, plain, data):
    outs = data.draw(st.lists(st.integers(1, 7), min_size=layers, max_size=layers))
    factors = {f"blocks.{i}.Ünï {i}": (torch.randn(rank, meta_rank), torch.randn(out, rank)) for i, out in enumerate(outs)}
    one = Identity(factors, "b", "f" * 64, "m", "a" * 64, rank, meta_rank, 0.5, "woman", "woman", trigger, 7, 3)
    one = replace(one, downs={name: torch.randn(meta_rank, 4) for name in factors}) if plain else one
    path = one.save(tmp_path_factory.mktemp("id") / "mé.safetensors")
    other = Identity.load(path)
    assert same(one.factors, other.factors) and same(wrapped(one.downs), wrapped(other.downs)) and one._header() == other._header() and one.sha256 == other.sha256


def test_a_file_with_the_licence_of_its_base_has_the_same_bytes_every_time(person, tmp_path):
    """Its header has two entries then, which safetensors writes in an order of the moment."""
    ours = replace(person, base="black-forest-labs/FLUX.1-dev")
    written = {ours.save(tmp_path / f"{n}.safetensors").read_bytes() for n in range(20)}
    assert len(written) == 1 and same(Identity.load(tmp_path / "0.safetensors").factors, person.factors)


def test_the_file_holds_what_the_contract_says_and_nothing_else(person, tmp_path):
    path = person.save(tmp_path / "me.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["metalora"])
        assert set(header) == {"format_version", "base", "base_fingerprint", "meta_down", "meta_down_sha256", "rank", "meta_rank",
                               "scale", "domain", "noun", "trigger", "steps", "seed"}  # fmt: skip
        assert {key.rsplit(".", 1)[1] for key in file.keys()} == {"mid", "up"}
    assert [p.name for p in tmp_path.iterdir()] == ["me.safetensors"]


def test_another_base_or_meta_down_is_refused_with_both_names(person, base):
    with pytest.raises(MetaLoraError, match=r"made on the base tiny .* is other"):
        person.check("other", "0" * 64)
    with pytest.raises(MetaLoraError, match=r"Meta-Down tiny-0 .* is tiny-9"):
        person.to_lora(make_meta_down(base, base.settings.adapter, seed=9))
    with pytest.raises(MetaLoraError, match=r"learnt on the base tiny .* here is other"):
        make_meta_down(base, base.settings.adapter).check_base("other", "0" * 64)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["me.safetensors", "me.pt", "me.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(MetaLoraError, match="pickle"):
        Identity.load(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(MetaLoraError, match="pickle"):
        Identity.load(path)


@settings(max_examples=30, deadline=None)
@given(junk=st.binary(max_size=200))
def test_any_other_bytes_are_one_sentence(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "x.safetensors"
    path.write_bytes(junk)
    with pytest.raises(MetaLoraError, match="."):
        Identity.load(path)


@settings(max_examples=30, deadline=None)
@given(cut=st.floats(0, 1), at=st.floats(0, 1))
def test_a_damaged_file_never_passes_unseen_as_another_kind_of_fault(tmp_path_factory, base, meta_down, cut, at):
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    make(base, meta_down).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * (len(whole) - 1))])
    with pytest.raises(MetaLoraError):
        Identity.load(path)
    header = bytearray(whole)
    header[int(at * 600)] ^= 0x41
    path.write_bytes(bytes(header))
    try:
        Identity.load(path)
    except MetaLoraError:
        pass


def test_other_safetensors_files_and_missing_ones_are_one_sentence(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(MetaLoraError, match="not an identity file"):
        Identity.load(tmp_path / "lora.safetensors")
    with pytest.raises(MetaLoraError, match="There is no file"):
        Identity.load(tmp_path / "none.safetensors")


def test_a_newer_format_says_so(person, tmp_path):
    path = replace(person, format_version=99).save(tmp_path / "me.safetensors")
    with pytest.raises(MetaLoraError, match="newer"):
        Identity.load(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(person, tmp_path, monkeypatch):
    path = person.save(tmp_path / "me.safetensors")
    before = path.read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(MetaLoraError, match="disk is full"):
        replace(person, seed=1).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_meta_down_folder_comes_back_exactly(meta_down, tmp_path):
    again = MetaDown.load(meta_down.save(tmp_path / "m"))
    assert again.sha256 == meta_down.sha256 and again.adapter == meta_down.adapter and again.name == meta_down.name
    assert all(torch.equal(again.tensors[k], v) for k, v in meta_down.tensors.items())
    assert meta_down.sha256 in (tmp_path / "m" / "README.md").read_text()
    tensors = load_file(tmp_path / "m" / "meta_down.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "m" / "meta_down.safetensors")
    with pytest.raises(MetaLoraError, match="damaged"):
        MetaDown.load(tmp_path / "m")
    with pytest.raises(MetaLoraError, match="not a Meta-Down folder"):
        MetaDown.load(tmp_path)


@pytest.mark.parametrize("rank", [1, 3])
def test_kohya_names_hold_the_same_weights(base, rank):
    meta_down = make_meta_down(base, AdapterConfig(rank, 4, 0.75))
    lora = make(base, meta_down).to_lora(meta_down)
    kohya = kohya_names(lora, base.family.kohya)

    def delta(prefix):
        assert float(kohya[f"{prefix}.alpha"]) == len(kohya[f"{prefix}.lora_down.weight"])
        return kohya[f"{prefix}.lora_up.weight"] @ kohya[f"{prefix}.lora_down.weight"]

    def parts(block, *names):
        return torch.cat([lora[f"transformer.{block}.{n}.lora_B.weight"] @ lora[f"transformer.{block}.{n}.lora_A.weight"] for n in names])

    for target, sources in base.family.kohya.double.items():
        torch.testing.assert_close(delta(f"lora_unet_double_blocks_0_{target}"), parts("transformer_blocks.0", *sources))
    for target, sources in base.family.kohya.single.items():
        torch.testing.assert_close(delta(f"lora_unet_single_blocks_1_{target}"), parts("single_transformer_blocks.1", *sources))
    assert len(kohya) == 3 * (8 + 2 * 2)


def test_kohya_refuses_what_it_cannot_name(base, meta_down, person):
    lora = person.to_lora(meta_down)
    fewer = {k: v for k, v in lora.items() if "to_q" not in k}
    with pytest.raises(MetaLoraError, match="q, k and v"):
        kohya_names(fewer, base.family.kohya)
    with pytest.raises(MetaLoraError, match="no name"):
        kohya_names({**lora, "transformer.transformer_blocks.0.else.lora_A.weight": torch.zeros(1, 2)}, base.family.kohya)
    with pytest.raises(MetaLoraError, match="no name for transformer.x_embedder"):
        kohya_names({**lora, "transformer.x_embedder.lora_A.weight": torch.zeros(1, 2)}, base.family.kohya)
    with pytest.raises(MetaLoraError, match="no export format"):
        person.export("x.safetensors", meta_down, base.family, "bin")
