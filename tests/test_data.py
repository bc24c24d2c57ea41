"""Dataset folders: what is right is read in order, and all that is wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metalora import MetaLoraError
from metalora.data import MOST_LISTED, Subject, kept_out, load_dataset


def row(name="a.png", identity="ann", role="reference", domain="woman", text="a photo of {person}"):
    return {"file_name": name, "text": text, "identity": identity, "domain": domain, "role": role}


def write(folder: Path, rows, prompts="a photo of {person} in a park\n\n  in a cap  \n", pictures=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if prompts is not None:
        (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    for r in rows if pictures else []:
        if isinstance(r, dict) and isinstance(r.get("file_name"), str) and len(r["file_name"]) < 99 and not r["file_name"].startswith(("/", "..")):
            (folder / r["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(folder / r["file_name"])
    return folder


def fault_of(folder, **needs) -> str:
    with pytest.raises(MetaLoraError) as error:
        load_dataset(folder, **needs)
    return str(error.value)


def test_pictures_that_cannot_be_read_are_told_with_the_other_faults(tmp_path):
    folder = write(tmp_path, [row("a.png"), row("b.png", "bea"), row("c.png", "cia", "other")])
    (folder / "b.png").write_bytes(b"no picture")
    load_dataset(write(tmp_path / "good", [row()]), open_pictures=True)
    told = fault_of(folder, open_pictures=True)
    assert "2 faults" in told and "b.png" in told and "cia has no photo with the role reference" in told and "a.png" not in told


def test_people_come_in_order_with_their_photos_and_prompts(tmp_path):
    rows = [row("b/1.png", "zoë"), row("a.png", "ann"), row("b/2.png", "zoë", "other", text="{person} laughing"), "", row("m.png", "max", domain="man")]
    found = load_dataset(write(tmp_path, rows))
    assert [(s.identity, s.domain, len(s.references), len(s.others)) for s in found.subjects] == [("zoë", "woman", 1, 1), ("ann", "woman", 1, 0), ("max", "man", 1, 0)]
    assert found.subjects[0].others[0] == found.subjects[0].items[1]
    assert found.subjects[0].others[0].path == tmp_path / "b/2.png" and found.subjects[0].others[0].text == "{person} laughing"
    assert found.prompts == ["a photo of {person} in a park", "in a cap"]
    assert [s.identity for s in found.of_domain("man")] == ["max"]
    with pytest.raises(MetaLoraError, match="it has man, woman"):
        found.of_domain("dog")


def test_a_folder_of_links_is_read_as_the_hubs_cache_has_it(tmp_path):
    real = write(tmp_path / "blobs", [row()])
    view = tmp_path / "snapshot"
    view.mkdir()
    for path in real.iterdir():
        (view / path.name).symlink_to(path)
    assert len(load_dataset(view).subjects) == 1


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    folder = write(tmp_path, [row()])
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + (json.dumps(row()) + "\r\n").encode())
    assert load_dataset(folder).subjects[0].identity == "ann"


FAULTS = {
    "not valid JSON": '{"file_name": ',
    "not a JSON object": "[1]",
    "text is missing": {k: v for k, v in row().items() if k != "text"},
    "identity must be a text": row() | {"identity": 7},
    "text must be a text that is not empty": row(text="  "),
    "there is no picture xxxx": row("x" * 5000),
    "../a.png lies outside the folder": row("../a.png"),
    "/a.png lies outside the folder": row("/a.png"),
    "a.png comes twice": row(),
    "the role model is unknown": row("r.png", role="model"),
    "ann is of the domain man here and woman before": row("d.png", domain="man"),
    "bob has no photo with the role reference": row("b.png", "bob", "other", "man"),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_is_named_with_its_line(tmp_path, words):
    message = fault_of(write(tmp_path, [row(), FAULTS[words]]))
    assert words in message and "1 fault;" in message
    assert "line 2:" in message or "bob" in message


def test_all_faults_are_told_at_once(tmp_path):
    folder = write(tmp_path, [row(), *FAULTS.values(), row("gone.png")], prompts=None)
    (folder / "gone.png").unlink()
    message = fault_of(folder, need_prompts=True, need_others=True)
    assert all(words in message for words in [*FAULTS, "there is no picture gone.png", "prompts.txt is missing", "ann has no photo with the role other"])
    many = fault_of(write(tmp_path / "many", [row(f"{i}.png") for i in range(MOST_LISTED + 5)], pictures=False))
    assert "and 5 more" in many and many.count("there is no picture") == MOST_LISTED


def test_what_is_not_needed_may_lack(tmp_path):
    folder = write(tmp_path, [row()], prompts=None)
    assert load_dataset(folder).prompts == []
    assert "prompts.txt is missing or empty" in fault_of(folder, need_prompts=True)
    assert "ann has no photo with the role other" in fault_of(folder, need_others=True)


def test_a_folder_without_metadata_is_one_sentence(tmp_path):
    assert "holds no metadata.jsonl" in fault_of(tmp_path)
    assert "is not there" in fault_of(tmp_path / "nowhere")
    (tmp_path / "metadata.jsonl").write_text("\n")
    assert "metadata.jsonl is empty" in fault_of(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{")
    assert "not UTF-8" in fault_of(tmp_path)


@given(st.text(max_size=80) | st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda v: st.dictionaries(st.sampled_from(list(row())), v), max_leaves=6).map(json.dumps))
def test_any_line_is_read_or_refused_in_words(tmp_path_factory, line):
    folder = tmp_path_factory.getbasetemp() / "any"
    write(folder, [row()])
    (folder / "metadata.jsonl").write_text(json.dumps(row()) + "\n" + line, encoding="utf-8", errors="replace")
    try:
        load_dataset(folder)
    except MetaLoraError as error:
        assert "fault" in str(error)


@given(st.integers(0, 120), st.integers(0, 9))
def test_who_judges_a_training_is_not_learnt_from(count, most):
    people = [Subject(str(k), "woman", [object()], [object()]) for k in range(count)]
    learnt, judged = kept_out(people, most)
    assert len(judged) == min(most, count // 25) and len(learnt) + len(judged) == count and not set(map(id, learnt)) & set(map(id, judged))
