"""Ansible's own reading of YAML, for tests of what the roles' templates say."""

from __future__ import annotations

import functools

from ansible.parsing.dataloader import DataLoader


@functools.cache
def data_loader() -> DataLoader:
    """Return what reads YAML as Ansible does."""
    return DataLoader()
