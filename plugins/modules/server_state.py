#!/usr/bin/python
"""Ansible module server_state: all that a deployment of dots.ocr has to know of the servers on a host, at once."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: server_state
short_description: What is known of the servers on this host
description:
  - Reads the servers' settings, units, images and proven state, and who listens where.
  - On request takes the lock of this host first, so that two deployments do not meet, and has each server prove that it
    reads. Changes nothing else.
options:
  lock: {description: Take the lock under this description. In check mode it is not taken., type: str}
  lock_seconds: {description: "When systemd takes the lock back, should the controller die.", type: int, default: 86400}
  prove:
    description: Servers that have to prove that a container gets their GPU, and that they read.
    type: list
    elements: str
    default: []
  isolated:
    description: Whether they have to prove that nothing gets out of their containers, too.
    type: bool
    default: false
  unlock: {description: Give the lock back if all of them have., type: bool, default: false}
attributes:
  check_mode: {description: "Takes no lock, and looks all the same.", support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Look at what is installed
  dots_ocr.deploy.server_state:
  register: found

- name: Check that all of it runs
  ansible.builtin.assert:
    that: found.settled
"""

RETURN = r"""
servers: {description: "The settings of each server, by its name.", returned: success, type: dict}
proven: {description: The same of the state that was last proven to read., returned: success, type: dict}
running:
  description: Names of the servers that hold their memory and ports.
  returned: success
  type: list
  elements: str
stopped:
  description: Since when servers that were proven to read are stopped, and disabled in systemd; empty if one is not.
  returned: success
  type: str
asleep: {description: Names of the servers that have left the GPU until a page comes., returned: success, type: list}
settled:
  description: Whether there are servers, all as they were when they were last proven to read, up, without a restart, at
    boot, too, or asleep, and watched as their settings say.
  returned: success
  type: bool
images:
  description: What Docker knows of the servers' images, by name. Those that are not there are left out.
  returned: success
  type: dict
listeners: {description: "Who listens at each TCP port, as ss says it.", returned: success, type: dict}
now: {description: Seconds since 1970., returned: success, type: int}
locked: {description: Whether the lock that was asked for has been taken., returned: success, type: bool}
holder: {description: Why it has not been., returned: success, type: str}
proofs:
  description: What each server that was asked for it said. A sleeping one is left so. Empty if one could not prove it.
  returned: success
  type: list
  elements: str
"""

import json
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.common import ask, run

DEFINITION = Path("/etc/dots-ocr/server")
PROVEN = Path("/var/lib/dots-ocr/states/good/server")
PROGRAMS = "/usr/local/lib/dots-ocr"
LOCK = "dots-ocr-deployment.service"
HELD = ("active", "deactivating")
UNIT_STOPPED = "9d1aaa27d60140bd96365438aad20286"  # systemd's id of that message (sd-messages.h)
STOPPED = (("inactive", "disabled"), ("failed", "disabled"))

Settings = dict[str, dict[str, Any]]


def settings(folder: Path) -> Settings:
    """Return the settings of each server in a folder of definitions, by its name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def timer(server: str) -> str:
    """Return the name of the timer that has the watchdog look after a server."""
    return f"dots-ocr-watchdog@{server}.timer"


def ask_systemd(servers: Settings) -> dict[str, dict[str, str]]:
    """Return what systemd says of each server's unit and of the timer of its watchdog, by name."""
    names = [name for server in servers for name in (f"{server}.service", timer(server))]
    properties = "--property=ActiveState,UnitFileState,NRestarts"
    blocks = ask("systemctl", "show", properties, *names).split("\n\n") if names else []
    return dict(zip(names, [dict(line.split("=", 1) for line in one.splitlines()) for one in blocks], strict=False))


def ask_docker(servers: Settings) -> dict[str, Any]:
    """Return what Docker says of the servers' images."""
    pins = sorted({server["image"]["pin"] for server in servers.values() if "image" in server})
    found = {pin: json.loads(ask("docker", "image", "inspect", pin) or "[]") for pin in pins}
    return {pin: images[0] for pin, images in found.items() if images}


def ask_listeners() -> dict[str, str]:
    """Return who listens, by port."""
    found: dict[str, str] = {}
    for line in ask("ss", "--no-header", "--listening", "--numeric", "--tcp", "--processes").splitlines():
        port = line.split()[3].rpartition(":")[2]
        found[port] = f"{found[port]}\n{line}" if port in found else line
    return found


def asleep(server: dict[str, Any], unit: dict[str, str]) -> bool:
    """Tell whether a server sleeps; one that failed, or that its owner has stopped, does not."""
    return "on_demand" in server and (unit.get("ActiveState"), unit.get("UnitFileState")) == ("inactive", "enabled")


def settled(servers: Settings, units: dict[str, dict[str, str]]) -> bool:
    """Tell whether nothing is left to be done for what is installed."""
    for name, server in servers.items():
        unit, watchdog = units.get(f"{name}.service", {}), units.get(timer(name), {})
        watched = ("active", "enabled") if server["watched"] else ("inactive", "disabled")
        up = [unit.get(key) for key in ("ActiveState", "UnitFileState", "NRestarts")] == ["active", "enabled", "0"]
        if not up and not asleep(server, unit):
            return False
        if (watchdog.get("ActiveState"), watchdog.get("UnitFileState")) != watched:
            return False
    return bool(servers) and json.loads(ask(f"{PROGRAMS}/state", "compare") or "{}").get("same", False) is True


def stopped(servers: Settings, units: dict[str, dict[str, str]]) -> str:
    """Return since when the servers are stopped by their owner, or nothing."""
    states = [(one.get("ActiveState"), one.get("UnitFileState")) for one in units.values()]
    # An installation that was broken off before its first start has proven nothing yet.
    if not states or not settings(PROVEN) or any(state not in STOPPED for state in states):
        return ""
    # systemd itself forgets a unit that nothing wants.
    last = ("journalctl", "--quiet", "--no-pager", "--lines=1", "--output=short-iso", f"MESSAGE_ID={UNIT_STOPPED}")
    said = ask(*last, *(f"--unit={name}.service" for name in servers))
    return said.split(" ")[0] or "the journal does not know when"


def prove(name: str, server: dict[str, Any], sleeping: bool, isolated: bool) -> str:
    """Return how a server has proven that it reads; nothing if it could not prove all of it."""
    if sleeping:
        return f"{name} is asleep, and stays so: the next page wakes it."
    show = ("docker", "run", "--rm", "--pull=never", "--network=none", f"--device={server['device']}")
    commands: list[tuple[str, ...]] = [(*show, "--entrypoint=nvidia-smi", server["image"]["pin"], "-L")]
    commands += [(f"{PROGRAMS}/api_firewall", "close", name)] if server["allowed_networks"] else []
    commands += [(f"{PROGRAMS}/isolated_network", "prove", name)] if isolated else []
    if any(run(*command)[0] != 0 for command in commands):
        return ""
    return str(json.loads(ask(f"{PROGRAMS}/ready", name, "--keep-compiled") or "{}").get("summary", ""))


def main() -> None:
    """Take the lock, look, have it proven, and give the lock back, as far as that is wanted."""
    module = AnsibleModule(
        argument_spec={
            "lock": {"type": "str"},
            "lock_seconds": {"type": "int", "default": 86400},
            "prove": {"type": "list", "elements": "str", "default": []},
            "isolated": {"type": "bool", "default": False},
            "unlock": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    status, holder = 0, ""
    if wanted["lock"] and not module.check_mode:
        limit = f"--property=RuntimeMaxSec={wanted['lock_seconds']}"
        options = (f"--unit={LOCK}", f"--description={wanted['lock']}", limit, "--quiet")
        status, _, holder = run("systemd-run", *options, "sleep", "infinity")
    servers = settings(DEFINITION)
    units = ask_systemd(servers)
    sleeping = [name for name, server in servers.items() if asleep(server, units.get(f"{name}.service", {}))]
    proofs = [prove(name, servers[name], name in sleeping, wanted["isolated"]) for name in wanted["prove"]]
    proofs = proofs if all(proofs) else []
    if wanted["unlock"] and proofs:
        run("systemctl", "stop", LOCK)
    module.exit_json(
        changed=False,
        servers=servers,
        proven=settings(PROVEN),
        running=[name for name in servers if units.get(f"{name}.service", {}).get("ActiveState") in HELD],
        asleep=sleeping,
        stopped=stopped(servers, units),
        settled=settled(servers, units),
        images=ask_docker(servers),
        listeners=ask_listeners(),
        now=int(time.time()),
        locked=status == 0,
        holder=holder.strip(),
        proofs=proofs,
    )


if __name__ == "__main__":
    main()
