#!/usr/bin/python
"""Ansible module docker_engine_info: which Docker Engine is on a host, where it comes from, and what it runs."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: docker_engine_info
short_description: Which Docker Engine is on a host, and what it runs
description:
  - Looks without changing anything. What the engine runs is asked only of one that answers.
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
  description: The engine; C(origin) is package, snap, desktop, other, or none.
  returned: always
  type: dict
  sample:
    program: /usr/bin/dockerd
    version: 28.5.2
    origin: package
    package: docker-ce
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
SOCKET = Path("/var/run/docker.sock")
SNAP = Path("/snap/bin/docker")
# Docker Desktop's integration mounts this into a distribution of WSL.
DESKTOP = Path("/mnt/wsl/docker-desktop")


def parse_version(text: str) -> str:
    """Return the version in what `dockerd --version` prints, without a distribution's suffix; nothing without one."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return found[0] if found else ""


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
    engine: dict[str, Any] = {
        "program": program or "",
        "version": parse_version(ask(program, "--version")) if program else "",
        "origin": "package" if package else "other" if program else "none",
        "package": package,
        "running": [],
        "containers": 0,
        "volumes": 0,
    }
    if DESKTOP.exists():
        engine["origin"] = "desktop"
    elif SNAP.exists():
        engine["origin"] = "snap"
    if program and SOCKET.exists() and ask("systemctl", "is-active", "docker.service").strip() == "active":
        containers = ask("docker", "ps", "--all", "--quiet").split()
        inspected = json.loads(ask("docker", "inspect", *containers) or "[]") if containers else []
        engine |= {
            "running": running_containers(inspected),
            "containers": len(containers),
            "volumes": len(ask("docker", "volume", "ls", "--quiet").split()),
        }
    return engine


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.exit_json(changed=False, engine=look(module))


if __name__ == "__main__":
    main()
