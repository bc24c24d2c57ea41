"""Small pieces of HTML that the page shows: the state of the base, the progress of a learning, what was generated."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from .hub import Fetched
    from .studio import Picture
    from .train import StepReport

PICTURE_SIDE = 256  # px, of the pictures inside a card
CURVE = (240, 40)  # px, width and height of the loss curve's canvas


def sentence(text: str) -> str:
    """Text as HTML, in which addresses of the web are links and all else is as it stands."""
    parts = re.split(r"""(https?://[^\s<>"'`]*[^\s<>"'`.,;:!?)])""", text)
    return "".join(f'<a href="{escape(part)}" target="_blank" rel="noopener">{escape(part)}</a>' if n % 2 else escape(part, quote=False) for n, part in enumerate(parts))


def status(text: str, kind: str = "ready") -> str:
    """A pill with a dot; `kind` is busy, ready or fault."""
    return f'<div class="status {kind}" role="status"><i></i><span>{sentence(text)}</span></div>'


def heading(number: int, text: str) -> str:
    """The head of a step of the page."""
    return f'<h2 class="head"><b>{number}</b>{escape(text)}</h2>'


def line(text: str) -> str:
    """One quiet line."""
    return f'<p class="summary">{escape(text)}</p>'


def words(groups: Sequence[Sequence[str]]) -> str:
    """The phrases that the base was trained on, folded away; nothing for a base that does not say."""
    if not groups:
        return ""
    rows = "".join(f"<li>{escape(', '.join(group))}</li>" for group in groups)
    return f'<details class="words"><summary>Words that this base knows best</summary><ul>{rows}</ul></details>'


def data_uri(image: Image.Image, side: int = PICTURE_SIDE) -> str:
    """The picture, no larger than `side` px, as an address that holds it."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG" if max(small.size) <= 128 else "JPEG")
    kind = "png" if max(small.size) <= 128 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def speed(report: StepReport) -> str:
    """Steps a second, or seconds a step where that is the larger number."""
    return f"{report.steps_per_second:.1f} it/s" if report.steps_per_second >= 1 else f"{1 / report.steps_per_second:.1f} s/it"


def counted(number: int, what: str) -> str:
    """"1 step", "2 steps"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass
class Learning:
    """The card of one learning: the photo, the likeness as it comes, a bar, the figures, the loss curve."""

    photo: str  # address of the photo
    preview: str = ""
    losses: list[float] = field(default_factory=list)

    def add(self, report: StepReport) -> None:
        """Take a step in."""
        self.losses.append(report.loss)
        if report.preview is not None:
            self.preview = data_uri(report.preview)

    def running(self, report: StepReport) -> str:
        """The card while it learns."""
        figures = f"step {report.step} of {report.steps} · loss {self.smooth()[-1]:.3f} · {speed(report)} · {clock(report.seconds_left)} left"
        return self._card("running", "Learning", figures, report.step / report.steps)

    def preparing(self) -> str:
        """The card before the first step."""
        return self._card("running", "Preparing", "opening the base, finding the face, encoding the photo", None)

    def done(self, seconds: float, noun: str) -> str:
        """The card at the end."""
        return self._card("done", "Learnt", f"this {escape(noun)}, in {clock(seconds)} and {counted(len(self.losses), 'step')}; ask for pictures now", 1.0)

    def stopped(self) -> str:
        """The card after a stop."""
        self.preview = ""
        return self._card("stopped", "Stopped", f"after {counted(len(self.losses), 'step')}; nothing of it was kept", 0.0)

    def failed(self) -> str:
        """The card after a fault, whose sentence is shown elsewhere."""
        self.preview = ""
        return self._card("stopped", "Not learnt", "", 0.0)

    def smooth(self, keep: float = 0.95) -> list[float]:
        """Losses as a running mean that forgets; single ones jump, since each step draws its own noise level."""
        mean, weight, means = 0.0, 0.0, []
        for loss in self.losses:
            mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
            means.append(mean / weight)
        return means

    def _card(self, kind: str, title: str, figures: str, share: float | None) -> str:
        bar = "" if share is None else f' style="width:{100 * share:.1f}%"'
        now = f'<img src="{self.preview}" alt="the likeness so far">' if self.preview else "<span>the likeness<br>appears here</span>"
        return (
            f'<div class="learning {kind}">'
            f'<div class="pair"><figure><img src="{self.photo}" alt="your photo"><figcaption>photo</figcaption></figure>'
            f'<b>→</b><figure><div class="frame">{now}</div><figcaption>{"learnt" if kind == "done" else "so far"}</figcaption></figure></div>'
            f'<div class="bar"><i class="{"wait" if share is None else ""}"{bar}></i></div>'
            f'<p><b>{title}</b> <span class="figures">{figures}</span></p>{curve(self.smooth())}</div>'
        )


def curve(values: Sequence[float]) -> str:
    """The values as a line; nothing for fewer than two."""
    if len(values) < 2:
        return ""
    width, height = CURVE
    shown = [values[round(i * (len(values) - 1) / 119)] for i in range(120)] if len(values) > 120 else values
    low, high = min(shown), max(shown)
    spread = (high - low) or 1.0
    points = " ".join(f"{i * width / (len(shown) - 1):.1f},{2 + (high - v) / spread * (height - 4):.1f}" for i, v in enumerate(shown))
    return f'<svg class="curve" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="loss curve"><polyline points="{points}"/></svg>'


def clock(seconds: float) -> str:
    """"48 s", "2 min 05 s", "1 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def fetched(report: Fetched) -> str:
    """"owner/model: 3.10 of 33.60 GB, 52.0 MB/s, 9 min 47 s left"."""
    return f"{report.name}: {report.done / 1e9:.2f} of {report.total / 1e9:.2f} GB, {report.rate / 1e6:.1f} MB/s, {clock(report.seconds_left)} left"


def figure(cosine: float) -> str:
    """Two digits; no minus before a zero."""
    return f"{round(cosine, 2) + 0.0:.2f}"


def caption(picture: Picture, seed: int, scored: bool) -> str:
    """What stands under a picture."""
    lines = []
    if picture.similarity is not None:
        lines.append(f"similarity to your photo {figure(picture.similarity)}")
    if picture.r_facesim is not None:
        lines.append(f"R-FaceSim {figure(picture.r_facesim)}")
    if not lines and scored:
        lines.append("no face found")
    return "\n".join([*lines, f"seed {seed}"])


def summary(pictures: Sequence[Picture], seconds: float, held_out: int) -> str:
    """One line over the pictures: how long, and the mean scores."""
    parts = [f"{len(pictures)} picture{'s' if len(pictures) != 1 else ''} in {clock(seconds) if seconds >= 10 else f'{seconds:.1f} s'}"]
    for name, values in (
        ("mean similarity to your photo", [p.similarity for p in pictures]),
        (f"mean R-FaceSim ({held_out} other photo{'s' if held_out != 1 else ''})", [p.r_facesim for p in pictures]),
    ):
        known = [v for v in values if v is not None]
        if known:
            parts.append(f"{name} <b>{figure(sum(known) / len(known))}</b>")
    return f'<p class="summary">{" · ".join(parts)}</p>'
