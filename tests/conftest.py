"""Which tests share a process, where pytest-xdist runs them in several."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling


class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist ships no type information
    """A file in one process, and all of the gateway's, whose fixtures take most of their time."""

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/gateway/"
        return folder if nodeid.startswith(folder) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Choose how tests are handed out."""
    return Scheduling(config, log)
