"""The verification suite: run it against rehearsal hosts and real ones alike.

pytest verification --hosts=ansible://ocr_servers --ansible-inventory=inventory/local [--disruptive]
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from server import CONTAINER


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--disruptive", action="store_true", help="also run tests that stop or break the service")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "disruptive: stops or breaks the service for a while; needs --disruptive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--disruptive"):
        for item in items:
            if item.get_closest_marker("disruptive"):
                item.add_marker(pytest.mark.skip(reason="stops or breaks the service: needs --disruptive"))


@pytest.fixture(scope="module")
def container(host: Host) -> dict[str, Any]:
    """What Docker says of the server's container."""
    containers: list[dict[str, Any]] = json.loads(host.check_output("docker inspect %s", CONTAINER))
    return containers[0]


@pytest.fixture(scope="module")
def arguments(container: dict[str, Any]) -> list[str]:
    """The command line that vLLM runs with."""
    return list(container["Config"]["Cmd"])
