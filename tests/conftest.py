"""Which tests share a process, where pytest-xdist runs them in several; and no limit of time for Hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

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
