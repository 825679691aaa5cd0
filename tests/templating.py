"""Ansible's own reading of YAML, for tests of what the roles' templates say."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ansible.parsing.dataloader import DataLoader


@functools.cache
def data_loader() -> DataLoader:
    """Return what reads YAML as Ansible does."""
    return DataLoader()


def filter_module(name: str) -> Any:
    """Return the module of one of the collection's filters, which may import others as it does in a play."""
    data_loader()
    return importlib.import_module(f"ansible_collections.dots_ocr.deploy.plugins.filter.{name}")
