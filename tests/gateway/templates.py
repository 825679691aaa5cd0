"""The role's templates, through Ansible's own templating but without a run of Ansible."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

ROLE = Path(__file__).resolve().parent.parent.parent / "roles/dots_ocr_gateway"


@functools.cache
def _loader() -> DataLoader:
    init_plugin_loader()
    return DataLoader()


def render(name: str, variables: dict[str, Any]) -> str:
    """Return what a template becomes with these variables over the role's own."""
    loader = _loader()
    files = (ROLE / "defaults/main.yml", ROLE / "vars/main.yml")
    defaults, own = (loader.load_from_file(str(file), trusted_as_template=True) for file in files)
    everything = {"ansible_managed": "Ansible managed", "role_path": str(ROLE), **defaults, **own, **variables}
    text = trust_as_template((ROLE / "templates" / name).read_text())
    return str(Templar(loader=loader, variables=everything).template(text))
