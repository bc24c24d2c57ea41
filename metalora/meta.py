"""Stage 1: many subjects of one domain → Meta-Down, the factor they share.

Only a bucket of subjects is resident at a time, each with its own fresh Mid and Up. First these train while Down is held, so
that untrained heads send no noise into Down; then all three train. A batch mixes subjects. Mid and Up are thrown away, Down
goes on to the next bucket and is what is kept. [paper: buckets, warm-up, mixed batches; ours: the schedule]

With `direction_people` above 0 Down does not begin at random, but where the gradients of so many subjects point; see directions.py.
Or it begins at a Meta-Down that is there already, and goes on with other subjects, or on another base of the same layers.

With `start_rate` above 0 Mid and Up leave something behind, too [ours, beyond the paper]: one start for all, from which every
subject of every bucket sets out, and which afterwards goes a part of the way towards the mean of where they came to. That is
Reptile [arXiv 1803.02999, section 2; a bucket is a meta-batch]. A mean of heads that began at different random places would be
worth nothing, since Up · Mid is the same with both signs turned; those that set out together stay comparable.

With `predict_rank` above 0 everybody's Mid and Up are learnt once more in the end, from that start and with Down held, and a
predictor is fitted that tells them from the face; see predict.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import prompts
from .adapter import Adapter, Factors, attach, random_downs
from .base import Base
from .cache import TrainingSet, encode, face_mask, mirrored, to_tensor, to_weights
from .config import PICTURE, SETTINGS_FILE, AdapterConfig, MetaConfig, overlay
from .data import Item, Subject, kept_out
from .directions import leading_directions
from .errors import MetaLoraError
from .face import Finder
from .files import load_tensors, save_tensors
from .metadown import MetaDown
from .photo import load_photo
from .predict import fit_predictor
from .processes import here
from .subject import finder_for
from .train import Clock, Share, StepReport, fit, flow_loss, optimizer, wholes

CHECKPOINT = "checkpoint.safetensors"
HEADS = "heads-{}.safetensors"  # Mid and Up of the subjects of a bucket
VALIDATION_DRAWS = 4  # of noise and noise level, for each picture
Bucket = Callable[[Sequence[int]], TrainingSet]  # numbers of subjects → their pictures, encoded, renumbered 0, 1, …


@dataclass
class _State:
    """What a round hands to the next: Down with its optimiser's moments, the start, and how many rounds are done."""

    downs: dict[str, Tensor]
    moments: dict[str, Tensor]  # "exp_avg" and "exp_avg_sq" (numbers of all layers' Down,), "step" ()
    round: int = 0
    start: Factors = field(default_factory=dict)  # layer → Mid, Up; none where none is learnt


def meta_train(
    base: Base, subjects: int, bucket: Bucket, domain: str, config: MetaConfig, *,
    name: str, adapter: AdapterConfig | None = None, folder: str | Path | None = None, unseen: tuple[TrainingSet, TrainingSet] | None = None,
    faces: Callable[[], Sequence[Tensor]] | None = None, begin: MetaDown | None = None, digest: str = "",
) -> Generator[StepReport, None, MetaDown]:  # fmt: skip
    """Learn Meta-Down from `subjects` subjects that `bucket` encodes on demand; yields a report a step.

    The generator's return value is the MetaDown. With a `folder`, its checkpoint is written where directions are found and every few rounds, and a run that
    finds one goes on from it exactly as if it had never stopped. In memory: `bucket=training_set.select`.
    With `unseen`, pictures of people who were kept out, to learn from and others to judge by, a report every few rounds
    has the loss on the latter, and where there are no rounds the last report has it. For a predictor, `faces` gives the
    embeddings (photos, d) of every subject, which may be none. Under `accelerate launch` the processes share every batch: the
    result is that of one process, to rounding. With `begin` Down, its ranks and the start are that Meta-Down's at first. `digest`
    tells a checkpoint's subjects from others that are as many.
    Raises MetaLoraError where there are too few subjects or too many processes, or the checkpoint is of other settings.
    """
    shape = begin.adapter if begin else adapter or base.settings.adapter
    size = min(config.bucket_size, subjects)
    if size < 1:
        raise MetaLoraError(f"There is no subject of the domain {domain} to learn from; check the dataset's metadata.jsonl.")
    process = here().join(cpu=base.device.type == "cpu")
    share = Share(process.rank, process.world)
    if share.world > config.batch_size:
        raise MetaLoraError(f"{share.world} processes cannot share batches of {config.batch_size}; start {config.batch_size} at most, or raise meta.batch_size in {SETTINGS_FILE}.")
    checkpoint = Path(folder) / CHECKPOINT if folder else None
    if config.predict_rank and faces is None:
        raise MetaLoraError("A predictor is fitted on faces, and none are given; leave meta.predict_rank at 0.")
    if begin:
        config = replace(config, direction_people=0)
    if not config.rounds and not config.direction_people:
        raise MetaLoraError("Stage 1 learns nothing in no rounds and from no directions; ask for rounds, for directions, or for both.")
    stamp = {"moments": "end to end", "config": repr(replace(config, rounds=0, predict_rank=0, predict_steps=0)), "adapter": repr(shape), "domain": domain, "subjects": str(subjects), "base": base.fingerprint}
    stamp |= {key: value for key, value in {"begin": begin.stamp if begin else "", "people": digest}.items() if value}
    buckets = -(-subjects // size) if config.predict_rank else 0
    first = _members(subjects, min(config.direction_people, subjects), 0, config.seed)
    judged = unseen is not None and config.validation_every > 0
    judged_once = judged and not config.rounds
    clock = Clock(len(first) + config.rounds * config.bucket_steps + judged_once + buckets * config.predict_steps)
    state = _resume(checkpoint, stamp)
    process.agree(state.round if state else -1, f"The processes do not see the same rounds of a checkpoint in {folder}; give them an output folder that all see")
    if state:
        clock.skip(len(first) + state.round * config.bucket_steps)
    else:
        state = yield from _begin(base, shape, config, first, bucket, share, clock, begin)
        if checkpoint and first and share.rank == 0:
            _save(checkpoint, state, stamp)
    with attach(base.transformer, state.downs, shape, size) as heads, base.resident("transformer"):
        for number in range(state.round, config.rounds):
            data = bucket(_members(subjects, size, number, config.seed)).to(base.device, base.dtype)
            losses = _round(base, heads, data, state, config, number, share)
            for loss in islice(losses, config.bucket_steps - 1):
                yield clock.tick(loss)
            *_, last = losses  # with the last step the round is over, and what it leaves can be kept
            state.downs, state.round, state.start = heads.down_tensors(), number + 1, _towards_mean(state.start, heads, config.start_rate)
            if checkpoint and share.rank == 0 and (state.round % config.checkpoint_every == 0 or state.round == config.rounds):
                _save(checkpoint, state, stamp)
            due = judged and state.round % config.validation_every == 0
            yield clock.tick(last, validation=_validate(base, heads, unseen, config, state.start) if due else None)
        if judged_once:
            loss = _validate(base, heads, unseen, config, state.start)
            yield clock.tick(loss, validation=loss)
        summary = {**asdict(config), "subjects": subjects if config.rounds else len(first), "steps": config.rounds * config.bucket_steps}
        found = MetaDown(state.downs, shape, name, domain, base.name, base.fingerprint, summary, start=state.start, subject=config.subject)
        if begin:
            summary["began at"] = f"{begin.name}, {begin.sha256[:8]}"
            found = replace(found, licence=begin.licence, adapt=begin.adapt)
        if not config.predict_rank:
            return found
        people: list[Factors] = []
        for number in range(buckets):
            of_bucket = range(number * size, min((number + 1) * size, subjects))
            kept = checkpoint and checkpoint.with_name(HEADS.format(f"{number:04d}"))
            people += yield from _heads(base, heads, bucket, of_bucket, found, config, number, share, clock, kept, digest)
    with_face = [(person, face) for person, face in zip(people, faces()) if len(face)]
    predictor, explained = fit_predictor(*zip(*with_face), config.predict_rank)
    summary = {**summary, "people predicted from": len(with_face), "variance of others explained": round(explained, 4)}
    return replace(found, training=summary, predictor=predictor)


def _begin(
    base: Base, shape: AdapterConfig, config: MetaConfig, first: Sequence[int], bucket: Bucket, share: Share, clock: Clock, given: MetaDown | None
) -> Generator[StepReport, None, _State]:  # fmt: skip
    """Down as it is given, at the leading directions of the `first` people, or at random, and the start that any person has, the same for all."""
    if given:
        downs = given.tensors
    elif first:
        downs = yield from leading_directions(base, first, bucket, shape, config, clock, share)
    else:
        downs = random_downs(base.transformer, shape, torch.Generator().manual_seed(config.seed))
    start = given.start if given else {}
    if start or config.start_rate == 0:
        return _State(downs, {}, start=start)
    with attach(base.transformer, downs, shape) as one:
        one.start(torch.Generator().manual_seed(hash((config.seed, 3)) % 2**63))
        return _State(downs, {}, start=one.factors())


def _towards_mean(start: Factors, heads: Adapter, rate: float) -> Factors:
    """Reptile's outer step: the start goes this part of the way towards the mean of the heads; no start stays none."""
    means = {name: (heads.layers[name].mid.detach().mean(0).cpu(), heads.layers[name].up.detach().mean(0).cpu()) for name in start}
    return {name: tuple(torch.lerp(old, new, rate) for old, new in zip(start[name], means[name])) for name in start}


def _members(subjects: int, size: int, number: int, seed: int) -> list[int]:
    """Subjects of bucket `number`: every subject comes once before one comes again, in an order that the seed gives."""
    chosen: list[int] = []
    place = number * size
    while len(chosen) < size:
        lap, at = divmod(place, subjects)
        order = torch.randperm(subjects, generator=torch.Generator().manual_seed(hash((seed, lap)) % 2**63)).tolist()
        chosen += [s for s in order[at : at + size - len(chosen)] if s not in chosen]
        place = (lap + 1) * subjects
    return chosen


def _round(base: Base, heads: Adapter, data: TrainingSet, state: _State, config: MetaConfig, number: int, share: Share) -> Iterator[float]:
    """One bucket: fresh heads, warm-up with Down held, then all three. Draws depend on the seed and the round alone."""
    generator = torch.Generator().manual_seed(hash((config.seed, 1, number)) % 2**63)
    heads.start(generator)
    heads.start_at(state.start)
    of_heads = optimizer([(heads.heads(), config.learning_rate)], config.weight_decay)
    of_down = optimizer([(heads.downs(), config.down_learning_rate)], config.weight_decay)
    common = dict(batch_size=config.batch_size, generator=generator, flow_config=config.flow, max_grad_norm=config.max_grad_norm, share=share)
    heads.train_down(False)
    yield from fit(base, heads, data, [of_heads], steps=config.warmup_steps, **common)
    heads.train_down(True)
    (down,) = wholes([of_down])
    if state.moments:
        of_down.state[down] = {key: value.clone().to(down.device) for key, value in state.moments.items()}
    yield from fit(base, heads, data, [of_heads, of_down], steps=config.bucket_steps - config.warmup_steps, **common)
    heads.train_down(False)
    state.moments = {key: value.cpu() for key, value in of_down.state[down].items()}


def _heads(
    base: Base, heads: Adapter, bucket: Bucket, subjects: Sequence[int], found: MetaDown, config: MetaConfig, number: int, share: Share,
    clock: Clock, kept: Path | None, digest: str,
) -> Generator[StepReport, None, list[Factors]]:  # fmt: skip
    """Mid and Up of these subjects, learnt from the common start with Down held; read from the file `kept` where they lie there already."""
    stamp = {"meta_down": found.stamp, "seed": str(config.seed), "steps": str(config.predict_steps), "subjects": f"{subjects[0]}-{subjects[-1]}", "people": digest}
    if kept and kept.is_file():
        tensors, said = load_tensors(kept, "heads of a stage 1")
        if said == stamp:
            clock.skip(config.predict_steps)
            return _unstacked(tensors, list(heads.layers))
    generator = torch.Generator().manual_seed(hash((config.seed, 4, number)) % 2**63)
    data = bucket(subjects).to(base.device, base.dtype)
    heads.start(torch.Generator().manual_seed(hash((config.seed, 3)) % 2**63))  # the same for all buckets, so that all stay comparable
    heads.start_at(found.start)
    of_heads = optimizer([(heads.heads(), config.learning_rate)], config.weight_decay)
    losses = fit(
        base, heads, data, [of_heads], steps=config.predict_steps, batch_size=config.batch_size, generator=generator,
        flow_config=config.flow, max_grad_norm=config.max_grad_norm, share=share,
    )  # fmt: skip
    for loss in losses:
        yield clock.tick(loss)
    stacked = {f"{name}.{part}": t.detach()[: len(subjects)].cpu() for name, layer in heads.layers.items() for part, t in (("mid", layer.mid), ("up", layer.up))}
    if kept and share.rank == 0:
        save_tensors(kept, stacked, stamp)
    return _unstacked(stacked, list(heads.layers))


def _unstacked(tensors: dict[str, Tensor], layers: Sequence[str]) -> list[Factors]:
    """People's Mid and Up one by one, from layers' (n, ...)."""
    count = len(tensors[f"{layers[0]}.mid"])
    return [{name: (tensors[f"{name}.mid"][i].clone(), tensors[f"{name}.up"][i].clone()) for name in layers} for i in range(count)]


def _validate(base: Base, heads: Adapter, unseen: tuple[TrainingSet, TrainingSet], config: MetaConfig, start: Factors) -> float:
    """Loss on the second pictures of people who were kept out, after they have learnt the first with Down held; always the same draws."""
    seen, rest = (pictures.to(base.device, base.dtype) for pictures in unseen)
    generator = torch.Generator().manual_seed(config.seed)
    heads.start(generator)
    heads.start_at(start)
    learning = fit(
        base, heads, seen, [optimizer([(heads.heads(), config.learning_rate)], config.weight_decay)], steps=config.validation_steps,
        batch_size=min(config.batch_size, seen.subjects), generator=generator, flow_config=config.flow, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    for _ in learning:
        pass
    losses = []
    with torch.no_grad():
        for rows in torch.arange(len(rest)).split(config.batch_size):
            heads.use_rows(rest.subject[rows])
            losses += [flow_loss(base, rest, rows, generator, config.flow).item() * len(rows) for _ in range(VALIDATION_DRAWS)]
    heads.use_rows(None)
    return sum(losses) / (len(rest) * VALIDATION_DRAWS)


def _save(checkpoint: Path, state: _State, stamp: dict[str, str]) -> None:
    tensors = {f"down.{name}": t for name, t in state.downs.items()} | {f"moment.{key}": t for key, t in state.moments.items()}
    tensors |= {f"start.{part}.{name}": t for name, pair in state.start.items() for part, t in zip(("mid", "up"), pair)}
    save_tensors(checkpoint, tensors, {**stamp, "round": str(state.round)})


def _resume(checkpoint: Path | None, stamp: dict[str, str]) -> _State | None:
    if checkpoint is None or not checkpoint.is_file():
        return None
    tensors, found = load_tensors(checkpoint, "a checkpoint")
    other = [key for key, value in stamp.items() if found.get(key) != value]
    if other or "round" not in found:
        raise MetaLoraError(f"{checkpoint} is of another training ({', '.join(other)} differ); remove it, or choose another output folder.")
    parts = {kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)} for kind in ("down.", "moment.", "start.mid.", "start.up.")}
    start = {name: (mid, parts["start.up."][name]) for name, mid in parts["start.mid."].items()}
    return _State(parts["down."], parts["moment."], int(found["round"]), start)


def bucket_of_photos(base: Base, people: Sequence[Sequence[Item]], words: str, finder: Finder | None = None, background: float = 1.0) -> Bucket:
    """A bucket source that reads photos with their captions from disk: people[s] are those of subject s.

    Every photo is cut to its central square and also mirrored; `words` stand for the person in its caption. With a
    `background` below 1 what lies outside the largest face that the `finder` sees counts so much, as does all of a photo without
    a face. Encoding anew for every bucket keeps little in memory, which for FLUX.1-dev's text embeddings matters more than time.
    """

    def encode_bucket(subjects: Sequence[int]) -> TrainingSet:
        size = (base.settings.train_resolution,) * 2
        items = [(number, item) for number, s in enumerate(subjects) for item in people[s]]
        photos = [ImageOps.fit(load_photo(item.path), size, Image.Resampling.LANCZOS) for _, item in items]
        captions = [item.text if words in item.text else prompts.fill(item.text, words) for _, item in items]
        captions += map(prompts.mirrored, captions[:])
        masks = to_weights(mirrored([_mask(finder, photo, background) for photo in photos])) if background < 1 else None
        return encode(base, to_tensor(mirrored(photos)), captions, [number for number, _ in items] * 2, masks)

    return encode_bucket


def _mask(finder: Finder, photo: Image.Image, background: float) -> Image.Image:
    found = finder.detect(photo)
    return face_mask(photo.size, found[0].box, background) if found else Image.new("L", photo.size, round(255 * background))


def learn_domain(
    base: Base, people: list[Subject], domain: str, name: str, folder: Path, changes: Mapping[str, Any] | None = None, begin: MetaDown | None = None
) -> Generator[StepReport, None, MetaDown]:  # fmt: skip
    """Stage 1 on a dataset's people of one domain, some of whom are kept out to judge it; see `meta_train`.

    `changes` are laid over the base's settings, and before them what the photos of `begin` are of.
    """
    of_begin = {"subject": begin.subject} if begin else {}
    config = overlay(base.settings.meta, of_begin | dict(changes or {}), "stage 1")
    if config.subject == PICTURE:
        config = replace(config, background=1.0)  # nothing lies outside a whole picture
    if config.rounds and config.warmup_steps >= config.bucket_steps:
        raise MetaLoraError(f"Of a bucket's {config.bucket_steps} steps the warm-up takes {config.warmup_steps}, and leaves none for Down; lower warmup_steps, or raise bucket_steps.")
    learnt, unseen = kept_out(people, min(config.validation_people, config.bucket_size))
    finder = finder_for(base.settings, config.subject) if config.background < 1 or config.predict_rank else None
    bucket = partial(bucket_of_photos, base, words=f"{base.settings.trigger} {domain}", finder=finder, background=config.background)
    halves = [[s.items[k::2] for s in unseen] for k in (0, 1)]
    judged = tuple(bucket(half)(range(len(half))) for half in halves) if unseen else None
    faces = partial(_faces, finder, learnt) if config.predict_rank else None
    return meta_train(base, len(learnt), bucket([s.items for s in learnt]), domain, config, name=name, folder=folder, unseen=judged, faces=faces, begin=begin, digest=_digest(learnt))


def _digest(people: Sequence[Subject]) -> str:
    """Of who they are, which photos they have, and what is said of these."""
    return hashlib.sha256(repr([(s.identity, [(item.path.name, item.text) for item in s.items]) for s in people]).encode()).hexdigest()


def _faces(finder: Finder, people: Sequence[Subject]) -> list[Tensor]:
    """Embeddings (photos, d) of everybody, of the photos in which a face is found."""
    return [torch.from_numpy(finder.embed_all(load_photo(item.path) for item in person.items)) for person in people]
