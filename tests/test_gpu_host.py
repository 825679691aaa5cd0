"""The module gpu_host: what it makes of a measured host. Measuring itself is tested on hosts (molecule/preflight)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "plugins/modules/gpu_host.py"
spec = importlib.util.spec_from_file_location("gpu_host", FILE)
assert spec
assert spec.loader
gpu_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_host)

REQUIREMENTS = {
    "driver_version": "580.65.06",
    "compute_capability": "7.5",
    "gpu_memory_mib": 12000,
    "disk_free": [{"path": "/var/lib/docker", "gib": 60}],
}
GPU = {
    "index": 0,
    "name": "NVIDIA GeForce RTX 5070 Ti",
    "memory_total_mib": 16303,
    "memory_free_mib": 15000,
    "compute_capability": "12.0",
    "driver_version": "580.173.02",
}


def host(**changes: Any) -> dict[str, Any]:
    """Return a host that can serve, with changes."""
    return {
        "platform": "bare_metal",
        "systemd": True,
        "distribution": "ubuntu",
        "distribution_version": "24.04",
        "architecture": "x86_64",
        "docker_engine": False,
        "memory_total_mib": 32000,
        "nvidia_pci_devices": 1,
        "nvidia_smi": "/usr/bin/nvidia-smi",
        "nvidia_smi_message": "",
        "gpus": [GPU],
        "disk_free_gib": {"/var/lib/docker": 100},
        **changes,
    }


def test_good_host_has_no_problem() -> None:
    assert gpu_host.judge(host(), REQUIREMENTS) == []


def test_every_problem_is_named_in_one_go_with_its_cure() -> None:
    old = {**GPU, "compute_capability": "6.1", "memory_total_mib": 8119, "driver_version": "550.54.14"}
    bad = host(systemd=False, architecture="aarch64", gpus=[old], disk_free_gib={"/var/lib/docker": 3})
    problems = gpu_host.judge(bad, REQUIREMENTS)
    assert len(problems) == 6
    assert all(entry["cure"] for entry in problems)


@pytest.mark.parametrize(
    ("changes", "problem", "cure"),
    [
        ({"platform": "wsl1"}, "WSL 1", "wsl --set-version"),
        ({"platform": "wsl2", "systemd": False}, "systemd does not run", "/etc/wsl.conf"),
        ({"systemd": False}, "systemd does not run", "boot the machine with systemd"),
        ({"distribution": "fedora"}, "the distribution is fedora", "Ubuntu"),
        ({"distribution_version": "20.04"}, "the distribution is ubuntu 20.04", "Ubuntu 22.04 or newer"),
        ({"distribution": "debian", "distribution_version": "12"}, "too old for CDI", "docker-ce"),
        ({"gpus": [], "nvidia_smi": None, "nvidia_pci_devices": 0}, "no NVIDIA GPU in this machine", "choose"),
        ({"gpus": [], "nvidia_smi": None}, "a GPU but no driver", "open kernel modules"),
        ({"gpus": [], "nvidia_smi_message": "No devices were found"}, "(No devices were found)", "reboot"),
        ({"platform": "wsl2", "gpus": []}, "no GPU answers inside WSL", "in Windows"),
        ({"gpus": [{**GPU, "driver_version": "575.57.08"}]}, "driver is 575.57.08", "open kernel modules"),
        (
            {"platform": "wsl2", "gpus": [{**GPU, "driver_version": "572.61"}]},
            "driver is 572.61",
            "in Windows (never inside WSL)",
        ),
        ({"disk_free_gib": {"/var/lib/docker": 59}}, "59 GiB are free for /var/lib/docker", "free some space"),
    ],
)
def test_problem_comes_with_the_cure_for_this_platform(changes: dict[str, Any], problem: str, cure: str) -> None:
    found = gpu_host.judge(host(**changes), REQUIREMENTS)
    assert len(found) == 1
    assert problem.replace("a GPU", "an NVIDIA GPU") in found[0]["problem"]
    assert cure in found[0]["cure"]


def test_one_capable_gpu_among_several_is_enough() -> None:
    weak = {**GPU, "compute_capability": "6.1", "memory_total_mib": 4096}
    assert gpu_host.judge(host(gpus=[weak, GPU]), REQUIREMENTS) == []


def test_memory_of_a_gpu_that_is_too_old_does_not_help_a_small_one() -> None:
    old = {**GPU, "compute_capability": "6.1", "memory_total_mib": 24576}
    small = {**GPU, "memory_total_mib": 6144}
    (problem,) = gpu_host.judge(host(gpus=[old, small]), REQUIREMENTS)
    assert "6144 MiB" in problem["problem"]


def test_space_that_is_in_use_already_is_not_demanded_again(tmp_path: Path) -> None:
    full = host(disk_free_gib={"/var/lib/docker": 1})
    space = {"path": "/var/lib/docker", "gib": 60, "unless_exists": str(tmp_path)}
    assert gpu_host.judge(full, {**REQUIREMENTS, "disk_free": [space]}) == []
    missing = {**space, "unless_exists": str(tmp_path / "no")}
    assert len(gpu_host.judge(full, {**REQUIREMENTS, "disk_free": [missing]})) == 1


@pytest.mark.parametrize("line", ["", "WARNING: infoROM is corrupted", "0, GPU, [N/A], [N/A], 12.0, 580.65.06"])
def test_line_that_describes_no_gpu_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|literal"):
        gpu_host.parse_gpu(line)


@pytest.mark.parametrize(("older", "newer"), [("580.65.06", "580.105.08"), ("575.57.08", "580.65.06"), ("7.5", "12.0")])
def test_versions_compare_by_number_not_by_letter(older: str, newer: str) -> None:
    assert gpu_host.version(older) < gpu_host.version(newer)


def test_free_space_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    assert gpu_host.free_gib(str(tmp_path / "not/yet")) == gpu_host.free_gib(str(tmp_path))
