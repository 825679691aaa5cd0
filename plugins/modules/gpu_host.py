#!/usr/bin/python
"""Ansible module gpu_host: measure a host that shall serve a model from its GPU, and name what keeps it from that."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gpu_host
short_description: Measure a GPU host and judge it
description:
  - Measures platform, operating system, GPUs, driver, memory and free disk space, as the fact C(gpu_host).
  - Compares them with the requirements and returns every problem with its cure. It never fails because of a problem and
    never changes anything; what to do about the problems is the caller's business.
options:
  requirements:
    description: What the host must offer; without it the host is only measured.
    type: dict
    options:
      driver_version:
        description: Oldest NVIDIA driver that is good enough, such as C(580.65.06).
        type: str
        required: true
      compute_capability:
        description: Oldest compute capability that the image has kernels for, such as C(7.5).
        type: str
        required: true
      gpu_memory_mib:
        description: Memory that at least one GPU must have, in MiB.
        type: int
        required: true
      disk_free:
        description: Free space that must be left, as a list of C(path) and C(gib); a path need not exist yet.
        type: list
        elements: dict
        default: []
        options:
          path:
            description: A folder, or where one will be.
            type: path
            required: true
          gib:
            description: Free space in GiB.
            type: int
            required: true
          unless_exists:
            description: A path that exists once the space is in use; then nothing more is demanded.
            type: path
attributes:
  check_mode:
    support: full
author:
  - The dots-ocr-deploy founders
"""

EXAMPLES = r"""
- name: Measure the host
  gpu_host:
    requirements:
      driver_version: "580.65.06"
      compute_capability: "7.5"
      gpu_memory_mib: 12000
      disk_free:
        - path: /var/lib/docker
          gib: 60
"""

RETURN = r"""
ansible_facts:
  description: The fact C(gpu_host), the host as measured.
  returned: always
  type: dict
  sample:
    gpu_host:
      platform: bare_metal
      systemd: true
      distribution: debian
      distribution_version: "13"
      architecture: x86_64
      docker_engine: true
      memory_total_mib: 32000
      nvidia_pci_devices: 1
      nvidia_smi: /usr/bin/nvidia-smi
      nvidia_smi_message: ""
      gpus:
        - index: 0
          name: NVIDIA GeForce RTX 5070 Ti
          memory_total_mib: 16303
          memory_free_mib: 15791
          compute_capability: "12.0"
          driver_version: 580.173.02
      disk_free_gib:
        /var/lib/docker: 120
problems:
  description: What keeps the host from serving, each with its cure.
  returned: always
  type: list
  elements: dict
  sample:
    - problem: "systemd does not run"
      cure: "boot the machine with systemd"
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

Host = dict[str, Any]

OLDEST_RELEASES = {"debian": "12", "ubuntu": "22.04"}

# NVIDIA's documentation for WSL: root does not find nvidia-smi on its PATH, so it is called by its full path.
WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"
NVIDIA_PCI_VENDOR = "0x10de"
DISPLAY_PCI_CLASS = "0x03"
QUERY = ("index", "name", "memory.total", "memory.free", "compute_cap", "driver_version")


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 580.65.06 for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def judge(host: Host, requirements: dict[str, Any]) -> list[dict[str, str]]:
    """Return every problem of a measured host with its cure, in the order in which to mend them."""
    problems: list[dict[str, str]] = []

    def add(problem: str, cure: str) -> None:
        problems.append({"problem": problem, "cure": cure})

    wsl = host["platform"] in ("wsl1", "wsl2")
    if host["platform"] == "wsl1":
        add("this is WSL 1, which has no GPU", "in Windows: wsl --set-version DISTRIBUTION 2")
    if host["architecture"] != "x86_64":
        add(f"the processor is {host['architecture']}", "use an x86-64 machine: the images are built for it alone")
    release = f"{host['distribution'] or 'unknown'} {host['distribution_version']}".strip()
    oldest = OLDEST_RELEASES.get(host["distribution"])
    if oldest is None or version(host["distribution_version"]) < version(oldest):
        add(f"the distribution is {release}", "use Debian 12 or newer or Ubuntu 22.04 or newer")
    elif release == "debian 12" and not host["docker_engine"]:
        add("Docker Engine of Debian 12 is too old for CDI", "install docker-ce from Docker first, or use Debian 13")
    if not host["systemd"]:
        cure = "put [boot] systemd=true into /etc/wsl.conf, then in Windows: wsl --shutdown"
        add("systemd does not run", cure if wsl else "boot the machine with systemd; a plain container is no target")
    problems += judge_gpus(host, requirements, wsl)
    for wanted in requirements["disk_free"]:
        free = host["disk_free_gib"][wanted["path"]]
        in_use = wanted.get("unless_exists") and Path(wanted["unless_exists"]).exists()
        if free < wanted["gib"] and not in_use:
            add(
                f"{free} GiB are free for {wanted['path']}, {wanted['gib']} GiB are needed",
                "free some space, or mount a larger file system there",
            )
    return problems


def judge_gpus(host: Host, requirements: dict[str, Any], wsl: bool) -> list[dict[str, str]]:
    """Return the problems with the GPUs and their driver."""
    if not host["gpus"]:
        return [judge_missing_gpu(host, wsl)]
    problems = []
    needed = requirements["compute_capability"]
    capable = [gpu for gpu in host["gpus"] if version(gpu["compute_capability"]) >= version(needed)]
    # Of those that are new enough; if none is, of all, so that both problems are named at once.
    memory = max(gpu["memory_total_mib"] for gpu in capable or host["gpus"])
    names = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in host["gpus"])
    if not capable:
        problems.append(
            {
                "problem": f"compute capability {needed} is needed, but the GPU is {names}",
                "cure": "use a GPU of the Turing generation (RTX 20) or newer",
            }
        )
    if memory < requirements["gpu_memory_mib"]:
        problems.append(
            {
                "problem": f"the GPU has {memory} MiB of memory, {requirements['gpu_memory_mib']} MiB are needed",
                "cure": "use a GPU with 12 GB or more",
            }
        )
    driver = host["gpus"][0]["driver_version"]
    if version(driver) < version(requirements["driver_version"]):
        where = "in Windows (never inside WSL)" if wsl else "with the open kernel modules, then reboot"
        problems.append(
            {
                "problem": f"the NVIDIA driver is {driver}, the image needs {requirements['driver_version']} or newer",
                "cure": f"install a newer driver {where}",
            }
        )
    return problems


def judge_missing_gpu(host: Host, wsl: bool) -> dict[str, str]:
    """Say which link between the GPU and us is broken."""
    if wsl:
        return {
            "problem": f"no GPU answers inside WSL{detail(host)}",
            "cure": "install NVIDIA's driver in Windows (580 or newer), run 'wsl --update', then 'wsl --shutdown'",
        }
    if host["nvidia_smi"] is None and host["nvidia_pci_devices"] == 0:
        return {"problem": "there is no NVIDIA GPU in this machine", "cure": "choose a machine that has one"}
    if host["nvidia_smi"] is None:
        return {
            "problem": "there is an NVIDIA GPU but no driver",
            "cure": "install the NVIDIA driver, branch 580 or newer, with the open kernel modules, and reboot",
        }
    return {
        "problem": f"the NVIDIA driver is installed but shows no GPU{detail(host)}",
        "cure": "reboot; if that does not help, reinstall the driver for the running kernel",
    }


def detail(host: Host) -> str:
    """Return what nvidia-smi said, to follow a sentence."""
    return f" ({host['nvidia_smi_message']})" if host["nvidia_smi_message"] else ""


def measure_platform(kernel: str) -> str:
    """Return wsl1, wsl2 or bare_metal, which here is every other kind of machine.

    Ansible's own facts do not know WSL. A custom kernel may lack Microsoft's name, hence the second sign; a container
    inside WSL shows the same kernel but is not WSL.
    """
    microsoft = "microsoft" in kernel.lower() or Path("/run/WSL").is_dir() or Path("/usr/lib/wsl/lib").is_dir()
    if not microsoft or Path("/.dockerenv").exists():
        return "bare_metal"
    return "wsl1" if kernel.endswith("-Microsoft") else "wsl2"


def measure_gpus() -> Host:
    """Ask nvidia-smi for the GPUs: index, name, memory in MiB, compute capability, driver version."""
    smi = WSL_NVIDIA_SMI if Path(WSL_NVIDIA_SMI).exists() else shutil.which("nvidia-smi")
    found: Host = {"nvidia_smi": smi, "nvidia_smi_message": "", "gpus": []}
    if smi is None:
        return found
    command = [smi, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        found["nvidia_smi_message"] = str(error)
        return found
    if done.returncode != 0:
        found["nvidia_smi_message"] = " ".join((done.stdout + done.stderr).split())
        return found
    try:
        found["gpus"] = [parse_gpu(line) for line in done.stdout.splitlines()]
    except ValueError:
        found["nvidia_smi_message"] = " ".join(done.stdout.split())
    return found


def parse_gpu(line: str) -> Host:
    """Return one GPU from a line of nvidia-smi's answer to QUERY; raises ValueError for any other line."""
    index, name, total, free, capability, driver = (value.strip() for value in line.split(","))
    return {
        "index": int(index),
        "name": name,
        "memory_total_mib": int(total),
        "memory_free_mib": int(free),
        "compute_capability": capability,
        "driver_version": driver,
    }


def count_nvidia_pci_devices() -> int:
    """Return how many NVIDIA display controllers the PCI bus shows."""

    def shows(device: Path, attribute: str, start: str) -> bool:
        try:
            return (device / attribute).read_text().startswith(start)
        except OSError:
            return False

    devices = Path("/sys/bus/pci/devices").glob("*")
    return sum(shows(d, "vendor", NVIDIA_PCI_VENDOR) and shows(d, "class", DISPLAY_PCI_CLASS) for d in devices)


def free_gib(path: str) -> int:
    """Return the free space in GiB of the file system that holds a path or will hold it."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free >> 30


def measure(paths: list[str]) -> Host:
    """Measure this host."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return {
        "platform": measure_platform(platform.release()),
        "systemd": Path("/run/systemd/system").is_dir(),
        "distribution": release.get("ID", ""),
        "distribution_version": release.get("VERSION_ID", ""),
        "architecture": platform.machine(),
        "docker_engine": shutil.which("dockerd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin") is not None,
        "memory_total_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "nvidia_pci_devices": count_nvidia_pci_devices(),
        **measure_gpus(),
        "disk_free_gib": {path: free_gib(path) for path in paths},
    }


def main() -> None:
    """Run the module."""
    space = {
        "path": {"type": "path", "required": True},
        "gib": {"type": "int", "required": True},
        "unless_exists": {"type": "path"},
    }
    requirements = {
        "driver_version": {"type": "str", "required": True},
        "compute_capability": {"type": "str", "required": True},
        "gpu_memory_mib": {"type": "int", "required": True},
        "disk_free": {"type": "list", "elements": "dict", "default": [], "options": space},
    }
    module = AnsibleModule(
        argument_spec={"requirements": {"type": "dict", "options": requirements}},
        supports_check_mode=True,
    )
    wanted = module.params["requirements"]
    host = measure([space["path"] for space in wanted["disk_free"]] if wanted else [])
    problems = judge(host, wanted) if wanted else []
    module.exit_json(changed=False, ansible_facts={"gpu_host": host}, problems=problems)


if __name__ == "__main__":
    main()
