"""The benchmark on a small real base: complete, resumable, shared, and honest about whom it leaves out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from metalora import MetaLoraError, Personalizer
from metalora.adapter import attach_plain, trainable
from metalora.config import AdaptConfig
from metalora.data import load_dataset
from metalora.degrade import Degradation
from metalora.evaluate import Bench, evaluate
from metalora.methods import PEER, Method
from metalora.peer import PeerConfig
from metalora.report import CELL, TRUE_PHOTOS, contact_sheet, differences, folder_of, read_rows, summarise, table, wrap, write_report
from metalora.webreport import curves, degrade_curves, html_report

from .conftest import run, state_hash
from .parts import GREY, build_small_dino, write_people

PROMPTS = ("a photo of {person} in a red cap", "in the green park, smiling")
METHODS = ["base", "meta-lora", "lora-r1@2"]


@pytest.fixture(scope="module")
def personalizer(base, meta_down) -> Personalizer:
    return Personalizer(base, meta_down)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("people"), {"ann": "woman", "bea": "woman", "cleo": "woman"}, prompts=PROMPTS)


@pytest.fixture(scope="module")
def done(personalizer, people, tmp_path_factory):
    """A whole evaluation: its folder, the progress, the summary."""
    output = tmp_path_factory.mktemp("evaluation")
    before = state_hash(personalizer.base.transformer)
    progress, summary = run(evaluate(personalizer, people, METHODS, output, steps=3))
    assert state_hash(personalizer.base.transformer) == before
    return output, progress, summary


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scores(folder) -> dict[str, list]:
    """All rows without the time they took."""
    return {f"{m.name}/{k}": [{**r, "learn_seconds": 0} for r in rows] for m in sorted(folder.iterdir()) if m.is_dir() for k, rows in read_rows(m).items()}


def test_every_person_every_method_every_prompt(done):
    output, _, summary = done
    assert {p.name for p in output.iterdir()} == {"base", "meta-lora", "lora-r1@2", TRUE_PHOTOS, "summary.json", "contact-sheet.png", "report.html"}
    for method in METHODS:
        rows = read_rows(output / method)
        assert list(rows) == ["000-ann", "001-bea", "002-cleo"]
        assert all([r["prompt"] for r in person] == list(PROMPTS) for person in rows.values())
        for row in (r for person in rows.values() for r in person):
            assert Image.open(output / row["picture"]).info["AI-generated"] == "true"
            assert row["face"] == (row["r_facesim"] is not None) and -1 <= row["clip_t"] <= 1
            assert row["identified"] == (row["nearest"] == row["identity"])
    assert summary["chance"] == pytest.approx(1 / 3) and summary["gallery"] == 3
    assert summary["methods"]["meta-lora"]["pictures"] == 6 and summary["left_out"] == {}
    assert json.loads((output / "summary.json").read_text()) == summary


def test_methods_see_the_same_noise_and_differ(done):
    output = done[0]
    pictures = [[Image.open(output / r["picture"]).tobytes() for r in read_rows(output / m)["000-ann"]] for m in METHODS]
    assert pictures[0] != pictures[1] != pictures[2] != pictures[0]
    assert [r["seed"] for m in METHODS for r in read_rows(output / m)["001-bea"]] == [1] * 6
    info = Image.open(output / read_rows(output / "base")["000-ann"][0]["picture"]).info
    assert info["prompt"] == "a photo of a woman in a red cap" and info["identity"] == "{}"


def test_true_photos_are_the_ceiling_without_themselves(done):
    output, _, summary = done
    true = summary["methods"][TRUE_PHOTOS]
    assert true["identification"]["mean"] == 1 and true["faces_found"]["mean"] == 1 and true["learn_seconds"] == 0
    row = read_rows(output / TRUE_PHOTOS)["000-ann"][0]
    assert row["r_facesim"] < 0.9999 and (output / row["picture"]).is_file()  # not compared with itself


def test_the_size_of_what_is_learnt_is_that_of_the_trained_tensors_and_the_file(done, personalizer, people, tmp_path):
    base, methods = personalizer.base, done[2]["methods"]
    with attach_plain(base.transformer, replace(base.settings.adapter, rank=1), torch.Generator().manual_seed(0)) as adapter:
        assert methods["lora-r1@2"]["parameters"] == sum(p.numel() for p in trainable(adapter))
    identity = personalizer.adapt(people / "ann-0.png", "woman", steps=3)
    assert methods["meta-lora"]["parameters"] == sum(t.numel() for pair in identity.factors.values() for t in pair)
    assert methods["meta-lora"]["bytes"] == identity.save(tmp_path / "ann.safetensors").stat().st_size
    assert methods["base"]["parameters"] == methods["base"]["bytes"] == 0


def test_strength_changes_the_pictures_and_is_stated(done, personalizer, people, tmp_path):
    _, summary = run(evaluate(personalizer, people, ["meta-lora"], tmp_path, steps=3, limit=1, strength=0.5))
    assert summary["strength"] == 0.5 and done[2]["strength"] == 1
    pictures = [Image.open(folder / read_rows(folder / "meta-lora")["000-ann"][0]["picture"]) for folder in (done[0], tmp_path)]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    with pytest.raises(MetaLoraError, match="strength"):
        run(evaluate(personalizer, people, ["meta-lora"], done[0], steps=3, strength=0.5))


def test_with_a_dino_pictures_have_one_score_more(done, personalizer, people, tmp_path):
    dino = str(build_small_dino(tmp_path / "dino"))
    _, summary = run(evaluate(personalizer, people, ["base"], tmp_path / "out", limit=2, dino=dino))
    own = [row["dino"] for person in read_rows(tmp_path / "out" / "base").values() for row in person]
    assert len(own) == 4 and summary["methods"]["base"]["dino"]["mean"] == pytest.approx(sum(own) / 4)
    assert "DINO" in table(summary) and ">DINO<" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "dino" not in done[2]["methods"]["base"] and "DINO" not in table(done[2]) and ">DINO<" not in (done[0] / "report.html").read_text(encoding="utf-8")
    for folder, given in ((tmp_path / "out", None), (done[0], dino)):
        with pytest.raises(MetaLoraError, match="other settings .*dino"):
            run(evaluate(personalizer, people, ["base"], folder, steps=None, dino=given))


def test_progress_rises_to_the_end(done):
    _, progress, _ = done
    assert progress[2].what == "looking at the photos of cleo"
    shares = [p.done for p in progress[3:]]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1) and progress[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(p.seconds_left) for p in progress)


def test_a_second_run_does_nothing_anew(done, personalizer, people):
    output, _, summary = done
    before = contents(output)
    progress, again = run(evaluate(personalizer, people, METHODS, output, steps=3))
    assert len(progress) == 3 and again == summary and contents(output) == before


def without_places(folder) -> dict[str, list]:
    return {k: [{**r, "reference": 0, "picture": 0} for r in rows] for k, rows in scores(folder).items()}


@pytest.mark.one_family
def test_numbers_of_steps_share_one_training_and_are_what_each_alone_would_be(personalizer, people, tmp_path, monkeypatch):
    trainings, begin = [], Personalizer.adapt_meta_steps
    monkeypatch.setattr(Personalizer, "adapt_meta_steps", lambda self, *given, **more: trainings.append(more["config"].steps) or begin(self, *given, **more))
    names = ["meta-lora@1", "meta-lora@5", "meta-lora@3"]
    run(evaluate(personalizer, people, names, tmp_path / "together", limit=1))
    assert trainings == [5]
    for name in names:
        run(evaluate(personalizer, people, [name], tmp_path / name, limit=1))
    assert trainings == [5, 1, 5, 3]
    alone = {key: rows for name in names for key, rows in without_places(tmp_path / name).items()}
    both = without_places(tmp_path / "together")
    assert both == alone and len({tuple(row["clip_i"] for row in both[f"{name}/000-ann"]) for name in names}) == 3
    times = [read_rows(tmp_path / "together" / name)["000-ann"][0]["learn_seconds"] for name in names]
    assert 0 < times[0] < times[2] < times[1]
    assert (tmp_path / "together" / "curves.svg").read_text(encoding="utf-8").startswith("<svg") and not (tmp_path / names[0] / "curves.svg").exists()
    run(evaluate(personalizer, people, names[:1], tmp_path / "together", limit=1))
    assert not (tmp_path / "together" / "curves.svg").exists()  # of the methods before


@pytest.mark.one_family
def test_a_broken_run_goes_on(done, personalizer, people, tmp_path):
    broken = evaluate(personalizer, people, METHODS, tmp_path, steps=3)
    for _ in range(20):
        next(broken)
    broken.close()
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.lock"))
    _, summary = run(evaluate(personalizer, people, METHODS, tmp_path, steps=3))
    assert summary["methods"]["meta-lora"]["people"] == 3 and without_places(done[0]) == without_places(tmp_path)


def test_processes_share_the_people_and_the_first_writes_the_report(done, personalizer, people, tmp_path, monkeypatch):
    first = evaluate(personalizer, people, ["base"], tmp_path)
    while "ann" not in next(first).what or not (tmp_path / "base").exists():
        pass  # up to the first picture of ann, whom the first process is at from then on
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, summary = run(evaluate(personalizer, people, ["base"], tmp_path))
    assert summary == {} and not (tmp_path / "summary.json").exists()
    assert sorted(read_rows(tmp_path / "base")) == ["001-bea", "002-cleo"]
    monkeypatch.delenv("RANK")
    _, summary = run(first)
    assert summary["methods"]["base"]["people"] == 3 and not (tmp_path / ".claims").exists()
    assert without_places(tmp_path)["base/000-ann"] == without_places(done[0])["base/000-ann"]


def test_a_limit_keeps_the_gallery_whole(personalizer, people, tmp_path):
    _, summary = run(evaluate(personalizer, people, ["base"], tmp_path, limit=1))
    assert summary["methods"]["base"]["people"] == 1 and summary["gallery"] == 3


def test_who_cannot_be_learnt_is_left_out_by_name(personalizer, tmp_path):
    folder = write_people(tmp_path / "people", {"ann": "woman", "bea": "woman", "cleo": "woman"}, prompts=PROMPTS)
    Image.new("RGB", (32, 32), GREY).save(folder / "ann-0.png")
    for number in (1, 2):
        Image.new("RGB", (32, 32), GREY).save(folder / f"bea-{number}.png")
    _, summary = run(evaluate(personalizer, folder, ["base"], tmp_path / "out"))
    assert summary["gallery"] == 1 and "No face" in summary["left_out"]["ann"] and "other photos" in summary["left_out"]["bea"]
    assert summary["methods"]["base"]["people"] == 1
    Image.new("RGB", (32, 32), GREY).save(folder / "cleo-0.png")
    with pytest.raises(MetaLoraError, match="Nobody of the dataset"):
        run(evaluate(personalizer, folder, ["base"], tmp_path / "none"))


def test_other_settings_need_another_folder(done, personalizer, people):
    with pytest.raises(MetaLoraError, match="other settings .*steps.*choose another output folder"):
        run(evaluate(personalizer, people, ["meta-lora"], done[0], steps=4))
    with pytest.raises(MetaLoraError, match="seed"):
        run(evaluate(personalizer, people, ["base"], done[0], steps=3, seed=1))


def test_methods_are_read_from_their_names():
    assert Method.parse("meta-lora@100") == Method("meta-lora@100", "meta-lora", 0, 100)
    assert Method.parse("lora-r16").rank == 16
    for name in ("lora", "lora-r0", "base@3", "meta-lora@0", "../x", "lora-r1@", TRUE_PHOTOS):
        with pytest.raises(MetaLoraError, match="known are base, meta-lora"):
            Method.parse(name)


def test_a_method_lays_its_settings_over_those_of_the_base():
    config = AdaptConfig(seed=7)
    got = Method.parse("meta-lora:learning_rate=2e-3,steps=250,flow.logit_mean=0.5,margin=[1,2]")
    assert got.over(config) == replace(config, learning_rate=2e-3, steps=250, margin=(1, 2), flow=replace(config.flow, logit_mean=0.5))
    assert got.name == "meta-lora:learning_rate=2e-3,flow.logit_mean=0.5,margin=[1,2]@250"  # a point of the same curve as other steps
    assert got == Method.parse(got.name) and re.fullmatch(r"[\w@=.,+-]+", folder_of(got.name))
    assert Method.parse("lora-r4:steps=9") == Method.parse("lora-r4@9")
    assert Method.parse("meta-lora:compiled=true").over(config) == replace(config, compiled=True)
    assert Method.parse("lora-r4").over(config) == config
    peers = Method.parse("dreambooth-r16:learning_rate=1e-3@500")
    assert (peers.kind, peers.rank, peers.steps) == (PEER, 16, 500) and peers.over(PeerConfig(seed=3)) == PeerConfig(steps=500, learning_rate=1e-3, seed=3)
    with pytest.raises(MetaLoraError, match="Of diffusers' script batch_size and learning_rate can be set"):
        Method.parse("dreambooth-r16:up_rate=4")


@pytest.mark.parametrize("settings, fault", [
    ("rate=1", "no setting named rate; known are"), ("flow.mean=1", "no setting named mean"), ("steps=2.5", "must be a int"), ("steps=many", "not understood"),
    ("learning_rate=NaN", "not understood"), ("", "not understood"), ("../x=1", "named"), ("steps=0", "out of range"), ("learning_rate=-1", "out of range"),
    ("margin=[2,1]", "out of range"), ("crops=2,crops=3", "twice"), ("steps=2@3", "twice"), ("seed=3", "--seed"), ("steps=" + "1" * 200, "not understood"),
    ("up_rate=0", "out of range"), ("start_up=1.5", "out of range"), ("skip_blocks=1", "out of range"), ("prior_pictures=-1", "out of range"), ("asked_draws=-1", "out of range"), ("reworded=1.1", "out of range"), ("scale=0", "out of range"),
    ("flow=1,flow.logit_mean=1", "twice"), ("crops=[1]", "must be a int"), ("compiled=1", "must be a bool"), ("crops=true", "must be a int"),
])  # fmt: skip
def test_a_wrong_setting_of_a_method_is_a_sentence(settings, fault):
    with pytest.raises(MetaLoraError, match=fault):
        Method.parse(f"meta-lora:{settings}")


def test_other_settings_make_other_pictures_in_a_folder_of_their_own(done, personalizer, people, tmp_path):
    name = "meta-lora:learning_rate=0.5,batch_size=2"
    _, summary = run(evaluate(personalizer, people, [name], tmp_path / "trial", steps=3, limit=1))
    rows = [read_rows(folder)["000-ann"][0] for folder in (done[0] / "meta-lora", tmp_path / "trial" / folder_of(name))]
    assert rows[1]["method"] == name and name in summary["methods"] and summary["methods"][name]["steps"] == 3
    paths = [folder / row["picture"] for folder, row in zip((done[0], tmp_path / "trial"), rows)]
    assert Image.open(paths[0]).tobytes() != Image.open(paths[1]).tobytes()


# ---- baselines of their own settings, photos made worse


def test_an_ordinary_lora_starts_from_its_own_settings(done, personalizer, people, tmp_path):
    """Rate, batch and steps are its own; photo, crops, noise levels and seed are those of all."""
    settings = personalizer.base.settings
    flow = replace(settings.adapt.flow, logit_mean=0.5)
    own = replace(settings, adapt=replace(settings.adapt, crops=3, margin=(0.1, 0.2), flow=flow), plain=replace(settings.plain, steps=7, learning_rate=0.123, batch_size=3, crops=5))
    other = Personalizer(replace(personalizer.base, settings=own), personalizer.meta_down("woman"))
    bench = Bench(other, load_dataset(people), tmp_path, None, 4, 1.0, None)
    plain, meta = (bench.settings(Method.parse(name)) for name in ("lora-r1", "meta-lora"))
    assert plain == AdaptConfig(steps=7, learning_rate=0.123, batch_size=3, crops=3, margin=(0.1, 0.2), flow=flow, seed=4)
    assert meta == replace(own.adapt, seed=4) and bench.steps(Method.parse("lora-r2@9")) == 9
    assert bench.settings(Method.parse("lora-r1:learning_rate=1e-4")).learning_rate == 1e-4
    said = json.loads((done[0] / "lora-r1@2" / "settings.json").read_text())["adapt"]
    assert f"learning_rate={settings.plain.learning_rate}" in said and said != json.loads((done[0] / "meta-lora" / "settings.json").read_text())["adapt"]


@pytest.fixture(scope="module")
def degraded(personalizer, people, tmp_path_factory):
    output = tmp_path_factory.mktemp("degraded")
    _, summary = run(evaluate(personalizer, people, ["base", "meta-lora"], output, steps=2, limit=2, degrade=["dark=0.3", "dark=0.98"]))
    return output, summary


@pytest.mark.one_family
def test_a_photo_made_worse_is_learnt_as_a_method_of_its_own(degraded, done):
    output, summary = degraded
    assert list(summary["methods"]) == ["base", "meta-lora", "meta-lora+dark=0.3", "meta-lora+dark=0.98", TRUE_PHOTOS]
    photos = [read_rows(output / folder)["000-ann"][0]["reference"] for folder in ("meta-lora", "meta-lora+dark=0.3")]
    assert photos[0] == photos[1]  # what it is judged by stays
    worse = Image.open(output / "meta-lora+dark=0.3" / "000-ann-photo-0.png")
    assert worse.getpixel((16, 16)) == (178, 0, 0)
    pictures = [Image.open(output / folder / "000-ann-0.png").tobytes() for folder in ("meta-lora", "meta-lora+dark=0.3")]
    assert pictures[0] != pictures[1]
    assert summary["methods"]["meta-lora+dark=0.3"]["degrade"] == {"kind": "dark", "strength": 0.3}


def test_a_face_that_is_lost_counts_as_not_identified_and_is_told(degraded):
    output, summary = degraded
    lost, rows = summary["methods"]["meta-lora+dark=0.98"], read_rows(output / "meta-lora+dark=0.98")
    assert lost["failed"] == lost["people"] == 2 and summary["methods"]["meta-lora+dark=0.3"]["failed"] == 0 and lost["pictures"] == 0
    assert lost["identification"]["mean"] == 0 and lost["faces_found"]["mean"] == 0 and lost["r_facesim"]["mean"] is None
    assert all("No face was found" in row["failed"] and row["picture"] is None for person in rows.values() for row in person)
    assert "meta-lora+dark=0.98: no face was found in the degraded photo of 2 people" in table(summary)


def test_the_page_shows_a_curve_for_each_kind_of_effect(degraded):
    page = (degraded[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "Learnt from photos made worse" in page and "2 of 2 people" in page and "Over the steps" not in page
    methods = degraded[1]["methods"]
    more = {**methods, "meta-lora+blur=2": methods["meta-lora+dark=0.3"] | {"degrade": {"kind": "blur", "strength": 2.0}}}
    assert [kind for kind, _ in degrade_curves(more)] == ["dark", "blur"]


def test_a_degraded_run_goes_on_and_keeps_to_its_settings(degraded, personalizer, people):
    before = contents(degraded[0])
    _, again = run(evaluate(personalizer, people, ["base", "meta-lora", "meta-lora+dark=0.3", "meta-lora+dark=0.98"], degraded[0], steps=2, limit=2))
    assert again == degraded[1] and contents(degraded[0]) == before
    with pytest.raises(MetaLoraError, match="other settings .*adapt|steps"):
        run(evaluate(personalizer, people, ["meta-lora+dark=0.3"], degraded[0], steps=3))


def test_methods_with_worse_photos_are_read_from_their_names():
    got = Method.parse("meta-lora:learning_rate=1e+3@20+blur=2")
    assert (got.name, got.steps, got.degrade) == ("meta-lora:learning_rate=1e+3@20+blur=2", 20, Degradation("blur", 2.0))
    assert Method.parse("lora-r1+dark=0.50").name == "lora-r1+dark=0.5" and got == Method.parse("meta-lora:learning_rate=1e+3@20").degraded(Degradation("blur", 2.0))
    for name, fault in {"base+blur=2": "learns from no photo", "meta-lora+fog=2": "write it like blur=2", "meta-lora+blur=2+dark=0.5": "degraded already"}.items():
        with pytest.raises(MetaLoraError, match=fault):
            Method.parse(name)


# ---- the report


def test_a_summary_counts_as_one_would_by_hand():
    def row(hit, likeness, domain="woman"):
        return {"identified": hit, "r_facesim": likeness, "similarity": 0.5, "copying": None, "clip_t": 0.1, "clip_i": 0.2, "face": likeness is not None,
                "learn_seconds": 2.0, "domain": domain}  # fmt: skip

    got = summarise({"a": [row(True, 0.6), row(False, None)], "b": [row(True, 0.2, "man")]})
    assert got["identification"]["mean"] == pytest.approx(2 / 3) and got["r_facesim"]["mean"] == pytest.approx(0.4)
    assert got["copying"]["mean"] is None and got["faces_found"]["mean"] == pytest.approx(2 / 3)
    assert got["by_domain"]["man"]["identification"]["mean"] == 1 and got["by_domain"]["woman"]["pictures"] == 2


def test_the_sheet_and_the_table_show_every_method(done):
    output, _, summary = done
    lines = table(summary).splitlines()
    assert [line.split()[0] for line in lines] == ["method", *METHODS, TRUE_PHOTOS, "gallery"] and len({len(line) for line in lines[:-1]}) == 1
    sheet = Image.open(output / "contact-sheet.png")
    found = {name: read_rows(output / name) for name in METHODS}
    assert sheet.height > 9 * CELL and sheet.size == contact_sheet(output, found | {TRUE_PHOTOS: read_rows(output / TRUE_PHOTOS)}, 3).size


def test_a_report_needs_results_but_not_the_pictures(done, tmp_path):
    with pytest.raises(MetaLoraError, match="no results"):
        write_report(tmp_path, ["base"])
    import shutil

    shutil.copytree(done[0], tmp_path / "copy")
    for picture in (tmp_path / "copy").rglob("*-0.png"):
        picture.unlink()
    assert write_report(tmp_path / "copy", ["base"])["methods"].keys() == {"base"}


def test_the_page_shows_curves_where_a_method_has_several_numbers_of_steps(done):
    output, _, summary = done
    assert "Over the steps" not in (output / "report.html").read_text(encoding="utf-8")
    more = {**summary["methods"], "meta-lora@9": summary["methods"]["meta-lora"] | {"steps": 9}}
    page = html_report(summary | {"methods": more, "left_out": {"<dan>": "No face & no photo."}}, curves(more), Image.new("RGB", (9, 9)))
    assert "<svg" in page and "meta-lora@9" in page and "&lt;dan&gt;" in page and "No face &amp; no photo." in page
    assert not re.search(r"(src|href)=.?https?:", page)  # it opens offline


def test_heads_are_broken_between_words():
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    lines = wrap("a portrait of somebody in a black suit, in an office, with a calm face", font, CELL)
    assert len(lines) > 2 and all(font.getlength(line) <= CELL for line in lines)
    assert " ".join(lines) == "a portrait of somebody in a black suit, in an office, with a calm face"


def test_differences_are_taken_person_by_person():
    def rows(*scores):
        return [{"r_facesim": s, "identified": bool(s), "copying": s, "clip_t": 0.5} for s in scores]

    people = 0.1, 0.5, 0.3, 0.9, 0.7
    one = {str(i): rows(s + 0.1, s + 0.3) for i, s in enumerate(people)}
    other = {str(i): rows(s, s) for i, s in enumerate(people)} | {"only here": rows(0.0)}
    other["0"][1]["r_facesim"] = None  # a picture without a face does not count
    (pair,) = differences({"a": one, "b": other})
    assert (pair["method"], pair["less"], pair["people"]) == ("a", "b", 5)
    assert pair["r_facesim"]["mean"] == pytest.approx(0.2) and pair["clip_t"] == {"mean": 0, "low": 0, "high": 0}
    # every person gains the same, so the interval is a point, however much people differ
    assert pair["r_facesim"]["low"] == pytest.approx(pair["r_facesim"]["high"])
    assert differences({"a": one}) == [] == differences({"a": one, "b": {"nobody": rows(0.1)}})


def test_a_face_that_is_lost_first_is_no_fault(degraded):
    """What is not measured of anybody has no figure, whoever comes first."""
    output, _ = degraded
    lost, found = (read_rows(output / folder)["000-ann"] for folder in ("meta-lora+dark=0.98", "meta-lora+dark=0.3"))
    for rows in ({"a": lost, "b": found}, {"a": found, "b": lost}):
        got = summarise(rows)
        assert "dino" not in got and got["failed"] == 1 and got["people"] == 2
