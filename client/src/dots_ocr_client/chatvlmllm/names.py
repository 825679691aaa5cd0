"""Which names of the application's modules their replacements lack: ``python -m ...names FILE...``, one a line."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

replacement = importlib.import_module(str(__package__))

# Of the application as of January 2026: programs at the end of its modules, for which there is ``dots-ocr doctor``.
DROPPED = {"test_vllm_client", "test_dots_ocr_vllm_integration", "main"}


def missing(source: str) -> list[str]:
    """Return the public names in a module's source, ``Class.name`` for those in a class, that the replacement lacks."""
    return [name for name in _public(ast.parse(source)) if not _has(name)]


def _public(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if node.name not in DROPPED:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in sorted(_members(node)) if not name.startswith("_"))


def _members(node: ast.AST) -> set[str]:
    parts = [*ast.walk(node)]
    stored = (part for part in parts if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store))
    own = {part.attr for part in stored if ast.unparse(part.value) == "self"}
    return own | {part.name for part in parts if isinstance(part, ast.FunctionDef)}


def _has(name: str) -> bool:
    kind, _, member = name.partition(".")
    found = getattr(replacement, kind, None)
    if found is None or not member:
        return found is not None
    return hasattr(found, member) or member in _members(ast.parse(inspect.getsource(found)))


if __name__ == "__main__":
    for file in sys.argv[1:]:
        for lacking in missing(Path(file).read_text(encoding="utf-8")):
            print(f"{file}: {lacking}")
