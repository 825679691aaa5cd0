"""The engine runs with our options and keeps those of others."""

import json

from testinfra.host import Host


def test_engine_runs_now_and_at_boot(host: Host) -> None:
    assert host.service("docker").is_running
    assert host.service("docker").is_enabled


def test_options_are_merged(host: Host) -> None:
    config = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert config["features"] == {"buildkit": True, "cdi": True}
    assert config["log-opts"] == {"max-size": "7m"}
    assert config["insecure-registries"] == ["mirror:5000"]


def test_running_engine_looks_for_cdi_devices(host: Host) -> None:
    assert "/etc/cdi" in json.loads(host.check_output("docker info --format '{{json .CDISpecDirs}}'"))
