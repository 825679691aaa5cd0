"""The verification suite: run it against rehearsal hosts and real ones alike.

    pytest verification --hosts=ansible://ocr_servers --ansible-inventory=inventory/local [--disruptive]
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "dots-ocr.service"
CONTAINER = "dots-ocr"


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
    return json.loads(host.check_output("docker inspect %s", CONTAINER))[0]


@pytest.fixture(scope="module")
def arguments(container: dict[str, Any]) -> list[str]:
    """The command line that vLLM runs with."""
    return container["Config"]["Cmd"]


def ready(host: Host, *, wait: int) -> dict[str, Any]:
    """Run the readiness check on the host, waiting at most so many seconds; return its verdict."""
    options = ["--url=http://127.0.0.1:8000", "--model=dots.ocr", f"--unit={UNIT}", f"--wait={wait}"]
    return json.loads(host.run(shlex.join(["/usr/local/lib/dots-ocr/ready", *options])).stdout)


def get(host: Host, path: str) -> str:
    """Return the body of a GET request that the host sends to its own server; another status than 200 is an error."""
    program = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000{path}', timeout=30).read().decode())"
    return host.check_output("python3 -c %s", program)
