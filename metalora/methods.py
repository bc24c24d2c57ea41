"""The methods that an evaluation compares, read from their names: what is learnt, and with which settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .config import AdaptConfig, overlay, read_settings, setting_parts
from .degrade import Degradation
from .errors import MetaLoraError

METHODS = (
    "base, meta-lora, lora-r1 (or any rank), dreambooth-r16 (diffusers' own script), each but the first also with its number of steps: lora-r1@625, "
    "with other settings: meta-lora:learning_rate=2e-3,batch_size=2, and from a photo made worse: meta-lora@100+blur=2"
)
PEER = "dreambooth"  # a kind: the script of peer.py
LEARNING = ("meta-lora", "lora", PEER)  # the kinds of method that learn from a photo
OF_THE_PEER = {"learning_rate", "batch_size"}
LONGEST = 160  # characters of a name, which is a folder's name too
Config = TypeVar("Config")  # AdaptConfig or PeerConfig


@dataclass(frozen=True)
class Method:
    """One way to come from a photo to pictures."""

    name: str  # with the steps at its end, wherever they were asked for, so that runs of different length are one family
    kind: str  # "base": nothing is learnt; "meta-lora"; "lora"; PEER; TRUE_PHOTOS: the ceiling, nothing is generated
    rank: int = 0
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)  # laid over the base's AdaptConfig, or over PeerConfig
    degrade: Degradation | None = None  # what is done to the photo before it is learnt

    @classmethod
    def parse(cls, name: str) -> Method:
        """"base", "meta-lora", "lora-r1", "meta-lora@100", "meta-lora:learning_rate=2e-3,flow.logit_mean=0.5".

        At the end may stand what is done to the photo: "meta-lora+blur=2". MetaLoraError for anything else.
        """
        clean, _, worse = name.rpartition("+") if re.search(r"\+[a-z]+=[^+]*$", name) else (name, "", "")
        if worse:
            return cls.parse(clean).degraded(Degradation.parse(worse))
        found = re.fullmatch(r"(?:(base)|((?:(meta-lora)|(lora|dreambooth)-r([1-9]\d{0,2}))(:[^@]*)?)(?:@([1-9]\d{0,5}))?)", name)
        if not found:
            raise MetaLoraError(f"There is no method {name}; known are {METHODS}.")
        base, stem, meta, lora, rank, asked, at = found.groups()
        steps, settings = int(at) if at else None, {}
        if asked is not None:
            settings, own = _settings(asked[1:], f"The method {name}")
            if lora == PEER and set(settings) - OF_THE_PEER:
                raise MetaLoraError(f"Of diffusers' script {' and '.join(sorted(OF_THE_PEER))} can be set, and the steps; leave out the rest of {name}.")
            if own is not None and steps is not None:
                raise MetaLoraError(f"The method {name} gives its steps twice; leave out one.")
            steps = own or steps
            others = [part for part in setting_parts(asked[1:]) if not part.startswith("steps=")]
            stem = stem.removesuffix(asked) + (":" + ",".join(others) if others else "")
        if len(name) > LONGEST:
            raise MetaLoraError(f"The name of a method has at most {LONGEST} characters, not {len(name)}; change fewer settings at a time.")
        label = (base or stem) + (f"@{steps}" if steps else "")
        return cls(label, base or meta or lora, int(rank or 0), steps, settings)

    def degraded(self, how: Degradation) -> Method:
        """The same method from a photo made worse. MetaLoraError where nothing is learnt from a photo."""
        if self.degrade or self.kind not in LEARNING:
            raise MetaLoraError(f"The method {self.name} cannot be tried with {how}: it learns from no photo, or from one that is degraded already.")
        return replace(self, name=f"{self.name}+{how}", degrade=how)

    def over(self, config: Config) -> Config:
        """`config` as this method wants it."""
        return overlay(config, self.settings | ({"steps": self.steps} if self.steps else {}), f"the method {self.name}")


def _settings(text: str, where: str) -> tuple[dict[str, Any], int | None]:
    """key=value,… as nested settings that AdaptConfig takes, and the steps, which are kept apart."""
    settings = read_settings(text, where)
    if "seed" in settings:
        raise MetaLoraError("The seed is the same for all methods; give it with --seed.")
    overlay(AdaptConfig(), settings, where)
    return settings, settings.pop("steps", None)
