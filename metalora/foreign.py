"""Three-factor weights that other code published → a Meta-Down folder.

The names of such a file are not known beforehand, so matrices are told apart by how their shapes chain, and layers found first by
name and then, where names say nothing, by shape and order, if there are as many in the file as in the base. What was placed how,
and what was not, is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

from torch import Tensor

from . import hub
from .adapter import find_targets
from .base import fingerprint
from .errors import MetaLoraError
from .families import settings_of
from .files import load_tensors
from .metadown import MetaDown
from .plan import Model


@dataclass(frozen=True, eq=False)
class Layer:
    """What a foreign file has of one layer: Down (r_m, d_in), and the widths that tell where it belongs."""

    down: Tensor
    rank: int | None  # r, where Mid and Up are there too
    d_out: int | None

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a layer of these widths (d_in, d_out) can hold it."""
        return shape[0] == self.down.shape[1] and self.d_out in (None, shape[1])


@dataclass
class Placement:
    """Where the layers of a foreign file went."""

    downs: dict[str, Tensor] = field(default_factory=dict)  # of the base's layers
    by_name: list[str] = field(default_factory=list)
    by_order: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # layers of the base for which there was none
    left_out: list[str] = field(default_factory=list)  # a line each, of what could not be placed or read


def convert(path: str | Path, base: str, domain: str, name: str) -> tuple[MetaDown, Placement]:
    """A Meta-Down from the foreign safetensors file at `path`, and where everything went.

    Mid and Up in it belong to somebody and are left. Of the base, a folder or a Hub id, only the names and shapes of its layers are
    asked, so its weights stay on the disk. Raises MetaLoraError where nothing can be placed or ranks differ.
    """
    tensors, _ = load_tensors(path, "a foreign adapter")
    folder = hub.base_folder(base)
    settings = settings_of(folder)
    transformer = Model.of(folder).modules["transformer"]
    known, own = settings.name or base, settings.adapter
    targets = {n: (layer.in_features, layer.out_features) for n, layer in find_targets(transformer, own.targets).items()}
    layers, unread = read_layers(tensors)
    found = place(layers, targets)
    found.left_out[:0] = unread
    if not found.downs:
        raise MetaLoraError(f"Nothing in {Path(path).name} fits a layer of the base {known}; check that it was made for this base.")
    meta_ranks = sorted({len(down) for down in found.downs.values()})
    if len(meta_ranks) > 1:
        raise MetaLoraError(f"The layers of {Path(path).name} have different ranks ({', '.join(map(str, meta_ranks))}); a Meta-Down has one.")
    ranks = {layer.rank for layer in layers.values()} - {None}
    shape = replace(own, meta_rank=meta_ranks[0], rank=ranks.pop() if len(ranks) == 1 else own.rank)
    if found.empty:
        shape = replace(shape, targets=f"^({'|'.join(map(re.escape, found.downs))})$")
    said = {"converted from": Path(path).name, "layers placed by name": len(found.by_name), "layers placed by shape and order": len(found.by_order)}
    return MetaDown({n: found.downs[n] for n in targets if n in found.downs}, shape, name, domain, known, fingerprint(folder), said), found


def read_layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Layer], list[str]]:
    """Layers of a file by the part of their names that their matrices share, in order, and what could not be read."""
    groups: dict[str, list[Tensor]] = {}
    for key in sorted(tensors, key=_in_order):
        if tensors[key].ndim == 2:
            groups.setdefault(_stem(key), []).append(tensors[key].float())
    layers = {stem: layer for stem, matrices in groups.items() if (layer := _read(matrices))}
    unread = [f"{stem}: {' and '.join(_size(m) for m in groups[stem])} do not chain as Down, Mid and Up" for stem in groups if stem not in layers]
    others = [key for key, tensor in tensors.items() if tensor.ndim != 2]
    return layers, unread + ([f"{len(others)} tensors that are no matrices, such as {others[0]}"] if others else [])


def place(layers: Mapping[str, Layer], targets: Mapping[str, tuple[int, int]]) -> Placement:
    """Give each layer of the base, of widths (d_in, d_out), the foreign layer that is its own."""
    found, left, free = Placement(), dict(layers), dict(targets)
    for stem, layer in layers.items():
        ends = [name for name in free if _plain(stem).endswith(_plain(name)) and layer.fits(free[name])]
        if ends:
            own = max(ends, key=len)
            found.downs[own], _ = left.pop(stem).down.contiguous(), free.pop(own)
            found.by_name.append(own)
    for key in dict.fromkeys((layer.down.shape[1], layer.d_out) for layer in left.values()):
        alike = [stem for stem, layer in left.items() if (layer.down.shape[1], layer.d_out) == key]
        places = [name for name, shape in free.items() if left[alike[0]].fits(shape)]
        if len(alike) == len(places):
            for stem, own in zip(alike, places):
                found.downs[own], _ = left.pop(stem).down.contiguous(), free.pop(own)
                found.by_order.append(own)
        else:
            width = f"{key[0]} to {key[1]}" if key[1] else f"{key[0]}"
            found.left_out.append(
                f"{len(alike)} layers {width} wide, such as {alike[0]}: the base has {len(places)} of these widths left, so which is which is not known"
            )
    found.empty = list(free)
    return found


def _read(matrices: Sequence[Tensor]) -> Layer | None:
    """One matrix is Down, the wider side its input; three are Down (r_m, d_in), Mid (r, r_m), Up (d_out, r) in any order, all turned or none."""
    if len(matrices) == 1:
        (only,) = matrices
        return Layer(only if only.shape[0] <= only.shape[1] else only.T, None, None)
    if len(matrices) != 3:
        return None
    chains = []
    for turned in (matrices, [m.T for m in matrices]):
        for down, mid, up in permutations(turned):
            if down.shape[0] == mid.shape[1] and mid.shape[0] == up.shape[1] and down.shape[0] <= down.shape[1] and up.shape[1] <= up.shape[0]:
                chains.append((down, mid, up))
    # Read backwards, a chain with d_in and d_out of any size is one too; Down's rank is the larger.
    chains = [c for c in chains if len(c[0]) >= len(c[1])] or chains
    if not chains:
        return None
    down, mid, up = chains[0]
    return Layer(down, len(mid), len(up))


def _stem(key: str) -> str:
    """The name of a tensor's layer: without "weight" and what stands before it, the factor's own name."""
    parts = [part for part in key.split(".") if part not in ("weight", "default")]
    return ".".join(parts[:-1]) if len(parts) > 1 else re.sub(r"[._]?[A-Za-z]+$", "", parts[0])


def _plain(name: str) -> str:
    return "_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _in_order(key: str) -> list[tuple[int, str]]:
    """Numbers in names count as numbers: block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _size(matrix: Tensor) -> str:
    return " x ".join(map(str, matrix.shape))
