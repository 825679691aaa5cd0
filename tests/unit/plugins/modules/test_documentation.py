"""What each module's documentation says of its options is what the module takes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.basic import AnsibleModule

MODULES = sorted(path.stem for path in Path(__file__).parents[4].glob("plugins/modules/*.py"))


class Taken(Exception):
    """What AnsibleModule was given."""


def said(options: dict[str, Any], within: str) -> dict[str, Any]:
    """Return what matters of options, as documentation and specification both write it; `within` holds their own."""
    names = ("elements", "required", "default", "choices")
    return {
        name: {
            "type": option.get("type", "str"),
            **{key: option[key] for key in names if option.get(key) not in (None, False)},
            "of": said(option.get(within) or {}, within),
        }
        for name, option in options.items()
    }


@pytest.mark.parametrize("name", MODULES)
def test_documented_options_are_those_that_the_module_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(_: AnsibleModule, argument_spec: dict[str, Any], **__: Any) -> None:
        raise Taken(argument_spec)

    module = importlib.import_module(f"ansible_collections.dots_ocr.deploy.plugins.modules.{name}")
    monkeypatch.setattr(AnsibleModule, "__init__", take)
    with pytest.raises(Taken) as caught:
        module.main()
    documented = yaml.safe_load(module.DOCUMENTATION)
    assert documented["module"] == name
    assert said(documented["options"], "suboptions") == said(caught.value.args[0], "options")
