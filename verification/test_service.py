"""The service: a hardened container in the foreground of a systemd unit."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host

from server import UNIT, port


def test_service_runs_now_and_at_boot(host: Host) -> None:
    service = host.service(UNIT)
    assert service.is_running
    assert service.is_enabled
    assert service.systemd_properties["Restart"] == "always"


def test_port_is_open_on_loopback_only(host: Host) -> None:
    assert host.socket(f"tcp://127.0.0.1:{port(host)}").is_listening
    assert not host.socket(f"tcp://0.0.0.0:{port(host)}").is_listening


def test_container_is_hardened(container: dict[str, Any]) -> None:
    settings = container["HostConfig"]
    assert container["Config"]["User"] == "2000:0"
    assert settings["ReadonlyRootfs"] is True
    assert settings["CapDrop"] == ["ALL"]
    assert settings["CapAdd"] is None
    assert settings["SecurityOpt"] == ["no-new-privileges"]
    assert settings["Privileged"] is False


def test_systemd_alone_restarts_the_container(container: dict[str, Any]) -> None:
    assert container["HostConfig"]["RestartPolicy"]["Name"] in ("", "no")
    assert container["HostConfig"]["AutoRemove"] is True


def test_weights_are_mounted_read_only(container: dict[str, Any]) -> None:
    mounts = {mount["Destination"]: mount for mount in container["Mounts"]}
    assert mounts["/models/DotsOCR"]["RW"] is False
    assert mounts["/models/DotsOCR/configuration_dots.py"]["RW"] is False


def test_container_sees_the_gpu(host: Host) -> None:
    assert host.check_output("docker exec dots-ocr nvidia-smi -L").startswith("GPU 0: ")


@pytest.mark.parametrize(
    "argument",
    ["--trust-remote-code", "--chat-template-content-format=string", "--allowed-media-domains=invalid.invalid"],
)
def test_vllm_runs_with(arguments: list[str], argument: str) -> None:
    assert argument in arguments


def test_weights_match_their_manifest(host: Host, container: dict[str, Any]) -> None:
    source = next(m["Source"] for m in container["Mounts"] if m["Destination"] == "/models/DotsOCR")
    with host.sudo():
        assert host.run("cd %s && sha256sum --check --strict --quiet SHA256SUMS", source).rc == 0
