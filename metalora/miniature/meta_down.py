"""`python -m metalora.miniature meta-down`: stage 1 on the rendered portrait world, a person's pictures encoded when they first come up.

The stage itself is metalora.meta.meta_train, the same that `python -m metalora meta-train` runs on photos.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from metalora import cache
from metalora.base import Base
from metalora.config import overlay
from metalora.face import FaceFinder
from metalora.meta import Bucket, meta_train
from metalora.miniature.captions import TRIGGER, caption
from metalora.miniature.shards import Shards, load_shards
from metalora.prompts import mirrored

FACES = 4  # pictures of a person that are embedded for a predictor


def people_of(shards: Shards, domain: str) -> dict[int, list[int]]:
    """Numbers of the pictures of each person of one domain, by the person's seed, in order."""
    pictures: dict[int, list[int]] = {}
    for i, record in enumerate(shards.records):
        if record["domain"] == domain:
            pictures.setdefault(record["person"], []).append(i)
    return dict(sorted(pictures.items()))


def bucket_of_shards(base: Base, shards: Shards, domain: str, seed: int = 0) -> Bucket:
    """A bucket source of the people of `people_of`: each picture also mirrored, captioned with "sks woman" in place of the looks.

    What was encoded once is kept: latents and embeddings of the miniature are small.
    """
    people, encoded = list(people_of(shards, domain).items()), {}

    def encode_new(subjects: Sequence[int]) -> None:
        rows = [(number, i) for number, s in enumerate(subjects) for i in people[s][1]]
        texts = [caption(shards.records[i]["attributes"], random.Random(f"{seed} {i}"), f"{TRIGGER} {domain}") for _, i in rows]
        images = shards.images[[i for _, i in rows]].float() / 127.5 - 1  # (n, 3, size, size)
        numbers = [number for number, _ in rows] * 2
        together = cache.encode(base, torch.cat([images, images.flip(-1)]), [*texts, *map(mirrored, texts)], numbers)
        encoded.update({s: together.select([number]) for number, s in enumerate(subjects)})

    def bucket(subjects: Sequence[int]) -> cache.TrainingSet:
        if new := [s for s in subjects if s not in encoded]:
            encode_new(new)
        return cache.join([encoded[s] for s in subjects])

    return bucket


def faces_of(base: Base, shards: Shards, domain: str) -> list[torch.Tensor]:
    """Embeddings (pictures, d) of the people of `people_of`, of some pictures each."""
    finder = FaceFinder(base.settings.face_pack, base.settings.det_size)
    return [torch.from_numpy(finder.embed_all(Image.fromarray(shards.images[i].permute(1, 2, 0).numpy()) for i in pictures[:FACES]))
            for pictures in people_of(shards, domain).values()]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Trains the Meta-Down of one domain and writes its folder; a killed run goes on with the same command."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature meta-down", description=main.__doc__)
    parser.add_argument("--data", type=Path, action="append", required=True, help="folder of shards; repeatable")
    parser.add_argument("--base", default="miniature")
    parser.add_argument("--domain", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the Meta-Down")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help='such as \'{"rounds": 40}\'')
    arguments = parser.parse_args(argv)
    base = Base.open(arguments.base)
    config = overlay(base.settings.meta, arguments.config)
    training, _ = load_shards(*arguments.data).split()
    subjects = len(people_of(training, arguments.domain))
    run = meta_train(base, subjects, bucket_of_shards(base, training, arguments.domain), arguments.domain, config,
                     name=f"{base.name}/{arguments.domain}", folder=arguments.work,
                     faces=partial(faces_of, base, training, arguments.domain))
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
