"""The host: an engine that hands out the GPU as a CDI device."""

from __future__ import annotations

import json

from testinfra.host import Host


def test_docker_engine_runs_now_and_at_boot(host: Host) -> None:
    service = host.service("docker")
    assert service.is_running
    assert service.is_enabled


def test_engine_looks_for_cdi_devices(host: Host) -> None:
    assert "/var/run/cdi" in json.loads(host.check_output("docker info --format '{{json .CDISpecDirs}}'"))


def test_gpu_is_a_cdi_device(host: Host) -> None:
    assert "nvidia.com/gpu=all" in host.check_output("nvidia-ctk cdi list").splitlines()


def test_cdi_specification_is_refreshed_at_boot(host: Host) -> None:
    assert host.service("nvidia-cdi-refresh.service").is_enabled
    assert host.service("nvidia-cdi-refresh.path").is_running
