"""`measure`: the tables of the documents, at toy size, on the miniature itself."""

import json
from pathlib import Path

import pytest

from metalora.methods import Method
from metalora.miniature import measure
from metalora.miniature.__main__ import main

TABLES = {"some": measure.Table("people", ("base", "meta-lora@1", "meta-lora@2"), ("--limit", "1"), sheet=("base", "meta-lora@2"), curves=True),
          "chance": measure.Table("people", ("meta-lora:learning_rate=2e-2@2",), ("--limit", "1"), random=True, beside="some")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.DATASETS, "people", ("--people", "1000100:1000102"))
    for name, table in TABLES.items():
        monkeypatch.setitem(measure.TABLES, name, table)


def test_tables_are_measured_with_what_the_judge_finds(tmp_path: Path, small, capsys):
    output = tmp_path / "figures"
    command = ["measure", "some", "chance", "--work", str(tmp_path / "work"), "--output", str(output), "--cores", "1"]
    assert main(command) == 0
    some, chance = (json.loads((output / f"{name}.json").read_text()) for name in TABLES)
    assert set(some["methods"]) == {"base", "meta-lora@1", "meta-lora@2", "true-photos"}
    assert 0 <= some["methods"]["meta-lora@2"]["found"]["all"]["found"] <= 1 and {"some-sheet.jpg", "some.svg"} <= {path.name for path in output.iterdir()}
    assert [(pair["method"], pair["less"], pair["people"]) for pair in chance["paired with some"]] == [("meta-lora:learning_rate=2e-2@2, chance", "meta-lora@2, some", 1)]
    assert chance["methods"]["meta-lora:learning_rate=2e-2@2"]["similarity"] != some["methods"]["meta-lora@2"]["similarity"]  # it was another Down
    printed = capsys.readouterr().out
    assert "| Meta-LoRA, 2 steps |" in printed and "| other true pictures |" in printed


def test_a_table_that_there_is_not_is_refused_before_anything_is_measured(tmp_path: Path, capsys):
    assert main(["measure", "people", "none", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "figures")]) == 2
    assert "There is no table none; known are people, " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_table_beside_another_wants_that_one_first(tmp_path: Path, small, capsys):
    assert main(["measure", "chance", "some", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "figures")]) == 2
    assert "chance is compared with some; measure that first" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", measure.TABLES)
def test_every_table_names_methods_and_a_dataset_that_there_are(name: str):
    table = measure.TABLES[name]
    assert table.dataset in measure.DATASETS and {*table.sheet} <= {*table.methods}
    assert [measure.words(method, Method.parse(method).steps) for method in table.methods]
    assert not table.beside or {*map(measure.but_the_rate, table.methods)} <= {*map(measure.but_the_rate, measure.TABLES[table.beside].methods)}
