"""What the page does, without the page: one opened base for the whole process, learn, generate, score, files.

Nothing of a user stays here but the numbers of the person drawn last, in the transformer's weights until somebody else is. What a session
owns is a `Learnt` that the page keeps in that session's state, and files in the page's cache folder, which it clears.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hub
from .config import ZERO_GPU
from .errors import Cancelled, MetaLoraError

LONGEST = 120  # seconds of a GPU that ZeroGPU gives to whoever has no account, a day

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .config import BaseSettings
    from .face import Face
    from .identity import Identity
    from .personalizer import Personalizer
    from .train import StepReport


@dataclass(frozen=True, eq=False)
class Learnt:
    """A person of one session: the identity, and the embeddings (n, d) of photos, unit length, to score likeness against."""

    identity: Identity
    photos: np.ndarray | None = None
    held_out: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """One generated picture, its likeness (None: no face in it, or nothing to compare with) and where it was written."""

    image: Image.Image
    path: Path
    similarity: float | None  # cosine to the photo learnt from: "similarity to your photo"
    r_facesim: float | None  # mean cosine to the held-out photos


@dataclass(frozen=True)
class Order:
    """How to generate, as the page's controls say it."""

    prompt: str
    count: int
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]  # width, height, px
    strength: float


@dataclass(frozen=True)
class StopFlag:
    """A stop wish that reaches a worker in another process too (ZeroGPU runs its work in one): a file that is there or not."""

    path: Path

    @classmethod
    def of(cls, session: str | None) -> StopFlag:
        """The flag of a session."""
        name = hashlib.sha256((session or "nobody").encode()).hexdigest()[:32]  # whatever a program calls its session
        return cls(Path(tempfile.gettempdir()) / f"metalora-stop-{os.getuid() if hasattr(os, 'getuid') else 0}-{name}")

    def raise_(self) -> None:
        """Ask the session's work to stop."""
        self.path.touch()

    def clear(self) -> None:
        """Forget an earlier wish."""
        self.path.unlink(missing_ok=True)

    def is_set(self) -> bool:
        """Whether to stop."""
        return self.path.exists()

    def check(self) -> None:
        """Raise Cancelled where the user wants to stop."""
        if self.is_set():
            raise Cancelled


@dataclass(eq=False)
class Studio:
    """The base that this process serves. It opens in the background; whoever needs it waits, and learns why it could not."""

    base: str
    meta_down: str | None = None
    plan: str | None = None
    fetched: hub.Fetched | None = None  # how far a download is, while there is one
    notice: str = ""  # what everybody should know of how the base was opened
    _opened: Future | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _desk: threading.Lock = field(default_factory=threading.Lock, repr=False)  # one piece of work at a time, also where a client has given up on one that still runs

    def open(self) -> Future[Personalizer]:
        """Start to open the base; again where the last try failed, since a network may be back."""
        with self._lock:
            if self._opened is None or (self._opened.done() and self._opened.exception()):
                self._opened = _in_background(self._open) if not ZERO_GPU else _at_once(self._open)
            return self._opened

    @property
    def is_open(self) -> bool:
        """Whether the base can be had without waiting."""
        opened = self._opened
        return opened is not None and opened.done() and opened.exception() is None

    def fetch(self, token: str | None = None) -> Future[None]:
        """Start to fetch what is to be opened. The token is for this only: neither the studio nor whoever opens the base has it."""
        return _in_background(self._fetch, token)

    def _fetch(self, token: str | None) -> None:
        try:
            hub.prepare(self.base, self.meta_down, self._take, token, self._check_memory)
        finally:
            self.fetched = None

    def _check_memory(self, configs: Path) -> None:
        from .base import choice_for

        choice_for(configs, plan=self.plan, learning=hub.learning(self.base, self.meta_down))

    def _open(self) -> Personalizer:
        self._fetch(None)
        from .personalizer import Personalizer

        personalizer = Personalizer.open(self.base, self.meta_down, plan=self.plan)
        self.notice, personalizer.base.notice = personalizer.base.notice, ""
        personalizer.finder  # loaded now, so that the first photo need not wait
        for domain in personalizer.domains:
            personalizer.finder_of(domain)
        return personalizer

    def _take(self, report: hub.Fetched) -> None:
        self.fetched = report

    @property
    def personalizer(self) -> Personalizer:
        """The opened base; waits for it. MetaLoraError where it cannot be had."""
        return self.open().result()

    def take_notice(self) -> str:
        """What the user should know of the base since the last time; nothing, as a rule."""
        base = self.personalizer.base
        said, base.notice = base.notice, ""
        return said

    @property
    def settings(self) -> BaseSettings:
        """What the base wants to be used with."""
        return self.personalizer.base.settings

    @staticmethod
    def open_photo(photo: Any) -> Image.Image:
        """A photo, upright, RGB. MetaLoraError where it cannot be read."""
        from .photo import load_photo

        return load_photo(photo)

    def faces(self, image: Image.Image) -> list[Face]:
        """The faces of a picture. MetaLoraError where it shows none."""
        return self.personalizer.finder.detect(image)

    def portrait(self, photo: Any, domain: str, face: int | None) -> Image.Image:
        """What the learning card shows: the photo, or of several faces the one that was chosen."""
        from .face import crop

        image, finder = self.open_photo(photo), self.personalizer.finder_of(domain)
        return image if face is None or finder.whole else crop(image, finder.pick(image, face), self.settings.resolution)

    def learn(
        self, photo: Any, domain: str, *, face: int | None, steps: int, seed: int, held_out: Sequence[Any], stop: StopFlag, preview_every: int
    ) -> Generator[StepReport, None, Learnt]:
        """Learn a person; yields every step, returns what the session keeps. Cancelled within a step of the stop wish."""
        import numpy as np

        personalizer = self.personalizer
        if personalizer.finder_of(domain).whole:
            face = None  # chosen before the domain was
        with self._desk:
            photos = np.stack([self._embed(photo, domain, face)])
            others = [self._held_out(each, domain) for each in held_out]
            run = personalizer.adapt_steps([photo], domain, steps, seed, face=face, preview_every=preview_every, pause=stop.check)
            try:
                while True:
                    stop.check()
                    yield next(run)
            except StopIteration as end:
                return Learnt(end.value, photos, np.stack(others) if others else None)
            finally:
                run.close()
                personalizer.forget()

    def _embed(self, photo: Any, domain: str, face: int | None) -> np.ndarray:
        """Embedding (d,) of the photo's one face, or the one that was chosen."""
        from .face import SeveralFaces

        try:
            return self.personalizer.pick(self.open_photo(photo), domain, face).embedding
        except SeveralFaces as error:
            raise MetaLoraError("The photo shows several faces; click the one to learn.") from error

    def _held_out(self, photo: Any, domain: str) -> np.ndarray:
        """Embedding (d,) of the one face of a photo that is only compared with."""
        from .face import only

        return only(self.personalizer.finder_of(domain), self.open_photo(photo), Path(photo).name).embedding

    def generate(self, learnt: Learnt, order: Order, folder: Path, stop: StopFlag) -> Iterator[Picture]:
        """Pictures one after the other, each scored and written to `folder`. Cancelled within a step of the stop wish."""
        from .generate import save_png

        pictures = self.personalizer.generate_each(
            (learnt.identity, order.strength), order.prompt, order.count, order.seed,
            steps=order.steps, guidance=order.guidance, size=order.size, on_step=lambda done, every: stop.check(),
        )  # fmt: skip
        with self._desk:
            for number, image in enumerate(pictures):
                path = save_png(image, folder / f"picture-{order.seed + number}.png")
                yield Picture(image, path, *self._likeness(image, learnt))

    def _likeness(self, image: Image.Image, learnt: Learnt) -> tuple[float | None, float | None]:
        """Mean cosines of the picture's face, or of the whole, to the photo learnt from and to the held-out photos."""
        if learnt.photos is None and learnt.held_out is None:
            return None, None
        face = self.personalizer.finder_of(learnt.identity.domain).embed(image)  # (d,)
        return tuple(None if face is None or them is None else float((them @ face).mean()) for them in (learnt.photos, learnt.held_out))

    def load(self, path: str | Path) -> Learnt:
        """A person from an identity file that fits the base here."""
        from .identity import Identity

        identity = Identity.load(path)
        self.personalizer.person(identity)
        return Learnt(identity)

    def write_files(self, identity: Identity, folder: Path) -> tuple[Path, Path, Path | None]:
        """The identity file, the diffusers LoRA and the kohya LoRA, in `folder`; None where kohya's format has no names for the layers."""
        kohya = None
        with suppress(MetaLoraError):
            kohya = self.personalizer.export(identity, folder / "lora-kohya.safetensors", "kohya")
        return identity.save(folder / "identity.safetensors"), self.personalizer.export(identity, folder / "lora-diffusers.safetensors", "diffusers"), kohya


def _in_background(work: Callable[..., Any], *given: Any) -> Future:
    """In a thread that does not keep the process when that is to end."""
    done: Future = Future()
    threading.Thread(target=hub.fulfil, args=(done, functools.partial(work, *given)), name="open-base", daemon=True).start()
    return done


def _at_once(work: Callable[[], Any]) -> Future:
    """Done in this thread: ZeroGPU sees only what the thread that imports puts onto the GPU."""
    done: Future = Future()
    hub.fulfil(done, work)
    return done


def on_gpu(seconds: Callable[..., int]) -> Callable[[Callable], Callable]:
    """Decorator of generators: on a Space with ZeroGPU they run on a GPU that is held for `seconds(*given)`, LONGEST at most."""
    if not ZERO_GPU:
        return lambda work: work
    import spaces

    def decorate(work: Callable) -> Callable:
        there = spaces.GPU(duration=lambda *given: min(LONGEST, seconds(*given)))(_sent(work))
        return lambda *given: _received(there(*given))

    return decorate


def _sent(work: Callable) -> Callable:
    """The generator, as its values can be pickled in another process: without what calls back into it, and with the faults that mean something as values."""

    @functools.wraps(work)
    def sent(*given: Any) -> Iterator[Any]:
        try:
            for found in work(*given):
                yield replace(found, learnt=None) if hasattr(found, "learnt") else found
        except (Cancelled, MetaLoraError) as fault:
            yield fault

    return sent


def _received(values: Iterator[Any]) -> Iterator[Any]:
    """What was sent, with faults raised again."""
    for found in values:
        if isinstance(found, (Cancelled, MetaLoraError)):
            raise found
        yield found


__all__ = ["Learnt", "MetaLoraError", "Order", "Picture", "StopFlag", "Studio", "on_gpu"]
