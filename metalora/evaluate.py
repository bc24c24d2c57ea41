"""The benchmark: every person of a dataset, learnt from the reference by every method, asked for every prompt, and scored.

What is done lies in the output folder: METHOD/PERSON.jsonl with a line a picture, written once the person is complete, and
the pictures beside it. A run that is started again goes on with what lacks, and several processes share the people.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors.torch import save

from . import hub, peer
from .config import FACE, PICTURE, AdaptConfig
from .data import METADATA, Dataset, Subject, load_dataset
from .degrade import Degradation
from .dino import Dino
from .errors import MetaLoraError
from .face import Finder
from .files import save_json, write_atomically
from .generate import GenerateConfig, Person, generate, save_png, unload_people
from .identity import Identity
from .methods import LEARNING, PEER, Method
from .personalizer import Personalizer, plain_faults
from .photo import load_photo
from .processes import CLAIMS, WAITING, Pace, Progress, here, share_out, shown
from .prompts import anyone, fill
from .report import SCORES, SETTINGS, TRUE_PHOTOS, folder_of, write_report
from .score import Scorer, gallery_entry, likeness, nearest, number


class LostFace(MetaLoraError):
    """A photo was made so much worse that its face is not found."""


@dataclass(frozen=True, eq=False)
class Someone:
    """A person of the dataset, as the benchmark knows them."""

    number: int  # place in the gallery
    subject: Subject
    photos: np.ndarray  # (m, d) embeddings of the references
    others: np.ndarray  # (k, d) of the other photos; NaN where no face was found

    @property
    def file(self) -> str:
        """Start of the names of this person's files."""
        return f"{self.number:03d}-{re.sub(r'[^A-Za-z0-9]+', '-', self.subject.identity)[:40]}"


def evaluate(
    personalizer: Personalizer, folder: str | Path, methods: Sequence[str], output: str | Path, *,
    steps: int | None = None, seed: int = 0, limit: int | None = None, strength: float = 1.0, degrade: Sequence[str] = (), dino: str | None = None,
) -> Generator[Progress, None, dict[str, Any]]:  # fmt: skip
    """Run what lacks, then write summary.json, contact-sheet.png, curves.svg and report.html over all that is in `output`; returns the summary.

    `limit` takes the first people only; the gallery is always the whole dataset. `strength` is the weight of the person while
    pictures are made. Each of `degrade`, such as "blur=2", has every method learn once more from photos that are so much
    worse; what it is judged by stays as it is. With `dino`, the Hub id or folder of a DINO model, pictures get that score too.
    Under `accelerate launch`, or started several times, the processes share the people, one at a time each; the first of a
    launch waits for all and writes the report, and the summary of the others is empty.
    Raises MetaLoraError for a faulty dataset, one of people and things together, an unknown method, or an output folder of other settings.
    """
    named = [Method.parse(name) for name in methods]
    worse = [method.degraded(how) for how in map(Degradation.parse, degrade) for method in named if method.kind in LEARNING and not method.degrade]
    chosen = [*dict.fromkeys([*named, *worse]), Method(TRUE_PHOTOS, TRUE_PHOTOS)]
    if any(method.kind == PEER for method in chosen):
        peer.check(personalizer.base)
    data = load_dataset(folder, need_prompts=True, need_others=True)
    bench = Bench(personalizer, data, Path(output), steps, seed, strength, Dino(hub.model_folder(dino)) if dino else None)
    people, left_out = yield from bench.meet()
    gallery = np.stack([gallery_entry(p.others) for p in people])  # (g, d)
    settings = {"dataset": _sha256(Path(folder).expanduser() / METADATA), "prompts": data.prompts, "gallery": len(people), "seed": seed, "strength": strength}
    settings["dino"] = bench.scorer.dino.sha256 if bench.scorer.dino else ""
    if bench.scorer.finder.whole:
        settings |= {"subject": PICTURE, "seen_by": bench.scorer.finder.dino.sha256}
    for method in chosen:
        bench.claim(method, settings, people)
    wanted = {person.file: person for person in people[:limit]}

    def lacking(file: str) -> list[Method]:
        return [method for method in chosen if not bench.path(wanted[file], method).is_file()]

    def left() -> float:
        return sum(bench.cost(group) for file in wanted for group in together(lacking(file)))

    pace = Pace(left())
    for file in share_out(list(wanted), lambda file: not lacking(file), bench.output / CLAIMS):
        pace.before = pace.units - left()
        if file is None:
            yield pace.at(0, WAITING)
            continue
        for group in together(lacking(file)):
            for done, method in bench.run(wanted[file], group, gallery, [p.subject.identity for p in people]):
                yield pace.at(done, f"{wanted[file].subject.identity}, {method.name}")
            pace.before += bench.cost(group)
    return write_report(bench.output, [m.name for m in chosen], left_out) if here().first else {}


class Learnt(NamedTuple):
    """What a method made of a photo; nobody where nothing is learnt."""

    person: Person | None = None
    seconds: float = 0.0
    parameters: int = 0  # numbers that were trained
    bytes: int = 0  # of the file


def together(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods that differ in their steps alone, side by side: one training serves them all, for its rate does not know its end."""
    groups: dict[Method, list[Method]] = {}
    for method in methods:
        groups.setdefault(method if method.kind == PEER else replace(method, name="", steps=None), []).append(method)
    return list(groups.values())


def finder_of(personalizer: Personalizer, data: Dataset) -> Finder:
    """What finds the subjects of a dataset. MetaLoraError where it has both people and things, for their embeddings are of two spaces."""
    domains: dict[str, list[str]] = {}
    for domain in sorted({subject.domain for subject in data.subjects}):
        domains.setdefault(personalizer.subject_of(domain), []).append(domain)
    if len(domains) > 1:
        faces, things = (", ".join(domains[subject]) for subject in (FACE, PICTURE))
        raise MetaLoraError(f"The dataset mixes domains of people ({faces}) with domains of things ({things}), whose likeness is measured in other ways; evaluate each in a dataset of its own.")
    return personalizer.finder_of(data.subjects[0].domain)


def usual_settings(personalizer: Personalizer, data: Dataset) -> AdaptConfig:
    """How those of a dataset are learnt with their Meta-Downs. MetaLoraError where the Meta-Down of one domain asks for another way than that of the next."""
    ways = {domain: personalizer.adapt_config(domain) for domain in sorted({subject.domain for subject in data.subjects} & {*personalizer.domains})}
    if len(set(map(repr, ways.values()))) > 1:
        raise MetaLoraError(f"The Meta-Downs of {', '.join(ways)} ask for settings of their own, each for others; evaluate each domain in a dataset of its own.")
    return next(iter(ways.values()), personalizer.base.settings.adapt)


class Bench:
    """The people, the parts that score, and the folder."""

    def __init__(self, personalizer: Personalizer, data: Dataset, output: Path, steps: int | None, seed: int, strength: float, dino: Dino | None):
        self.personalizer, self.data, self.output, self.seed, self.strength = personalizer, data, output, seed, strength
        settings, same = personalizer.base.settings, {"seed": seed} | ({} if steps is None else {"steps": steps})
        self.config = replace(usual_settings(personalizer, data), **same)
        # An ordinary LoRA has the settings that suit it best, and all the rest in common: photo, crops, loss, seed.
        common = {name: getattr(self.config, name) for name in ("crops", "margin", "background", "prior_pictures", "asked_draws", "reworded", "ema", "flow")}
        self.plain = replace(settings.plain, **common, **same)
        self.peer = peer.PeerConfig(**same)  # no setting of ours is its concern
        self.scorer = Scorer(finder_of(personalizer, data), personalizer.clip, dino)

    def meet(self) -> Generator[Progress, None, tuple[list[Someone], dict[str, str]]]:
        """Embed everybody's photos. Who cannot be learnt or recognised is left out, with the reason."""
        people: list[Someone] = []
        left_out: dict[str, str] = {}
        pace = Pace(len(self.data.subjects))
        for count, subject in enumerate(self.data.subjects, 1):
            try:
                photos = np.stack([self.scorer.finder.pick(load_photo(i.path)).embedding for i in subject.references])
                others = self.scorer.faces([load_photo(i.path) for i in subject.others])
                if np.isnan(gallery_entry(others)).any():
                    raise MetaLoraError("No face was found in any of the other photos.")
                people.append(Someone(len(people), subject, photos, others))
            except MetaLoraError as error:
                left_out[subject.identity] = str(error)
            yield pace.at(count, f"looking at the photos of {subject.identity}")
        if not people:
            raise MetaLoraError(f"Nobody of the dataset can be evaluated; the first is left out because: {next(iter(left_out.values()))}")
        return people, left_out

    def path(self, person: Someone, method: Method) -> Path:
        """Where the rows of a person go."""
        return self.output / folder_of(method.name) / f"{person.file}.jsonl"

    def claim(self, method: Method, common: dict[str, Any], people: Sequence[Someone]) -> None:
        """Write down what the method's folder is made with; MetaLoraError where it was made with something else."""
        base = self.personalizer.base
        settings = common | {"base": base.name, "fingerprint": base.fingerprint, "steps": self.steps(method)}
        if method.kind in LEARNING:
            settings["adapt"] = repr(replace(self.settings(method), steps=1))  # whatever their number, the settings are the same
        if method.degrade:
            settings["degrade"] = asdict(method.degrade)
        if method.kind == "meta-lora":
            downs = {domain: self.personalizer.meta_down(domain) for domain in sorted({p.subject.domain for p in people})}
            settings |= {"meta_down": {d: down.stamp for d, down in downs.items()}, "adapter": {d: repr(down.adapter) for d, down in downs.items()}}
        path = self.output / folder_of(method.name) / SETTINGS
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in dict.fromkeys([*settings, "subject"]) if found.get(key) != settings.get(key)]
            if other:
                raise MetaLoraError(f"{path.parent} was made with other settings ({', '.join(other)}); choose another output folder, or remove it.")
        save_json(path, settings)

    def settings(self, method: Method) -> AdaptConfig | peer.PeerConfig:
        """How a method learns."""
        if method.kind == PEER:
            return method.over(replace(self.peer, rank=method.rank))
        return method.over(self.plain if method.kind == "lora" else self.config)

    def steps(self, method: Method) -> int:
        """Training steps of a method."""
        return 0 if method.kind in ("base", TRUE_PHOTOS) else self.settings(method).steps

    def cost(self, group: Sequence[Method]) -> float:
        """Of one person and methods that learn together, in forward passes."""
        return self.learning(group) + sum(self.drawing(method) for method in group)

    def drawing(self, method: Method) -> float:
        """The part of the cost that pictures and their scores have."""
        return 1 + (0 if method.kind == TRUE_PHOTOS else len(self.data.prompts) * self.personalizer.base.settings.inference_steps)

    def learning(self, group: Sequence[Method]) -> float:
        """The learning's part of the cost; a training step is three forward passes for each picture of its batch."""
        config = self.settings(group[0])
        return 3 * config.batch_size * max(self.steps(method) for method in group)

    def run(self, person: Someone, group: Sequence[Method], gallery: np.ndarray, names: Sequence[str]) -> Iterator[tuple[float, Method]]:
        """Learn once; generate, score and write for each method; yields the cost that is done. A photo made too bad to learn from is a failure."""
        try:
            learnt = yield from self._learn(person, group)
        except LostFace as error:
            for method in group:
                self._write(person, method, self._fail(person, method, str(error)))
            return
        done = self.learning(group)
        for method in group:
            rows = yield from shown(self._rows(person, method, learnt[method.name], gallery, names), lambda share: (done + share * self.drawing(method), method))
            self._write(person, method, rows)
            done += self.drawing(method)
            yield done, method

    def _write(self, person: Someone, method: Method, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.path(person, method), lambda beside: beside.write_text(text, encoding="utf-8"))

    def _rows(
        self, person: Someone, method: Method, learnt: Learnt, gallery: np.ndarray, names: Sequence[str]
    ) -> Generator[float, None, list[dict[str, Any]]]:
        if method.kind == TRUE_PHOTOS:
            items = person.subject.others
            images, paths, texts = [load_photo(i.path) for i in items], [i.path for i in items], [i.text for i in items]
        else:
            images, paths, texts = [], [], self.data.prompts
            for image in self._pictures(person, learnt.person):
                paths.append(save_png(image, self.path(person, method).with_name(f"{person.file}-{len(images)}.png")))
                images.append(image)
                yield len(images) / (len(texts) + 1)
        rows = self._score(person, images, texts, gallery, names, method.kind == TRUE_PHOTOS)
        own = {"method": method.name, "learn_seconds": round(learnt.seconds, 3), "parameters": learnt.parameters, "bytes": learnt.bytes}
        return [{**row, **own, "picture": os.path.relpath(path, self.output)} for row, path in zip(rows, paths)]

    def _learn(self, person: Someone, group: Sequence[Method]) -> Generator[tuple[float, Method], None, dict[str, Learnt]]:
        """Stage 2 on the references, by name of the method; ours get the same crops, captions and draws, the peer the photos and the words."""
        method = max(group, key=self.steps)
        if method.kind not in LEARNING:
            return {each.name: Learnt() for each in group}
        begin, learnt = time.perf_counter(), {}
        photos, domain, config = self._photos(person, method), person.subject.domain, self.settings(method)
        if method.kind == PEER:
            return {method.name: self._of_the_peer(photos, domain, config)}
        p = self.personalizer
        learn = partial(p.adapt_plain_steps, rank=method.rank) if method.kind == "lora" else p.adapt_meta_steps
        with closing(learn(photos, domain, config=config)) as reports:
            for report in reports:
                seconds = time.perf_counter() - begin
                for each in group:
                    if self.steps(each) == report.step:
                        identity = report.learnt()
                        learnt[each.name] = Learnt(p.person(identity, self.strength), seconds, *_size(identity))
                yield self.learning(group) * report.step / report.steps, method
        return learnt

    def _of_the_peer(self, photos: Sequence[Image.Image], domain: str, config: peer.PeerConfig) -> Learnt:
        begin = time.perf_counter()
        s, words = self.personalizer.base.settings, f"{self.personalizer.base.settings.trigger} {domain}"
        lora = peer.train(self.personalizer.base.folder, photos, f"a photo of {words}", s.train_resolution, s.text_tokens, config)
        seconds, file = time.perf_counter() - begin, save(lora)
        person = Person(lora, words, hashlib.sha256(file).hexdigest(), self.strength)
        return Learnt(person, seconds, sum(t.numel() for t in lora.values()), len(file))

    def _photos(self, person: Someone, method: Method) -> list[Image.Image]:
        """The references as the method is to see them. LostFace where one was made so much worse that its face is not found."""
        photos = [load_photo(item.path) for item in person.subject.references]
        if method.degrade is None:
            return photos
        seen = [method.degrade.apply(photo, self.scorer.finder.pick(photo).box, self.seed + person.number) for photo in photos]
        for place, photo in enumerate(seen):
            save_png(photo, self.path(person, method).with_name(f"{person.file}-photo-{place}.png"))
            try:
                self.scorer.finder.pick(photo)
            except MetaLoraError as error:
                raise LostFace(str(error)) from error
        return seen

    def _fail(self, person: Someone, method: Method, why: str) -> list[dict[str, Any]]:
        """Rows for a person of whom there is nothing to show: recognised in no picture, and no likeness to speak of."""
        who = {"identity": person.subject.identity, "domain": person.subject.domain, "reference": os.path.relpath(person.subject.references[0].path, self.output)}
        nothing = {**dict.fromkeys([*SCORES.values(), "nearest", "seed"]), "face": False, "identified": False, "learn_seconds": 0.0}
        return [{**who, "prompt": prompt, **nothing, "method": method.name, "picture": None, "failed": why} for prompt in self.data.prompts]

    def _pictures(self, person: Someone, learnt: Person | None) -> Iterator[Image.Image]:
        """A picture a prompt. Noise differs from person to person and is the same for all methods."""
        somebody = anyone(person.subject.domain)
        prompts = self.data.prompts if learnt else [fill(prompt, somebody) for prompt in self.data.prompts]
        with plain_faults():
            yield from generate(self.personalizer.base, prompts, [learnt] if learnt else [], GenerateConfig(seed=self.seed + person.number))
        unload_people(self.personalizer.base)

    def _score(
        self, person: Someone, images: Sequence[Image.Image], texts: Sequence[str], gallery: np.ndarray, names: Sequence[str], true: bool
    ) -> list[dict[str, Any]]:
        """A row a picture. A true photo is compared with the person's other photos without itself, in the gallery too."""
        somebody, references = anyone(person.subject.domain), [load_photo(i.path) for i in person.subject.references]
        faces = self.scorer.faces(images)
        clip_t = self.scorer.clip_t(images, [fill(text, somebody) for text in texts])
        clip_i = self.scorer.clip_i(images, references)
        dino = self.scorer.dino_i(images, references) if self.scorer.dino else None
        rows = []
        for i, face in enumerate(faces):
            others = np.delete(person.others, i, axis=0) if true else person.others
            known = gallery.copy()
            known[person.number] = gallery_entry(others) if len(others) else np.nan
            who = int(nearest(face[None], known)[0])
            rows.append({
                "identity": person.subject.identity, "domain": person.subject.domain, "prompt": texts[i],
                "reference": os.path.relpath(person.subject.references[0].path, self.output), "seed": None if true else self.seed + person.number,
                "face": who >= 0, "nearest": names[who] if who >= 0 else None,
                "identified": None if np.isnan(known[person.number]).any() else who == person.number,
                **{key: number(value[0]) for key, value in likeness(face[None], person.photos, others).items()},
                "clip_t": number(clip_t[i]), "clip_i": number(clip_i[i]), **({} if dino is None else {"dino": number(dino[i])}),
            })  # fmt: skip
        return rows


def _size(identity: Identity) -> tuple[int, int]:
    """Numbers that were trained, and bytes of the identity's file."""
    trained = [*identity.downs.values(), *(up for _, up in identity.factors.values())]
    trained += [] if identity.is_plain else [mid for mid, _ in identity.factors.values()]  # an ordinary LoRA has no Mid to train
    with tempfile.TemporaryDirectory() as folder:
        return sum(t.numel() for t in trained), identity.save(Path(folder) / "person.safetensors").stat().st_size


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
