#!/usr/bin/python
"""Ansible module nvidia_driver_plan: decide what a machine needs for a working NVIDIA driver, and whether it has it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: nvidia_driver_plan
short_description: Decide about the NVIDIA driver of a machine
description:
  - Says which packages bring the driver to this machine and from where, whether a reboot is due and why, and what is
    still wrong with the driver. Fails with the cause and the fix where there is no good way.
  - A driver that is good enough and came from elsewhere is left alone. One that is not is never mixed with ours.
  - Refreshes apt's lists if they do not know the packages yet; changes nothing else.
options:
  host: {description: The fact C(gpu_host)., type: dict, required: true}
  branch:
    description:
      - NVIDIA's driver branch, such as C(580). With C(auto) what we installed stays on its branch; else it is 580,
        which is supported longest, and 595 where there is no 580.
    type: str
    default: auto
  package_version:
    description: The exact version of the driver, such as C(580.173.02); empty for the newest of the branch.
    type: str
    default: ""
  source:
    description:
      - Where the packages come from; C(auto) is Canonical's archive on Ubuntu and NVIDIA's repository on Debian.
    type: str
    choices: [auto, ubuntu, cuda_repo]
    default: auto
  lock_timeout:
    description: Seconds to wait while another program holds the lock of apt's lists.
    type: int
    default: 600
attributes:
  check_mode: {description: "Refreshes lists too, since without them not even a check can tell.", support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Decide what is to be done
  dots_ocr.deploy.nvidia_driver_plan:
    host: "{{ ansible_facts['gpu_host'] }}"
    branch: "580"
  register: plan
"""

RETURN = r"""
install: {description: Whether the packages are ours; false leaves a good driver alone., returned: always, type: bool}
branch: {description: "The branch that was chosen, or the oldest one that is good enough.", returned: always, type: str}
key:
  description: The file of NVIDIA's key in the folder below, and its fingerprint; both empty if none is needed.
  returned: always
  type: dict
  sample: {file: 8793F200.pub, fingerprint: 02182E60104FCDC26EAE1B8597A5D4CB8793F200}
repository: {description: "The folder in NVIDIA's CUDA repository, such as C(debian13).", returned: always, type: str}
pinning: {description: "The package, or none, that keeps apt on one branch or version.", returned: always, type: str}
unpin: {description: "Those for other branches, to be purged before.", returned: always, type: list, elements: str}
packages: {description: "The driver's packages.", returned: always, type: list, elements: str}
versions: {description: "Patterns of versions, by package or pattern of packages.", returned: always, type: dict}
replace: {description: "Ours for another branch, to be removed in one go.", returned: always, type: list, elements: str}
kernel: {description: Packages of new kernels and headers to be held., returned: always, type: list, elements: str}
missing: {description: Which of the packages are not installed., returned: always, type: list, elements: str}
reboot: {description: "Why the machine has to reboot, or empty.", returned: always, type: str}
faults: {description: "What is wrong with it as it runs; empty proves it.", returned: always, type: list, elements: str}
persistenced: {description: Whether the unit nvidia-persistenced.service is there., returned: always, type: bool}
machine_id: {description: "The machine's identity, to tell it from the controller.", returned: always, type: str}
"""

import os
import re
import time
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from ..module_utils import apt
from ..module_utils.cards import OLDEST_OPEN, is_blackwell, needs_open_modules, why_none
from ..module_utils.common import Problem, answer, ask, read_text, run, together

Host = dict[str, Any]

# Whatever depends on NVIDIA's packages in the very same version. Other packages of such names have other versions.
PINNED_TOGETHER = ("nvidia-*", "libnvidia-*", "libcuda*", "firmware-nvidia-*", "xserver-xorg-video-nvidia*")
# In Ubuntu's archive the enterprise driver comes first: it changes least.
UBUNTU_VARIANTS = ("-server", "")


class Folder(NamedTuple):
    """A distribution's folder in NVIDIA's CUDA repository."""

    key: str  # file of the public key in the folder
    fingerprint: str
    first_branch: int  # the oldest that was seen in it


FIRST_KEY = ("3bf863cc.pub", "EB693B3035CD5710E231E123A4B469963BF863CC")
# Of the distributions that we support. Keys and branches differ: NVIDIA/cuda-repo-management#38 and #39 on GitHub.
FOLDERS = {
    "debian12": Folder(*FIRST_KEY, 535),
    "debian13": Folder("8793F200.pub", "02182E60104FCDC26EAE1B8597A5D4CB8793F200", 590),
    "ubuntu2204": Folder(*FIRST_KEY, 535),
    "ubuntu2404": Folder(*FIRST_KEY, 535),
    "ubuntu2604": Folder("60DF8A40.pub", "14BAFBC7562AD710CA04E69905FBB6DA60DF8A40", 595),
}
# The first is supported until June 2028, the second is the production branch until March 2027 (NVIDIA's table).
DEFAULT_BRANCHES = ("580", "595")


class NotInLists(Problem):
    """Apt's lists lack what is needed; they may be old."""


class NoBranch(NotInLists):
    """The source has no driver of this branch; another may do."""


class System(NamedTuple):
    """What apt and dpkg say of a machine."""

    packages: dict[str, str]  # installed, with what they depend on
    configured: frozenset[str]  # removed, but with configuration files left
    available: frozenset[str]  # known to apt's lists
    owned: bool  # the driver that is there is the one that we installed
    reboot_wanted_by: tuple[str, ...]  # packages that asked for a reboot
    booted_since: bool  # since the kernel's modules changed last


class Wishes(NamedTuple):
    """What the operator asked for."""

    branch: str
    package_version: str
    source: str


class Resolution(NamedTuple):
    """The packages of one source."""

    packages: list[str]
    kernel: list[str]
    repository: str
    pinning: str
    versions: dict[str, str]


def major(text: str) -> int:
    """Return the branch of a version such as 580.65.06; 0 for none."""
    found = re.match(r"\d+", text)
    return int(found.group()) if found else 0


def in_packages(release: str) -> str:
    """Return a kernel's release as package names have it: without capitals and underscores."""
    return release.lower().replace("_", "-")


def version_on_disk(host: Host) -> str:
    """Return the version of the driver that the next boot will run, or the one that runs if that is all we see."""
    shown: list[str] = [gpu["driver_version"] for gpu in host["gpus"]]
    return str(host["driver"]["installed"] or host["driver"]["loaded"] or (shown[0] if shown else ""))


def has_driver(host: Host) -> bool:
    """Tell whether any driver is there, or something of one."""
    return bool(version_on_disk(host) or host["nvidia_packages"])


def flavours(host: Host, system: System) -> list[str]:
    """Return the flavours of Ubuntu's or Debian's kernel that the running one may belong to, likeliest first.

    `uname -r` alone does not tell generic from generic-hwe-24.04, so the installed package that brings new kernels
    decides: the one that depends on the running kernel, else one whose flavour begins like it.
    """
    release = in_packages(host["kernel_release"])
    found = [(re.fullmatch(r"linux-image-(?!unsigned-)([a-z].*)", name), name) for name in sorted(system.packages)]
    metas = {meta[1]: system.packages[name] for meta, name in found if meta}
    running = re.compile(rf"\blinux-image(-unsigned)?-{re.escape(release)}(?![\w.+-])")
    exact = [flavour for flavour, depends in metas.items() if running.search(depends)]
    similar = [flavour for flavour in metas if re.search(rf"-{re.escape(flavour.split('-')[0])}\b", release)]
    return [*exact, *(flavour for flavour in similar if flavour not in exact)]


def kernel_packages(flavour: str, there: Container[str]) -> list[str]:
    """Return those of the packages there that would bring another kernel."""
    names = (f"linux-{flavour}", f"linux-image-{flavour}", f"linux-headers-{flavour}")
    return [name for name in names if name in there]


def known(name: str, system: System) -> bool:
    """Tell whether apt can install a package, or has."""
    return name in system.available or name in system.packages


def upgrade_kernel(host: Host, flavour: str, what: str) -> NotInLists:
    """Refuse a kernel for which the archive no longer has, or not yet has, what is needed."""
    if host["kernel_release"].endswith("-pve"):
        return NotInLists(
            f"apt has no {what} for the running kernel {host['kernel_release']}, which is Proxmox's",
            "in a container (CT): the driver belongs to the Proxmox machine, so deploy to it or to a VM that has the"
            f" GPU; on Proxmox itself: 'apt-get install proxmox-headers-{host['kernel_release']}', or install the"
            " driver by hand, which this role then leaves alone",
        )
    return NotInLists(
        f"apt has no {what} for the running kernel {host['kernel_release']}",
        f"upgrade the kernel first: 'apt-get update && apt-get install linux-image-{flavour} linux-headers-{flavour}',"
        " reboot, then run again",
    )


def resolve_ubuntu(host: Host, system: System, wishes: Wishes) -> Resolution:
    """Choose Canonical's modules, signed and built for the running kernel."""
    if wishes.package_version:
        raise Problem(
            f"nvidia_driver_package_version is {wishes.package_version}, but Canonical's modules go with the kernel and"
            " have its version",
            "leave it empty: what is installed is held; or set nvidia_driver_source to 'cuda_repo'",
        )
    candidates = flavours(host, system)
    if not candidates:
        raise Problem(
            f"no installed package brings kernels like the running {host['kernel_release']}, so none brings modules for"
            " it",
            "install a kernel of Ubuntu's own ('apt-get install linux-generic'), reboot, then run again",
        )
    branch, release = wishes.branch, in_packages(host["kernel_release"])
    for variant in UBUNTU_VARIANTS:
        modules = f"linux-modules-nvidia-{branch}{variant}-open"
        others = (f"nvidia-headless-no-dkms-{branch}{variant}-open", f"nvidia-utils-{branch}{variant}")
        for flavour in candidates:
            if not all(known(name, system) for name in (f"{modules}-{flavour}", *others)):
                continue
            if not known(f"{modules}-{release}", system):
                raise upgrade_kernel(host, flavour, f"module of branch {branch}, signed by Canonical,")
            packages = [f"{modules}-{flavour}", f"{modules}-{release}", *others]
            return Resolution(packages, kernel_packages(flavour, system.packages), "", "", {})
    ours = re.compile(rf"linux-modules-nvidia-(\d+)(?:-server)?-open-(?:{'|'.join(map(re.escape, candidates))})")
    offers = {found.group(1) for found in map(ours.fullmatch, system.available) if found}
    seen = f" (there is {', '.join(sorted(offers))})" if offers else ""
    raise NoBranch(
        f"apt has no linux-modules-nvidia-{branch}-server-open-{candidates[0]}, so there is no driver of branch"
        f" {branch} for this kernel's flavour",
        "see that the component 'restricted' and the suite '-updates' of Ubuntu's archive are apt sources, or choose"
        f" another nvidia_driver_branch{seen}",
    )


def resolve_cuda(host: Host, system: System, wishes: Wishes) -> Resolution:
    """Choose NVIDIA's own packages, whose modules are built on the machine by DKMS."""
    # One that is loaded in spite of it was signed by an enrolled key, and so the next will be.
    if host["secure_boot"] and not host["driver"]["loaded"]:
        first = "turn Secure Boot off in the firmware and run again"
        if host["distribution"] == "ubuntu":
            first = "set nvidia_driver_source to 'ubuntu', whose modules Canonical signed"
        raise Problem(
            "Secure Boot is on, and it loads no module that DKMS built on this machine: such a module is signed with a"
            " key of the machine's own (MOK), which a person has to enrol at the console during a reboot",
            f"{first}; or install the driver by hand with the key enrolled ('mokutil --import /var/lib/dkms/mok.pub',"
            " reboot, enrol), which this role then leaves alone",
        )
    release = in_packages(host["kernel_release"])
    flavour = [*flavours(host, system), "amd64" if host["distribution"] == "debian" else "generic"][0]
    headers = f"linux-headers-{release}"
    if not known(headers, system):
        raise upgrade_kernel(host, flavour, headers)
    folder = folder_of(host)
    version = wishes.package_version or wishes.branch
    begins = FOLDERS[folder].first_branch
    there = major(version_on_disk(host)) == int(wishes.branch) or known(f"nvidia-driver-pinning-{version}", system)
    if int(wishes.branch) < begins and not there:
        raise NoBranch(
            f"NVIDIA's repository for {folder} has no branch {wishes.branch}: it begins at {begins}",
            f"set nvidia_driver_branch to '{DEFAULT_BRANCHES[-1]}' or 'auto'",
        )
    meta = f"linux-headers-{flavour}"
    names = ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"]
    if host["distribution"] == "ubuntu":
        # From 590 on NVIDIA's packages for Ubuntu no longer have the branch in their names.
        suffix = f"-{wishes.branch}" if int(wishes.branch) < 590 else ""
        names = [f"libnvidia-compute{suffix}", f"nvidia-dkms{suffix}-open", f"nvidia-utils{suffix}"]
    pattern = f"{version}-*" if wishes.package_version else f"{version}.*"
    packages = [*names, headers, *([meta] if known(meta, system) else [])]
    kernel = kernel_packages(flavour, {*system.packages, *packages})
    versions = dict.fromkeys((*names, *PINNED_TOGETHER), pattern)
    return Resolution(packages, kernel, folder, f"nvidia-driver-pinning-{version}", versions)


def folder_of(host: Host) -> str:
    """Return the name that a distribution's folder has, or would have, in NVIDIA's repository."""
    return str(host["distribution"] + host["distribution_version"].replace(".", ""))


def resolve(host: Host, system: System, wishes: Wishes) -> Resolution:
    """Choose the packages for a machine that has no driver but ours."""
    distribution, release = host["distribution"], host["distribution_version"]
    if folder_of(host) not in FOLDERS:
        raise Problem(
            f"we know no source of drivers for {distribution or 'this system'} {release}".strip(),
            "use Debian 12 or 13, or Ubuntu 22.04, 24.04 or 26.04; or install the driver by hand, which this role then"
            " leaves alone",
        )
    devices = [int(device, 16) for device in host["nvidia_pci_ids"]]
    if devices and max(devices) < OLDEST_OPEN:
        raise Problem(
            f"the GPU ({', '.join(host['nvidia_pci_ids'])}) is older than Turing, and the open kernel modules do not"
            " drive it",
            "use a GPU of the Turing generation (RTX 20) or newer",
        )
    source = wishes.source
    if source == "auto":
        source = "ubuntu" if distribution == "ubuntu" else "cuda_repo"
    if source == "ubuntu" and distribution != "ubuntu":
        raise Problem(
            f"nvidia_driver_source is 'ubuntu', but this is {distribution} {release}",
            "set nvidia_driver_source to 'auto' or 'cuda_repo'",
        )
    return resolve_ubuntu(host, system, wishes) if source == "ubuntu" else resolve_cuda(host, system, wishes)


def foreign_is_good(host: Host, wishes: Wishes) -> bool:
    """Tell whether a driver that is not ours does, now or after a reboot."""
    version = version_on_disk(host)
    if major(version) < int(wishes.branch) or not version.startswith(wishes.package_version):
        return False
    flavour = host["driver"]["flavour"] or host["driver"]["loaded_flavour"]
    return flavour != "proprietary" or (bool(host["gpus"]) and not needs_open_modules(host))


def refuse_foreign(host: Host, wishes: Wishes) -> Problem:
    """Refuse to install beside a driver that others installed, with the way to be rid of it."""
    packages, version = host["nvidia_packages"], version_on_disk(host)
    flavour = host["driver"]["flavour"] or host["driver"]["loaded_flavour"]
    what = f"NVIDIA driver {version}" if version else "NVIDIA driver that brought no module for this kernel"
    wanted = wishes.package_version or f"branch {wishes.branch}"
    reason = f"{wanted} is needed"
    if flavour == "proprietary" and major(version) >= int(wishes.branch):
        what = f"proprietary kernel module of {what}"
        reason = "it does not drive this GPU" + (": Blackwell needs the open modules" if is_blackwell(host) else "")
    where = f"by others ({', '.join(packages[:6])}{', …' if len(packages) > 6 else ''})" if packages else (
        "without a package, by NVIDIA's .run program")  # fmt: skip
    remove = "'apt-get purge " + " ".join(packages) + "'" if packages else "'nvidia-uninstall'"
    return Problem(
        f"the {what} was installed {where}, but {reason}; drivers of two sources do not mix",
        f"remove it with {remove}, then run again",
    )


def judge_reboot(host: Host, system: System) -> str:
    """Return why the machine has to reboot before its driver can work, or nothing."""
    loaded, installed = host["driver"]["loaded"], host["driver"]["installed"]
    if host["nouveau"]:
        return "the module nouveau holds the GPU" + (f", {installed} is installed" if installed else "")
    if loaded and installed and loaded != installed:
        return f"the kernel runs the NVIDIA module {loaded}, but {installed} is installed"
    if installed and not loaded and not system.booted_since:
        return f"the NVIDIA module {installed} is installed but not loaded"
    if "version mismatch" in host["nvidia_smi_message"]:
        return f"the driver's libraries do not fit the loaded module {loaded} ({host['nvidia_smi_message']})"
    asking = [name for name in system.reboot_wanted_by if "nvidia" in name]
    return f"{', '.join(asking)} asked for a reboot" if asking else ""


def judge(host: Host, wishes: Wishes, ours: bool) -> list[str]:
    """Return what is wrong with the driver as it runs now; nothing is the proof that it works.

    Of our own we demand more: the very branch or version, and the open modules by the words of their licence. A card
    that does not answer beside one that does is no fault: gpu_host advises about it, here as in preflight.
    """
    driver, faults = host["driver"], []
    shown = {gpu["driver_version"] for gpu in host["gpus"]}
    versions = {"loaded": {driver["loaded"]}, "installed": {driver["installed"]}, "shown by nvidia-smi": shown}
    seen = {name: ", ".join(sorted(values)) for name, values in versions.items() if values - {""}}
    if len(set(seen.values())) > 1:
        faults.append("the versions differ: " + ", ".join(f"{value} is {name}" for name, value in seen.items()))
    if ours and not driver["installed"]:
        faults.append(f"no NVIDIA module is installed for the running kernel {host['kernel_release']}")
    elif ours and not driver["loaded"]:
        on = ", and Secure Boot is on" if host["secure_boot"] else ""
        faults.append(f"the kernel did not load the NVIDIA module {driver['installed']}{on}")
    if not host["gpus"]:
        broken = [f"GPU {card['index']} {card['name']}: {card['fault']}" for card in host.get("gpus_broken", ())]
        said = "; ".join(filter(None, [*broken, host["nvidia_smi_message"]]))
        said = f" ({said})" if said else ""
        faults.append(f"nvidia-smi shows no GPU{said}" if host["nvidia_smi"] else "there is no nvidia-smi")
    closed = [driver[where] for where in ("flavour", "loaded_flavour") if driver[where] not in ("open", "")]
    if ours and closed:
        faults.append(f"the module is {closed[0]} by its licence, not open")
    version = version_on_disk(host)
    if ours and version and (major(version) != int(wishes.branch) or not version.startswith(wishes.package_version)):
        faults.append(f"the driver is {version}, wanted is {wishes.package_version or 'branch ' + wishes.branch}")
    return faults


def make_plan(host: Host, system: System, wishes: Wishes) -> dict[str, Any]:
    """Return the plan; RETURN describes it."""
    if wishes.branch != "auto":
        return plan_branch(host, system, wishes)
    branches = list(DEFAULT_BRANCHES)
    if wishes.package_version:
        branches = [str(major(wishes.package_version))]
    elif system.owned and (installed := major(version_on_disk(host))) >= int(branches[0]):
        branches.insert(0, str(installed))
    refusals = []
    for branch in branches:
        try:
            return plan_branch(host, system, wishes._replace(branch=branch))
        except NoBranch as refusal:
            refusals.append(refusal)
    raise refusals[0]


def plan_branch(host: Host, system: System, wishes: Wishes) -> dict[str, Any]:
    """Return the plan for one branch; NoBranch if only another branch can help."""
    if not wishes.branch.isdecimal():
        raise Problem(
            f"nvidia_driver_branch is '{wishes.branch}'", "set it to 'auto' or to a branch of NVIDIA's, such as '580'"
        )
    if wishes.package_version and major(wishes.package_version) != int(wishes.branch):
        raise Problem(
            f"nvidia_driver_package_version {wishes.package_version} is not of branch {wishes.branch}",
            "set nvidia_driver_branch to the same branch, or leave the version empty",
        )
    if host["platform"] == "container":
        raise Problem(
            "this is a container, and kernel modules belong to the machine that runs it",
            "install the driver on that machine, and deploy to it or to a virtual machine that has the GPU",
        )
    if none := why_none(host):
        raise Problem(*none)
    ours = system.owned or not has_driver(host)
    if not ours and not foreign_is_good(host, wishes):
        raise refuse_foreign(host, wishes)
    chosen = resolve(host, system, wishes) if ours else Resolution([], [], "", "", {})
    replace, unpin = [], []
    if ours:
        branches = [(name, re.search(r"-(\d{3})(?=-|$)", name)) for name in host["nvidia_packages"]]
        others = [name for name, branch in branches if branch and branch[1] != wishes.branch]
        replace = [name for name in others if name not in chosen.packages]
        there = {*system.configured, *system.packages} - {chosen.pinning}
        unpin = sorted(name for name in there if name.startswith("nvidia-driver-pinning-"))
    folder = FOLDERS.get(chosen.repository, Folder("", "", 0))
    return {
        **chosen._asdict(),
        "install": ours,
        "branch": wishes.branch,
        "key": {"file": folder.key, "fingerprint": folder.fingerprint},
        "unpin": unpin,
        "replace": replace,
        "missing": [name for name in chosen.packages if name not in system.packages],
        "reboot": judge_reboot(host, system),
        "faults": judge(host, wishes, ours),
    }


def boot_time() -> float:
    """Return when the first process started, in seconds since 1970; a container has a boot of its own."""
    ticks = int(Path("/proc/1/stat").read_text().rsplit(")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def measure_packages() -> tuple[dict[str, str], frozenset[str]]:
    """Return the packages of kernels and drivers: what is installed depends on, and what left files behind."""
    lines = run("dpkg-query", "--show", "--showformat=${Package}\t${db:Status-Status}\t${Depends}\n",
                "linux-*", "nvidia-*", "libnvidia-*")[1].splitlines()  # fmt: skip
    rows = [line.split("\t", 2) for line in lines]
    packages = {name: depends for name, status, depends in rows if status == "installed"}
    return packages, frozenset(name for name, status, _ in rows if status == "config-files")


def measure(host: Host) -> System:
    """Ask apt, dpkg and the kernel."""
    (packages, configured), names = together(measure_packages, lambda: ask("apt-cache", "pkgnames").split())
    modules = Path("/lib/modules", host["kernel_release"], "modules.dep")
    return System(
        packages=packages,
        configured=configured,
        available=frozenset(names),
        owned=host["driver"]["ours"],
        reboot_wanted_by=tuple(host["driver"]["reboot_wanted_by"]),
        booted_since=modules.exists() and boot_time() > modules.stat().st_mtime,
    )


def main() -> None:
    """Run the module."""
    options = {
        "host": {"type": "dict", "required": True},
        "branch": {"type": "str", "default": "auto"},
        "package_version": {"type": "str", "default": ""},
        "source": {"type": "str", "choices": ["auto", "ubuntu", "cuda_repo"], "default": "auto"},
        "lock_timeout": {"type": "int", "default": 600},
    }

    def work(params: dict[str, Any], _check: bool) -> dict[str, Any]:
        host, wishes = params["host"], Wishes(params["branch"], params["package_version"], params["source"])
        try:
            plan = make_plan(host, measure(host), wishes)
        except NotInLists:
            apt.refresh(params["lock_timeout"])
            plan = make_plan(host, measure(host), wishes)
        return {
            "changed": False,
            "machine_id": read_text("/etc/machine-id").strip(),
            "persistenced": ask("systemctl", "cat", "nvidia-persistenced.service") != "",
            **plan,
        }

    answer(options, work)


if __name__ == "__main__":
    main()
