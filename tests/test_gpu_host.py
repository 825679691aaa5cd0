"""The module gpu_host: what it makes of a measured host. Measuring itself is tested on hosts (molecule/preflight)."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "plugins/modules/gpu_host.py"
spec = importlib.util.spec_from_file_location("gpu_host", FILE)
assert spec
assert spec.loader
gpu_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_host)

REQUIREMENTS = {"disk_free": [], "wsl_memory_mib": 10000, "manages_windows": False}
SPACE = {"path": "/var/lib/docker", "place": "/var/lib/docker", "gib": 60}
GPU = {
    "index": 0,
    "name": "NVIDIA GeForce RTX 5070 Ti",
    "memory_total_mib": 16303,
    "memory_free_mib": 15000,
    "compute_capability": "12.0",
    "driver_version": "580.173.02",
}
NO_DRIVER = {"loaded": "", "loaded_flavour": "", "installed": "", "flavour": ""}
DRIVER = {"loaded": "580.173.02", "loaded_flavour": "open", "installed": "580.173.02", "flavour": "open"}
MISSING: dict[str, Any] = {"gpus": [], "nvidia_smi": None, "driver": NO_DRIVER}
SILENT: dict[str, Any] = {"gpus": [], "nvidia_smi_message": "No devices were found"}
WSL: dict[str, Any] = {
    "platform": "wsl2",
    "dxg": True,
    "nvidia_pci_devices": 0,
    "nvidia_pci_ids": [],
    "driver": NO_DRIVER,
}
SEED = {"name": "dots-ocr-fixed", "state": "running", "ports": []}
WEB = {"name": "web", "state": "running", "ports": [8000, 9000]}
TAKEN = {"port": 8000, "pid": 812, "process": "docker-proxy"}


def host(**changes: Any) -> dict[str, Any]:
    """Return a host that can serve, with changes."""
    return {
        "platform": "bare_metal",
        "systemd": True,
        "systemd_version": 255,
        "distribution": "ubuntu",
        "distribution_version": "24.04",
        "architecture": "x86_64",
        "kernel_release": "6.14.0-33-generic",
        "secure_boot": False,
        "docker_engine": False,
        "docker": {"desktop": False, "snap": False, "version": "", "images": "/var/lib/docker"},
        "memory_total_mib": 32000,
        "nvidia_pci_devices": 1,
        "nvidia_pci_ids": ["0x2c05"],
        "dxg": False,
        "nouveau": False,
        "driver": DRIVER,
        "nvidia_packages": ["nvidia-utils-580-server"],
        "wsl": {},
        "nvidia_smi": "/usr/bin/nvidia-smi",
        "nvidia_smi_message": "",
        "gpus": [GPU],
        "gpu_processes": [],
        "containers": [],
        "ports_in_use": [],
        "disk_free_gib": {"/var/lib/docker": 100},
        "disk_devices": {"/var/lib/docker": 1},
        **changes,
    }


def wsl(**changes: Any) -> dict[str, Any]:
    """Return a distribution of WSL that can serve, with changes."""
    return host(**{**WSL, "nvidia_packages": [], "wsl": {"version": "2.6.1.0", "networking": "nat"}, **changes})


@pytest.mark.parametrize("good", [host(), wsl(), host(secure_boot=True)])
def test_good_host_has_no_problem(good: dict[str, Any]) -> None:
    assert gpu_host.judge(good, REQUIREMENTS) == []
    assert gpu_host.warn(good) == []


def test_every_problem_is_named_in_one_go_with_its_cure() -> None:
    bad = wsl(
        systemd=False,
        architecture="aarch64",
        distribution="fedora",
        gpus=[],
        docker={"desktop": True, "snap": True},
        nvidia_packages=["nvidia-utils-580"],
        memory_total_mib=4000,
        ports_in_use=[TAKEN],
        containers=[SEED],
        disk_free_gib={"/var/lib/docker": 3},
    )
    problems = gpu_host.judge(bad, {**REQUIREMENTS, "disk_free": [SPACE]})
    assert len(problems) == 11
    assert all(entry["cure"] for entry in problems)


@pytest.mark.parametrize(
    ("bad", "problem", "cure", "mended_by"),
    [
        (wsl(platform="wsl1", gpus=[]), "WSL 1", "wsl --set-version", ""),
        (host(platform="container"), "this is a container", "deploy to the machine that runs it", ""),
        (wsl(systemd=False), "systemd does not run", "/etc/wsl.conf", "wsl"),
        (host(systemd=False), "systemd does not run", "boot the machine with systemd", ""),
        (host(systemd_version=245), "systemd is 245, 249 or newer is needed", "upgrade the distribution", ""),
        (host(distribution="fedora"), "the distribution is fedora", "Ubuntu", ""),
        (host(distribution_version="20.04"), "the distribution is ubuntu 20.04", "Ubuntu 22.04 or newer", ""),
        (wsl(nvidia_packages=["nvidia-utils-580"]), "(nvidia-utils-580)", "apt-get purge nvidia-utils-580", ""),
        (wsl(memory_total_mib=7900), "7900 MiB of main memory, 10000 MiB are needed", "memory=12GB", ""),
        (host(docker={"desktop": True, "snap": False}), "Docker Desktop", "switch its WSL integration off", ""),
        (host(docker={"desktop": False, "snap": True}), "a snap", "snap remove docker", ""),
        (host(**MISSING, nvidia_pci_devices=0, nvidia_pci_ids=[]), "no NVIDIA GPU in this machine", "choose", ""),
        (host(**MISSING), "an NVIDIA GPU but no driver", "open kernel modules", "nvidia_driver"),
        (host(**MISSING, secure_boot=True), "an NVIDIA GPU but no driver", "open kernel", "nvidia_driver"),
        (host(**MISSING, secure_boot=True, distribution="debian", distribution_version="13"),
         "Secure Boot is on and no NVIDIA driver is loaded", "switch Secure Boot off", ""),
        (host(**SILENT), "(No devices were found)", "reboot", "nvidia_driver"),
        (host(**SILENT, driver={**DRIVER, "loaded": "580.65.06"}),
         "the kernel runs the NVIDIA module 580.65.06, but 580.173.02 is installed", "reboot", "nvidia_driver"),
        (host(driver={**DRIVER, "loaded": "580.65.06"}), "580.173.02 is installed", "reboot", "nvidia_driver"),
        (host(gpus=[], nvidia_smi_message="Driver/library version mismatch"),
         "do not fit the kernel module 580.173.02", "reboot", "nvidia_driver"),
        (host(**SILENT, driver={**DRIVER, "flavour": "proprietary"}), "proprietary", "open kernel", "nvidia_driver"),
        (host(driver={**DRIVER, "loaded_flavour": "proprietary"}, nvidia_pci_ids=[]),
         "proprietary", "open kernel", "nvidia_driver"),
        (wsl(gpus=[]), "no GPU answers inside WSL", "in Windows", ""),
        (wsl(gpus=[], dxg=False), "no GPU answers inside WSL (there is no /dev/dxg)", "in Windows", ""),
        (host(containers=[SEED]), "dots-ocr-fixed, left from an older deployment, holds memory of the GPU",
         "docker rm --force dots-ocr-fixed", ""),
        (host(containers=[WEB], ports_in_use=[TAKEN]), "container web holds port 8000", "docker stop web", ""),
        (host(ports_in_use=[TAKEN]), "port 8000 is taken by docker-proxy (process 812)", "dots_ocr_server_port", ""),
        (host(ports_in_use=[{"port": 8000, "pid": None, "process": ""}]), "an unknown process", "stop it", ""),
    ],
)  # fmt: skip
def test_problem_comes_alone_with_the_cure_for_this_platform(
    bad: dict[str, Any], problem: str, cure: str, mended_by: str
) -> None:
    (found,) = gpu_host.judge(bad, REQUIREMENTS)
    assert problem in found["problem"]
    assert cure in found["cure"]
    assert found["mended_by"] == mended_by


def test_nouveau_is_named_beside_the_missing_driver() -> None:
    nouveau, missing = gpu_host.judge(host(**MISSING, nouveau=True), REQUIREMENTS)
    assert "nouveau holds the GPU" in nouveau["problem"]
    assert "no driver" in missing["problem"]


def test_proprietary_module_is_fine_for_an_older_card() -> None:
    ada = {**GPU, "compute_capability": "8.9"}
    driver = {**DRIVER, "loaded_flavour": "proprietary", "flavour": "proprietary"}
    assert gpu_host.judge(host(gpus=[ada], nvidia_pci_ids=["0x2684"], driver=driver), REQUIREMENTS) == []


def test_main_memory_is_left_to_the_role_that_may_tell_windows() -> None:
    (found,) = gpu_host.judge(wsl(memory_total_mib=7900), {**REQUIREMENTS, "manages_windows": True})
    assert found["mended_by"] == "wsl"


def test_container_that_does_not_run_holds_nothing() -> None:
    assert gpu_host.judge(host(containers=[{**SEED, "state": "exited"}]), REQUIREMENTS) == []


@pytest.mark.parametrize(("found", "warned"), [("2.4.13.0", True), ("2.5.10.0", False), ("", False)])
def test_old_wsl_is_worth_an_advice(found: str, warned: bool) -> None:
    assert bool(gpu_host.warn(wsl(wsl={"version": found}))) == warned


def test_too_little_space_names_the_place() -> None:
    full = host(disk_free_gib={"/var/lib/docker": 59})
    (found,) = gpu_host.judge(full, {**REQUIREMENTS, "disk_free": [{**SPACE, "path": "images"}]})
    assert "59 GiB are free for images in /var/lib/docker, 60 GiB are needed" in found["problem"]
    assert "free some space" in found["cure"]


@pytest.mark.parametrize(("device", "problems"), [(1, 1), (2, 0)])
def test_space_of_one_file_system_is_added_up(device: int, problems: int) -> None:
    weights = {"path": "weights", "place": "/srv", "gib": 10}
    shared = host(disk_free_gib={"/var/lib/docker": 65, "/srv": 65},
                  disk_devices={"/var/lib/docker": 1, "/srv": device})  # fmt: skip
    found = gpu_host.judge(shared, {**REQUIREMENTS, "disk_free": [SPACE, weights]})
    assert len(found) == problems
    assert all("70 GiB are needed together" in entry["problem"] for entry in found)


STATUS = """Package: nvidia-utils-580
Status: install ok installed
Version: 1

Package: libnvidia-compute-580
Essential: no
Status: hold ok installed

Package: linux-modules-nvidia-580-server-open-generic
Status: install ok installed

Package: nvidia-driver-580
Status: deinstall ok config-files

Package: nvidia-container-toolkit-base
Status: install ok installed

Package: libnvidia-container1
Status: install ok installed

Package: nvidia-driver-pinning-580
Status: install ok installed
"""


def test_packages_of_a_driver_are_told_from_others_and_from_remains(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(STATUS)
    names = ["libnvidia-compute-580", "linux-modules-nvidia-580-server-open-generic", "nvidia-utils-580"]
    assert gpu_host.measure_packages(status) == names
    assert gpu_host.measure_packages(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("info", "place"),
    [
        ({"DockerRootDir": "/data", "DriverStatus": [["Backing Filesystem", "extfs"]]}, "/data"),
        ({"DockerRootDir": "/data", "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]},
         "/var/lib/containerd"),
    ],
)  # fmt: skip
def test_images_are_where_the_engine_says(info: dict[str, Any], place: str) -> None:
    assert gpu_host.image_folder(info) == place


@pytest.mark.parametrize("answer", [(0, "Docker version 29.1.0, build 1"), (-1, "not found")])
def test_new_engine_keeps_images_in_the_store_of_containerd(
    answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_host, "ask", lambda _command: answer)
    assert gpu_host.starts_with_containerd()


def test_older_engine_keeps_images_in_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_host, "ask", lambda _command: (0, "Docker version 28.5.2, build 1"))
    assert not gpu_host.starts_with_containerd()


def test_port_is_found_with_the_process_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (found,) = gpu_host.measure_ports([port])
        assert (found["port"], found["pid"]) == (port, os.getpid())
        assert found["process"]
    assert gpu_host.measure_ports([port]) == []


def test_program_that_is_missing_or_hangs_is_no_error() -> None:
    assert gpu_host.ask(["no-such-program"])[0] == -1
    assert gpu_host.ask(["sleep", "5"], timeout=0)[0] == -1


@pytest.mark.parametrize("line", ["", "WARNING: infoROM is corrupted", "0, GPU, [N/A], [N/A], 12.0, 580.65.06"])
def test_line_that_describes_no_gpu_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|literal"):
        gpu_host.parse_gpu(line)


@pytest.mark.parametrize(("older", "newer"), [("580.65.06", "580.105.08"), ("575.57.08", "580.65.06"), ("7.5", "12.0")])
def test_versions_compare_by_number_not_by_letter(older: str, newer: str) -> None:
    assert gpu_host.version(older) < gpu_host.version(newer)


def test_free_space_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    assert gpu_host.free_gib(str(tmp_path / "not/yet")) == gpu_host.free_gib(str(tmp_path))
