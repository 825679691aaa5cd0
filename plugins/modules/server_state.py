#!/usr/bin/python
"""Ansible module server_state: all that a deployment of dots.ocr has to know of the servers on a host, at once."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: server_state
short_description: What is known of the servers on this host
description:
  - Reads the servers' settings, units, images and proven state, and who listens where.
  - On request takes the lock of this host first, so that two deployments do not meet. Or it has each server prove that
    it reads, without looking at anything else. Changes nothing else.
options:
  lock: {description: Take the lock under this description. In check mode it is not taken., type: str}
  lock_seconds: {description: "When systemd takes the lock back, should the controller die.", type: int, default: 86400}
  weights: {description: "A folder with weights, of which it is told which code they name.", type: path}
  remote_code:
    description:
      - By the profile of an image, which code the weights may name, such as C(modeling.Model), and modules of which
        they may name all, such as C(configuration).
    type: dict
    default: {}
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
weights:
  description:
    - Whether the folder with weights has a C(config.json), and by the profile what is not allowed, a text each.
  returned: success
  type: dict
  sample: {exists: true, refused: {native_v0_32: ["config.json names evil.Model (AutoModel)"]}}
proofs:
  description: What each server that was asked for it said. A sleeping one is left so. Empty if one could not prove it.
  returned: with O(prove)
  type: list
  elements: str
pages:
  description: Once all have proven it, what C(golden_pages) says of each server, as of a loop of commands.
  returned: with O(prove)
  type: list
  elements: dict
  sample: [{item: dots-ocr, rc: 0, stdout: "{}", stderr: ""}]
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ..module_utils.common import answer, ask, run, together
from ..module_utils.model_code import refused
from ..module_utils.servers import DEFINITION, PROGRAMS, ask_systemd, look, settings, sleeping

LOCK = "dots-ocr-deployment.service"


def look_at_weights(folder: Path, remote_code: dict[str, list[str]]) -> dict[str, Any]:
    """Return whether there are weights, and by the profile of an image which code they may not name."""
    found = {profile: refused(folder, allowed) for profile, allowed in remote_code.items()}
    return {"exists": (folder / "config.json").is_file(), "refused": found}


def prove(name: str, server: dict[str, Any], sleeping: bool, isolated: bool) -> str:
    """Return how a server has proven that it reads; nothing if it could not prove all of it."""
    if sleeping:
        return f"{name} is asleep, and stays so: the next page wakes it."
    show = ("docker", "run", "--rm", "--pull=never", "--network=none", f"--device={server['device']}")
    commands: list[tuple[str, ...]] = [(*show, "--entrypoint=nvidia-smi", server["image"]["pin"], "-L")]
    commands += [(f"{PROGRAMS}/firewall", "close", name)] if server["allowed_networks"] else []
    commands += [(f"{PROGRAMS}/firewall", "prove", name)] if isolated else []
    commands += [(f"{PROGRAMS}/ready", name, "--keep-compiled")]
    done = together(*(partial(run, *command) for command in commands))
    return str(json.loads(done[-1][1]).get("summary", "")) if all(status == 0 for status, *_ in done) else ""


def read_golden_pages(name: str) -> dict[str, Any]:
    """Return what became of a server's golden pages, as a loop of commands returns it."""
    status, output, errors = run(f"{PROGRAMS}/golden_pages", name, "compare")
    return {"item": name, "rc": status, "stdout": output, "stderr": errors}


def work(wanted: dict[str, Any], check: bool) -> dict[str, Any]:
    """Have it proven, or take the lock and look, as far as that is wanted."""
    status, holder = 0, ""
    if wanted["lock"] and not check:
        limit = f"--property=RuntimeMaxSec={wanted['lock_seconds']}"
        options = (f"--unit={LOCK}", f"--description={wanted['lock']}", limit, "--quiet")
        status, _, holder = run("systemd-run", *options, "sleep", "infinity")
        if status != 0:
            told = ask("systemctl", "show", "--property=Description,ActiveEnterTimestamp", LOCK)
            holder = f"{holder.strip()} ({', '.join(told.splitlines())})"
    if wanted["prove"]:
        servers = settings(DEFINITION)
        asleep = sleeping(servers, ask_systemd(servers))
        proofs = [prove(name, servers[name], name in asleep, wanted["isolated"]) for name in wanted["prove"]]
        proofs = proofs if all(proofs) else []
        if wanted["unlock"] and proofs:
            run("systemctl", "stop", LOCK)
        pages = [read_golden_pages(name) for name in wanted["prove"] if name not in asleep] if proofs else []
        return {"changed": False, "proofs": proofs, "pages": pages}
    try:
        weights = look_at_weights(Path(wanted["weights"]), wanted["remote_code"]) if wanted["weights"] else {}
        found = {"changed": False, **look(), "weights": weights}
    except BaseException:
        if wanted["lock"] and not check and status == 0:  # nobody learns that it is held, and so nobody gives it back
            run("systemctl", "stop", LOCK)
        raise
    return {**found, "locked": status == 0, "holder": holder}


def main() -> None:
    """Run the module."""
    options = {
        "lock": {"type": "str"},
        "lock_seconds": {"type": "int", "default": 86400},
        "weights": {"type": "path"},
        "remote_code": {"type": "dict", "default": {}},
        "prove": {"type": "list", "elements": "str", "default": []},
        "isolated": {"type": "bool", "default": False},
        "unlock": {"type": "bool", "default": False},
    }
    answer(options, work)


if __name__ == "__main__":
    main()
