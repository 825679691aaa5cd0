"""What is known of Docker Engine: its settings, which engine is on a host, and which cannot run the server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import RECORDS, ask, together

DAEMON = Path("/etc/docker/daemon.json")
PLACES = "/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin:/sbin"
COMMAND = Path("/usr/bin/docker")
SOCKET = Path("/var/run/docker.sock")
ROOT = Path("/var/lib/docker")
SNAP = Path("/snap/bin/docker")
# Docker Desktop's integration mounts this into a distribution of WSL.
DESKTOP = Path("/mnt/wsl/docker-desktop")

# Problem and fix of an engine that answers and cannot run the server.
UNFIT = {
    "podman": (
        "podman answers in the place of Docker Engine",
        "'apt-get remove podman-docker' and, if it was linked, 'rm /var/run/docker.sock', which leave podman itself;"
        " then run again, and Docker Engine takes its place",
    ),
    "rootless": (
        "Docker Engine runs rootless: it can neither hand out the GPU nor close the containers' network",
        "have root use the engine of the host: 'docker context use default' as root, no DOCKER_HOST, and 'systemctl"
        " enable --now docker'; the rootless one can stay beside it",
    ),
    "userns": (
        "Docker Engine remaps users (userns-remap), so the container can neither read its key nor write its cache",
        f"remove userns-remap from {DAEMON}, or the flag from docker.service, then 'systemctl restart docker'; images"
        " and containers of before are kept in a folder of their own and seen again with it",
    ),
}


def read_object(data: bytes | str) -> dict[str, Any]:
    """Return an object in JSON, empty if it is none."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def settings(daemon: Path = DAEMON) -> dict[str, Any]:
    """Return what daemon.json says; nothing of a broken one, which the module docker_daemon reports."""
    # Bytes, of which Python finds out the encoding by a mark, as the engine does.
    return read_object(daemon.read_bytes()) if daemon.is_file() else {}


def unfit(info: dict[str, Any], components: str = "") -> str:
    """Return why the engine that answers cannot run the server, a key of UNFIT, or nothing.

    `info` is what it says of itself, by its API or by `docker info`; empty if it does not answer. `components` are
    their names, as `docker version` says of the server.
    """
    # Podman's service has a field or a component of its own, and its command has other keys.
    if "BuildahVersion" in info or "Podman" in components or ("ServerVersion" not in info and "host" in info):
        return "podman"
    security = {re.split("[=,]", str(option))[1] for option in info.get("SecurityOptions") or []}
    return next((name for name in UNFIT if name in security), "")


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
    kind = unfit(info, components)
    if kind:
        yield dict(zip(("problem", "fix"), UNFIT[kind], strict=True))
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
    program = shutil.which("dockerd", path=PLACES)
    active, enabled, (package, package_version) = together(
        lambda: ask("systemctl", "is-active", "docker.service").strip() == "active",
        lambda: ask("systemctl", "is-enabled", "docker.service").strip() == "enabled",
        lambda: ask_package(program or ""),
    )
    found: dict[str, Any] = {
        "program": program or "",
        "version": parse_version(package_version or (ask(program, "--version") if program else "")),
        "origin": "package" if package else "other" if program else "none",
        "package": package,
        "package_version": package_version,
        "brought": bool(packages) and (RECORDS / f"{packages}.json").exists(),
        "up": active and enabled,
        "running": [],
        "problems": [],
        **kept_in({ROOT, Path(str(settings().get("data-root", ROOT)))}),
    }
    if DESKTOP.exists():
        found["origin"] = "desktop"
    elif SNAP.exists():
        found["origin"] = "snap"
    elif is_podman(COMMAND):
        found["origin"] = "podman"
    # An engine that is stopped stays so: to ask Docker's socket would start it.
    if shutil.which("docker", path=PLACES) and (active or ask("systemctl", "is-active", "docker.socket") == ""):
        answer, names, running = together(
            lambda: read_object(ask_docker("info", "--format", "{{json .}}")),
            lambda: ask_docker("version", "--format", "{{range .Server.Components}}{{.Name}} {{end}}"),
            lambda: ask_running() if program and SOCKET.exists() and active else [],
        )
        found["problems"] = list(judge(answer, names, shutil.which("iptables", path=PLACES) is not None))
        found["running"] = running
    return found
