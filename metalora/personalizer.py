"""The one class most users need: open a base, adapt to a person, generate, export."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from . import adapt as stage2
from . import cache, hub, phrases
from .base import OUT_OF_MEMORY, Base, choice_for
from .clip import Clip
from .config import DEFAULT_BASE, FACE, AdaptConfig
from .errors import MetaLoraError, Pause, go_on, naming
from .face import Face, Finder, SeveralFaces
from .generate import GenerateConfig, Person, generate, render, unload_people
from .identity import ExportFormat, Identity
from .metadown import MetaDown
from .photo import load_photo
from .prompts import PLACE, Caption, Captioner, anyone, fill, mirrored
from .subject import finder_for
from .train import StepReport

Photo = Any  # a path, bytes, a PIL image or an array
Method = Callable[..., Generator[StepReport, None, Identity]]  # (data, config, preview=..., preview_every=...)
NAMED_SHARE = 0.5  # of the groups of phrases, those of which each of the base's own pictures shows one
REWORDINGS = 5  # other captions of a photo to be learnt under, at most, for each group of phrases: a group of many does not come more often
PREVIEW_STEPS = 10  # denoising steps of a preview, at most


class Encoded(NamedTuple):
    """Photos of somebody as stage 2 takes them."""

    key: Any  # tells apart photos and settings
    data: cache.TrainingSet
    face: np.ndarray  # (d,) float32, unit length: the mean of the photos' embeddings


class Personalizer:
    """A base model with its Meta-Downs. One piece of work at a time; not for use from several threads at once."""

    def __init__(self, base: Base, meta_down: str | MetaDown | None = None):
        self.base = base
        self._given = meta_down
        self._meta_downs: dict[str, MetaDown] = {}
        self._finders: dict[str, Finder] = {}
        self.clip = Clip(base.settings.clip, hub.model_folder)
        self._running: Generator | None = None
        self._encoded: Encoded | None = None
        self._own: tuple[Any, list[cache.TrainingSet]] | None = None

    @classmethod
    def open(
        cls, base: str = DEFAULT_BASE, meta_down: str | MetaDown | None = None, device: str | None = None, plan: str | None = None,
        on_fetch: hub.OnFetch | None = None,
    ) -> Personalizer:  # fmt: skip
        """Open a base ("miniature", a folder or a Hub id) with the catalogue's Meta-Downs for it, or with a given one.

        How it lies in a GPU's memory is worked out, or is the `plan` of that name. `on_fetch` sees how far a download is.
        Raises MetaLoraError where either cannot be had or they do not fit.
        """
        learning = hub.learning(base, meta_down)
        if not isinstance(meta_down, MetaDown):
            hub.prepare(base, meta_down, on_fetch, before=lambda configs: choice_for(configs, device, plan, learning))
        personalizer = cls(Base.open(base, device, plan, learning, on_fetch), meta_down)
        if meta_down is not None:
            for domain in personalizer.domains:
                personalizer.meta_down(domain)
        return personalizer

    @property
    def is_plain(self) -> bool:
        """Whether there is no Meta-Down for this base at all, so that people are learnt as ordinary LoRAs."""
        return self._given is None and not hub.meta_down_places(self.base.name)

    def adapt_config(self, domain: str) -> AdaptConfig:
        """How a domain's people are learnt here: as the base says, and its Meta-Down."""
        return self.base.settings.plain if self.is_plain else self.meta_down(domain).over(self.base.settings.adapt)

    @property
    def domains(self) -> list[str]:
        """The domains that there is a Meta-Down for; none where `is_plain`, and then any noun will do."""
        if self._given is None:
            return list(hub.meta_down_places(self.base.name))
        if isinstance(self._given, MetaDown):
            return [self._given.domain]
        return hub.domains_in(self._given) or [self._single().domain]

    def meta_down(self, domain: str) -> MetaDown:
        """The Meta-Down of a domain, loaded once. MetaLoraError where there is none, or it is for another base or domain."""
        if domain not in self._meta_downs:
            found = self._find(domain)
            found.check_base(self.base.name, self.base.fingerprint)
            if found.domain != domain:
                raise MetaLoraError(f"The Meta-Down {found.name} is for the domain {found.domain}, not {domain}; choose {found.domain} or another Meta-Down.")
            self._meta_downs[domain] = found
        return self._meta_downs[domain]

    def _find(self, domain: str) -> MetaDown:
        if self._given is not None:
            several = [] if isinstance(self._given, MetaDown) else hub.domains_in(self._given)
            if several and domain not in several:
                raise MetaLoraError(f"There is no Meta-Down for the domain {domain} in {self._given}; it has {', '.join(several)}.")
            return MetaDown.load(hub.meta_down_folder(str(self._given), domain)) if several else self._single()
        places = hub.meta_down_places(self.base.name)
        if domain not in places:
            known = f"it has {', '.join(places)}" if places else "give one with --meta-down"
            raise MetaLoraError(f"There is no Meta-Down for the domain {domain} of the base {self.base.name}; {known}.")
        return MetaDown.load(hub.meta_down_folder(places[domain], domain))

    def _single(self) -> MetaDown:
        """The one Meta-Down that was given, whatever its domain."""
        if isinstance(self._given, str | Path):
            self._given = MetaDown.load(hub.meta_down_folder(str(self._given)))
        return self._given

    @property
    def finder(self) -> Finder:
        """Finds and embeds faces; loaded on first use."""
        return self._finder(FACE)

    def finder_of(self, domain: str) -> Finder:
        """Finds and embeds what the photos of a domain are of; loaded on first use."""
        return self._finder(self.subject_of(domain))

    def _finder(self, subject: str) -> Finder:
        if subject not in self._finders:
            self._finders[subject] = finder_for(self.base.settings, subject)
        return self._finders[subject]

    def subject_of(self, domain: str) -> str:
        """What the photos of a domain are of, as its Meta-Down says; without one a face."""
        return self.meta_down(domain).subject if domain in self.domains else FACE

    def adapt(
        self, photos: Photo | Sequence[Photo], domain: str, steps: int | None = None, seed: int = 0, *,
        face: int | None = None, on_step: Callable[[StepReport], object] | None = None,
    ) -> Identity:  # fmt: skip
        """Learn a person from one photo or several; `on_step` sees every step and may raise Cancelled to stop.

        For a base without any Meta-Down the person is learnt as an ordinary LoRA, in more steps.
        Raises MetaLoraError where a photo cannot be read, shows no face, or shows several and `face` does not say which.
        """
        run = self.adapt_steps(photos, domain, steps, seed, face=face)
        try:
            while True:
                report = next(run)
                if on_step:
                    on_step(report)
        except StopIteration as end:
            return end.value
        finally:
            run.close()

    def adapt_steps(
        self, photos: Photo | Sequence[Photo], domain: str, steps: int | None = None, seed: int = 0, *,
        face: int | None = None, preview_every: int = 0, pause: Pause = go_on,
    ) -> Generator[StepReport, None, Identity]:  # fmt: skip
        """The same as a generator of reports whose return value is the identity. Close it to stop; nothing half done is kept.

        With `preview_every`, every so many steps a report carries a picture of the person so far, always from the same noise.
        What comes before the first step takes a while too; `pause` is called again and again meanwhile, and may raise Cancelled to stop.
        """
        config = replace(self.adapt_config(domain), seed=seed)
        if steps is not None:
            if steps < 1:
                raise MetaLoraError(f"Steps must be 1 or more, not {steps}.")
            config = replace(config, steps=steps)
        if self.is_plain:
            return self.adapt_plain_steps(photos, domain, self.base.settings.plain_rank, config, face=face, preview_every=preview_every, pause=pause)
        return self.adapt_meta_steps(photos, domain, config, face=face, preview_every=preview_every, pause=pause)

    def adapt_meta_steps(
        self, photos: Photo | Sequence[Photo], domain: str, config: AdaptConfig, *, face: int | None = None, preview_every: int = 0,
        pause: Pause = go_on,
    ) -> Generator[StepReport, None, Identity]:  # fmt: skip
        """The same with the domain's Meta-Down and settings of one's own."""
        return self._start(partial(self._learn_meta, self.meta_down(domain)), photos, domain, config, face, preview_every, pause)

    def adapt_plain_steps(
        self, photos: Photo | Sequence[Photo], domain: str, rank: int, config: AdaptConfig, *, face: int | None = None, preview_every: int = 0,
        pause: Pause = go_on,
    ) -> Generator[StepReport, None, Identity]:  # fmt: skip
        """The same as an ordinary LoRA of that rank, for comparison, or for a base without a Meta-Down."""
        shape = replace(self.base.settings.adapter, rank=rank)
        return self._start(partial(stage2.adapt_plain, self.base, shape, domain), photos, domain, config, face, preview_every, pause)

    def _learn_meta(self, meta_down: MetaDown, data: cache.TrainingSet, config: AdaptConfig, **more: Any) -> Generator[StepReport, None, Identity]:
        """Stage 2 from where the face in the photos, which were encoded last, says."""
        return stage2.adapt(self.base, meta_down, data, config, face=torch.from_numpy(self._encoded.face), **more)

    def _start(
        self, learn: Method, photos: Any, domain: str, config: AdaptConfig, face: int | None, preview_every: int, pause: Pause
    ) -> Generator[StepReport, None, Identity]:
        self._finish_other()
        if not 0 <= config.seed < 2**63:
            raise MetaLoraError(f"The seed must be a whole number from 0, below 2**63, not {config.seed}.")
        self._running = self._adapt(learn, _listed(photos), domain, config, face, preview_every, pause)
        return self._running

    def _adapt(
        self, learn: Method, photos: list[Photo], domain: str, config: AdaptConfig, face: int | None, preview_every: int, pause: Pause
    ) -> Generator[StepReport, None, Identity]:
        data = self.encode(photos, domain, config, face, pause)
        preview = self._preview(domain) if preview_every else None
        with plain_faults():
            if config.prior_pictures and not self.finder_of(domain).whole:  # in pictures of others the subject does not count, which is all of them here
                data = cache.merge([data, *self._prior(domain, config.prior_pictures, config.seed, pause)])
            unload_people(self.base)
            return (yield from learn(data, config, preview=preview, preview_every=preview_every))

    def encode(
        self, photos: Sequence[Photo], domain: str, config: AdaptConfig | None = None, face: int | None = None, pause: Pause = go_on
    ) -> cache.TrainingSet:
        """Photos → crops round the face with captions, encoded: what stage 2 trains on. The last set is kept for another try.

        Where the whole picture is the subject there is one crop, the largest square, as it is, and no background.
        """
        config = config or self.adapt_config(domain)
        if self.finder_of(domain).whole:
            config = replace(config, crops=1, background=1.0)
        images = [load_photo(photo) for photo in photos]
        seen = [(image.size, hashlib.sha256(image.tobytes()).digest()) for image in images]
        key = (seen, domain, face, config.crops, config.margin, config.background, config.asked_draws, config.reworded > 0, config.batch_size, config.seed)
        if self._encoded is None or self._encoded.key != key:
            faces = [self._pick(number, image, domain, face, len(images)) for number, image in enumerate(images, 1)]
            mean = np.mean([found.embedding for found in faces], axis=0)
            self._encoded = Encoded(key, self._encode(images, faces, domain, config, pause), mean / np.linalg.norm(mean))
        return self._encoded.data

    def forget(self) -> None:
        """Leave no photo behind: the set that is kept for another try holds its latents and the face's embedding."""
        self._encoded = None

    def _pick(self, number: int, image: Image.Image, domain: str, face: int | None, photos: int) -> Face:
        """The face of photo `number`. Of several photos, of which one may show a face alone, `face` is for those that show more."""
        if photos == 1:
            return self.pick(image, domain, face)
        with naming(f"Photo {number} of {photos}"):
            try:
                return self.pick(image, domain)
            except SeveralFaces:
                return self.pick(image, domain, face)

    def _encode(self, images: Sequence[Image.Image], faces: Sequence[Face], domain: str, config: AdaptConfig, pause: Pause) -> cache.TrainingSet:
        settings, whole = self.base.settings, self.finder_of(domain).whole
        captioner = Captioner(self.clip, settings.thing_phrases if whole else settings.caption_phrases)
        sets = []
        for number, (image, found) in enumerate(zip(images, faces)):
            pause()
            box = found.box
            cut, mask = (  # the mask is cut as the photo is; a thing is not mirrored: handles would change sides, and letters
                stage2.crops(picture, box, settings.train_resolution, config, config.seed + number, mirror=not whole)
                for picture in (image, cache.face_mask(image.size, box, config.background))
            )
            caption = captioner.caption(cut[0], f"{settings.trigger} {domain}", domain)
            both = partial(_both_ways, config.crops, len(cut))
            with plain_faults():
                data = cache.encode(self.base, cache.to_tensor(cut), both(str(caption)), masks=cache.to_weights(mask) if config.background < 1 else None)
                told = self._ask(data.pictures(torch.arange(config.crops)), caption, config, pause) if config.asked_draws and not whole else caption
                captions = [told, *(told.reworded(REWORDINGS, random.Random(config.seed)) if config.reworded else [])]
                if captions != [caption]:
                    data = cache.captioned(self.base, data, list(zip(*(both(str(each)) for each in captions))))
            sets.append(data)
        return cache.merge(sets)

    def _ask(self, data: cache.TrainingSet, caption: Caption, config: AdaptConfig, pause: Pause) -> Caption:
        """The caption with what the base itself, nobody in it, says of the encoded crops."""
        unload_people(self.base)
        known = str(caption)
        for group in self.base.settings.asked_phrases:
            caption = caption.saying(phrases.truest(self.base, data, known, group, config.asked_draws, config.batch_size, config.seed, pause), group)
        return caption

    def _prior(self, domain: str, count: int, seed: int, pause: Pause) -> list[cache.TrainingSet]:
        """What the base makes of others of the class, under the person's words and without the faces; see `config.prior_pictures`.

        Prompts name now this, now that. A picture without a face is left out. The last set is kept for the next person.
        """
        if self._own is None or self._own[0] != (domain, count, seed):
            settings, rng = self.base.settings, random.Random(seed)
            size, words = (settings.train_resolution,) * 2, f"{settings.trigger} {domain}"
            sets = []
            for place in range(count):
                named = [rng.choice(group) for group in settings.prompt_phrases if rng.random() < NAMED_SHARE]
                prompt = ", ".join([f"a photo of {PLACE}", *named])
                (picture,) = generate(self.base, [fill(prompt, anyone(domain))], [], GenerateConfig(1, seed + place, size=size), lambda *_: pause())
                masks = [cache.face_mask(size, face.box, background=1.0, face=0.0) for face in self.finder.detect(picture)[:1]]
                if masks:
                    sets.append(cache.encode(self.base, cache.to_tensor([picture]), [fill(prompt, words)], masks=cache.to_weights(masks)))
            self._own = (domain, count, seed), sets
        return self._own[1]

    def pick(self, image: Image.Image, domain: str, face: int | None = None) -> Face:
        """The one face of a photo, or its number `face`, or what else the domain is of; MetaLoraError for none, or for several and no number."""
        return self.finder_of(domain).pick(image, face)

    def _preview(self, domain: str) -> stage2.Preview:
        settings = self.base.settings
        text = self.base.encode_for_picture(f"a photo of {settings.trigger} {domain}", settings.guidance)
        size, steps = settings.train_resolution, min(settings.inference_steps, PREVIEW_STEPS)

        def preview() -> Image.Image | None:
            try:
                with self.base.resident("vae"):  # the transformer is at work already
                    return render(self.base, text, size, size, steps, settings.guidance, seed=0)
            except torch.OutOfMemoryError:
                self.base.notice = "There is no memory for a preview beside the learning, which goes on without."
                return None

        return preview

    def generate(
        self, identity: Identity | Sequence[Identity | tuple[Identity, float]] | None, prompt: str | Sequence[str], count: int = 1, seed: int = 0, *,
        steps: int | None = None, guidance: float | None = None, size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """Pictures of a person: `count` for each prompt, picture i from seed + i. Same inputs, same pictures.

        `{person}` in a prompt becomes the person; without it the person is put in front. Several people, or people with a
        weight, as a list; None for the base alone. Sizes are (width, height) in px. Each picture's `info` says what made it.
        Raises MetaLoraError for an empty prompt, values out of range, or an identity of another base or Meta-Down.
        """
        return list(self.generate_each(identity, prompt, count, seed, steps=steps, guidance=guidance, size=size, on_step=on_step))

    def generate_each(
        self, identity: Identity | Sequence[Identity | tuple[Identity, float]] | None, prompt: str | Sequence[str], count: int = 1, seed: int = 0, *,
        steps: int | None = None, guidance: float | None = None, size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Image.Image]:  # fmt: skip
        """The same, one picture after the other as they are done."""
        self._finish_other()
        people = [self.person(*_weighted(entry)) for entry in ([] if identity is None else _listed(identity))]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with plain_faults():
            yield from generate(self.base, prompts, people, GenerateConfig(count, seed, steps, guidance, size), on_step)

    def person(self, identity: Identity, weight: float = 1.0) -> Person:
        """An identity as the ordinary LoRA that generation takes. MetaLoraError where it belongs to another base or Meta-Down."""
        identity.check(self.base.name, self.base.fingerprint)
        return Person(identity.to_lora(self._meta_down_of(identity)), identity.prompt_words, identity.sha256, weight)

    def export(self, identity: Identity, path: str | Path, format: ExportFormat = "diffusers") -> Path:
        """Write the person as an ordinary LoRA file that needs nothing of ours; "diffusers" or "kohya" names."""
        identity.check(self.base.name, self.base.fingerprint)
        return identity.export(path, self._meta_down_of(identity), self.base.family, format)

    def _meta_down_of(self, identity: Identity) -> MetaDown | None:
        return None if identity.is_plain else self.meta_down(identity.domain)

    def _finish_other(self) -> None:
        """End a training that was left between two steps, so that its layers do not stay on the base."""
        if self._running is not None:
            try:
                self._running.close()
            except ValueError as error:  # it is at work in another thread
                raise MetaLoraError("Another training is running; wait for it to end, or stop it.") from error
        self._running = None


@contextmanager
def plain_faults() -> Iterator[None]:
    """A device that runs out of memory where no smaller plan helps becomes one sentence with advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MetaLoraError(OUT_OF_MEMORY) from error


def _both_ways(upright: int, pictures: int, caption: str) -> list[str]:
    """The caption for each of the pictures, of which those after the first `upright` are seen in a mirror."""
    return [caption] * upright + [mirrored(caption)] * (pictures - upright)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) and not _is_weighted(value) else [value]


def _is_weighted(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Identity) and not isinstance(value[1], Identity)


def _weighted(entry: Identity | tuple[Identity, float]) -> tuple[Identity, float]:
    return entry if isinstance(entry, tuple) else (entry, 1.0)
