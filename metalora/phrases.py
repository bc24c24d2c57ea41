"""Which phrase is true of a picture, asked of the base itself: it is the one under which the picture's noise is predicted best.

A diffusion model knows what it draws, expressions of a face among them, where a small CLIP knows places and clothes at best.
[After "Your Diffusion Model is Secretly a Zero-Shot Classifier", arXiv 2303.16203, section 3, with its adaptive evaluation; ours: what it is asked for, and at which noise]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .base import Base
from .cache import TrainingSet
from .config import FlowConfig
from .errors import Pause, go_on
from .train import draw, draw_rows, loss_of

# Much noise leaves nothing of a mouth to be seen. At sigma .1 to .5 the loss tells expressions apart best, and this draws mostly there.
LITTLE_NOISE = FlowConfig(logit_mean=1.0)
ROUNDS = 3


@torch.no_grad()
def truest(base: Base, data: TrainingSet, caption: str, phrases: Sequence[str], draws: int, batch_size: int, seed: int = 0, pause: Pause = go_on) -> str:
    """The one of `phrases` that, put behind `caption`, has the least loss on the encoded pictures `data`, over `draws` of picture, noise and noise level.

    All phrases have the same draws, `batch_size` at a time; after each of ROUNDS equal parts of them the worse half drops out. The base
    is taken as it stands, with whatever is attached to it. `pause` is called before each batch.
    """
    text = base.encode_prompts([f"{caption}, {phrase}" for phrase in phrases])
    data = replace(data, text=text).to(base.device, base.dtype)
    generator = torch.Generator().manual_seed(seed)
    rows, batches = draw_rows(data, batch_size, generator), -(-draws // (ROUNDS * batch_size))
    left, total = torch.arange(len(phrases)), torch.zeros(len(phrases))
    with base.resident("transformer"), base.hastened():
        for _ in range(ROUNDS):
            told = [replace(data, captions=torch.full_like(data.captions, number)) for number in left.tolist()]
            for _ in range(batches):
                pause()
                drawn = draw(data, next(rows), generator, LITTLE_NOISE)
                total[left] += base.persevere(lambda: torch.stack([loss_of(base, each, drawn) for each in told])).cpu()
            left = left[total[left].argsort()][: (len(left) + 1) // 2]
    return phrases[int(left[0])]
