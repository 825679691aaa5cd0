"""Ansible's own reading of YAML, for tests of what the roles' templates say."""

from __future__ import annotations

import functools
from pathlib import Path

from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader


@functools.cache
def data_loader() -> DataLoader:
    """Return what reads YAML as Ansible does."""
    init_plugin_loader([str(Path(__file__).resolve().parent.parent / "collections")])
    return DataLoader()
