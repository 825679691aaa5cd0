"""The verification suite: run it against rehearsal hosts and real ones alike.

pytest verification --hosts=ansible://ocr_servers --ansible-inventory=inventory/local [--disruptive]
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from server import Settings, servers

MATRIX = pytest.StashKey[list[str]]()  # rows that test_faults.py measured
STAND_IN = "/etc/stand-in-gpu.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--disruptive", action="store_true", help="also run tests that stop or break the service")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "disruptive: stops or breaks the service for a while; needs --disruptive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--disruptive"):
        for item in items:
            if item.get_closest_marker("disruptive"):
                item.add_marker(pytest.mark.skip(reason="stops or breaks the service: needs --disruptive"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the fault matrix that was measured."""
    if rows := config.stash.get(MATRIX, []):
        terminalreporter.section("fault matrix")
        head = ["fault", "reads again after, s", "starts", "read", "failed", "refused", "silent", "misread"]
        for line in (f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def server(host: Host) -> Settings:
    """What is set for the first server of the host."""
    return servers(host)[0]


@pytest.fixture(scope="module")
def container(host: Host, server: Settings) -> dict[str, Any]:
    """What Docker says of the server's container."""
    with host.sudo():
        containers: list[dict[str, Any]] = json.loads(host.check_output("docker inspect %s", server["container"]))
    return containers[0]


@pytest.fixture(scope="module")
def arguments(container: dict[str, Any]) -> list[str]:
    """The command line that vLLM runs with."""
    return list(container["Config"]["Cmd"])


@pytest.fixture
def stand_in(host: Host) -> str:
    """The file that says what the stand-in GPU of a rehearsal host shows; a real GPU cannot be changed by a test."""
    if not host.file(STAND_IN).exists:
        pytest.skip("the GPU is real")
    return STAND_IN
