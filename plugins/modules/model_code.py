#!/usr/bin/python
"""Ansible module model_code: tell which code of its own a model's folder names for execution."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_code
short_description: Tell which code the weights name for execution
description:
  - With C(--trust-remote-code) vLLM and transformers execute what the key C(auto_map) names, in any of the folder's
    C(*.json), at any depth, in this folder or in another repository.
  - So they do with the model's own module where C(architectures) names a class that vLLM does not have.
  - Names every such target that is not allowed. Executes nothing and changes nothing.
options:
  path: {description: Folder with the weights; it need not be there., type: str, required: true}
  allowed:
    description:
      - Targets that may be named, such as C(modeling.Model), and modules of which all may be, such as C(configuration).
    type: list
    elements: str
    required: true
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Check that nothing but the reviewed class would be executed
  dots_ocr.deploy.model_code:
    path: /var/lib/dots-ocr/models/dots-studio--dots_ocr/0123456789abcdef0123456789abcdef01234567
    allowed: [configuration_dots]
  register: weights
  failed_when: weights.refused | length > 0
"""

RETURN = r"""
exists: {description: Whether the folder has a C(config.json)., returned: success, type: bool}
refused:
  description: What is not allowed, a text each, with its file.
  returned: success
  type: list
  elements: str
  sample: ["config.json names evil.Model (AutoModel)"]
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..module_utils.common import answer

KEY = "auto_map"
ARCHITECTURES = ["DotsOCRForCausalLM"]  # classes that vLLM has, and that config.json may name
# Data of the tokenizer, megabytes without settings; transformers reads no auto_map there.
WITHOUT = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")


def targets(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, target) for each text below an auto_map; what should be one and is not stands for itself."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from targets(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from targets(inner, name)
    elif value is not None:
        yield name, value if isinstance(value, str) else repr(value)


def maps(value: Any) -> Iterator[Any]:
    """Yield every value of the key auto_map in what a JSON file holds, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == KEY:
                yield inner
            else:
                yield from maps(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from maps(inner)


def refused(folder: Path, allowed: list[str], architectures: list[str]) -> list[str]:
    """Return what is not allowed, a text each; a file that cannot be read is not allowed either."""
    found = []
    for file in sorted(folder.glob("*.json")):
        if file.name in WITHOUT:
            continue
        try:
            contents = json.loads(file.read_text(encoding="utf-8"))
            named = [pair for value in maps(contents) for pair in targets(value)]
        except (OSError, ValueError, RecursionError) as error:
            found.append(f"{file.name} cannot be read ({type(error).__name__})")
            continue
        if file.name == "config.json":
            classes = (contents.get("architectures") if isinstance(contents, dict) else None) or []
            others = [one for one in (classes if isinstance(classes, list) else [classes]) if one not in architectures]
            found += [f"{file.name} names the class {one} (architectures)" for one in others]
        # 'REPOSITORY--module.Class' is code of another repository.
        bad = [(key, one) for key, one in named if one not in allowed and one.rpartition(".")[0] not in allowed]
        found += [f"{file.name} names {one} ({key})" for key, one in bad]
    return found


def main() -> None:
    """Run the module."""
    options = {
        "path": {"type": "str", "required": True},
        "allowed": {"type": "list", "elements": "str", "required": True},
    }

    def work(params: dict[str, Any], _check: bool) -> dict[str, Any]:
        folder = Path(params["path"] or "/nonexistent")
        found = refused(folder, params["allowed"], ARCHITECTURES)
        return {"changed": False, "exists": (folder / "config.json").is_file(), "refused": found}

    answer(options, work)


if __name__ == "__main__":
    main()
