"""The engine runs with our options and keeps those of others; nobody but us changes its version."""

import json

from testinfra.host import Host


def test_engine_runs_now_and_at_boot(host: Host) -> None:
    assert host.service("docker").is_running
    assert host.service("docker").is_enabled


def test_engine_is_dockers_own_from_a_signed_source(host: Host) -> None:
    assert host.package("docker-ce").version == "5:28.5.2-1~debian.13~trixie"
    source = host.file("/etc/apt/sources.list.d/docker.sources").content_string
    assert "Signed-By: /etc/apt/keyrings/docker.gpg" in source
    assert not host.file("/etc/apt/sources.list.d/docker.list").exists


def test_options_are_merged(host: Host) -> None:
    config = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert config["features"] == {"buildkit": True, "cdi": True}
    assert config["log-opts"] == {"max-size": "7m"}
    assert "log-driver" not in config
    assert config["live-restore"] is False
    assert config["default-address-pools"] == [{"base": "10.201.0.0/16", "size": 24}]
    assert set(config["insecure-registries"]) == {"mirror:5000", "mirror.invalid:5000"}


def test_running_engine_looks_for_cdi_devices(host: Host) -> None:
    assert "/etc/cdi" in json.loads(host.check_output("docker info --format '{{json .CDISpecDirs}}'"))


def test_engine_started_once_and_with_these_options(host: Host) -> None:
    started = host.check_output("journalctl --unit=docker.service --output=cat --grep='Starting up' --no-pager")
    assert len(started.splitlines()) == 1 + before_our_own(host)


def before_our_own(host: Host) -> int:
    """Count the starts of the distribution's engine, which refusals.yml met: it writes another version."""
    text = host.check_output("journalctl --unit=docker.service --output=cat --no-pager")
    return text.count("version=26.1")


def test_packages_are_held_for_apt_and_unattended_upgrades(host: Host) -> None:
    assert {"docker-ce", "docker-ce-cli", "containerd.io"} <= set(host.check_output("apt-mark showhold").split())
    listing = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert '"^docker-ce$"' in listing


def test_nobody_is_in_the_group(host: Host) -> None:
    assert host.group("docker").members == []
