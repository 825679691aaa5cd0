"""Which Docker Engine is on a host: the modules docker_engine_info and gpu_host both tell it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import engine as engines
from .common import RECORDS, ask, together

COMMAND = Path("/usr/bin/docker")
SOCKET = Path("/var/run/docker.sock")
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


def judge(info: dict[str, Any], components: str, has_iptables: bool) -> Iterator[dict[str, str]]:
    """Yield why the engine behind the command docker cannot run the server; see `unfit` for what it is told.

    Whether it manages the firewall, and with what, does not matter: the server has a rule of its own, by iptables.
    """
    kind = engines.unfit(info, components)
    if kind:
        yield dict(zip(("problem", "fix"), engines.UNFIT[kind], strict=True))
    if kind == "podman":
        return
    if info.get("OperatingSystem") == "Docker Desktop":
        yield {
            "problem": "The command docker asks Docker Desktop, whose engine sees no CDI device of this machine",
            "fix": "'docker context use default'; on WSL switch Docker Desktop's integration off for this distribution",
        }
    if str(info.get("DockerRootDir", "")).startswith("/var/snap/"):
        yield {
            "problem": "Docker is a snap, which sees neither the files of systemd's units nor CDI devices",
            "fix": "save what is in its volumes, 'snap remove docker', then run again",
        }
    if info.get("ServerVersion") and not has_iptables:
        yield {
            "problem": "There is no program iptables, by which the containers' network is closed",
            "fix": "'apt-get install iptables'; it works beside Docker's firewall backend nftables, too",
        }


def ask_docker(*words: str) -> str:
    """Return what the command docker prints; nothing if it fails, or does not end within a minute."""
    return ask("docker", *words, timeout=60)


def ask_package(program: str) -> tuple[str, str]:
    """Return the package that a program came with, and its version."""
    package = ask("dpkg-query", "--search", program).split(":")[0] if program else ""
    return package, ask("dpkg-query", "--show", "--showformat=${Version}", package) if package else ""


def ask_running() -> list[str]:
    """Return the running containers that a restart of the engine would end for good."""
    running = ask_docker("ps", "--quiet").split()
    return running_containers(json.loads(ask_docker("inspect", *running) or "[]")) if running else []


def look(packages: str | None = None) -> dict[str, Any]:
    """Look at the engine of this host, and whether that set of packages brought it."""
    program = shutil.which("dockerd", path=engines.PLACES)
    active, enabled, (package, package_version) = together(
        lambda: ask("systemctl", "is-active", "docker.service").strip() == "active",
        lambda: ask("systemctl", "is-enabled", "docker.service").strip() == "enabled",
        lambda: ask_package(program or ""),
    )
    engine: dict[str, Any] = {
        "program": program or "",
        "version": parse_version(package_version or (ask(program, "--version") if program else "")),
        "origin": "package" if package else "other" if program else "none",
        "package": package,
        "package_version": package_version,
        "brought": bool(packages) and (RECORDS / f"{packages}.json").exists(),
        "running": [],
        "problems": [],
        **kept_in({ROOT, Path(str(engines.settings().get("data-root", ROOT)))}),
    }
    if DESKTOP.exists():
        engine["origin"] = "desktop"
    elif SNAP.exists():
        engine["origin"] = "snap"
    elif is_podman(COMMAND):
        engine["origin"] = "podman"
    engine["up"] = active and enabled
    # An engine that is stopped stays so: to ask Docker's socket would start it.
    if shutil.which("docker", path=engines.PLACES) and (active or ask("systemctl", "is-active", "docker.socket") == ""):
        answer, names, running = together(
            lambda: engines.read_object(ask_docker("info", "--format", "{{json .}}")),
            lambda: ask_docker("version", "--format", "{{range .Server.Components}}{{.Name}} {{end}}"),
            lambda: ask_running() if program and SOCKET.exists() and active else [],
        )
        engine["problems"] = list(judge(answer, names, shutil.which("iptables", path=engines.PLACES) is not None))
        engine["running"] = running
    return engine
