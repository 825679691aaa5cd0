"""The driver is there, open, held, and alone; on WSL nothing is."""

import pytest
from testinfra.host import Host

NOUVEAU = "/etc/modprobe.d/dots-ocr-nouveau.conf"


@pytest.fixture
def machine(host: Host) -> str:
    """Return which machine the host plays."""
    return str(host.check_output("hostname")).removeprefix("test-nvidia-driver-")


def test_module_is_open_and_of_the_branch(host: Host, machine: str) -> None:
    if machine == "wsl":
        assert host.run("modinfo nvidia").rc != 0
        return
    expected = {"ubuntu": "580.173.02", "debian": "595.91.07"}[machine]
    assert host.check_output("modinfo -F version nvidia") == expected
    assert host.check_output("modinfo -F license nvidia") == "Dual MIT/GPL"
    assert host.file("/sys/module/nvidia/version").content_string.strip() == expected


def test_driver_and_kernel_are_held(host: Host, machine: str) -> None:
    held = set(host.check_output("apt-mark showhold").split())
    expected = {
        "ubuntu": {
            "linux-generic",
            "linux-image-generic",
            "linux-headers-generic",
            "linux-modules-nvidia-580-server-open-generic",
            "nvidia-headless-no-dkms-580-server-open",
            "nvidia-utils-580-server",
        },
        "debian": {
            "linux-image-amd64",
            "linux-headers-amd64",
            "nvidia-driver-cuda",
            "nvidia-kernel-open-dkms",
            "nvidia-driver-pinning-595",
        },
        "wsl": set(),
    }[machine]
    assert expected <= held
    assert bool(held) == bool(expected)


def test_unattended_upgrades_leave_driver_and_kernel_alone(host: Host, machine: str) -> None:
    listed = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    expected = {
        "ubuntu": {"^libnvidia-", "^linux-modules-nvidia-", "^linux-generic$", "^linux-image-generic$"},
        "debian": {"^libnvidia-", "^nvidia-", "^linux-image-amd64$", "^linux-headers-amd64$"},
        "wsl": set(),
    }[machine]
    found = {line.split('"')[1] for line in listed.splitlines() if '""' not in line}
    assert expected <= found
    assert bool(found) == bool(expected)


def test_nouveau_is_kept_away(host: Host, machine: str) -> None:
    assert host.file(NOUVEAU).exists == (machine != "wsl")


def test_only_debian_has_a_repository_of_nvidia(host: Host, machine: str) -> None:
    assert host.file("/etc/apt/sources.list.d/nvidia-cuda.sources").exists == (machine == "debian")


def test_persistence_daemon_runs(host: Host, machine: str) -> None:
    if machine == "wsl":
        assert not host.service("nvidia-persistenced").exists
        return
    assert host.service("nvidia-persistenced").is_running
    assert host.service("nvidia-persistenced").is_enabled
