#!/usr/bin/python
"""Ansible module client_wheels: bring together the wheels of the client for another machine's Python."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: client_wheels
short_description: Bring together the wheels of dots-ocr-client[serve] for another machine's Python
description:
  - Runs on the controller, with C(ansible_playbook_python) as its interpreter, which has pip.
  - Names what would be installed, by a fingerprint that covers the client's source and the lock, or the wheels, and the
    Python that they are for. This needs no network.
  - With an O(archive) it collects them too, so that the other machine needs no package index.
options:
  repository:
    description: Checkout, or installed collection, to build the client from; the rest is what C(requirements.lock)
      pins, from pip's index.
    type: path
  wheels: {description: "Folder that has all wheels, instead.", type: str, default: ""}
  python: {description: "Version of the other machine's Python, such as C(3.13.5).", type: str, required: true}
  machine: {description: "Its processor as C(uname) names it, such as C(x86_64).", type: str, required: true}
  glibc: {description: "Version of its C library, such as C(2.41).", type: str, required: true}
  archive: {description: Tar archive to write; none if it is not set., type: path}
attributes:
  check_mode: {description: "Names what it would collect, and collects nothing.", support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Collect the wheels for this host
  dots_ocr.deploy.client_wheels:
    repository: "{{ role_path }}/../.."
    python: 3.13.5
    machine: x86_64
    glibc: "2.41"
    archive: /tmp/wheels.tar
  delegate_to: localhost
  become: false
  vars:
    ansible_python_interpreter: "{{ ansible_playbook_python }}"
"""

RETURN = r"""
fingerprint:
  description: A short name for what is, or would be, collected.
  returned: success
  type: str
  sample: 0123456789abcdef
"""

import hashlib
import importlib.util
import re
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..module_utils.common import Problem, answer, run, sha256

REQUIREMENT = "dots-ocr-client[serve]"
FIX = (
    "Fix: run on a controller that reaches its package index and has pip beside Ansible, or set the role's variable "
    "..._wheels to a folder on the controller that has all wheels of dots-ocr-client[serve]"
)


@dataclass(frozen=True)
class Target:
    """The Python that the wheels are for, as it describes itself."""

    python: str
    machine: str
    glibc: str

    @property
    def minor(self) -> str:
        """The version of Python without its patch level."""
        return ".".join(self.python.split(".")[:2])

    def pip_options(self) -> list[str]:
        """Return pip's options for this Python."""
        newest = int(self.glibc.split(".")[1])
        # Each manylinux tag names the glibc that a wheel needs (PEP 600); the older names stand for 2.17, 2.12 and 2.5.
        platforms = [f"manylinux_2_{number}_{self.machine}" for number in range(newest, 4, -1)]
        platforms += [f"manylinux{name}_{self.machine}" for name in ("2014", "2010", "1")]
        options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.minor}"]
        options += [f"--abi={abi}" for abi in ("cp" + self.minor.replace(".", ""), "abi3", "none")]
        return options + [f"--platform={platform}" for platform in platforms]


@dataclass(frozen=True)
class Source:
    """Where the wheels come from: a checkout, or a folder that has them all."""

    folder: Path
    is_checkout: bool

    def files(self) -> list[Path]:
        """Return the files that decide what is installed; raises Problem if there are none."""
        if not self.is_checkout:
            wheels = sorted(self.folder.glob("*.whl"))
            if not any(wheel.name.startswith("dots_ocr_client-") for wheel in wheels):
                raise Problem(f"there is no wheel of dots-ocr-client in {self.folder}", FIX)
            return wheels
        client, lock = self.folder / "client", self.folder / "requirements.lock"
        project = client / "pyproject.toml"
        if not project.exists() or not lock.exists():
            raise Problem(f"{self.folder.resolve()} lacks client/ or requirements.lock", FIX)
        code = (path for path in (client / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return [lock, project, *sorted(code)]

    def fingerprint(self, target: Target) -> str:
        """Return a short name for what would be collected; raises Problem."""
        files = [f"{path.relative_to(self.folder)} {sha256(path)}" for path in self.files()]
        lines = [target.minor, target.machine, *files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def collect(self, target: Target, archive: Path) -> None:
        """Write a tar archive of the wheels; raises Problem."""
        self.files()
        with tempfile.TemporaryDirectory() as scratch:
            wheels, built = Path(scratch) / "wheels", Path(scratch) / "built"
            download = ["download", *target.pip_options(), "--dest", wheels]
            if self.is_checkout:
                lock, versions = self.folder / "requirements.lock", Path(scratch) / "versions.txt"
                # With a hash in it, pip before 26 demands one of each requirement and a version of each dependency.
                versions.write_text(re.sub(r"\s*\\\n\s*--hash=\S+", "", lock.read_text()))
                build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, self.folder / "client"]
                pip(*build, path=find_backend(Path(scratch), lock, versions))
                pip(*download, "--constraint", versions, "--find-links", built, REQUIREMENT)
                check_hashes(wheels, built, lock)
            else:
                pip(*download, "--no-index", "--find-links", self.folder, REQUIREMENT)
            with tarfile.open(archive, "w") as tar:
                for wheel in sorted(wheels.iterdir()):
                    tar.add(wheel, arcname=wheel.name)


def find_backend(scratch: Path, lock: Path, versions: Path) -> Path | None:
    """Return a folder with what builds the client, by files that the lock has; None where this Python has it."""
    if importlib.util.find_spec("hatchling"):
        return None
    wheels, folder = scratch / "backend-wheels", scratch / "backend"
    pip("download", "--only-binary=:all:", "--dest", wheels, "--constraint", versions, "hatchling")
    check_hashes(wheels, scratch / "nothing", lock)
    pip("install", "--no-index", "--find-links", wheels, "--target", folder, "hatchling")
    return folder


def check_hashes(wheels: Path, built: Path, lock: Path) -> None:
    """Raise Problem for a wheel that is neither our own nor one whose SHA-256 the lock has."""
    known = set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", lock.read_text()))
    known.update(sha256(wheel) for wheel in built.glob("*"))
    if others := [wheel.name for wheel in sorted(wheels.iterdir()) if sha256(wheel) not in known]:
        raise Problem(
            f"the package index gave other files than {lock.name} pins: {', '.join(others)}; "
            "a mirror has to hand out the files of the public index unchanged",
            FIX,
        )


def pip(*words: str | Path, path: Path | None = None) -> None:
    """Run this Python's pip, with a folder of modules more if need be; raises Problem with what it says."""
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words))
    status, output, errors = run(*command, environment={"PYTHONPATH": str(path)} if path else None)
    if status != 0:
        raise Problem(f"pip {words[0]}: {errors.strip() or output.strip()}", FIX)


def main() -> None:
    """Run the module."""
    options = {
        "repository": {"type": "path"},
        "wheels": {"type": "str", "default": ""},
        "python": {"type": "str", "required": True},
        "machine": {"type": "str", "required": True},
        "glibc": {"type": "str", "required": True},
        "archive": {"type": "path"},
    }

    def work(wanted: dict[str, Any], check: bool) -> dict[str, Any]:
        target = Target(wanted["python"], wanted["machine"], wanted["glibc"])
        source = Source(Path(wanted["wheels"] or wanted["repository"]), is_checkout=not wanted["wheels"])
        fingerprint = source.fingerprint(target)
        collecting = wanted["archive"] is not None and not check
        if collecting:
            source.collect(target, Path(wanted["archive"]))
        return {"changed": collecting, "fingerprint": fingerprint}

    answer(options, work)


if __name__ == "__main__":
    main()
