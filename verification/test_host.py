"""The host: an engine that hands out the GPU as a CDI device."""

from __future__ import annotations

import json
import re

from testinfra.host import Host


def test_docker_engine_runs_now_and_at_boot(host: Host) -> None:
    service = host.service("docker")
    assert service.is_running
    assert service.is_enabled


def test_engine_keeps_published_loopback_ports_to_the_host(host: Host) -> None:
    # Docker's notes on 28.0: before it, neighbours on the network reached ports that are published on loopback.
    version = host.check_output("docker version --format '{{.Server.Version}}'")
    assert tuple(map(int, version.split("+")[0].split(".")[:2])) >= (28, 0)


def test_what_was_installed_is_held(host: Host) -> None:
    with host.sudo():
        records = host.check_output("cat /var/lib/dots-ocr/installed/*.json || true")
    names = re.findall(r'"held": \[([^]]*)\]', records)
    held = {name for group in names for name in re.findall(r'"([^"]+)"', group)}
    assert held <= set(host.check_output("apt-mark showhold").split())


def test_engine_looks_for_cdi_devices(host: Host) -> None:
    assert "/var/run/cdi" in json.loads(host.check_output("docker info --format '{{json .CDISpecDirs}}'"))


def test_gpu_is_a_cdi_device(host: Host) -> None:
    assert "nvidia.com/gpu=all" in host.check_output("nvidia-ctk cdi list").splitlines()


def test_cdi_specification_is_refreshed_at_boot(host: Host) -> None:
    assert host.service("nvidia-cdi-refresh.service").is_enabled
    assert host.service("nvidia-cdi-refresh.path").is_running
