"""The module gpu_host: what it makes of a measured host. Measuring itself is tested on hosts (molecule/preflight)."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.modules import gpu_host

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
DOCKER = {"desktop": False, "snap": False, "version": "", "images": "/var/lib/docker", "userland_proxy": True}
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
        "docker": DOCKER,
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
    return host(**{**WSL, "nvidia_packages": [], "wsl": {"version": "2.7.1.0", "networking": "nat"}, **changes})


@pytest.mark.parametrize("good", [host(), wsl(), host(secure_boot=True)])
def test_good_host_has_no_problem(good: dict[str, Any]) -> None:
    assert gpu_host.judge(good, REQUIREMENTS) == []
    assert gpu_host.warn(good) == []


def test_every_problem_is_named_in_one_go_with_its_fix() -> None:
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
    assert all(entry["fix"] for entry in problems)


@pytest.mark.parametrize(
    ("bad", "problem", "fix", "mended_by"),
    [
        (wsl(platform="wsl1", gpus=[]), "WSL 1", "wsl --set-version", ""),
        (host(platform="container"), "this is a container", "deploy to the machine that runs it", ""),
        (host(platform="container", container="lxc", **MISSING),
         "this is a container (lxc): its kernel, the driver and the GPU belong", "on Proxmox a VM", ""),
        (wsl(wsl={"version": "2.7.0.0", "networking": "none"}), "WSL has no network", "networkingMode=nat", ""),
        (wsl(wsl={"version": "2.7.0.0", "networking": "mirrored"}, docker={**DOCKER, "userland_proxy": False}),
         "mirrored and Docker's userland proxy is off", "userland-proxy", ""),
        (wsl(systemd=False), "systemd does not run", "/etc/wsl.conf", "wsl"),
        (host(systemd=False), "systemd does not run", "boot the machine with systemd", ""),
        (host(systemd_version=245), "systemd is 245, 249 or newer is needed", "upgrade the distribution", ""),
        (host(distribution="fedora"), "the distribution is fedora", "Ubuntu", ""),
        (host(distribution_version="20.04"), "the distribution is ubuntu 20.04", "Ubuntu 22.04 or newer", ""),
        (wsl(nvidia_packages=["nvidia-utils-580"]), "(nvidia-utils-580)", "apt-get purge nvidia-utils-580", ""),
        (wsl(memory_total_mib=7900), "7900 MiB of main memory, 10000 MiB are needed", "memory=12GB", ""),
        (host(docker={"desktop": True, "snap": False}), "Docker Desktop", "switch its WSL integration off", ""),
        (host(docker={"desktop": False, "snap": True}), "a snap", "snap remove docker", ""),
        (host(docker={**DOCKER, "unfit": "podman"}), "podman answers", "podman-docker", ""),
        (host(docker={**DOCKER, "unfit": "rootless"}), "runs rootless", "enable --now docker", ""),
        (host(docker={**DOCKER, "unfit": "userns"}), "remaps users", "remove userns-remap", ""),
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
def test_problem_comes_alone_with_the_fix_for_this_platform(
    bad: dict[str, Any], problem: str, fix: str, mended_by: str
) -> None:
    (found,) = gpu_host.judge(bad, REQUIREMENTS)
    assert problem in found["problem"]
    assert fix in found["fix"]
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
    ada = {**GPU, "compute_capability": "8.9"}
    assert bool(gpu_host.warn(wsl(wsl={"version": found}, gpus=[ada]))) == warned


@pytest.mark.parametrize(
    ("found", "capability", "warned"),
    [
        ("2.6.3.0", "12.0", True),
        ("2.6.3.0", "12.1", True),
        ("2.7.0.0", "12.0", False),
        ("2.11.0.0", "12.0", False),
        ("2.6.3.0", "10.0", False),
        ("2.6.3.0", "8.9", False),
        ("", "12.0", False),
    ],
)
def test_wsl_that_captures_no_graphs_is_worth_an_advice(found: str, capability: str, warned: bool) -> None:
    advice = gpu_host.warn(wsl(wsl={"version": found}, gpus=[{**GPU, "compute_capability": capability}]))
    assert len(advice) == warned
    for entry in advice:
        assert f"WSL is {found}; before 2.7.0 the capture of CUDA graphs fails" in entry["problem"]
        assert "wsl --update" in entry["fix"]
        assert "--enforce-eager" in entry["fix"]


@pytest.mark.parametrize(
    ("network", "advice"),
    [("nat", ""), ("consomme", ""), ("", ""), ("mirrored", "out of reach on 127.0.0.1"), ("bridged", "as localhost")],
)
def test_network_of_wsl_is_judged(network: str, advice: str) -> None:
    found = wsl(wsl={"version": "2.7.1.0", "networking": network})
    assert gpu_host.judge(found, REQUIREMENTS) == []
    problems = [entry["problem"] for entry in gpu_host.warn(found)]
    assert len(problems) == bool(advice)
    assert all(advice in problem for problem in problems)


@pytest.mark.parametrize(
    ("systemd", "environment", "marked", "kind"),
    [
        ("", "HOME=/\0TERM=linux", False, ""),
        ("lxc\n", "", False, "lxc"),
        ("", "TERM=linux\0container=lxc\0", False, "lxc"),
        ("", "container=lxc", False, "lxc"),
        ("systemd-nspawn", "", False, "systemd-nspawn"),
        ("wsl", "container=wsl", False, ""),
        ("docker", "container=docker", True, "docker"),
    ],
)
def test_containers_are_told_from_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemd: str, environment: str, marked: bool, kind: str
) -> None:
    for name, text in (("CONTAINER_OF_SYSTEMD", systemd), ("FIRST_ENVIRONMENT", environment)):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(gpu_host, name, tmp_path / name)
    mark = tmp_path / ("CONTAINER_OF_SYSTEMD" if marked else "missing")
    monkeypatch.setattr(gpu_host, "CONTAINER_MARKS", {str(mark): "docker"})
    assert gpu_host.measure_container() == kind
    assert gpu_host.measure_platform("6.12.48") == ("container" if kind else "bare_metal")


def test_docker_desktop_elsewhere_is_not_docker_desktop_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desktop, link = tmp_path / "mnt/wsl/docker-desktop", tmp_path / "docker"
    desktop.mkdir(parents=True)
    monkeypatch.setattr(gpu_host, "DOCKER_DESKTOP", desktop)
    monkeypatch.setattr(gpu_host, "DOCKER_DESKTOP_LINKS", (link,))
    assert not gpu_host.desktop_is_integrated()
    link.symlink_to(tmp_path / "other/docker")
    assert not gpu_host.desktop_is_integrated()
    link.unlink()
    link.symlink_to(desktop / "cli-tools/usr/bin/docker")
    assert gpu_host.desktop_is_integrated()


def test_too_little_space_names_the_place() -> None:
    full = host(disk_free_gib={"/var/lib/docker": 59})
    (found,) = gpu_host.judge(full, {**REQUIREMENTS, "disk_free": [{**SPACE, "path": "images"}]})
    assert "59 GiB are free for images in /var/lib/docker, 60 GiB are needed" in found["problem"]
    assert "free some space" in found["fix"]


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
Priority: optional
Architecture: amd64
Version: 1.19.1-1
Description: a library
 Version: none

Package: nvidia-container-toolkit-base
Status: deinstall ok config-files
Version: 1.18.0-1

Package: nvidia-driver-pinning-580
Status: install ok installed
"""


def test_packages_of_a_driver_are_told_from_others_and_from_remains(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(STATUS)
    names = ["libnvidia-compute-580", "linux-modules-nvidia-580-server-open-generic", "nvidia-utils-580"]
    toolkit = {"libnvidia-container1": "1.19.1-1"}
    assert gpu_host.measure_packages(status) == {"nvidia_packages": names, "nvidia_container_toolkit": toolkit}
    nothing: dict[str, Any] = {"nvidia_packages": [], "nvidia_container_toolkit": {}}
    assert gpu_host.measure_packages(tmp_path / "missing") == nothing


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


@pytest.mark.parametrize("answer", ["Docker version 29.1.0, build 1", ""])
def test_new_engine_keeps_images_in_the_store_of_containerd(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_host, "ask", lambda *_, **__: answer)
    assert gpu_host.starts_with_containerd()


def test_older_engine_keeps_images_in_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_host, "ask", lambda *_, **__: "Docker version 28.5.2, build 1")
    assert not gpu_host.starts_with_containerd()


def test_port_is_found_with_the_process_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (found,) = gpu_host.measure_ports([port])
        assert (found["port"], found["pid"]) == (port, os.getpid())
        assert found["process"]
    assert gpu_host.measure_ports([port]) == []


def test_program_that_is_missing_or_hangs_is_no_error() -> None:
    assert gpu_host.run("no-such-program")[0] == -1
    assert gpu_host.run("sleep", "5", timeout=0)[0] == -1


ROW = "0, NVIDIA GeForce RTX 5070 Ti, 16303, 15791, 12.0, 580.95.05\n"
LOST = (
    "Unable to determine the device handle for GPU0000:02:00.0: GPU is lost.  Reboot the system to recover this GPU\n"
)
INFOROM = "WARNING: infoROM is corrupted at gpu 0000:01:00.0"


class TestNvidiaSmi:
    """What comes of the answers of nvidia-smi, also of those that it gives on real machines with a fault."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Return a folder in which nvidia-smi lies, without NVIDIA cards on the bus."""
        smi = tmp_path / "nvidia-smi"
        smi.write_text(
            '#!/bin/sh\ncase "$*" in *--id=*) part=${*##*--id=} ;; *) part=all ;; esac\n'
            f'cd {tmp_path}\ncat "$part.out" && cat "$part.err" >&2\nexit "$(cat "$part.rc")"\n'
        )
        smi.chmod(0o755)
        monkeypatch.setattr(gpu_host.shutil, "which", lambda _name: str(smi))
        monkeypatch.setattr(gpu_host, "PCI", tmp_path / "pci")
        return tmp_path

    def measure(self, folder: Path, **answers: tuple[str, str, int]) -> dict[str, Any]:
        """Return what is measured where nvidia-smi gives these answers (output, errors, status)."""
        for part, (output, errors, status) in answers.items():
            for suffix, text in (("out", output), ("err", errors), ("rc", str(status))):
                (folder / f"{part}.{suffix}").write_text(text)
        found: dict[str, Any] = gpu_host.measure_gpus("bare_metal")
        return found

    def card(self, folder: Path, address: str, device: str, driver: str = "nvidia") -> None:
        """Put a card on the bus."""
        place = folder / "pci" / address
        place.mkdir(parents=True)
        for name, value in (("vendor", "0x10de"), ("device", device), ("class", "0x030000")):
            (place / name).write_text(f"{value}\n")
        (place / "driver").symlink_to(f"/sys/bus/pci/drivers/{driver}")

    @pytest.mark.parametrize(
        ("output", "errors", "status", "broken", "message"),
        [
            (ROW, "", 0, [], ""),
            (f"\n{ROW}\n", "", 0, [], ""),
            (ROW + INFOROM, "", 14, [], INFOROM),
            (ROW + INFOROM, "", 0, [], INFOROM),
            (ROW, INFOROM, 0, [], INFOROM),
            (ROW, "ERROR: ld.so: object 'a.so' from LD_PRELOAD cannot be preloaded: ignored.", 0, [], ""),
            (ROW, "libEGL warning: 0, 1, 2, 3, 4.0, 5.0", 14, [], ""),
            (ROW, "Unable to determine the device handle for GPU1: Unknown Error", 0, [],
             "Unable to determine the device handle for GPU1: Unknown Error"),
            (f"{ROW}1, NVIDIA GeForce GT 710, [N/A], [N/A], 3.5, 580.95.05\n", "", 0,
             ["memory.total is [N/A], memory.free is [N/A]"], ""),
            (f"{ROW}1, RTX 3060, [GPU is lost], [GPU is lost], [GPU is lost], 580.95.05\n", "", 15,
             ["memory.total is [GPU is lost], memory.free is [GPU is lost], compute_cap is [GPU is lost]"], ""),
            (f"{ROW}1, A100, 40960, [Insufficient Permissions], 8.0, 580.95.05\n", "", 0,
             ["memory.free is [Insufficient Permissions]"], ""),
            (f"{ROW}1, [Unknown Error]\n", "", 0, ["nvidia-smi says '1, [Unknown Error]'"], ""),
        ],
    )  # fmt: skip
    def test_good_row_is_kept_and_the_rest_is_named(
        self, folder: Path, output: str, errors: str, status: int, broken: list[str], message: str
    ) -> None:
        found = self.measure(folder, all=(output, errors, status))
        assert [(gpu["index"], gpu["memory_free_mib"]) for gpu in found["gpus"]] == [(0, 15791)]
        assert [(card["index"], card["fault"]) for card in found["gpus_broken"]] == [(1, fault) for fault in broken]
        assert found["nvidia_smi_message"] == message
        measured = host(**found, nvidia_pci_devices=1 + len(broken))
        assert gpu_host.judge(measured, REQUIREMENTS) == []
        advice = " ".join(entry["problem"] for entry in gpu_host.warn(measured))
        assert all(text in advice for text in (*broken, message))
        assert bool(advice) == bool(broken or message)

    def test_comma_in_a_name(self, folder: Path) -> None:
        found = self.measure(folder, all=("0, NVIDIA RTX 6000, Ada Generation, 49140, 48000, 8.9, 580.95.05\n", "", 0))
        assert found["gpus"][0]["name"] == "NVIDIA RTX 6000, Ada Generation"

    def test_lost_card_that_ends_the_answer_does_not_hide_the_others(self, folder: Path) -> None:
        self.card(folder, "0000:01:00.0", "0x2c05")
        self.card(folder, "0000:02:00.0", "0x2504")
        self.card(folder, "0000:03:00.0", "0x2504", "vfio-pci")
        answers = {"all": (LOST, "", 15), "0000:01:00.0": (ROW, "", 0), "0000:02:00.0": (LOST, "", 15)}
        found = self.measure(folder, **answers)
        assert [gpu["index"] for gpu in found["gpus"]] == [0]
        assert found["nvidia_smi_message"] == LOST.strip()
        (advice,) = gpu_host.warn(host(**found, nvidia_pci_devices=2))
        assert "nvidia-smi shows 1 of 2 NVIDIA GPUs (Unable to determine the device handle" in advice["problem"]
        assert "reboot" in advice["fix"]

    def test_no_driver_answers(self, folder: Path) -> None:
        found = self.measure(folder, all=("", "NVIDIA-SMI has failed because of the driver", 9))
        assert (found["gpus"], found["nvidia_smi_message"]) == ([], "NVIDIA-SMI has failed because of the driver")

    @pytest.mark.parametrize(
        ("row", "fix"),
        [
            ("0, NVIDIA GB10, [N/A], [N/A], 12.1, 580.126.09", "use another GPU"),
            ("0, A100, 40960, [Insufficient Permissions], 8.0, 580.95.05", "nvidia-smi -i 0 -mig 0"),
            ("0, RTX 3060, [GPU is lost], [GPU is lost], 8.6, 580.95.05", "look for Xid"),
            ("0, RTX 3060, [GPU requires reset], 12000, 8.6, 580.95.05", "look for Xid"),
            ("0, RTX 3060, [Something new], 12000, 8.6, 580.95.05", "look at 'nvidia-smi'"),
        ],
    )
    def test_only_card_is_broken(self, folder: Path, row: str, fix: str) -> None:
        (found,) = gpu_host.judge(host(**self.measure(folder, all=(row, "", 0))), REQUIREMENTS)
        assert "cannot be used" in found["problem"]
        assert fix in found["fix"]
        assert found["mended_by"] == ""

    def test_processes_are_seen_beside_a_warning(self, folder: Path) -> None:
        self.measure(folder, all=(f"4711, /usr/bin/python3, 11000\n4712, [Not Found], [N/A]\n{INFOROM}\n", "", 14))
        found = gpu_host.measure_gpu_processes(str(folder / "nvidia-smi"))
        assert found == [{"pid": 4711, "name": "python3", "memory_mib": 11000}]

    def test_card_of_a_virtual_machine_is_not_ours(self, folder: Path) -> None:
        self.card(folder, "0000:01:00.0", "0x2c05", "vfio-pci")
        assert gpu_host.measure_pci() == [{"address": "0000:01:00.0", "device": "0x2c05", "driver": "vfio-pci"}]
        reserved = host(**MISSING, nvidia_pci_devices=0, nvidia_pci_ids=[], nvidia_pci_reserved=gpu_host.measure_pci())
        (found,) = gpu_host.judge(reserved, REQUIREMENTS)
        assert "the NVIDIA GPU at 0000:01:00.0 is kept for a virtual machine by vfio-pci" in found["problem"]


def test_card_that_the_open_modules_do_not_drive_is_explained() -> None:
    pascal = host(nvidia_pci_devices=2, nvidia_pci_ids=["0x1b81", "0x2c05"])
    assert gpu_host.judge(pascal, REQUIREMENTS) == []
    (advice,) = gpu_host.warn(pascal)
    assert "1 of 2 NVIDIA GPUs; 0x1b81 is older than Turing" in advice["problem"]
    assert advice["fix"] == "nothing has to be done if the others suffice"


def test_blackwell_that_the_proprietary_modules_do_not_drive_matters_only_alone() -> None:
    driver = {**DRIVER, "loaded_flavour": "proprietary", "flavour": "proprietary"}
    for capability, problems in (("8.9", 0), ("6.1", 1)):
        both = host(gpus=[{**GPU, "compute_capability": capability}], nvidia_pci_devices=2,
                    nvidia_pci_ids=["0x2684", "0x2c05"], driver=driver)  # fmt: skip
        assert len(gpu_host.judge(both, REQUIREMENTS)) == problems
        assert "1 of 2" in gpu_host.warn(both)[0]["problem"]


@pytest.mark.parametrize(("older", "newer"), [("580.65.06", "580.105.08"), ("575.57.08", "580.65.06"), ("7.5", "12.0")])
def test_versions_compare_by_number_not_by_letter(older: str, newer: str) -> None:
    assert gpu_host.version(older) < gpu_host.version(newer)


def test_free_space_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    assert gpu_host.free_gib(str(tmp_path / "not/yet")) == gpu_host.free_gib(str(tmp_path))


@pytest.mark.parametrize(
    ("info", "unfit"),
    [
        ({}, ""),
        ({"SecurityOptions": None}, ""),
        ({"SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"]}, ""),
        ({"SecurityOptions": ["name=seccomp,profile=builtin", "name=userns", "name=no-new-privileges"]}, "userns"),
        ({"SecurityOptions": ["name=userns", "name=rootless"]}, "rootless"),
        ({"ServerVersion": "5.4.2", "BuildahVersion": "1.39.3", "SecurityOptions": ["name=rootless"]}, "podman"),
    ],
)
def test_engine_that_answers_is_judged(info: dict[str, Any], unfit: str) -> None:
    assert gpu_host.engine.unfit(info) == unfit
