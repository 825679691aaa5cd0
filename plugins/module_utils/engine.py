"""What is known of Docker Engine: its settings, and which engine cannot run the server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DAEMON = Path("/etc/docker/daemon.json")
PLACES = "/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin:/sbin"

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
