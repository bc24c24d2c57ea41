"""The command line: `python -m metalora COMMAND`. Parse, call, show; what is done is done elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .config import DEFAULT_BASE
from .errors import MetaLoraError
from .processes import here
from .terminal import Result, Unfinished, check_file, check_folder, command, finish, launch, pair

if TYPE_CHECKING:
    from .base import Base
    from .hub import OnFetch
    from .personalizer import Personalizer
    from .plan import Learning

CHECK_PICTURES = 4  # generated after adapting, where there are held-out photos to compare with

Photos = Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="One photo of the person, or several.")]
HeldOut = Annotated[list[Path] | None, typer.Option("--held-out", metavar="PHOTO...", help="Other photos of the same person, to score with; nothing is learnt from them.")]
Dataset = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of people's photos, with metadata.jsonl.")]
Domain = Annotated[str, typer.Option("--domain", help="Kind of person, as the Meta-Downs have it: woman, man, ...")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps; the base's own number when not given.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
BaseName = Annotated[str, typer.Option("--base", envvar="METALORA_BASE", help="miniature, a Hub id or a folder.")]
MetaDownName = Annotated[str | None, typer.Option("--meta-down", envvar="METALORA_META_DOWN", help="A Hub id[@revision] or a folder; the base's own when not given.")]
PlanName = Annotated[str | None, typer.Option("--plan", envvar="METALORA_PLAN", help="How to use the GPU's memory, by name; the fastest plan that fits when not given.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]


@command
def adapt(
    photos: Photos, domain: Domain, output: Output, held_out: HeldOut = None, steps: Steps = None, seed: Seed = 0,
    face: Annotated[int | None, typer.Option("--face", min=1, help="Which face, counted from the left, where a photo shows several.")] = None,
    base: BaseName = DEFAULT_BASE, meta_down: MetaDownName = None, plan: PlanName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Learn a person from one photo or several; writes an identity file."""
    check_file(output)
    from .face import only
    from .photo import load_photo
    from .progress import Line

    images, others = ([load_photo(path) for path in paths] for paths in (photos, held_out or []))
    _prepare(base, meta_down, plan)
    personalizer = _open(base, meta_down, plan)
    for path, image in zip(held_out or [], others):
        only(personalizer.finder_of(domain), image, path)
    _say_plain(personalizer, f"the {domain} is")
    start = time.perf_counter()
    with Line() as line:
        identity = personalizer.adapt(images, domain, steps, seed, face=face, on_step=line.step)
    seconds = time.perf_counter() - start
    identity.save(output)
    result = {"output": str(output), "sha256": identity.sha256, "domain": domain, "steps": identity.steps, "seed": seed, "seconds": round(seconds, 2)}
    text = f"{output}: this {domain}, learnt in {identity.steps} steps and {seconds:.1f} s"
    if others:
        prompt = "a photo of {person}"
        try:
            pictures = personalizer.generate(identity, prompt, CHECK_PICTURES, seed)
            scores = _means(_scorer(personalizer, domain).score(pictures, images, others, [_anyone(prompt, domain)] * len(pictures)))
        except MetaLoraError as error:
            raise Unfinished(f"{text}; but it could not be scored: {error}", result) from error
        result["scores"] = scores
        text += f"\n{_listed(scores)} (means of {CHECK_PICTURES} generated pictures)"
    return result, text


@command
def adapt_all(
    dataset: Dataset, output: Output, domain: Annotated[str | None, typer.Option("--domain", help="Only the people of that kind; everybody when not given.")] = None,
    steps: Steps = None, seed: Seed = 0, base: BaseName = DEFAULT_BASE, meta_down: MetaDownName = None, plan: PlanName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Learn everybody of a dataset from their reference photos; goes on where it was stopped. Also under accelerate launch."""
    check_folder(output)
    from .data import load_dataset
    from .progress import Line

    people = load_dataset(dataset)
    subjects = people.of_domain(domain) if domain else people.subjects
    _prepare(base, meta_down, plan)
    from .people import adapt_all as run

    personalizer = _open(base, meta_down, plan)
    _say_plain(personalizer, "people are")
    with Line() as line:
        learnt = finish(run(personalizer, subjects, output, steps=steps, seed=seed), line.progress)
    if not here().first:
        return {}, ""
    result = {"output": str(output), "people": {identity: str(path) for identity, path in learnt.files.items()}, "faults": learnt.faults}
    text = f"{output}: {len(learnt.files)} of {len(subjects)} people"
    if learnt.faults:
        said = "".join(f"\n  - {identity}: {fault}" for identity, fault in learnt.faults.items())
        raise Unfinished(f"{text}; mend the photos of these and start again:{said}", result)
    return result, text


@command
def generate(
    identity: Annotated[Path, typer.Argument(metavar="ME.safetensors", help="The identity file that adapt wrote.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the pictures show; {person} stands for the person.")],
    output: Output, count: Annotated[int, typer.Option("--count", min=1, help="Pictures for each prompt; picture i has seed + i.")] = 1,
    seed: Seed = 0, steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="How strictly the prompt is followed.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Width and height in px.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="How strongly the person comes in; below 1 the prompt counts for more.")] = 1.0,
    base: BaseName = DEFAULT_BASE, meta_down: MetaDownName = None, plan: PlanName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Generate pictures of a person into a folder; each PNG says in its metadata what made it."""
    check_folder(output)
    wanted = pair(size, "x", "--size", "768x512") if size else None
    _prepare(base, meta_down, plan, identity)
    from .files import free
    from .generate import save_png
    from .identity import Identity
    from .progress import Line

    person = Identity.load(identity)
    personalizer = _open(base, meta_down, plan)
    paths: list[Path] = []
    with Line() as line:
        pictures = personalizer.generate_each(
            (person, strength), prompts, count, seed, steps=steps, guidance=guidance, size=wanted,
            on_step=lambda done, every: line.show(done / every, f"picture {len(paths) + 1}/{len(prompts) * count}  step {done}/{every}"),
        )  # fmt: skip
        for number, image in enumerate(pictures):
            paths.append(save_png(image, free(output / f"{number // count + 1:02d}-{seed + number % count}.png")))
    shown = [{"file": str(path), "prompt": prompts[n // count], "seed": seed + n % count} for n, path in enumerate(paths)]
    return {"identity": person.sha256, "pictures": shown}, "\n".join(map(str, paths))


@command
def export(
    identity: Annotated[Path, typer.Argument(metavar="ME.safetensors", help="The identity file that adapt wrote.")],
    output: Output, format: Annotated[str, typer.Option("--format", help="diffusers (also for ComfyUI) or kohya.")] = "diffusers",
    base: BaseName = DEFAULT_BASE, meta_down: MetaDownName = None, plan: PlanName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Write a person as an ordinary LoRA that other programs read."""
    check_file(output)
    _prepare(base, meta_down, plan, identity)
    from .identity import Identity

    person = Identity.load(identity)
    _open(base, meta_down, plan).export(person, output, format)
    result = {"output": str(output), "format": format, "identity": person.sha256, "prompt_words": person.prompt_words}
    return result, f"{output}: a LoRA of rank {person.rank} under {format} names; prompts call the person {person.prompt_words}"


@command
def score(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="The pictures to judge.")],
    against: Annotated[list[Path], typer.Option("--against", metavar="PHOTO...", help="Photos of the person that were not learnt from.")],
    learnt_from: Annotated[list[Path] | None, typer.Option("--learnt-from", metavar="PHOTO...", help="The photos learnt from; adds similarity to them and copying.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the pictures were asked to show; adds CLIP-T.")] = None,
    subject: Annotated[Literal["face", "picture"], typer.Option("--subject", help="What is compared: the face in each; or, of things, the whole pictures, by a DINO model.")] = "face",
    base: BaseName = DEFAULT_BASE, json: Json = False,
) -> Result:  # fmt: skip
    """Score pictures: R-FaceSim to other photos of the person, and what else can be told."""
    from .photo import load_photo

    images, others, photos = ([load_photo(path) for path in paths or []] for paths in (pictures, against, learnt_from))
    from . import hub
    from .clip import Clip
    from .face import only
    from .families import settings_of
    from .score import Scorer
    from .subject import finder_for

    settings = settings_of(hub.base_folder(base, weights=False))
    scorer = Scorer(finder_for(settings, subject), Clip(settings.clip, hub.model_folder))
    for path, image in zip((*against, *(learnt_from or [])), (*others, *photos)):
        only(scorer.finder, image, path)
    rows = scorer.score(images, photos, others, [prompt] * len(images) if prompt else None)
    rows = [{"file": str(path), **row} for path, row in zip(pictures, rows)]
    return {"pictures": rows, "means": _means(rows)}, "\n".join(f"{row['file']}: {_listed(row)}" for row in rows)


@command
def meta_train(
    dataset: Dataset, domain: Domain, output: Output, name: Annotated[str | None, typer.Option("--name", help="What to call it; the output folder's name when not given.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=0, help="Buckets of people to go through; the base's own number when not given.")] = None,
    directions: Annotated[int | None, typer.Option("--directions", min=0, metavar="PEOPLE", help="Before, begin where the gradients of so many people point.")] = None,
    begin: Annotated[str | None, typer.Option("--from", metavar="META_DOWN", help="Go on from this Meta-Down, a folder or a Hub id[@revision], with other people or on another base of the same layers.")] = None,
    subject: Annotated[Literal["face", "picture"] | None, typer.Option("--subject", help="What the photos are of: a face in each, or the whole picture for a domain of things; the base's own when not given.")] = None,
    settings: Annotated[str, typer.Option("--set", metavar="KEY=VALUE,...", help="Other settings of stage 1 than the base's, such as start_rate=0.5,bucket_size=8.")] = "",
    adapt: Annotated[str, typer.Option("--adapt", metavar="KEY=VALUE,...", help="Settings with which those of this domain are to be learnt, where the base's do not suit, such as steps=40.")] = "",
    seed: Seed = 0, log: Annotated[Path | None, typer.Option("--log", metavar="FOLDER", help="Write a TensorBoard log there.")] = None,
    base: BaseName = DEFAULT_BASE, plan: PlanName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Learn the Meta-Down of a domain; stopped, it goes on from its last checkpoint. Also under accelerate launch."""
    check_folder(output)
    _check_free(output)
    if begin and directions:
        raise MetaLoraError("--from and --directions both say where to begin; leave out one of them.")
    from . import hub
    from .config import AdaptConfig, overlay, read_settings
    from .data import load_dataset
    from .progress import Line, tensorboard

    given = {"rounds": rounds, "direction_people": directions, "subject": subject}
    told = read_settings(settings, "--set") if settings else {}
    if "seed" in told:
        raise MetaLoraError("--set has the seed; give it with --seed.")
    changes = told | {key: value for key, value in given.items() if value is not None} | {"seed": seed}
    of_domain = read_settings(adapt, "--adapt") if adapt else {}
    overlay(AdaptConfig(), of_domain, "--adapt")
    people = load_dataset(dataset, open_pictures=True).of_domain(domain)
    _fetched(lambda seen: hub.base_folder(base, on_fetch=seen, before=lambda configs: _check_memory(configs, plan, "stage 1")))
    folder = _fetched(lambda seen: hub.meta_down_folder(begin, domain, on_fetch=seen)) if begin else None
    from .base import Base
    from .meta import CHECKPOINT, HEADS, learn_domain
    from .metadown import MetaDown

    first = here().first
    opened = Base.open(base, here().device(), plan, "stage 1")
    _say_plan(opened)
    record = tensorboard(log, name or output.name) if log and first else None
    with Line() as line:

        def show(report: Any) -> None:
            line.step(report)
            if record:
                record(report)

        found = finish(learn_domain(opened, people, domain, name or output.name, output, changes, MetaDown.load(folder) if folder else None), show)
        found = replace(found, adapt=found.adapt | of_domain)
    if not first:
        return {}, ""  # one of several processes speaks for all
    found.save(output)
    for kept in (output / CHECKPOINT, *output.glob(HEADS.format("*"))):
        kept.unlink(missing_ok=True)
    result = {"output": str(output), "domain": domain, "people": found.training["subjects"], "sha256": found.sha256, "steps": found.training["steps"]}
    return result, f"{output}: the Meta-Down of {found.training['subjects']} subjects of the domain {domain}"


@command
def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Three-factor weights that other code wrote.")],
    output: Output, domain: Annotated[str, typer.Option("--domain", help="Of whom they were learnt, such as woman.")],
    base: BaseName = DEFAULT_BASE, json: Json = False,
) -> Result:  # fmt: skip
    """Make a Meta-Down of weights that other code published; layers are found by name, then by shape and order."""
    from . import hub
    from .files import check_tensors

    _check_free(output)
    check_tensors(source, "a foreign adapter")
    _fetched(lambda seen: hub.base_folder(base, on_fetch=seen))
    from .foreign import convert

    found, placed = convert(source, base, domain, output.name)
    found.save(output)
    result = {"output": str(output), "by_name": len(placed.by_name), "by_order": len(placed.by_order), "empty": placed.empty, "left_out": placed.left_out}
    lines = [f"{output}: {len(placed.by_name)} layers placed by name, {len(placed.by_order)} by shape and order", *(f"not placed: {line}" for line in placed.left_out)]
    return result, "\n".join([*lines, *([f"{len(placed.empty)} layers of the base stay as they are, such as {placed.empty[0]}"] if placed.empty else [])])


@command
def evaluate(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of people's photos, with metadata.jsonl and prompts.txt.")],
    method: Annotated[list[str], typer.Option("--method", metavar="METHOD...", help="base, meta-lora, lora-r1, ..., with @STEPS for other steps than the base's, or :KEY=VALUE,... for other settings.")],
    output: Output, steps: Steps = None, seed: Seed = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first people only.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="How strongly the person comes into the pictures.")] = 1.0,
    degrade: Annotated[list[str] | None, typer.Option("--degrade", metavar="KIND=STRENGTH...", help="Learn once more from photos made worse: blur=2, noise=0.1, dark=0.5, lowres=0.5, jpeg=0.9, occlusion=0.2.")] = None,
    dino: Annotated[str | None, typer.Option("--dino", metavar="HUB_ID|FOLDER", help="A DINO model, such as facebook/dinov2-small, to score whole pictures with too.")] = None,
    base: BaseName = DEFAULT_BASE, meta_down: MetaDownName = None, plan: PlanName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Compare methods on people they have never seen; goes on where it was stopped. Also under accelerate launch."""
    check_folder(output)
    from . import hub
    from .degrade import Degradation
    from .methods import Method
    from .progress import Line

    for each in method:
        Method.parse(each)
    for each in degrade or []:
        Degradation.parse(each)
    _prepare(base, meta_down, plan)
    dino = str(_fetched(lambda seen: hub.model_folder(dino, seen))) if dino else None
    from .evaluate import evaluate as run
    from .report import table

    personalizer = _open(base, meta_down, plan)
    with Line() as line:
        summary = finish(run(personalizer, dataset, method, output, steps=steps, seed=seed, limit=limit, strength=strength, degrade=degrade or [], dino=dino), line.progress)
    if not here().first:
        return {}, ""
    return summary, f"{table(summary)}\n{output / 'summary.json'}\n{output / 'report.html'}"


@command
def publish(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|ME.safetensors", help="The Meta-Down folder that meta-train wrote, or an identity file.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub; made when it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else can see it; refused where the repository is there already and public.")] = False, json: Json = False,
) -> Result:  # fmt: skip
    """Put a Meta-Down or a person on the Hub, with a card and the base's licence; HF_TOKEN must let you write."""
    from .publish import publish

    address = publish(source, repo, private)
    return {"address": address}, address


@command
def doctor(
    memory: Annotated[list[float] | None, typer.Option("--memory", min=0.1, metavar="GB", help="Say also what the plan would be for a card of that size.")] = None,
    base: BaseName = DEFAULT_BASE, meta_down: MetaDownName = None, json: Json = False,
) -> Result:  # fmt: skip
    """Say what is on this machine and what is missing; fetches nothing."""
    from .doctor import examine, lines

    found = examine(base, meta_down, memory or [])
    return found, lines(found)


def _check_free(output: Path) -> None:
    from .files import is_complete

    if is_complete(output):
        raise MetaLoraError(f"{output} holds a Meta-Down already; choose another output folder.")


def _fetched(get: Callable[[OnFetch], Any]) -> Any:
    """What `get` has on this machine, before the libraries are loaded that open it (see hub.prepare); downloads are shown."""
    from .progress import Line

    with Line() as line:
        return get(line.fetched)


def _prepare(base: str, meta_down: str | None, plan: str | None, identity: Path | None = None) -> None:
    """The same with the Meta-Downs; not where this machine has not the memory for it."""
    from . import hub
    from .files import check_tensors

    if identity:
        check_tensors(identity, "an identity file")  # not after a download of many GB
    _fetched(lambda seen: hub.prepare(base, meta_down, seen, before=lambda configs: _check_memory(configs, plan, hub.learning(base, meta_down))))


def _check_memory(configs: Path, plan: str | None, learning: Learning) -> None:
    from .base import choice_for

    choice_for(configs, here().device(), plan, learning)


def _open(base: str, meta_down: str | None, plan: str | None) -> Personalizer:
    from .personalizer import Personalizer

    personalizer = Personalizer.open(base, meta_down, here().device(), plan)
    _say_plan(personalizer.base)
    return personalizer


def _say_plan(base: Base) -> None:
    if base.device.type != "cpu" and here().first:  # a CPU has only one
        print(f"plan {base.choice.says}", file=sys.stderr)


def _say_plain(personalizer: Personalizer, who: str) -> None:
    if personalizer.is_plain and here().first:
        print(f"There is no Meta-Down for {personalizer.base.name}, so {who} learnt as an ordinary LoRA, which takes more steps; make one with meta-train, or give one with --meta-down.", file=sys.stderr)


def _scorer(personalizer: Personalizer, domain: str):
    from .score import Scorer

    return Scorer(personalizer.finder_of(domain), personalizer.clip)


def _anyone(prompt: str, domain: str) -> str:
    from .prompts import anyone, fill

    return fill(prompt, anyone(domain))


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean of each score over the pictures that have it."""
    columns = {key: [float(row[key]) for row in rows if row[key] is not None] for key in rows[0] if key != "file"}
    return {key: sum(values) / len(values) if values else None for key, values in columns.items()}


def _listed(scores: dict[str, Any]) -> str:
    names = {"r_facesim": "R-FaceSim", "similarity": "similarity to the photo learnt from", "copying": "copying", "clip_t": "CLIP-T", "clip_i": "CLIP-I"}
    return ", ".join(f"{name} {scores[key]:.3f}" for key, name in names.items() if scores.get(key) is not None) or "no face found"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above and leave with its exit code."""
    launch(arguments)
