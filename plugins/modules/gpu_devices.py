#!/usr/bin/python
"""Ansible module gpu_devices: GPUs as CDI devices, refreshed when stale and proven in a throwaway container."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gpu_devices
short_description: GPUs as CDI devices, proven in a throwaway container
description:
  - Enables NVIDIA's refresh units, has the CDI specification rewritten when it lacks the device or no longer fits
    the driver, and opens the device in a container that leaves nothing behind.
  - The proof is given again after every boot and after every change of the engine, the driver or the specification.
options:
  device: {description: The CDI device that a container should get., type: str, default: nvidia.com/gpu=all}
  disabled_hooks:
    description:
      - Hooks of NVIDIA's that the specification must not have, beside those that the host's own settings name. They
        are written to the environment file of NVIDIA's unit.
    type: list
    elements: str
    default: []
  state:
    description: >-
      C(absent) stops and disables the units, and removes the specification that they wrote and the settings that their
      package leaves behind.
    type: str
    choices: [present, absent]
    default: present
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Prove that containers get the GPU
  dots_ocr.deploy.gpu_devices:
    device: nvidia.com/gpu=all
  register: gpus
"""

RETURN = r"""
devices: {description: The CDI devices., returned: always, type: list, elements: str}
stale: {description: Why the specification was rewritten; empty if it was not., returned: always, type: str}
proven: {description: Whether a container was started to prove it this time., returned: always, type: bool}
services:
  description: Services of dots.ocr with a GPU that run, or try to, with what another specification gave them.
  returned: always
  type: list
  elements: str
"""

import hashlib
import io
import json
import os
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

from ..module_utils.common import Problem, answer, read_text, remove_empty, run, write

UNITS = ("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service")
SPECIFICATION = Path("/var/run/cdi/nvidia.yaml")
OWN_SPECIFICATIONS = Path("/etc/cdi")
# Of NVIDIA's unit, and what its package writes and does not remove (nvidia-container-toolkit 1.20.0).
ENVIRONMENT = Path("/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env")
CONFIGURATION = Path("/etc/nvidia-container-runtime/config.toml")
DISABLED_HOOKS = "NVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS"
MARK = "# Written by Ansible (module gpu_devices), with what stood above; the last line counts."
STAMP = Path("/run/dots-ocr-gpu-devices")
ENGINE_PROCESS = Path("/var/run/docker.pid")
LOADED_DRIVER = Path("/sys/module/nvidia/version")
CONTAINER = "dots-ocr-gpu-proof"

# A whole static program for x86-64 Linux, since an image must come from somewhere, also behind an air gap: it opens the
# file that its argument names for reading and writing, which the device's cgroup has to allow, and exits with the
# error's number.
CODE = bytes.fromhex(
    "488b7c2410"  # mov rdi, [rsp+16]   the argument
    "be02000000"  # mov esi, 2          O_RDWR
    "b802000000"  # mov eax, 2          open
    "0f05"  # syscall
    "89c7"  # mov edi, eax
    "c1ff1f"  # sar edi, 31             all ones if it failed
    "21c7"  # and edi, eax
    "f7df"  # neg edi                   0, or the error's number
    "b83c000000"  # mov eax, 60         exit
    "0f05"  # syscall
)


def program() -> bytes:
    """Return CODE as an executable file: ELF header, one segment, code (System V ABI, ELF-64)."""
    base, offset = 0x400000, 64 + 56
    size = offset + len(CODE)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base + offset, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + segment + CODE


def image() -> bytes:
    """Return the file system of the throwaway image: the program, and the folder that NVIDIA's hooks write to."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as files:
        folder = tarfile.TarInfo("etc")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        files.addfile(folder)
        entry = tarfile.TarInfo("open")
        entry.size, entry.mode = len(program()), 0o755
        files.addfile(entry, io.BytesIO(program()))
    return archive.getvalue()


def host_files(specification: str) -> list[str]:
    """Return the files on the host that a CDI specification names, in YAML or JSON.

    A device node's `path` is the one in the container, and on the host too unless a `hostPath` stands beside it.
    """
    found = re.findall(r"""["']?\b(hostPath|path)["']?:\s*["']?(/[^"',}\s]+)""", specification)
    files = []
    for position, (key, path) in enumerate(found):
        beside = found[max(position - 1, 0) : position + 2]
        has_other = any(other == "hostPath" and place.startswith("/dev/") for other, place in beside)
        if key == "hostPath" or (path.startswith("/dev/") and not has_other):
            files.append(path)
    return list(dict.fromkeys(files))


def why_stale(specification: str, loaded: str) -> str:
    """Return why a specification no longer fits the host; nothing if it does.

    `loaded` is the version of the kernel module; WSL2 has none, where a new driver lies in another folder instead.
    """
    if gone := [path for path in host_files(specification) if not Path(path).exists()]:
        return f"it names {gone[0]}, which is gone"
    versions = set(re.findall(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)*)", specification)) - {"1.1"}
    if loaded and versions and loaded not in versions:
        return f"it is for the driver {sorted(versions)[0]}, loaded is {loaded}"
    return ""


def node(specification: str) -> str:
    """Return a device node that a container gets."""
    found = re.search(r"/dev/(?:nvidia\d+|dxg)\b", specification)
    return found[0] if found else "/dev/nvidiactl"


def environment(text: str, hooks: list[str]) -> str:
    """Return the environment file with these hooks disabled beside those that it disables itself; ours comes last."""
    lines = text.splitlines()
    if MARK in lines:
        place = lines.index(MARK)
        del lines[place : place + 2]
    if hooks:
        theirs = [line.partition("=")[2].strip("\"' ") for line in lines if line.startswith(f"{DISABLED_HOOKS}=")]
        wanted = dict.fromkeys([*filter(None, (theirs or [""])[-1].split(",")), *hooks])
        lines += [MARK, f"{DISABLED_HOOKS}={','.join(wanted)}"]
    return "\n".join([*lines, ""]) if lines else ""


def specifications(folder: Path) -> list[Path]:
    """Return the specifications of a folder: files of other names are none to NVIDIA's tool, nor to Docker."""
    return [file for file in sorted(folder.glob("*")) if file.suffix in (".yaml", ".json")]


def rivals(device: str) -> list[Path]:
    """Return the specifications of one folder that all have a device: then none of them counts.

    Of two folders the later one wins, so those are no rivals; but it brings back nothing that the other one lost.
    """
    kind, _, name = device.partition("=")
    has_kind = re.compile(rf"""\bkind["']?\s*:\s*["']?{re.escape(kind)}["']?\s*(?:[,}}]|$)""", re.MULTILINE)
    has_name = re.compile(rf"""\bname["']?\s*:\s*["']?{re.escape(name)}["']?\s*(?:[,}}]|$)""", re.MULTILINE)
    for folder in (OWN_SPECIFICATIONS, SPECIFICATION.parent):
        files = [(file, read_text(file)) for file in specifications(folder)]
        same = [file for file, text in files if has_kind.search(text) and has_name.search(text)]
        if len(same) > 1:
            return same
    return []


def explain_rivals(device: str, files: list[Path]) -> str:
    """Return that specifications are in each other's way, and which to remove."""
    keep = SPECIFICATION if SPECIFICATION in files else files[0]
    extra = [str(file) for file in files if file != keep]
    return (
        f"{' and '.join(map(str, files))} both have the device {device}, so neither counts. Fix: remove"
        f" {', '.join(extra)}, which somebody wrote beside it; NVIDIA's units write {SPECIFICATION}"
    )


def why_it_failed(said: str) -> str:
    """Return why NVIDIA's unit failed, by its words in the journal.

    NVIDIA's tool writes logfmt. A warning is no cause, although it says "failed" in every run without
    libnvidia-sandboxutils. Before it nvidia-smi lists the GPUs, in plain words, from the places that it may be in.
    """
    found: dict[str, list[str]] = {"error": [], "failure": [], "words": [], "warning": []}
    for line in map(str.strip, said.splitlines()):
        if not line or re.search(r"systemd|nvidia-cdi-refresh|Failed with result|: not found$|^GPU \d+: ", line):
            continue
        level = re.search(r"\blevel=(\w+)", line)
        if not level:
            found["failure" if re.search(r"(?i)fail|error|mismatch|no devices", line) else "words"].append(line)
            continue
        words = re.search(r'\bmsg=(?:"((?:[^"\\]|\\.)*)"|(\S+))', line)
        text = re.sub(r"\\(.)", r"\1", words[1] or words[2] or "") if words else line
        kind = {"fatal": "error", "panic": "error"}.get(level[1], level[1])
        if kind in found:
            found[kind].append(text)
    last = found["error"] or found["failure"] or found["words"][:1] or found["warning"]
    return last[-1] if last else "nothing was said"


def why_skipped(state: str) -> str:
    """Return why systemd skipped NVIDIA's unit, by the unit's properties, and a fix; nothing if it did not."""
    # Of its own conditions systemd says no; of a command that it asks, both.
    if "Result=exec-condition" in state:
        return (
            f"/lib/modules/{os.uname().release}/modules.dep names no nvidia module, and there is no /dev/dxg. Fix:"
            " after an update of the kernel reboot; if 'modinfo nvidia' still finds nothing, the role"
            " nvidia_driver brings the module; else run 'depmod'. WSL: update it, then 'wsl --shutdown' in Windows"
        )
    if "ConditionResult=no" in state:
        return (
            "nvidia-smi is in none of the places that it looks in. Fix: see that nvidia-smi is in /usr/bin (WSL: in"
            " /usr/lib/wsl/lib); the role nvidia_driver (WSL: Windows) brings it"
        )
    return ""


def explain(message: str, device: str) -> str:
    """Return the engine's own words for why a container does not start, and a fix."""
    if "unresolvable CDI devices" in message and (files := rivals(device)):
        return f"A container does not get {device}: {explain_rivals(device, files)}"
    loaded = read_text(LOADED_DRIVER).strip()
    own = [file for file in specifications(OWN_SPECIFICATIONS) if why_stale(read_text(file), loaded)]
    if "Cannot connect" in message or "No such file or directory: 'docker'" in message:
        fix = "'systemctl status docker.service'; the role docker_engine brings the engine"
    elif 'device driver "cdi"' in message:
        fix = "run the role docker_engine, or set features.cdi to true in /etc/docker/daemon.json and restart Docker"
    elif own:
        fix = f"remove {own[0]}, which somebody wrote for another driver; NVIDIA's units write {SPECIFICATION}"
    elif "unresolvable CDI devices" in message:
        fix = "see that 'docker info' lists /var/run/cdi among its CDI spec directories, then restart Docker"
    elif "No space left" in message:
        fix = "free some space ('df --human-readable /var/lib/docker /var/lib/containerd'), then run again"
    else:
        fix = "look at 'journalctl -u docker.service' and at 'nvidia-ctk cdi list'"
    return f"A container does not get {device}: {message}. Fix: {fix}"


class Devices:
    """The CDI devices of this host."""

    def __init__(self, params: dict[str, Any], check: bool) -> None:
        """Take what is wanted, and whether it is only to be foreseen."""
        self.check = check
        self.device: str = params["device"]
        self.hooks: list[str] = params["disabled_hooks"]

    def ask(self, *command: str, data: bytes = b"") -> tuple[int, str, str]:
        """Run a command, and return its status, output and errors."""
        status, output, errors = run(*command, data=data)
        return status, output.strip(), errors.strip()

    def registry(self) -> tuple[list[str], str]:
        """Return the CDI devices, and what NVIDIA's tool says of specifications that do not count."""
        _, listed, said = self.ask("nvidia-ctk", "cdi", "list")
        return listed.split(), said.partition("registry errors were reported")[2].partition("\n")[2]

    def enable(self) -> bool:
        """Have the units work at boot and on changes."""
        states = self.ask("systemctl", "is-enabled", *UNITS)[1].split()
        running = self.ask("systemctl", "is-active", UNITS[0])[1] == "active"
        if running and states == ["enabled", "enabled"]:
            return False
        if not self.check:
            self.ask("systemctl", "enable", *UNITS)
            status, _, errors = self.ask("systemctl", "start", UNITS[0])
            if status != 0:
                raise Problem(f"{UNITS[0]} does not start: {errors}. Fix: 'systemctl status {UNITS[0]}'")
        return True

    def refresh(self, reason: str) -> None:
        """Have the specification rewritten."""
        # Somebody else's failures of before do not count towards the limit of starts.
        self.ask("systemctl", "reset-failed", UNITS[1])
        status, _, _ = self.ask("systemctl", "restart", UNITS[1])
        # The unit tries again after a second, as another invocation.
        invocation = self.ask("systemctl", "show", "--property=InvocationID", "--value", UNITS[1])[1]
        found, complaints = self.registry()
        if status == 0 and self.device in found:
            return
        if files := rivals(self.device):
            raise Problem(explain_rivals(self.device, files))
        # A unit whose condition does not hold is skipped: with status 0, and without a reason in the journal.
        state = self.ask("systemctl", "show", "--property=ConditionResult,Result", UNITS[1])[1]
        if skipped := why_skipped(state):
            raise Problem(f"{UNITS[1]} was skipped, since it sees no driver: {skipped}")
        command = ["journalctl", "--unit", UNITS[1], "--output", "cat", "--lines", "20", "--no-pager"]
        said = self.ask(*command, *([f"_SYSTEMD_INVOCATION_ID={invocation}"] if invocation else []))[1]
        # What was written well, and is not there all the same, is explained by who reads it.
        said = said if status else complaints or said
        what = f"The GPU is not a CDI device: {self.device} is not among {', '.join(found) or 'none'}"
        if self.device in found:
            what = f"The CDI specification is stale ({reason}) and cannot be rewritten"
        raise Problem(
            f"{what} ({why_it_failed(said)}). Fix: see that 'nvidia-smi' shows the GPU,"
            " after an update of the driver reboot (WSL: 'wsl --shutdown' in Windows), then look at 'journalctl -u"
            f" {UNITS[1]}'"
        )

    def prove(self, path: str) -> None:
        """Open the device in a container that leaves nothing behind."""
        status, name, errors = self.ask("docker", "image", "import", "-", data=image())
        if status != 0:
            raise Problem(explain(errors, self.device))
        options = ["--rm", "--pull=never", "--network=none", "--log-driver=none", f"--name={CONTAINER}"]
        try:
            self.ask("docker", "rm", "--force", CONTAINER)
            status, _, errors = self.ask(
                "timeout", "60", "docker", "run", *options, f"--device={self.device}", name, "/open", path
            )
            if status == 124:
                self.ask("docker", "rm", "--force", CONTAINER)
                errors = "it does not start within 60 seconds"
        finally:
            self.ask("docker", "image", "rm", name)
        if status != 0:
            lines = [line for line in errors.splitlines() if "--help" not in line and line.strip()]
            refused = f"{path} cannot be opened in it ({os.strerror(status)})"
            raise Problem(explain(" ".join(lines).removeprefix("docker: ") if errors else refused, self.device))

    def services(self) -> list[str]:
        """Return the services of dots.ocr that use a CDI device, and that run or try to."""
        states = "--state=active,activating,reloading,failed"
        listed = self.ask("systemctl", "list-units", "--all", "--plain", "--no-legend", states, "dots-ocr*.service")[1]
        names = [line.split()[0] for line in listed.splitlines() if line.strip()]
        units = [self.ask("systemctl", "show", "--property=FragmentPath", "--value", name)[1] for name in names]
        return [name for name, unit in zip(names, units, strict=True) if unit and "nvidia.com/gpu=" in read_text(unit)]

    def present(self) -> dict[str, Any]:
        """Have the device, and prove it."""
        changed = self.enable()
        if files := rivals(self.device):
            raise Problem(explain_rivals(self.device, files))
        told = read_text(ENVIRONMENT)
        wanted = environment(told, self.hooks)
        if wanted != told and not self.check:
            write(ENVIRONMENT, wanted or None, keep=True)
        changed = changed or wanted != told
        before = read_text(SPECIFICATION)
        found, _ = self.registry()
        stale = why_stale(before, read_text(LOADED_DRIVER).strip())
        if unwanted := [hook for hook in self.hooks if re.search(rf"\b{re.escape(hook)}\b", before)]:
            stale = f"it has the hook {unwanted[0]}"
        if self.device not in found or not before:
            stale = f"{self.device} is missing"
        result: dict[str, Any] = {"devices": found, "stale": stale, "proven": False, "services": []}
        if self.check:
            return {**result, "changed": changed or bool(stale)}
        if stale:
            self.refresh(stale)
            result["devices"], _ = self.registry()
        after = read_text(SPECIFICATION)
        started = ENGINE_PROCESS.stat().st_mtime_ns if ENGINE_PROCESS.exists() else 0
        holds_for = json.dumps([self.device, after, read_text(LOADED_DRIVER), started])
        fingerprint = hashlib.sha256(holds_for.encode()).hexdigest()
        # A boot removes it with the folder that it is in.
        if read_text(STAMP) != fingerprint:
            STAMP.unlink(missing_ok=True)
            self.prove(node(after))
            STAMP.write_text(fingerprint)
            result["proven"] = True
        if after != before:
            result["services"] = self.services()
        return {**result, "changed": changed or after != before}

    def absent(self) -> dict[str, Any]:
        """Stop the units, and remove what they wrote; their package may be gone already."""
        links = [link for unit in UNITS for link in Path("/etc/systemd/system").glob(f"*.wants/{unit}")]
        files = [path for path in (SPECIFICATION, STAMP, CONFIGURATION, *links) if path.exists() or path.is_symlink()]
        running = self.ask("systemctl", "is-active", *UNITS)[1].split()
        told = read_text(ENVIRONMENT)
        theirs = environment(told, [])
        changed = bool(files) or "active" in running or theirs != told
        if changed and not self.check:
            self.ask("systemctl", "stop", *UNITS)
            for path in files:
                path.unlink(missing_ok=True)
            if theirs != told:
                write(ENVIRONMENT, theirs or None, keep=True)
            self.ask("systemctl", "daemon-reload")
            self.ask("systemctl", "reset-failed", *UNITS)
            remove_empty(SPECIFICATION.parent, CONFIGURATION.parent, ENVIRONMENT.parent)
        return {"changed": changed, "devices": [], "stale": "", "proven": False, "services": []}


def main() -> None:
    """Run the module."""
    options = {
        "device": {"type": "str", "default": "nvidia.com/gpu=all"},
        "disabled_hooks": {"type": "list", "elements": "str", "default": []},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    }

    def work(params: dict[str, Any], check: bool) -> dict[str, Any]:
        devices = Devices(params, check)
        return devices.present() if params["state"] == "present" else devices.absent()

    answer(options, work)


if __name__ == "__main__":
    main()
