"""What is known of the servers of dots.ocr on a host: the modules server_state and gpu_host both tell it."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from .common import Problem, ask, together

DEFINITION = Path("/etc/dots-ocr/server")
PROVEN = Path("/var/lib/dots-ocr/states/good/server")
PROGRAMS = "/usr/local/lib/dots-ocr"
HELD = ("active", "deactivating")
UNIT_STOPPED = "9d1aaa27d60140bd96365438aad20286"  # systemd's id of that message (sd-messages.h)
BESIDE = ("watchdog@{}.service", "front@{}.service", "wake@{}.path")  # whose files systemd may not have read, either
STOPPED = (("inactive", "disabled"), ("failed", "disabled"))

Settings = dict[str, dict[str, Any]]


def settings(folder: Path) -> Settings:
    """Return the settings of each server in a folder of definitions, by its name; raises Problem for a broken file."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found[file.stem] = json.loads(file.read_bytes())
        except ValueError as error:
            fix = f"'{PROGRAMS}/state restore good' on the host" if folder == DEFINITION else f"remove {PROVEN.parent}"
            raise Problem(f"{file} is not JSON", f"{fix}, then run again") from error
    return found


def timer(server: str) -> str:
    """Return the name of the timer that has the watchdog look after a server."""
    return f"dots-ocr-watchdog@{server}.timer"


def ask_systemd(servers: Settings) -> dict[str, dict[str, str]]:
    """Return what systemd says of each server's unit and of those beside it, by name."""
    beside = [f"dots-ocr-{unit.format(server)}" for server in servers for unit in BESIDE]
    names = [*(name for server in servers for name in (f"{server}.service", timer(server))), *beside]
    properties = "--property=ActiveState,UnitFileState,NRestarts,NeedDaemonReload"
    blocks = ask("systemctl", "show", properties, *names).split("\n\n") if names else []
    return dict(zip(names, [dict(line.split("=", 1) for line in one.splitlines()) for one in blocks], strict=False))


def ask_docker(servers: Settings) -> dict[str, Any]:
    """Return what Docker says of the servers' images."""
    pins = sorted({server["image"]["pin"] for server in servers.values() if "image" in server})
    found = {pin: json.loads(ask("docker", "image", "inspect", pin) or "[]") for pin in pins}
    return {pin: images[0] for pin, images in found.items() if images}


def ask_state() -> bool:
    """Tell whether what is installed is the state that was last proven to read."""
    return json.loads(ask(f"{PROGRAMS}/state", "compare") or "{}").get("same", False) is True


def ask_listeners() -> dict[str, str]:
    """Return who listens, by port."""
    found: dict[str, str] = {}
    for line in ask("ss", "--no-header", "--listening", "--numeric", "--tcp", "--processes").splitlines():
        port = line.split()[3].rpartition(":")[2]
        found[port] = f"{found[port]}\n{line}" if port in found else line
    return found


def sleeping(servers: Settings, units: dict[str, dict[str, str]]) -> list[str]:
    """Return the servers that sleep; one that failed, or that its owner has stopped, does not."""
    asleep = {"ActiveState": "inactive", "UnitFileState": "enabled"}
    return [
        name
        for name, server in servers.items()
        if "on_demand" in server and asleep.items() <= units.get(f"{name}.service", {}).items()
    ]


def settled(servers: Settings, units: dict[str, dict[str, str]]) -> bool:
    """Tell whether the units of what is installed are as they should be."""
    asleep = sleeping(servers, units)
    for name, server in servers.items():
        unit, watchdog = units.get(f"{name}.service", {}), units.get(timer(name), {})
        watched = ("active", "enabled") if server["watched"] else ("inactive", "disabled")
        up = [unit.get(key) for key in ("ActiveState", "UnitFileState", "NRestarts")] == ["active", "enabled", "0"]
        if not up and name not in asleep:
            return False
        if (watchdog.get("ActiveState"), watchdog.get("UnitFileState")) != watched:
            return False
    # A run that was cut off has written units that systemd has not read yet.
    return bool(servers) and all(unit.get("NeedDaemonReload") != "yes" for unit in units.values())


def stopped(servers: Settings, units: dict[str, dict[str, str]]) -> str:
    """Return since when the servers are stopped by their owner, or nothing."""
    asked = [units.get(name, {}) for server in servers for name in (f"{server}.service", timer(server))]
    states = [(one.get("ActiveState"), one.get("UnitFileState")) for one in asked]
    # An installation that was broken off before its first start has proven nothing yet.
    if not states or not settings(PROVEN) or any(state not in STOPPED for state in states):
        return ""
    # systemd itself forgets a unit that nothing wants.
    last = ("journalctl", "--quiet", "--no-pager", "--lines=1", "--output=short-iso", f"MESSAGE_ID={UNIT_STOPPED}")
    said = ask(*last, *(f"--unit={name}.service" for name in servers))
    return said.split(" ")[0] or "the journal does not know when"


def look() -> dict[str, Any]:
    """Return all that the module server_state tells of the servers, their lock and their proof aside."""
    servers = settings(DEFINITION)
    units, same, images, listeners = together(
        partial(ask_systemd, servers), ask_state, partial(ask_docker, servers), ask_listeners
    )
    return {
        "servers": servers,
        "proven": settings(PROVEN),
        "running": [name for name in servers if units.get(f"{name}.service", {}).get("ActiveState") in HELD],
        "asleep": sleeping(servers, units),
        "stopped": stopped(servers, units),
        "settled": same and settled(servers, units),
        "images": images,
        "listeners": listeners,
        "now": int(time.time()),
    }
