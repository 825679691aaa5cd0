#!/usr/bin/python
"""Ansible module docker_engine_info: which Docker Engine is on a host, where it comes from, and what it runs."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: docker_engine_info
short_description: Which Docker Engine is on a host, and what it runs
description:
  - Looks without changing anything. What runs is asked of an engine that answers; what it keeps is counted in its
    folder, so that an engine that is stopped or broken does not look like an empty one.
attributes:
  check_mode:
    support: full
author:
  - The dots-ocr-deploy founders
"""

EXAMPLES = r"""
- name: Look at the engine
  docker_engine_info:
  register: engine
"""

RETURN = r"""
engine:
  description: The engine; C(origin) is package, snap, desktop, podman, other, or none.
  returned: always
  type: dict
  sample:
    program: /usr/bin/dockerd
    version: 28.5.2
    origin: package
    package: docker-ce
    package_version: 5:28.5.2-1~debian.13~trixie
    running: [web]
    containers: 2
    volumes: 1
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

PLACES = "/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin"
COMMAND = Path("/usr/bin/docker")
SOCKET = Path("/var/run/docker.sock")
DAEMON = Path("/etc/docker/daemon.json")
ROOT = Path("/var/lib/docker")
SNAP = Path("/snap/bin/docker")
# Docker Desktop's integration mounts this into a distribution of WSL.
DESKTOP = Path("/mnt/wsl/docker-desktop")


def parse_version(text: str) -> str:
    """Return the version in what an engine prints or its package has, without epoch and suffix; nothing without one."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return found[0] if found else ""


def is_podman(command: Path) -> bool:
    """Tell whether the command docker is podman's script of that name, from its package podman-docker."""
    if not command.is_file():
        return False
    with command.open("rb") as file:
        head = file.read(4096)
    return head.startswith(b"#!") and b"podman" in head


def data_roots(daemon: Path) -> set[Path]:
    """Return the folders that may hold an engine's data: the usual one, and what its configuration says."""
    try:
        return {ROOT, Path(json.loads(daemon.read_text())["data-root"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {ROOT}


def kept_in(roots: set[Path]) -> dict[str, int]:
    """Count the containers and volumes in an engine's folders, each of which is a folder; userns-remap has its own."""
    folders = [folder for root in roots for folder in (root, *root.glob("[0-9]*.[0-9]*"))]
    return {
        name: sum(entry.is_dir() for folder in folders for entry in folder.glob(f"{name}/*"))
        for name in ("containers", "volumes")
    }


def running_containers(inspected: list[dict[str, Any]]) -> list[str]:
    """Return the names of the running containers that a restart of the engine would end for good.

    One with a restart policy comes back by itself; one that is removed when it ends is somebody's foreground program.
    """
    return sorted(
        container["Name"].lstrip("/")
        for container in inspected
        if container["State"]["Running"]
        and not container["HostConfig"]["AutoRemove"]
        and container["HostConfig"]["RestartPolicy"]["Name"] in ("", "no", "on-failure")
    )


def look(module: AnsibleModule) -> dict[str, Any]:
    """Look at the engine of this host."""

    def ask(*command: str) -> str:
        status, output, _ = module.run_command(list(command))
        return str(output) if status == 0 else ""

    program = shutil.which("dockerd", path=PLACES)
    package = ask("dpkg-query", "--search", program).split(":")[0] if program else ""
    package_version = ask("dpkg-query", "--show", "--showformat=${Version}", package) if package else ""
    engine: dict[str, Any] = {
        "program": program or "",
        "version": parse_version(package_version or (ask(program, "--version") if program else "")),
        "origin": "package" if package else "other" if program else "none",
        "package": package,
        "package_version": package_version,
        "running": [],
        **kept_in(data_roots(DAEMON)),
    }
    if DESKTOP.exists():
        engine["origin"] = "desktop"
    elif SNAP.exists():
        engine["origin"] = "snap"
    elif is_podman(COMMAND):
        engine["origin"] = "podman"
    if program and SOCKET.exists() and ask("systemctl", "is-active", "docker.service").strip() == "active":
        running = ask("docker", "ps", "--quiet").split()
        engine["running"] = (
            running_containers(json.loads(ask("docker", "inspect", *running) or "[]")) if running else []
        )
    return engine


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.exit_json(changed=False, engine=look(module))


if __name__ == "__main__":
    main()
