"""What the documents say can be followed: links lead somewhere, commands take the options that they are given, tables are what was measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import metalora.cli  # noqa: F401  it adds the commands
from metalora.miniature.measure import rows
from metalora.terminal import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "assets/evaluation/README.md", ROOT / "metalora/miniature/README.md"]


def anchors(text: str) -> set[str]:
    """Names of the headings, as they are linked to."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def commands() -> list[str]:
    """What follows `python -m metalora` in the blocks of commands, lines that go on joined."""
    text = "\n".join(path.read_text() for path in DOCUMENTS).replace("\\\n", " ")
    return re.findall(r"^ {4}.*-m metalora (.+)$", text, re.MULTILINE)


def tables() -> list[tuple[str, str]]:
    """The tables that say in a comment which measured figures they hold: the file's name, and the lines."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    return re.findall(r"^<!-- (\S+\.json) -->\n\n((?:\|.+\n)+)", text, re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text())
    for place, anchor in links:
        target = document.parent / place if place else document
        assert target.exists(), place
        assert not anchor or anchor in anchors(target.read_text()), f"{place}#{anchor}"
    assert links


@pytest.mark.parametrize("line", commands())
def test_commands_take_their_options(line):
    name, *words = shlex.split(line)
    known = {option for parameter in get_command(app).commands[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize(("name", "lines"), tables(), ids=lambda value: value if value.endswith(".json") else "")
def test_tables_are_what_was_measured(name, lines):
    measured = json.loads((ROOT / "assets/evaluation" / name).read_text())
    assert lines.replace("**", "").splitlines() == list(rows(measured))


def test_there_are_tables_that_are_compared():
    assert "people.json" in dict(tables())
