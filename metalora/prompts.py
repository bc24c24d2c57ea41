"""Words: the person in a prompt, and the caption of a photo that names what is *not* the person."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .clip import Clip
from .errors import MetaLoraError

PLACE = "{person}"


def fill(prompt: str, words: str) -> str:
    """`{person}` becomes the person's words; a prompt without it gets them in front. MetaLoraError for an empty prompt."""
    if not prompt.strip():
        raise MetaLoraError("The prompt is empty; say what the picture shows, for example: a photo of {person} in a green park.")
    if PLACE in prompt:
        return prompt.replace(PLACE, words).strip()
    return f"{words}, {prompt.strip()}" if words else prompt.strip()


def anyone(noun: str) -> str:
    """"a woman": somebody of the class, and nobody in particular."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def mirrored(text: str) -> str:
    """The caption of the same picture seen in a mirror: left and right change places."""
    return re.sub(r"\b(left|right)\b", lambda found: {"left": "right", "right": "left"}[found[0]], text)


@dataclass(frozen=True)
class Caption:
    """Whom a photo shows and, of groups of phrases, what is true of it: "a photo of sks woman, wearing a red cap, in a green park"."""

    opening: str
    said: tuple[tuple[str, Sequence[str]], ...] = ()  # phrases, each with the group that it is of

    def __str__(self) -> str:
        return ", ".join([self.opening, *(phrase for phrase, _ in self.said)])

    def saying(self, phrase: str, group: Sequence[str]) -> Caption:
        """The same, and that."""
        return replace(self, said=(*self.said, (phrase, group)))

    def reworded(self, each: int, rng: random.Random) -> list[Caption]:
        """Captions that say something else of one group, `each` of every group at most, drawn from its other phrases."""
        found = []
        for place, (phrase, group) in enumerate(self.said):
            others = [other for other in group if other != phrase]
            for other in rng.sample(others, min(each, len(others))):
                found.append(replace(self, said=(*self.said[:place], (other, group), *self.said[place + 1 :])))
        return found


class Captioner:
    """Writes the caption of a photo with CLIP, from groups of phrases of which one each is chosen.

    What the caption names (smile, clothes, place) the training need not put into the person. [paper: captions that name
    what is not the person; ours: how]
    """

    def __init__(self, clip: str | Path | Clip, groups: Sequence[Sequence[str]]):
        self.clip = clip if isinstance(clip, Clip) else Clip(clip)
        self.groups = groups

    def caption(self, image: Image.Image, words: str, noun: str) -> Caption:
        """"a photo of sks woman, smiling, in a green park" for words "sks woman" and noun "woman"."""
        return Caption(f"a photo of {words}", tuple((self._best(image, noun, group), group) for group in self.groups))

    def _best(self, image: Image.Image, noun: str, group: Sequence[str]) -> str:
        texts = self.clip.texts([f"a photo of {anyone(noun)}, {phrase}" for phrase in group])  # (phrases, d)
        return group[int((texts @ self.clip.images([image])[0]).argmax())]
