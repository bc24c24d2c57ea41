"""The benchmark on a small real base: complete, resumable, divisible, and honest about whom it leaves out."""

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
from metalora.evaluate import evaluate
from metalora.methods import Method
from metalora.report import CELL, TRUE_PHOTOS, contact_sheet, folder_of, read_rows, summarise, table, wrap, write_report
from metalora.webreport import html_report

from .conftest import run, state_hash
from .parts import GREY, write_people

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


@pytest.mark.one_family
def test_a_broken_run_goes_on_and_parts_make_the_whole(done, personalizer, people, tmp_path):
    broken = evaluate(personalizer, people, METHODS, tmp_path, steps=3, part=(1, 2))
    for _ in range(20):
        next(broken)
    broken.close()
    assert not list(tmp_path.rglob("*.part"))
    _, half = run(evaluate(personalizer, people, METHODS, tmp_path, steps=3, part=(1, 2)))
    assert half["methods"]["meta-lora"]["people"] == 2 and half["gallery"] == 3
    _, whole = run(evaluate(personalizer, people, METHODS, tmp_path, steps=3, part=(2, 2)))
    assert whole["methods"]["meta-lora"]["people"] == 3
    strip = [{k: [{**r, "reference": 0, "picture": 0} for r in rows] for k, rows in scores(folder).items()} for folder in (done[0], tmp_path)]
    assert strip[0] == strip[1]


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
    assert Method.parse("lora-r4").over(config) == config


@pytest.mark.parametrize("settings, fault", [
    ("rate=1", "no setting named rate; known are"), ("flow.mean=1", "no setting named mean"), ("steps=2.5", "must be a int"), ("steps=many", "not understood"),
    ("learning_rate=NaN", "not understood"), ("", "not understood"), ("../x=1", "named"), ("steps=0", "out of range"), ("learning_rate=-1", "out of range"),
    ("margin=[2,1]", "out of range"), ("crops=2,crops=3", "twice"), ("steps=2@3", "twice"), ("seed=3", "--seed"), ("steps=" + "1" * 200, "not understood"),
    ("flow=1,flow.logit_mean=1", "twice"), ("crops=[1]", "must be a int"),
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


def test_impossible_parts_are_refused(personalizer, people, tmp_path):
    for part in ((0, 2), (3, 2)):
        with pytest.raises(MetaLoraError, match="does not exist"):
            run(evaluate(personalizer, people, ["base"], tmp_path, part=part))


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
    page = html_report(summary | {"methods": more, "left_out": {"<dan>": "No face & no photo."}}, Image.new("RGB", (9, 9)))
    assert "<svg" in page and "meta-lora@9" in page and "&lt;dan&gt;" in page and "No face &amp; no photo." in page
    assert not re.search(r"(src|href)=.?https?:", page)  # it opens offline


def test_heads_are_broken_between_words():
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    lines = wrap("a portrait of somebody in a black suit, in an office, with a calm face", font, CELL)
    assert len(lines) > 2 and all(font.getlength(line) <= CELL for line in lines)
    assert " ".join(lines) == "a portrait of somebody in a black suit, in an office, with a calm face"
