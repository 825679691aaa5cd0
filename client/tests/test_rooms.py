"""What may import what: each room of the package stands on those below it, and no two modules on one another."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dots_ocr_client

PACKAGE = Path(dots_ocr_client.__file__).parent
NAME = PACKAGE.name
FLOORS = (
    {"errors", "loop_thread", "prompts", "texts", "version"},
    {"credentials"},
    {"pages"},  # files into pictures
    {"results"},  # what was read, and its formats
    {"engines"},
    {"chain"},
    {"client"},
    {"apps"},
    {"batch", "ocrmypdf"},
    {"cli"},
    {"chatvlmllm"},
    {"__init__", "layout", "rasterizer"},  # paths for programs
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(file: Path) -> str:
    return ".".join((NAME, *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in PACKAGE.rglob("*.py")}


def imported(module: str, file: Path) -> Iterator[str]:
    """Yield the modules of this package that one imports, now or later, but not those it needs for types alone."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for name in node.names:
                yield f"{base}.{name.name}" if f"{base}.{name.name}" in MODULES else base


GRAPH = {module: set(imported(module, file)) - {module} for module, file in MODULES.items()}


def room_of(module: str) -> str:
    return module.removeprefix(NAME).lstrip(".").partition(".")[0] or "__init__"


def test_rooms_import_only_from_those_below_them() -> None:
    upwards = {
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if room_of(other) != room_of(module) and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(module)]
    }
    assert upwards == set()


def test_no_modules_import_one_another() -> None:
    try:
        order = [*TopologicalSorter(GRAPH).static_order()]
    except CycleError as circle:
        pytest.fail(str(circle))
    assert len(order) > 40
