"""Which code of its own a model's folder names for execution.

With `--trust-remote-code` vLLM and transformers execute what the key `auto_map` names, in any of the folder's `*.json`,
at any depth, in this folder or in another repository. So they do with the model's own module where `architectures`
names a class that vLLM does not have. Nothing is executed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = ("DotsOCRForCausalLM",)  # that vLLM has, and config.json may name
KEY = "auto_map"
# Data of the tokenizer, megabytes without settings; transformers reads no auto_map there.
WITHOUT = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")


def targets(value: Any, name: str = "", mapped: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (name, target) for each text below an auto_map, at any depth; what should be a text stands for itself."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from targets(inner, key, mapped or key == KEY)
    elif isinstance(value, list):
        for inner in value:
            yield from targets(inner, name, mapped)
    elif mapped and value is not None:
        yield name, value if isinstance(value, str) else repr(value)


def refused(folder: Path, allowed: list[str]) -> list[str]:
    """Return what is not allowed, a text each; a file that cannot be read is not allowed either.

    `allowed` are targets that may be named, such as modeling.Model, and modules of which all may be.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        if file.name in WITHOUT:
            continue
        try:
            contents = json.loads(file.read_text(encoding="utf-8"))
            named = list(targets(contents))
        except (OSError, ValueError, RecursionError) as error:
            found.append(f"{file.name} cannot be read ({type(error).__name__})")
            continue
        if file.name == "config.json":
            classes = (contents.get("architectures") if isinstance(contents, dict) else None) or []
            others = [one for one in (classes if isinstance(classes, list) else [classes]) if one not in ARCHITECTURES]
            found += [f"{file.name} names the class {one} (architectures)" for one in others]
        # 'REPOSITORY--module.Class' is code of another repository.
        bad = [(key, one) for key, one in named if one not in allowed and one.rpartition(".")[0] not in allowed]
        found += [f"{file.name} names {one} ({key})" for key, one in bad]
    return found
