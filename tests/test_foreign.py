"""Meta-Downs of files that other code wrote: whatever their names, what fits is found, and the rest is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from metalora import MetaLoraError
from metalora.adapter import find_targets
from metalora.cli import main
from metalora.foreign import convert, place, read_layers
from metalora.metadown import MetaDown

RANK, META_RANK = 1, 5


def factors(base, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Down, Mid and Up of every layer of the base that is adapted."""
    draw = torch.Generator().manual_seed(seed)
    layers = find_targets(base.transformer, base.settings.adapter.targets)
    sizes = {name: ((META_RANK, m.in_features), (RANK, META_RANK), (m.out_features, RANK)) for name, m in layers.items()}
    return {name: tuple(torch.randn(*size, generator=draw) for size in each) for name, each in sizes.items()}


def written(path, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


NAMINGS = {
    "peft": lambda i, name, part: f"base_model.model.transformer.{name}.lora_{'ABC'[part]}.default.weight",
    "underscores": lambda i, name, part: f"lora_unet_{name.replace('.', '_')}.{('down', 'mid', 'up')[part]}.weight",
    "numbers": lambda i, name, part: f"adapters.{i}.{('w_shared', 'w_mid', 'w_up')[part]}",
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("turned", [False, True])
def test_every_layer_is_found_whatever_its_name(base, tmp_path, naming, turned):
    all_factors = factors(base)
    tensors = {NAMINGS[naming](i, name, part): t.T if turned else t for i, (name, each) in enumerate(all_factors.items()) for part, t in enumerate(each)}
    found, placed = convert(written(tmp_path / "f.safetensors", tensors), str(base.folder), "woman", "theirs")
    assert list(found.tensors) == list(all_factors) and not placed.left_out and not placed.empty
    assert all(torch.equal(found.tensors[name], down) for name, (down, _, _) in all_factors.items())
    assert len(placed.by_order if naming == "numbers" else placed.by_name) == len(all_factors)
    assert (found.adapter.meta_rank, found.adapter.rank, found.adapter.targets) == (META_RANK, RANK, base.settings.adapter.targets)


def test_of_the_base_only_names_and_shapes_are_asked(base, tmp_path):
    bare = tmp_path / "bare"
    for path in base.folder.rglob("*"):
        if path.is_file() and (path.suffix == ".json" or path.parent.name == "transformer"):
            (bare / path.relative_to(base.folder)).parent.mkdir(parents=True, exist_ok=True)
            (bare / path.relative_to(base.folder)).symlink_to(path)
    tensors = {f"{name}.down": down for name, (down, _, _) in factors(base).items()}
    found, _ = convert(written(tmp_path / "f.safetensors", tensors), str(bare), "woman", "theirs")
    assert (found.base, found.base_fingerprint, list(found.tensors)) == (base.name, base.fingerprint, list(factors(base)))


def test_downs_alone_are_enough(base, tmp_path):
    downs = {f"transformer.{name}.meta_down.weight": down for name, (down, _, _) in factors(base).items()}
    found, placed = convert(written(tmp_path / "f.safetensors", downs), str(base.folder), "man", "theirs")
    assert len(placed.by_name) == len(downs) and found.domain == "man"


def test_some_layers_are_some_layers(base, tmp_path):
    some = dict(list(factors(base).items())[::2])
    tensors = {NAMINGS["peft"](0, name, part): t for name, each in some.items() for part, t in enumerate(each)}
    found, placed = convert(written(tmp_path / "f.safetensors", tensors), str(base.folder), "woman", "theirs")
    assert list(found.tensors) == list(some) == list(find_targets(base.transformer, found.adapter.targets))
    assert len(placed.empty) == len(factors(base)) - len(some)
    again = MetaDown.load(found.save(tmp_path / "folder"))
    assert again.sha256 == found.sha256 and again.adapter == found.adapter


def test_what_fits_nowhere_is_said_and_never_guessed(base, tmp_path):
    tensors = {NAMINGS["peft"](0, name, part): t for name, each in factors(base).items() for part, t in enumerate(each)}
    tensors |= {"other.3.down": torch.randn(META_RANK, 977), "other.4.a": torch.randn(3, 7), "other.4.b": torch.randn(9, 3), "alpha": torch.tensor(1.0)}
    _, placed = convert(written(tmp_path / "f.safetensors", tensors), str(base.folder), "woman", "theirs")
    assert sorted(line.split(":")[0].split(",")[0] for line in placed.left_out) == ["1 layers 977 wide", "1 tensors that are no matrices", "other.4"]
    numbered = {NAMINGS["numbers"](i, name, part): t for i, (name, each) in enumerate(list(factors(base).items())[1:]) for part, t in enumerate(each)}
    _, placed = convert(written(tmp_path / "g.safetensors", numbered), str(base.folder), "woman", "theirs")
    assert any("which is which is not known" in line for line in placed.left_out) and placed.empty


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 4), st.permutations([0, 1, 2]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_factors_are_told_apart_by_their_shapes(d_in, d_out, rank, more, order, turned):
    meta_rank = rank + more
    if meta_rank >= min(d_in, d_out) or (more == 0 and d_in == d_out):  # a Down that is square looks the same turned
        return
    matrices = [torch.randn(meta_rank, d_in), torch.randn(rank, meta_rank), torch.randn(d_out, rank)]
    tensors = {f"layer.{'xyz'[i]}": (matrices[i].T if turned else matrices[i]) for i in order}
    layers, unread = read_layers(tensors)
    (layer,) = layers.values()
    assert not unread and layer.down.shape[0] in (meta_rank, rank)
    if more:
        assert torch.equal(layer.down, matrices[0]) and (layer.rank, layer.d_out) == (rank, d_out)


def test_a_layer_goes_where_its_whole_name_points():
    layers, _ = read_layers({"net.blocks.1.to_q.down": torch.randn(2, 8), "net.blocks.11.to_q.down": torch.randn(2, 8)})
    placed = place(layers, {"blocks.1.to_q": (8, 8), "blocks.11.to_q": (8, 8)})
    assert torch.equal(placed.downs["blocks.1.to_q"], layers["net.blocks.1.to_q"].down) and len(placed.by_name) == 2


@pytest.mark.one_family
def test_the_command_says_what_went_where_and_refuses_what_it_cannot_read(base, tmp_path, capsys):
    tensors = {NAMINGS["peft"](0, name, part): t for name, each in factors(base).items() for part, t in enumerate(each)}
    source = written(tmp_path / "f.safetensors", tensors | {"alpha": torch.tensor(1.0)})
    arguments = ["convert", str(source), "--domain", "woman", "--base", str(base.folder), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="^0$"):
        main(arguments)
    said = capsys.readouterr().out
    assert f"{len(factors(base))} layers placed by name, 0 by shape and order" in said and "not placed: 1 tensors that are no matrices" in said
    assert MetaDown.load(tmp_path / "out").base_fingerprint == base.fingerprint
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert "holds a Meta-Down already" in capsys.readouterr().err
    with pytest.raises(MetaLoraError, match="Nothing in g.safetensors fits"):
        convert(written(tmp_path / "g.safetensors", {"a.down": torch.randn(3, 977)}), str(base.folder), "woman", "theirs")
    (tmp_path / "h.pt").write_bytes(b"\x80\x02whatever")
    with pytest.raises(MetaLoraError, match="was not opened"):
        convert(tmp_path / "h.pt", str(base.folder), "woman", "theirs")
    mixed = {f"transformer.{name}.down": torch.randn(2 + i % 2, down.shape[1]) for i, (name, (down, _, _)) in enumerate(factors(base).items())}
    with pytest.raises(MetaLoraError, match="have different ranks \\(2, 3\\); a Meta-Down has one"):
        convert(written(tmp_path / "m.safetensors", mixed), str(base.folder), "woman", "theirs")
