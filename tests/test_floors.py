"""Each module imports only floors below its own, and nothing of the package imports the miniature's workshop."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "metalora"
FLOORS = [
    {"errors"},
    {"config", "licence"},
    {"flow", "graph", "frozen", "packed", "rotary", "family", "fold", "files", "photo", "face", "clip"},
    {"adapter"},
    {"predict", "flat"},
    {"flux", "flux2", "data", "metadown", "prompts", "degrade", "processes", "dino"},
    {"families"},
    {"identity", "hub", "plan"},
    {"quantise", "publish", "subject"},
    {"base"},
    {"cache", "foreign"},
    {"train", "score", "webreport", "methods", "peer"},
    {"directions", "phrases"},
    {"adapt", "meta", "generate"},
    {"personalizer", "report"},
    {"evaluate", "people"},
    {"studio", "doctor"},
    {"cards"},
    {"handlers"},
    {"samples", "page", "progress"},
    {"terminal", "bench", "standin"},
    {"drawing", "growth"},
    {"speed"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file; type-checking imports do not count."""
    names = set()
    for node in _without_type_checking(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("metalora")):
            module = (node.module or "").removeprefix("metalora").lstrip(".")
            names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("metalora.")}
    return names


def _without_type_checking(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _without_type_checking(node)


def test_every_module_has_a_floor():
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"} <= set(FLOOR)


def test_imports_only_go_down():
    for path in PACKAGE.glob("*.py"):
        if path.stem != "__init__":
            up = {name for name in imported(path) if name in FLOOR and FLOOR[name] >= FLOOR[path.stem]}
            assert not up, f"{path.name} imports {up}, which is not below it"


def test_the_workshop_is_imported_by_nothing():
    app = PACKAGE.parent / "app.py"
    for path in [*PACKAGE.glob("*.py"), *([app] if app.exists() else [])]:
        assert "miniature" not in imported(path), path.name


def test_no_file_is_long():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
