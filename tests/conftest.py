"""The collection by its name; which tests share a process of pytest-xdist; and no limit of time for Hypothesis."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible.plugins.loader import init_plugin_loader
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# As Ansible finds it, for tests that import its plugins and for those that read templates.
init_plugin_loader([str(Path(__file__).resolve().parent.parent / "collections")])

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist ships no type information
    """A file in one process, and all of the gateway's, whose fixtures take most of their time."""

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/gateway/"
        return folder if nodeid.startswith(folder) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Choose how tests are handed out."""
    return Scheduling(config, log)
