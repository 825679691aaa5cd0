#!/usr/bin/python
"""Ansible module gpu_host: measure a host that should serve a model from its GPU, and name what keeps it from that."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gpu_host
short_description: Measure a GPU host and judge it
description:
  - Measures platform, operating system, GPUs, driver, memory, engine and free disk space, as the fact C(gpu_host).
  - Compares them with the requirements and returns every problem with its fix. It never fails because of a problem and
    never changes anything; what to do about the problems is the caller's business.
  - Whether an image can run on the GPUs, and whether the model fits, is not judged here but by the filter
    C(server_plan), since both depend on the image.
options:
  requirements:
    description: What the host must offer; without it the host is only measured, and ports and processes are not.
    type: dict
    suboptions:
      disk_free:
        description: Free space that must be left. What lies on one file system is added up.
        type: list
        elements: dict
        default: []
        suboptions:
          path:
            description:
              - A folder, or where one will be. C(images) is where the engine of this host keeps images, C(weights) what
                O(requirements.weights) says.
            type: str
            required: true
          gib: {description: Free space in GiB., type: int, required: true}
          unless_exists:
            description: A path that exists once the space is in use; then nothing more is demanded.
            type: path
      weights: {description: "The folder of the model's weights.", type: path, default: /var/lib/dots-ocr/models}
      ports: {description: TCP ports that must be free., type: list, elements: int, default: []}
      installed: {description: A path that exists once our server is there; then the ports are its own., type: path}
      engine:
        description: Name of the set of packages with which M(dots_ocr.deploy.apt_set) installs an engine here.
        type: str
      wsl_memory_mib: {description: "Main memory that a WSL host must have, in MiB; 0 is any.", type: int, default: 0}
      manages_windows:
        description: Whether the role C(wsl) may change what Windows gives to WSL.
        type: bool
        default: false
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Measure the host
  dots_ocr.deploy.gpu_host:
    requirements:
      ports: [8000]
      disk_free:
        - path: images
          gib: 60
"""

RETURN = r"""
ansible_facts:
  description: The fact C(gpu_host), the host as measured. Memory is in MiB, disk space in GiB.
  returned: always
  type: dict
  sample:
    gpu_host:
      platform: bare_metal  # wsl1, wsl2, bare_metal or container
      container: ""  # the kind of container, such as docker or lxc
      systemd: true
      systemd_version: 257
      distribution: debian
      distribution_version: "13"
      architecture: x86_64
      kernel_release: 6.12.48+deb13-amd64
      secure_boot: false
      docker_engine: true
      docker:
        {desktop: false, snap: false, version: 29.9.0, images: /var/lib/containerd, userland_proxy: true, unfit: ""}
      memory_total_mib: 32000
      nvidia_pci_devices: 1  # those that are not reserved
      nvidia_pci_ids: ["0x2c05"]
      nvidia_pci_reserved: []  # for virtual machines: {address: "0000:02:00.0", device: "0x2504", driver: vfio-pci}
      dxg: false
      nouveau: false
      driver:  # ours: by the role nvidia_driver
        {loaded: 580.173.02, loaded_flavour: open, installed: 580.173.02, flavour: open, ours: true,
         reboot_wanted_by: []}
      nvidia_packages: [nvidia-driver-cuda, nvidia-kernel-open-dkms]
      nvidia_container_toolkit: {nvidia-container-toolkit-base: 1.19.1-1}
      wsl: {}  # in WSL: {version: 2.6.1.0, networking: nat}, each empty if WSL does not tell
      nvidia_smi: /usr/bin/nvidia-smi
      nvidia_smi_message: ""  # what it said beside the GPUs
      gpus:
        - {index: 0, name: NVIDIA GeForce RTX 5070 Ti, memory_total_mib: 16303, memory_free_mib: 15791,
           compute_capability: "12.0", driver_version: 580.173.02}
      gpus_broken: []  # named but of no use: {index: 1, name: NVIDIA GeForce GT 710, fault: memory.total is [N/A]}
      gpu_processes: [{pid: 4711, name: python3, memory_mib: 5000}]
      containers: [{name: dots-ocr-server, state: running, ports: [8000]}]
      ports_in_use: [{port: 8000, pid: 812, process: docker-proxy}]
      disk_free_gib: {/var/lib/containerd: 120}
      server_installed: false
problems:
  description: What keeps the host from serving, each with its fix and the role that deals with it, if one does.
  returned: always
  type: list
  elements: dict
  sample:
    - problem: "systemd does not run"
      fix: "boot the machine with systemd"
      mended_by: ""
advice:
  description:
    - What does not keep the host from serving but will be missed, each with its fix; also without requirements. Here
      belongs a card that does not answer beside one that does.
  returned: always
  type: list
  elements: dict
engine:
  description: What M(dots_ocr.deploy.docker_engine_info) tells of the engine.
  returned: with requirements
  type: dict
servers:
  description: What M(dots_ocr.deploy.server_state) tells of our servers, if O(requirements.installed) is there.
  returned: with requirements
  type: dict
"""

import contextlib
import http.client
import json
import math
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..module_utils import engine, servers
from ..module_utils.cards import OLDEST_OPEN, Problem, needs_open_modules, trouble, version, why_none
from ..module_utils.common import RECORDS, answer, ask, read_text, run, together

Host = dict[str, Any]

OLDEST_RELEASES = {"debian": "12", "ubuntu": "22.04"}
OLDEST_SYSTEMD = 249  # of the directives that the units use
# The first whose source has instanceIdleTimeout, without which WSL puts a server to sleep.
OLDEST_WSL = "2.5.10"
# Before it the capture of CUDA graphs fails on GPUs of capability 12 (microsoft/WSL#14452, vllm-project/vllm#37242).
OLDEST_WSL_FOR_GRAPHS = "2.7.0"
GRAPHS_CAPABILITY = 12

# NVIDIA's documentation for WSL: root does not find nvidia-smi on its PATH, so it is called by its full path.
WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"
WSL_INFO = {"version": "--wsl-version", "networking": "--networking-mode"}
NVIDIA_PCI_VENDOR = "0x10de"
DISPLAY_PCI_CLASS = "0x03"
PCI = Path("/sys/bus/pci/devices")
# Drivers of the kernel that keep a card for a virtual machine.
RESERVING_DRIVERS = ("vfio-pci", "pci-stub", "xen-pciback")
NAT_FIX = "put networkingMode=nat below [wsl2] in Windows' %UserProfile%\\.wslconfig, then in Windows: wsl --shutdown"
# What nvidia-smi is asked for beside index and name: how it looks, and what it is called in the fact.
VALUES = {
    "memory.total": (r"\d+", "memory_total_mib"),
    "memory.free": (r"\d+", "memory_free_mib"),
    "compute_cap": (r"\d+\.\d+", "compute_capability"),
    "driver_version": (r"\d+(?:\.\d+)+", "driver_version"),
}
# A row of the answer. A name may have a comma, and a word in brackets may stand for any other value.
ROW = re.compile(r"(\d+),\s*(.+)" + r",\s*([^,]+)" * len(VALUES))
# What nvidia-smi says of a card that does not do (words of NVML), and what helps; the last is for any other word.
CARD_FIXES = (
    (r"(?i)permission", "let Ansible become root; if the card is divided (MIG), undo that: nvidia-smi -i INDEX -mig 0"),
    (
        r"(?i)lost|reset|unknown error|err!|device handle",
        "reboot; if that does not help, look for Xid in 'journalctl --dmesg --grep NVRM', and check the card's seat and"
        " its power",
    ),
    (r"(?i)inforom", "nothing has to be done while the GPU works; the card's own memory of settings is damaged"),
    (r"(?i)n/a|not supported|not available", "use another GPU; this one does not tell what the server is planned with"),
    ("", "look at 'nvidia-smi' and at 'journalctl --dmesg --grep NVRM'"),
)
SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
LOADED_MODULE = Path("/proc/driver/nvidia/version")

# Packages of a driver, of kernel modules and of their libraries, in Debian's, Ubuntu's and NVIDIA's names. The
# container toolkit and the package that only pins a branch are none.
DRIVER_PACKAGES = re.compile(
    r"^Package: ((?:nvidia-(?!container|driver-pinning)|libnvidia-(?!container)|linux-(?:modules|objects|signatures)"
    r"-nvidia-|cuda-drivers|libcuda1|libcudadebugger1|xserver-xorg-video-nvidia)\S*)\n"
    r"(?:[A-Z]\S*: .*\n)*?Status: \S+ \S+ installed$",
    re.MULTILINE,
)

# Those of NVIDIA Container Toolkit, with their versions.
TOOLKIT_PACKAGES = re.compile(
    r"^Package: ((?:lib)?nvidia-container\S*)\n(?:[A-Z]\S*: .*\n)*?Status: \S+ \S+ installed\n"
    r"(?:[A-Z]\S*: .*\n)*?Version: (\S+)$",
    re.MULTILINE,
)

# All distributions see this folder while Docker Desktop runs. One that it is integrated into has links to it.
DOCKER_DESKTOP = Path("/mnt/wsl/docker-desktop")
DOCKER_DESKTOP_LINKS = (*map(Path, ("/usr/bin/docker", "/usr/local/bin/docker", "/var/run/docker.sock")),)
DOCKER_DESKTOP_PROCESS = "docker-desktop-"
# Files of engines that mark their containers, and kinds of containers that run systemd and look like machines.
CONTAINER_MARKS = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}
SYSTEM_CONTAINERS = ("lxc", "lxc-libvirt", "systemd-nspawn", "openvz")
CONTAINER_OF_SYSTEMD = Path("/run/systemd/container")
FIRST_ENVIRONMENT = Path("/proc/1/environ")
# What the shell scripts that this deployment grew out of leave behind; they come back at every boot.
SEED_CONTAINERS = ("dots-ocr-server", "dots-ocr-fixed")
CONTAINERD_STORE = "io.containerd.snapshotter.v1"
FIRST_ENGINE_WITH_CONTAINERD_STORE = 29

TIMEOUT = 10  # seconds, for whatever is asked; a driver that hangs gets a minute
GPU_TIMEOUT = 60


def judge(host: Host, requirements: dict[str, Any]) -> list[Problem]:
    """Return every problem of a measured host with its fix, in the order in which to fix them."""
    wsl = host["platform"] in ("wsl1", "wsl2")
    return [
        *judge_platform(host, wsl),
        *(judge_wsl(host, requirements) if wsl else []),
        *judge_docker(host),
        # What a container lacks is for the machine that runs it.
        *(judge_wsl_gpu(host) if wsl else () if host["platform"] == "container" else judge_gpu(host)),
        *judge_ports(host, requirements),
        *judge_disks(host, requirements["disk_free"]),
    ]


def judge_platform(host: Host, wsl: bool) -> Iterator[Problem]:
    """Yield the problems with the machine and its operating system."""
    if host["platform"] == "wsl1":
        yield trouble("this is WSL 1, which has no GPU", "in Windows: wsl --set-version DISTRIBUTION 2")
    if host["platform"] == "container" and (kind := host.get("container", "")) in SYSTEM_CONTAINERS:
        yield trouble(
            f"this is a container ({kind}): its kernel, the driver and the GPU belong to the machine that runs it",
            "deploy to the machine that runs it, or to a virtual machine that has the GPU (on Proxmox a VM with the"
            " PCI device, no CT)",
        )
    elif host["platform"] == "container":
        yield trouble(
            "this is a container, where neither drivers nor services can be installed",
            "deploy to the machine that runs it",
        )
    if host["architecture"] != "x86_64":
        yield trouble(
            f"the processor is {host['architecture']}", "use an x86-64 machine: the images are built for it alone"
        )
    release = f"{host['distribution'] or 'unknown'} {host['distribution_version']}".strip()
    oldest = OLDEST_RELEASES.get(host["distribution"])
    if oldest is None or version(host["distribution_version"]) < version(oldest):
        yield trouble(f"the distribution is {release}", "use Debian 12 or newer or Ubuntu 22.04 or newer")
    if not host["systemd"] and wsl:
        yield trouble(
            "systemd does not run",
            "put systemd=true below [boot] in /etc/wsl.conf, then in Windows: wsl --shutdown",
            "wsl",
        )
    elif not host["systemd"]:
        yield trouble("systemd does not run", "boot the machine with systemd; a plain container is no target")
    elif host["systemd_version"] < OLDEST_SYSTEMD:
        yield trouble(
            f"systemd is {host['systemd_version']}, {OLDEST_SYSTEMD} or newer is needed", "upgrade the distribution"
        )


def judge_wsl(host: Host, requirements: dict[str, Any]) -> Iterator[Problem]:
    """Yield what does not belong into a distribution of WSL, and what Windows gives it too little of."""
    if packages := host["nvidia_packages"]:
        yield trouble(
            f"a Linux driver of NVIDIA is installed inside WSL ({', '.join(packages)}), and hides the one of Windows",
            f"apt-get purge {' '.join(packages)}, then in Windows: wsl --shutdown",
        )
    network = host["wsl"].get("networking", "")
    if network == "none":
        yield trouble(
            "WSL has no network (networkingMode=none), so neither packages nor images can come, and Windows does not"
            " reach the server",
            NAT_FIX,
        )
    if network == "mirrored" and not host["docker"].get("userland_proxy", True):
        yield trouble(
            "WSL's network is mirrored and Docker's userland proxy is off: published ports cannot be reached then",
            'take "userland-proxy": false out of /etc/docker/daemon.json and restart Docker; or ' + NAT_FIX,
        )
    needed = requirements["wsl_memory_mib"]
    if host["memory_total_mib"] < needed:
        yield trouble(
            f"WSL has {host['memory_total_mib']} MiB of main memory, {needed} MiB are needed",
            f"put memory={-(-needed // 1024) + 2}GB below [wsl2] in Windows' %UserProfile%\\.wslconfig,"
            " then: wsl --shutdown",
            "wsl" if requirements["manages_windows"] else "",
        )


def judge_docker(host: Host) -> Iterator[Problem]:
    """Yield engines that are in the way of ours."""
    if host["docker"]["desktop"]:
        yield trouble(
            "Docker Desktop is at work in this distribution, with an engine of its own",
            "switch its WSL integration off for this distribution and quit it, then in Windows: wsl --shutdown",
        )
    if host["docker"]["snap"]:
        yield trouble("Docker is installed as a snap, which sees no GPU", "snap remove docker")
    # As the role docker_engine refuses them, only before anything is brought.
    if unfit := host["docker"].get("unfit"):
        yield trouble(*engine.UNFIT[unfit])


def judge_wsl_gpu(host: Host) -> Iterator[Problem]:
    """Yield which link between Windows' GPU and us is broken."""
    if not host["gpus"] and host["platform"] == "wsl2":
        missing = "" if host["dxg"] else " (there is no /dev/dxg)"
        yield trouble(
            f"no GPU answers inside WSL{detail(host) or missing}",
            "install NVIDIA's driver in Windows (580 or newer), run 'wsl --update', then 'wsl --shutdown'",
        )


def judge_gpu(host: Host) -> list[Problem]:
    """Return which link between the GPU and us is broken, on a machine with drivers of its own."""
    if none := why_none(host):
        return [trouble(*none)]
    found: list[Problem] = []
    driver = host["driver"]
    loaded, installed = driver["loaded"], driver["installed"]
    if host["nouveau"]:
        found += of_driver(
            "the kernel module nouveau holds the GPU, so NVIDIA's cannot",
            "keep nouveau from loading ('blacklist nouveau' in /etc/modprobe.d, update-initramfs -u) and reboot",
        )
    if loaded and installed and loaded != installed:
        found += of_driver(f"the kernel runs the NVIDIA module {loaded}, but {installed} is installed", "reboot")
    elif "version mismatch" in host["nvidia_smi_message"]:
        found += of_driver(
            f"the NVIDIA libraries do not fit the kernel module {loaded or 'that is loaded'}{detail(host)}",
            "reboot; if that does not help, install libraries and module of one version",
        )
    if "proprietary" in (driver["loaded_flavour"], driver["flavour"]) and needs_open_modules(host):
        found += of_driver(
            "the NVIDIA kernel module is the proprietary one, which does not drive Blackwell",
            "install the open kernel modules in its place (Ubuntu: the packages with -open in their names), and reboot",
        )
    if host["gpus"]:
        return found  # a card that does not answer beside one that does is worth an advice: warn_cards
    if broken := host.get("gpus_broken", []):
        return found or [broken_card(card) for card in broken]
    if host["secure_boot"] and host["distribution"] == "debian" and not loaded:
        blocked = trouble(
            "Secure Boot is on and no NVIDIA driver is loaded; Debian's are built on the machine (DKMS), and the"
            " firmware does not know who signed them",
            "switch Secure Boot off in the firmware, or use Ubuntu, whose modules are signed by Canonical",
        )
        return [*found, blocked]
    if host["nvidia_smi"] is None and not loaded and not installed:
        return found + of_driver(
            "there is an NVIDIA GPU but no driver",
            "install the NVIDIA driver, branch 580 or newer, with the open kernel modules, and reboot",
        )
    return found or of_driver(
        f"the NVIDIA driver is installed but shows no GPU{detail(host)}",
        "reboot; if that does not help, reinstall the driver for the running kernel",
    )


def of_driver(problem: str, fix: str) -> list[Problem]:
    """Return the one problem, with which the role nvidia_driver deals."""
    return [trouble(problem, fix, "nvidia_driver")]


def broken_card(card: Host) -> Problem:
    """Return what is wrong with a card that nvidia-smi names but cannot tell all of, with the fix."""
    fix = next(fix for words, fix in CARD_FIXES if re.search(words, card["fault"]))
    return trouble(
        f"the GPU {card['index']} {card['name']} cannot be used: {card['fault']}",
        fix.replace("INDEX", str(card["index"])),
    )


def warn_cards(host: Host) -> Iterator[Problem]:
    """Yield the cards that do not answer beside those that do, and other warnings of nvidia-smi.

    It is the only rule about them: neither preflight nor the role nvidia_driver stops for a card that is not needed.
    """
    if not host["gpus"]:
        return
    broken = host.get("gpus_broken", [])
    yield from (broken_card(card) for card in broken)
    shown, there = len(host["gpus"]) + len(broken), host["nvidia_pci_devices"]
    if shown < there:
        old = [device for device in host["nvidia_pci_ids"] if int(device, 16) < OLDEST_OPEN]
        proprietary = "proprietary" in (host["driver"]["loaded_flavour"], host["driver"]["flavour"])
        reason, otherwise = "", "; else reboot, and look at 'journalctl --dmesg --grep NVRM'"
        if old and not proprietary and there - shown <= len(old):
            reason = f"; {', '.join(old)} is older than Turing, and the open kernel modules do not drive it"
            otherwise = ""
        yield trouble(
            f"nvidia-smi shows {shown} of {there} NVIDIA GPUs{reason}{detail(host)}",
            f"nothing has to be done if the others suffice{otherwise}",
        )
    elif said := host["nvidia_smi_message"]:
        fix = next(fix for words, fix in CARD_FIXES if re.search(words, said))
        yield trouble(f"nvidia-smi warns: {said}", fix)


def judge_ports(host: Host, requirements: dict[str, Any]) -> Iterator[Problem]:
    """Yield who holds our ports, and what else of the seed runs; whoever runs in a container is named by it."""
    ports = {entry["port"]: entry for entry in host["ports_in_use"]}
    told = set()
    for container in host["containers"]:
        name, held = container["name"], [port for port in container["ports"] if port in ports]
        seed = name in SEED_CONTAINERS
        if container["state"] != "running" or not (seed or held):
            continue
        told |= set(held)
        holds = [f"port {port}" for port in held] + ["memory of the GPU"] * seed
        yield trouble(
            f"the container {name}{', left from an older deployment,' if seed else ''} holds {' and '.join(holds)}",
            f"docker rm --force {name}" if seed else f"docker stop {name}, or set dots_ocr_server_port to a free one",
        )
    for port, entry in ports.items():
        if port not in told:
            who = f"{entry['process']} (process {entry['pid']})" if entry["pid"] else "an unknown process"
            yield trouble(f"port {port} is taken by {who}", "stop it, or set dots_ocr_server_port to a free one")


def judge_disks(host: Host, wanted: list[dict[str, Any]]) -> Iterator[Problem]:
    """Yield the file systems with too little space for what should lie on them, all together."""
    shares: dict[int, list[dict[str, Any]]] = {}
    for space in wanted:
        shares.setdefault(host["disk_devices"][space["place"]], []).append(space)
    for spaces in shares.values():
        free = min(host["disk_free_gib"][space["place"]] for space in spaces)
        needed = sum(space["gib"] for space in spaces)
        if free < needed:
            what = [space["path"] + f" in {space['place']}" * (space["place"] != space["path"]) for space in spaces]
            together = " together" if len(spaces) > 1 else ""
            yield trouble(
                f"{free} GiB are free for {' and '.join(what)}, {needed} GiB are needed{together}",
                "free some space, or mount a larger file system there",
            )


def warn(host: Host) -> list[Problem]:
    """Return what will be missed although the host can serve."""
    return [*warn_wsl(host), *warn_cards(host)]


def warn_wsl(host: Host) -> Iterator[Problem]:
    """Yield what Windows' part of WSL lacks."""
    found = host["wsl"].get("version", "")
    if found and version(found)[:3] < version(OLDEST_WSL):
        yield trouble(
            f"WSL is {found}; only {OLDEST_WSL} and newer can be told not to put an idle distribution to sleep",
            "in Windows: wsl --update, then wsl --shutdown",
            "wsl",
        )
    newest = [gpu["name"] for gpu in host["gpus"] if version(gpu["compute_capability"]) >= (GRAPHS_CAPABILITY,)]
    if found and newest and version(found)[:3] < version(OLDEST_WSL_FOR_GRAPHS):
        yield trouble(
            f"WSL is {found}; before {OLDEST_WSL_FOR_GRAPHS} the capture of CUDA graphs fails on the {newest[0]}"
            " (cudaErrorUnknown)",
            "in Windows: wsl --update, then wsl --shutdown; until then the server runs, more slowly, with"
            " dots_ocr_server_extra_args: [--enforce-eager]",
        )
    network = host["wsl"].get("networking", "")
    if network == "mirrored":
        yield trouble(
            "WSL's network is mirrored, in which published ports of containers may be out of reach on 127.0.0.1"
            " (microsoft/WSL#13868), and other machines see what is not bound to it",
            f"if the server does not answer, {NAT_FIX}",
        )
    elif network == "bridged":
        yield trouble(
            "WSL's network is bridged, in which Windows does not reach the server as localhost",
            f"{NAT_FIX}; or use the address of the distribution",
        )


def detail(host: Host) -> str:
    """Return what nvidia-smi said, to follow a sentence."""
    return f" ({host['nvidia_smi_message']})" if host["nvidia_smi_message"] else ""


def read(path: Path | str) -> str:
    """Return the text of a file, and nothing of one that cannot be read."""
    return read_text(path).strip()


def measure_platform(kernel: str) -> str:
    """Return wsl1, wsl2, container or bare_metal, which here is every other kind of machine.

    Ansible's own facts do not know WSL. A custom kernel may lack Microsoft's name, hence the other signs; a container
    inside WSL shows the same kernel but is not WSL. WSL2 alone has /dev/dxg.
    """
    if measure_container():
        return "container"
    if "microsoft" in kernel.lower() or Path("/run/WSL").is_dir() or Path("/usr/lib/wsl/lib").is_dir():
        return "wsl2" if "wsl2" in kernel.lower() or Path("/dev/dxg").exists() else "wsl1"
    return "bare_metal"


def measure_container() -> str:
    """Return the kind of container that this is, such as docker or lxc; empty for a machine.

    Engines mark their containers by a file. Those that look like machines are known to their systemd, or else to the
    environment of their first process.
    """
    for mark, kind in CONTAINER_MARKS.items():
        if Path(mark).exists():
            return kind
    told = re.search(r"(?:^|\0)container=([^\0]*)", read(FIRST_ENVIRONMENT))
    kinds = (read(CONTAINER_OF_SYSTEMD), told.group(1) if told else "")
    return next((kind for kind in kinds if kind in SYSTEM_CONTAINERS), "")


def measure_gpus(platform_name: str) -> Host:
    """Ask nvidia-smi for the GPUs: index, name, memory in MiB, compute capability, driver version.

    A card that is lost may end the whole answer: then each one is asked for by its address.
    """
    wsl = platform_name in ("wsl1", "wsl2")
    smi = WSL_NVIDIA_SMI if wsl and Path(WSL_NVIDIA_SMI).exists() else None if wsl else shutil.which("nvidia-smi")
    if smi is None:
        return {"nvidia_smi": None, "nvidia_smi_message": "", "gpus": [], "gpus_broken": []}
    command = [smi, f"--query-gpu={','.join(('index', 'name', *VALUES))}", "--format=csv,noheader,nounits"]
    gpus, broken, said = read_gpus(*run(*command, timeout=GPU_TIMEOUT))
    addresses = [card["address"] for card in measure_pci() if card["driver"] not in RESERVING_DRIVERS]
    if 1 < len(addresses) > len(gpus) + len(broken):
        for address in addresses:
            more, bad, words = read_gpus(*run(*command, f"--id={address}", timeout=GPU_TIMEOUT))
            known = {card["index"] for card in (*gpus, *broken)}
            gpus += [card for card in more if card["index"] not in known]
            broken += [card for card in bad if card["index"] not in known]
            said += [line for line in words if line not in said and not line.startswith("No devices were found")]
    gpus.sort(key=lambda card: int(card["index"]))
    return {"nvidia_smi": smi, "nvidia_smi_message": " ".join(said), "gpus": gpus, "gpus_broken": broken}


def read_gpus(status: int, answer: str, errors: str) -> tuple[list[Host], list[Host], list[str]]:
    """Return the GPUs of an answer of nvidia-smi, those that it cannot tell all of, and the lines that are of neither.

    Its status says nothing of the rows: a warning beside good ones ends with 14, say. On its standard error libraries
    talk too, which counts only if it failed or a GPU is meant.
    """
    gpus, broken, said = [], [], []
    for line in filter(None, map(str.strip, answer.splitlines())):
        if row := ROW.fullmatch(line):
            index, name, *told = map(str.strip, row.groups())
            card: Host = {"index": int(index), "name": name}
            bad = []
            for (field, (looks, fact)), value in zip(VALUES.items(), told, strict=True):
                card[fact] = int(value) if value.isdecimal() else value
                bad += [] if re.fullmatch(looks, value) else [f"{field} is {value}"]
            if bad:
                broken.append({"index": card["index"], "name": name, "fault": ", ".join(bad)})
            else:
                gpus.append(card)
        elif re.match(r"\d+,", line):
            index, _, name = line.partition(",")
            broken.append({"index": int(index), "name": name.strip(), "fault": f"nvidia-smi says '{line}'"})
        else:
            said.append(line)
    meant = re.compile(r"(?i)\bgpu|nvml|nvrm|inforom|device handle")
    said += [
        line for line in map(str.strip, errors.splitlines()) if line and (meant.search(line) or (status and not gpus))
    ]
    return gpus, broken, said


def measure_gpu_processes(smi: str) -> list[Host]:
    """Ask nvidia-smi who computes on the GPUs; nobody where it cannot tell, as on WSL."""
    query = "--query-compute-apps=pid,process_name,used_memory"
    # Its status says nothing of the rows here either.
    _, answer, _ = run(smi, query, "--format=csv,noheader,nounits", timeout=GPU_TIMEOUT)
    found = re.findall(r"^(\d+), *(.+), *(\d+)$", answer, re.MULTILINE)
    return [{"pid": int(pid), "name": Path(name).name, "memory_mib": int(memory)} for pid, name, memory in found]


def measure_pci() -> list[dict[str, str]]:
    """Return address, device id and driver (empty for none) of the NVIDIA display controllers on the PCI bus."""
    return [
        {
            "address": place.name,
            "device": read(place / "device"),
            "driver": (place / "driver").resolve().name if (place / "driver").is_symlink() else "",
        }
        for place in sorted(PCI.glob("*"))
        if read(place / "vendor") == NVIDIA_PCI_VENDOR and read(place / "class").startswith(DISPLAY_PCI_CLASS)
    ]


def measure_driver(kernel: str) -> Host:
    """Return version and flavour of the kernel module that is loaded, and of the one installed for this kernel."""
    said = read(LOADED_MODULE)
    told = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", said)
    loaded = read("/sys/module/nvidia/version") or (told.group() if told else "")
    flavour = "open" if "Open Kernel Module" in said else "proprietary" if said else ""
    answer = ask("modinfo", "-k", kernel, "nvidia", timeout=TIMEOUT)
    module = dict(re.findall(r"^(version|license): *(.+)$", answer, re.MULTILINE))
    licensed = "open" if "MIT" in module.get("license", "") else "proprietary"
    return {
        "loaded": loaded,
        "loaded_flavour": flavour if loaded else "",
        "installed": module.get("version", ""),
        "flavour": licensed if "version" in module else "",
        "ours": any(RECORDS.glob("nvidia-driver*.json")),
        "reboot_wanted_by": sorted(set(read_text("/run/reboot-required.pkgs").split())),
    }


def measure_packages(status: Path) -> Host:
    """Return the installed packages of NVIDIA's driver and toolkit, by dpkg's own file: fast, without a program."""
    text = read_text(status)
    return {
        "nvidia_packages": sorted(DRIVER_PACKAGES.findall(text)),
        "nvidia_container_toolkit": dict(TOOLKIT_PACKAGES.findall(text)),
    }


def ask_engine(path: str) -> Any:
    """Return the engine's answer to a question of its API; None if it does not answer."""
    connection = http.client.HTTPConnection("localhost")
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(TIMEOUT)
        link.connect(str(engine.SOCKET))
        connection.sock = link
        connection.request("GET", path)
        response = connection.getresponse()
        return json.loads(response.read()) if response.status == http.HTTPStatus.OK else None
    return None


def engine_runs() -> bool:
    """Tell whether an engine is there to be asked; a socket alone may be systemd's, which would start one."""
    if not engine.SOCKET.exists():
        return False
    return desktop_is_integrated() or "dockerd" in processes()


def processes() -> Iterator[str]:
    """Yield the name of every process."""
    return map(read, Path("/proc").glob("[0-9]*/comm"))


def desktop_is_integrated() -> bool:
    """Tell whether Docker Desktop works in this very distribution, or will when it is started."""
    links = [link.parent / link.readlink() for link in DOCKER_DESKTOP_LINKS if link.is_symlink()]
    linked = any(DOCKER_DESKTOP in link.parents for link in links)
    return linked or any(name.startswith(DOCKER_DESKTOP_PROCESS) for name in processes())


def measure_docker(ports: list[int]) -> Host:
    """Return which engine is there and where it keeps images, and its containers of the seed or on our ports."""
    runs = engine_runs()
    info = (ask_engine("/info") if runs else None) or {}
    listed = (ask_engine("/containers/json?all=1") if runs and ports else None) or []
    containers = []
    for entry in listed:
        name = entry["Names"][0].lstrip("/")
        published = sorted({port["PublicPort"] for port in entry["Ports"] if "PublicPort" in port})
        if name in SEED_CONTAINERS or set(published) & set(ports):
            containers.append({"name": name, "state": entry["State"], "ports": published})
    docker = {
        "desktop": desktop_is_integrated() or info.get("OperatingSystem") == "Docker Desktop",
        "snap": Path("/snap/docker").exists() or any(Path("/var/lib/snapd/snaps").glob("docker_*.snap")),
        "version": info.get("ServerVersion", ""),
        "unfit": engine.unfit(info),
        "images": image_folder(info),
        "userland_proxy": engine.settings().get("userland-proxy") is not False,
    }
    return {"docker": docker, "containers": containers}


def image_folder(info: Host) -> str:
    """Return the folder that holds the engine's images, or will.

    That is containerd's and not the engine's if its image store is containerd's: what the engine says of itself, else
    what its configuration says, else what a new one does from release 29 on.
    """
    settings = engine.settings()
    root = str(info.get("DockerRootDir") or settings.get("data-root") or "/var/lib/docker")
    features = settings.get("features")
    wish = features.get("containerd-snapshotter") if isinstance(features, dict) else None
    if info:
        containerd = CONTAINERD_STORE in json.dumps(info.get("DriverStatus"))
    elif wish is not None:
        containerd = bool(wish)
    else:
        containerd = not (Path(root) / "image").exists() and starts_with_containerd()
    if not containerd:
        return root
    moved = re.search(r"^root *= *[\"'](.+)[\"']", read("/etc/containerd/config.toml"), re.MULTILINE)
    return moved.group(1) if moved else "/var/lib/containerd"


def starts_with_containerd() -> bool:
    """Tell whether the engine that is installed, or will be, keeps its first images in containerd's store."""
    return (first_number("dockerd", "--version") or math.inf) >= FIRST_ENGINE_WITH_CONTAINERD_STORE


def first_number(*command: str) -> int:
    """Return the first number that a program prints, 0 if it prints none."""
    found = re.search(r"\d+", ask(*command, timeout=TIMEOUT))
    return int(found[0]) if found else 0


def measure_ports(ports: list[int]) -> list[Host]:
    """Return which of the ports somebody listens on, with the process and its name where they are known."""
    found, listening = [], servers.ask_listeners()
    for port in sorted(port for port in ports if str(port) in listening):
        holder = re.search(r'\("([^"]*)",pid=(\d+)', listening[str(port)])
        found.append({"port": port, "pid": int(holder[2]) if holder else None, "process": holder[1] if holder else ""})
    return found


def existing(path: str) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    return place


def free_gib(path: str) -> int:
    """Return the free space in GiB of the file system that holds a path or will hold it."""
    return shutil.disk_usage(existing(path)).free >> 30


def measure(ports: list[int], with_processes: bool) -> Host:
    """Measure this host."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    kernel = platform.release()
    kind = measure_platform(kernel)
    gpus, docker = together(lambda: measure_gpus(kind), lambda: measure_docker(ports))
    wsl = kind in ("wsl1", "wsl2")
    cards = measure_pci()
    reserved = [card for card in cards if card["driver"] in RESERVING_DRIVERS]
    devices = [card["device"] for card in cards if card not in reserved]
    return {
        "platform": kind,
        "container": measure_container(),
        "systemd": Path("/run/systemd/system").is_dir(),
        "systemd_version": first_number("systemctl", "--version"),
        "distribution": release.get("ID", ""),
        "distribution_version": release.get("VERSION_ID", ""),
        "architecture": platform.machine(),
        "kernel_release": kernel,
        "secure_boot": read_text(SECURE_BOOT)[4:] == "\x01",  # after four bytes of attributes
        "docker_engine": shutil.which("dockerd", path=engine.PLACES) is not None,
        "memory_total_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "nvidia_pci_devices": len(devices),
        "nvidia_pci_ids": devices,
        "nvidia_pci_reserved": reserved,
        "dxg": Path("/dev/dxg").exists(),
        "nouveau": Path("/sys/module/nouveau").is_dir(),
        "driver": measure_driver(kernel),
        **measure_packages(Path("/var/lib/dpkg/status")),
        "wsl": {name: ask("wslinfo", option, timeout=TIMEOUT).strip() for name, option in WSL_INFO.items() if wsl},
        **gpus,
        **docker,
        "ports_in_use": measure_ports(ports) if ports else [],
        "gpu_processes": measure_gpu_processes(gpus["nvidia_smi"])
        if with_processes and gpus["gpus"] and not wsl
        else [],
        "disk_free_gib": {},
        "disk_devices": {},
    }


def look(wanted: dict[str, Any] | None) -> dict[str, Any]:
    """Return the module's result: the host, what is wrong with it if that is asked for, its engine and our servers."""
    host: Host
    if not wanted:
        host = measure([], False)
        return {"changed": False, "ansible_facts": {"gpu_host": host}, "problems": [], "advice": warn(host)}
    ours = bool(wanted["installed"]) and Path(wanted["installed"]).exists()
    host, there, found = together(
        lambda: measure([] if ours else wanted["ports"], with_processes=True),
        servers.look if ours else dict,
        lambda: engine.look(wanted["engine"]),
    )
    host["server_installed"] = ours
    named = {"images": host["docker"]["images"], "weights": wanted["weights"]}
    wanted["disk_free"] = [
        {**space, "place": named.get(space["path"], space["path"])}
        for space in wanted["disk_free"]
        if not (space["unless_exists"] and Path(space["unless_exists"]).exists())
    ]
    for place in (space["place"] for space in wanted["disk_free"]):
        host["disk_free_gib"][place] = free_gib(place)
        host["disk_devices"][place] = existing(place).stat().st_dev
    result = {"problems": judge(host, wanted), "advice": warn(host), "servers": there, "engine": found}
    return {"changed": False, "ansible_facts": {"gpu_host": host}, **result}


def main() -> None:
    """Run the module."""
    space = {
        "path": {"type": "str", "required": True},
        "gib": {"type": "int", "required": True},
        "unless_exists": {"type": "path"},
    }
    requirements = {
        "disk_free": {"type": "list", "elements": "dict", "default": [], "options": space},
        "weights": {"type": "path", "default": "/var/lib/dots-ocr/models"},
        "ports": {"type": "list", "elements": "int", "default": []},
        "installed": {"type": "path"},
        "engine": {"type": "str"},
        "wsl_memory_mib": {"type": "int", "default": 0},
        "manages_windows": {"type": "bool", "default": False},
    }
    answer({"requirements": {"type": "dict", "options": requirements}}, lambda params, _: look(params["requirements"]))


if __name__ == "__main__":
    main()
