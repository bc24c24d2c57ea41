"""What happens on the page: the handlers of its events. The work is done in studio.py, the HTML of the cards in cards.py."""

from __future__ import annotations

import math
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from gradio.utils import get_upload_folder

from . import cards
from .config import FACE
from .errors import Cancelled, MetaLoraError
from .hub import NoAccess
from .prompts import anyone
from .studio import Learnt, Order, StopFlag, Studio, on_gpu

if TYPE_CHECKING:
    from .personalizer import Personalizer

UPDATE_EVERY = 1.0  # seconds between two looks of the progress card; on two cores a browser that draws it four times as often makes learning half as long again
DOMAINS = ("woman", "man")  # that the page begins with, and all there are to choose from without a Meta-Down
CONTROLS = 7  # that a base's settings set
LARGEST = 2  # times the base's own width and height: a picture takes the memory and the time of all
OURS = "Something went wrong on our side; the log of the app says what. Please try again."
PREVIEWS = 12  # pictures of the likeness on its way, over a whole learning
SHOWN_AS_THEY_ARE = {".jpg", ".jpeg", ".png", ".webp"}  # what every browser can show


@dataclass(frozen=True)
class Sample:
    """A person to try the page with: a photo to learn from, and others of the same person to score against."""

    photo: str
    domain: str
    held_out: list[str]


@contextmanager
def one_sentence() -> Iterator[None]:
    """What was asked and cannot be done becomes the user's sentence; a fault of ours is logged here and named as one."""
    try:
        yield
    except MetaLoraError as error:
        raise gr.Error(cards.sentence(str(error)), print_exception=False) from error
    except (Cancelled, gr.Error, GeneratorExit):
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise gr.Error(OURS, print_exception=False) from error


class Handlers:
    """The handlers of one page's events; every value of a user comes in and goes out, none stays."""

    def __init__(self, studio: Studio, samples: list[Sample]):
        self.studio, self.samples = studio, samples
        self.train = on_gpu(lambda photo, domain, face, steps, *rest: 40 + steps // 2)(self._train)
        self.draw = on_gpu(lambda learnt, order, *rest: 20 + 15 * order.count)(self._draw)

    def _train(self, photo: str, domain: str, face: int | None, steps: int, seed: int, held_out: list[str], stop: StopFlag):
        learnt = yield from self.studio.learn(
            photo, domain, face=face, steps=steps, seed=seed, held_out=held_out, stop=stop, preview_every=-(-steps // PREVIEWS)
        )
        yield learnt

    def _draw(self, learnt: Learnt, order: Order, folder: Path, stop: StopFlag):
        yield from self.studio.generate(learnt, order, folder, stop)

    def greet(self):
        """Wait for the base, showing how far its download is; then its name, and the controls set to what it wants.

        Where the Hub gives it only to who has a token, the field for one comes.
        """
        opening = self.studio.open()
        yield from self._follow(opening)
        fault = opening.exception()
        yield self._fault(fault) if fault else self._greeting(opening.result())

    def unlock(self, token: str):
        """Fetch the base with a token of the user's, which is for this download only and kept nowhere; then greet. The field is emptied at once.

        Without a token it is fetched with the one that the app was started with, as before.
        """
        token = (token or "").strip()
        with one_sentence():
            if not re.fullmatch(r"[!-~]*", token):  # of nothing else a header can be made, and the fault would quote it
                raise MetaLoraError("That is no token; paste yours, which begins with hf_.")
        fetching = self.studio.fetch(token or None)
        yield [cards.status("asking the Hub", "busy"), *[gr.skip()] * CONTROLS, gr.Textbox(value=""), gr.skip()]
        yield from self._follow(fetching)
        if fault := fetching.exception():
            yield self._fault(fault)
        else:
            yield from self.greet()

    def _follow(self, work: Future) -> Iterator[list]:
        """What the page shows until the base is fetched or opened."""
        while wait([work], timeout=UPDATE_EVERY).not_done:
            fetched = self.studio.fetched
            text = f"fetching {cards.fetched(fetched)}" if fetched else "opening the base model"
            yield [cards.status(text, "busy"), *[gr.skip()] * (CONTROLS + 2)]

    @staticmethod
    def _fault(fault: BaseException) -> list:
        """Why there is no base, with the field for a token where one may help."""
        if not isinstance(fault, MetaLoraError):
            traceback.print_exception(fault, file=sys.stderr)
            fault = MetaLoraError(OURS)
        return [cards.status(str(fault), "fault"), *[gr.skip()] * CONTROLS, *_access(isinstance(fault, NoAccess))]

    def _greeting(self, personalizer: Personalizer) -> list:
        try:
            domains = personalizer.domains or list(DOMAINS)
            domain = DOMAINS[0] if DOMAINS[0] in domains else domains[0]
            config = personalizer.adapt_config(domain)
        except MetaLoraError as error:
            return self._fault(error)
        base, s = personalizer.base, personalizer.base.settings
        device = f"{base.device}, plan {base.plan.name}" if base.device.type == "cuda" else base.device
        text = f"{base.name} · {s.resolution}×{s.resolution} px · {device} · ready"
        if personalizer.is_plain:
            text += f"; without a Meta-Down people are learnt as ordinary LoRAs of rank {s.plain_rank} (make one with python -m metalora meta-train, or give one with --meta-down)"
        if self.studio.notice:
            text += f"; {self.studio.notice}"
        return [
            cards.status(text),
            gr.Radio(choices=domains, **({} if set(DOMAINS) <= set(domains) else {"value": domain})),  # somebody may have chosen by now
            gr.Slider(value=config.steps),
            gr.Dropdown(choices=sizes(s.resolution, 2 * base.pipeline.vae_scale_factor), value=f"{s.resolution}x{s.resolution}"),
            gr.Slider(value=s.inference_steps),
            gr.Slider(value=s.guidance),
            gr.Gallery(columns=4 if s.resolution <= 256 else 2),
            cards.words(s.prompt_phrases),
            *_access(False),
        ]  # fmt: skip

    def take_sample(self, event: gr.SelectData):
        """A sample, ready to be learnt."""
        sample = self.samples[event.index]
        return sample.photo, sample.held_out, gr.HTML(visible=False), gr.Gallery(value=None, visible=False), 0, sample.domain

    def look(self, photo: str | None):
        """A fresh photo: shown upright if it is a photo at all, and its faces if there are several to choose from."""
        from .face import thumbnails

        one = [gr.HTML(visible=False), gr.Gallery(value=None, visible=False), 0, gr.Gallery(selected_index=None)]
        if not photo:
            return None, None, *one
        try:
            image = self.studio.open_photo(photo)
        except MetaLoraError as error:
            gr.Warning(cards.sentence(str(error)), title="Another photo, please")
            return None, None, *one
        with one_sentence():
            faces = self.studio.faces(image)
        if Path(photo).suffix.lower() not in SHOWN_AS_THEY_ARE:
            image.save(photo := str(new_folder() / "photo.png"))
        if len(faces) < 2:
            return photo, None, *one
        shown = [(small, f"face {number}") for number, small in enumerate(thumbnails(image, faces), 1)]
        return photo, None, gr.HTML(visible=True), gr.Gallery(value=shown, visible=True, selected_index=None), *one[2:]

    @staticmethod
    def choose_face(event: gr.SelectData) -> int:
        """Its number, from 1, left to right."""
        return event.index + 1

    def choose_domain(self, domain: str, steps: int):
        """Steps that suit the domain, if they are still those of another, and what there is to learn; once the base is open, which it is then asked for again."""
        if not self.studio.is_open:
            return gr.skip(), gr.skip()
        with one_sentence():
            personalizer = self.studio.personalizer
            usual = {each: personalizer.adapt_config(each).steps for each in personalizer.domains}
            noun = "person" if personalizer.subject_of(domain) == FACE else domain
        untouched = domain in usual and steps in usual.values()
        return gr.Slider(value=usual[domain]) if untouched else gr.skip(), gr.Button(f"Learn this {noun}")

    def learn(self, photo: str | None, face: int, domain: str, steps: int, seed: int, held_out: list[str] | None, request: gr.Request):
        """Learn the person in a photo; progress, then the identity file and the LoRA as diffusers and kohya write it."""
        stop = StopFlag.of(request.session_hash)
        stop.clear()
        busy, idle = (gr.Button(visible=False), gr.Button(visible=True)), (gr.Button(visible=True), gr.Button(visible=False))
        nothing = [gr.skip()] * 3
        with one_sentence():
            if not photo:
                raise MetaLoraError("Pick one of the samples or upload a photo first.")
            self.studio.take_notice()  # of somebody else's work
            card, started = cards.Learning(cards.data_uri(self.studio.portrait(photo, domain, int(face) or None))), time.monotonic()
        yield [*nothing, gr.skip(), card.preparing(), *busy]
        try:
            with one_sentence():
                shown = 0.0
                for report in self.train(photo, domain, int(face) or None, int(steps), int(seed or 0), held_out or [], stop):
                    self._tell()
                    if isinstance(report, Learnt):
                        files = self.studio.write_files(report.identity, new_folder())
                        yield [*map(download, files), report, card.done(time.monotonic() - started, domain), *idle]
                        return
                    card.add(report)
                    if time.monotonic() - shown > UPDATE_EVERY or report.preview is not None:
                        shown = time.monotonic()
                        yield [*nothing, gr.skip(), card.running(report), *busy]
        except Cancelled:
            yield [*nothing, gr.skip(), card.stopped(), *idle]
        except gr.Error:
            yield [*nothing, gr.skip(), card.failed(), *idle]
            raise
        finally:
            stop.clear()

    def _tell(self) -> None:
        """Show what the user should know of the base."""
        if notice := self.studio.take_notice():
            gr.Warning(notice, title="Please note")

    @staticmethod
    def stop(request: gr.Request) -> None:
        """Stop what this session is doing, within a step."""
        StopFlag.of(request.session_hash).raise_()

    def generate(
        self, learnt: Learnt | None, prompt: str, count: int, seed: int, vary: bool, size: str, steps: int, guidance: float, strength: float,
        request: gr.Request,
    ):  # fmt: skip
        """Pictures of the person learnt or loaded, as they are done, with their likeness."""
        stop, started = StopFlag.of(request.session_hash), time.monotonic()
        stop.clear()
        busy, idle = (gr.Button(visible=False), gr.Button(visible=True)), (gr.Button(visible=True), gr.Button(visible=False))
        with one_sentence():
            if learnt is None:
                raise MetaLoraError("Learn a person first, or load an identity file.")
            self.studio.take_notice()  # of somebody else's work
            order = Order(prompt, int(count), int(seed or 0), int(steps), float(guidance), parse_size(size), float(strength))
            most = LARGEST * self.studio.settings.resolution
            if math.prod(order.size) > most**2:
                raise MetaLoraError(f"Pictures here have at most {most}x{most} pixels; choose a smaller size.")
        scored, held_out = learnt.photos is not None, 0 if learnt.held_out is None else len(learnt.held_out)
        pictures, shown, summary = [], [], cards.line("Nothing was made.")
        yield [gr.skip(), cards.line("starting"), gr.skip(), *busy]
        try:
            with one_sentence():
                for picture in self.draw(learnt, order, new_folder(), stop):
                    self._tell()
                    shown.append((str(picture.path), cards.caption(picture, order.seed + len(pictures), scored)))
                    pictures.append(picture)
                    summary = cards.summary(pictures, time.monotonic() - started, held_out)
                    yield [shown, summary, gr.skip(), *busy]
            yield [shown, summary, order.seed + order.count if vary else order.seed, *idle]
        except Cancelled:
            yield [shown or gr.skip(), cards.line("Stopped."), gr.skip(), *idle]
        except gr.Error:
            yield [shown or gr.skip(), "", gr.skip(), *idle]
            raise
        finally:
            stop.clear()

    def load(self, file: str):
        """An identity file of this base: its person, ready for pictures, and the LoRA files again."""
        with one_sentence():
            learnt = self.studio.load(file)
            files = self.studio.write_files(learnt.identity, new_folder())
        gr.Info(cards.sentence(f"Loaded: {anyone(learnt.identity.domain)}, {cards.counted(learnt.identity.steps, 'step')}."))
        return [*map(download, files), learnt]


def _access(wanted: bool) -> tuple[gr.Textbox, gr.Button]:
    """The field for a token and its button, there or not."""
    return gr.Textbox(value="", visible=wanted), gr.Button(visible=wanted)


def new_folder() -> Path:
    """A folder for files of one session, inside the page's cache, which clears itself."""
    cache = Path(get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache))


def download(path: Path | None) -> gr.DownloadButton:
    """The button that gives a file, open where there is one."""
    return gr.DownloadButton(value=path and str(path), interactive=path is not None)


def sizes(resolution: int, grid: int) -> list[str]:
    """Square, upright and wide, on the base's grid."""
    short = max(grid, resolution * 3 // 4 // grid * grid)
    return [f"{resolution}x{resolution}", f"{short}x{resolution}", f"{resolution}x{short}"]


def parse_size(text: str) -> tuple[int, int]:
    """"96x128" → (96, 128); MetaLoraError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*", str(text))
    if not match:
        raise MetaLoraError(f"{text} is not a size; write width x height in pixels, for example 96x96.")
    return int(match[1]), int(match[2])
