"""`python -m metalora.miniature meta-down`: stage 1 on the rendered portrait world.

The stage itself is metalora.meta.meta_train, the same that `python -m metalora meta-train` runs on photos.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from metalora import cache
from metalora.base import Base
from metalora.config import overlay
from metalora.face import FaceFinder
from metalora.meta import meta_train
from metalora.miniature.captions import TRIGGER, caption
from metalora.miniature.shards import Shards, load_shards
from metalora.miniature.vae import to_floats
from metalora.progress import Line
from metalora.prompts import mirrored

FACES = 4  # pictures of a person that are embedded for a predictor


class People:
    """The people of one domain, in the order of their seeds, as stage 1 asks for them.

    A person's pictures, also mirrored, with "sks woman" in their captions in place of the looks, are encoded the first time
    that they are asked for and kept: stage 1 visits some hundreds of people, a world may have thousands. What lies outside the face
    counts as `background` says.
    """

    def __init__(self, base: Base, shards: Shards, domain: str, background: float = 1.0, seed: int = 0):
        self.base, self.shards, self.domain, self.background, self.seed = base, shards, domain, background, seed
        pictures: dict[int, list[int]] = {}
        for i, record in enumerate(shards.records):
            if record["domain"] == domain:
                pictures.setdefault(record["person"], []).append(i)
        self.pictures = dict(sorted(pictures.items()))  # person → rows of the shards
        self._encoded: dict[int, cache.TrainingSet] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def bucket(self, numbers: Sequence[int]) -> cache.TrainingSet:
        """The pictures of the people `numbers` of [0, n), renumbered 0, 1, …"""
        people = list(self.pictures)
        return cache.join([self._person(people[number]) for number in numbers])

    def faces(self) -> list[torch.Tensor]:
        """Embeddings (pictures, d) of everybody, of some pictures each, for a predictor."""
        finder = FaceFinder.of(self.base.settings)
        found = []
        with Line() as line:
            for number, rows in enumerate(self.pictures.values(), 1):
                images = (Image.fromarray(self.shards.images[i].permute(1, 2, 0).numpy()) for i in rows[:FACES])
                found.append(torch.from_numpy(finder.embed_all(images)))
                line.show(number / len(self), f"faces of {number}/{len(self)} people")
        return found

    def _person(self, person: int) -> cache.TrainingSet:
        if person not in self._encoded:
            rows, rng = self.pictures[person], random.Random(f"{self.seed} {person}")
            texts = [caption(self.shards.records[i]["attributes"], rng, f"{TRIGGER} {self.domain}") for i in rows]
            images = to_floats(self.shards.images[rows])  # (n, 3, size, size)
            masks = cache.to_weights([cache.face_mask(tuple(images.shape[-2:]), self.shards.boxes[i].tolist(), self.background) for i in rows])
            both = [torch.cat([each, each.flip(-1)]) for each in (images, masks)]
            self._encoded[person] = cache.encode(self.base, both[0], [*texts, *map(mirrored, texts)], masks=both[1])
        return self._encoded[person]


def main(argv: list[str] | None = None) -> None:
    """Trains the Meta-Down of one domain and writes its folder; a killed run goes on with the same command."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature meta-down", description=main.__doc__)
    parser.add_argument("--data", type=Path, action="append", required=True, help="folder of shards; repeatable")
    parser.add_argument("--base", default="miniature")
    parser.add_argument("--domain", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the Meta-Down")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help='such as \'{"rounds": 40}\'')
    parser.add_argument("--adapter", type=json.loads, default={}, metavar="JSON", help='such as \'{"rank": 1, "meta_rank": 16}\'; the base\'s own when not given')
    arguments = parser.parse_args(argv)
    base = Base.open(arguments.base)
    config = overlay(base.settings.meta, arguments.config)
    training, _ = load_shards(*arguments.data).split()
    people = People(base, training, arguments.domain, config.background)
    run = meta_train(base, len(people), people.bucket, arguments.domain, config,
                     adapter=overlay(base.settings.adapter, arguments.adapter), name=f"{base.name}/{arguments.domain}", folder=arguments.work, faces=people.faces)
    smooth, shown = None, 0.0
    while True:
        try:
            report = next(run)
        except StopIteration as end:
            end.value.save(arguments.output)
            return
        smooth = report.loss if smooth is None else 0.99 * smooth + 0.01 * report.loss
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{report.step}/{report.steps} loss {smooth:.4f} {report.steps_per_second:.1f} it/s "
                  f"{report.seconds_left / 60:.1f} min left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
