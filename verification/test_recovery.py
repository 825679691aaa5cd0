"""The service comes back by itself."""

from __future__ import annotations

import time

import pytest
from testinfra.host import Host

from server import CONTAINER, UNIT, ready

RECOVERY_SECONDS = 600


def restarts(host: Host) -> int:
    return int(host.check_output("systemctl show --property=NRestarts --value %s", UNIT))


@pytest.mark.disruptive
def test_service_recovers_from_a_killed_vllm(host: Host) -> None:
    before = restarts(host)
    victim = host.check_output("pgrep --full --oldest '/usr/local/bin/vllm serve'")
    with host.sudo():
        host.check_output("kill -KILL %s", victim)
    end = time.monotonic() + RECOVERY_SECONDS
    while restarts(host) == before and time.monotonic() < end:
        time.sleep(1)
    verdict = ready(host, wait=RECOVERY_SECONDS)
    assert verdict["ready"], verdict
    assert restarts(host) == before + 1


@pytest.mark.disruptive
def test_service_comes_back_with_the_engine(host: Host) -> None:
    with host.sudo():
        host.check_output("systemctl stop docker.socket docker.service")
        assert not host.service(UNIT).is_running
        host.check_output("systemctl start docker.service")
    verdict = ready(host, wait=RECOVERY_SECONDS)
    assert verdict["ready"], verdict


@pytest.mark.disruptive
def test_no_container_is_left_when_the_service_stops(host: Host) -> None:
    with host.sudo():
        host.check_output("systemctl stop %s", UNIT)
        try:
            assert CONTAINER not in host.check_output("docker ps --all --format '{{.Names}}'").split()
        finally:
            host.check_output("systemctl start %s", UNIT)
    verdict = ready(host, wait=RECOVERY_SECONDS)
    assert verdict["ready"], verdict
