"""People folded into the transformer's weights, so that a picture of somebody costs what one of nobody costs.

W + weight · B · A stands in W's place while a person is active. It is made from a copy of W as it came, which is kept beside:
switching to and fro adds no error, and when everybody is taken out the base is as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Lora = Mapping[str, Tensor]  # an ordinary LoRA under diffusers' names


@dataclass
class Fold:
    """What is folded into one transformer. Weights change in place, so what was compiled for them stays valid."""

    pristine: dict[str, Tensor] = field(default_factory=dict)  # layer → its weight (d_out, d_in) as it came
    inside: dict[str, float] | None = field(default_factory=dict)  # who is in, and with which weight; None where a change was broken off

    @torch.no_grad()
    def put(self, transformer: nn.Module, people: Mapping[str, tuple[Lora, float]]) -> None:
        """Have exactly these people in, each with its weight."""
        wanted = {who: weight for who, (_, weight) in people.items()}
        if wanted == self.inside:
            return
        changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for lora, weight in people.values():
            for name, (a, b) in factors(lora).items():
                changes.setdefault(name, []).append((a, weight * b))
        self.inside = None
        for name in self.pristine.keys() - changes.keys():
            transformer.get_submodule(name).weight.copy_(self.pristine[name])
        for name, parts in changes.items():
            weight = transformer.get_submodule(name).weight
            if name not in self.pristine:
                self.pristine[name] = weight.detach().clone()
            a, b = torch.cat([a for a, _ in parts]).to(weight.device), torch.cat([b for _, b in parts], dim=1).to(weight.device)
            weight.copy_(torch.addmm(self.pristine[name].float(), b, a))
        self.inside = wanted

    @torch.no_grad()
    def take_out(self, transformer: nn.Module) -> None:
        """Everybody out, and the copies go."""
        for name, weight in self.pristine.items():
            transformer.get_submodule(name).weight.copy_(weight)
        self.pristine.clear()
        self.inside = {}


def factors(lora: Lora) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, d_in) and B (d_out, r) in float32 of each layer."""
    names = [key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")]
    assert 2 * len(names) == len(lora), "a LoRA under diffusers' names, without alphas"
    return {name: (lora[f"transformer.{name}.lora_A.weight"].float(), lora[f"transformer.{name}.lora_B.weight"].float()) for name in names}
