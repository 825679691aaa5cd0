"""The hosts of the scenario `fleet`: how to ask, stop and deploy to them."""

from __future__ import annotations

import csv
import functools
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from rehearsal.engine import SOCKET

REPOSITORY = Path(__file__).resolve().parents[2]
SCENARIO = REPOSITORY / "molecule/fleet"
GATEWAY, MONITOR = "test-fleet-gateway", "test-fleet-monitor"
GPUS = ["test-fleet-1", "test-fleet-2"]
CPU = "test-fleet-cpu"
KEY = "the-key-of-a-client-0123456789"
PATIENCE = 240.0  # seconds; a host boots and serves in 30


def docker(*words: str) -> str:
    """Run a command of the engine that carries the hosts, and return what it prints."""
    done = subprocess.run(
        ["docker", "--host", f"unix://{SOCKET}", *words], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def on(host: str, *words: str) -> str:
    """Run a command on a host, and return what it prints."""
    return docker("exec", host, *words)


def address(host: str) -> str:
    """Return a host's IP address."""
    return docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", host)


@functools.cache
def gateway_address() -> str:
    """Return the gateway's IP address; it is the one host that nothing happens to."""
    return address(GATEWAY)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, and fail if it does not come true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.5)


def states() -> dict[str, str]:
    """Return what the gateway thinks of each server, such as `UP`, `DOWN`, `DRAIN`."""
    # By the network: this is asked twice a second for minutes, and `docker exec` costs a hundred times as much.
    answer = httpx2.get(f"http://{gateway_address()}:8404/stats;csv", trust_env=False).raise_for_status()
    rows = csv.DictReader(answer.text.removeprefix("# ").splitlines())
    servers = [row for row in rows if row["pxname"] == "ocr" and row["svname"] != "BACKEND"]
    return {row["svname"]: row["status"].split(" ")[0] for row in servers}


def all_up(*servers: str) -> bool:
    """Tell whether the gateway uses these servers, all of them if none is named."""
    found = states()
    return all(found.get(name) == "UP" for name in servers or found)


def drained() -> list[str]:
    """Return which servers the gateway was told to drain since it runs, in that order."""
    journal = on(GATEWAY, "journalctl", "--unit=dots-ocr-gateway", "--output=cat", "--no-pager")
    return re.findall(r"^Server ocr/(\S+) enters drain state", journal, re.MULTILINE)


def image(host: str) -> str:
    """Return the identity of the image that a host's server runs."""
    return on(host, "docker", "inspect", "--format", "{{.Image}}", "dots-ocr")


def play(playbook: str, variables: str = "{}", *, limit: str = "all") -> tuple[int, str]:
    """Run a playbook for the whole fleet, or a part of it; return its status and what it printed, in one line."""
    options = [f"--inventory={inventory}" for inventory in (SCENARIO / "inventory", SCENARIO / "further.ini")]
    # Molecule has colours forced.
    settings = {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"}
    done = subprocess.run(
        ["ansible-playbook", playbook, *options, "--limit", limit, "--extra-vars", variables],
        cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, env={**os.environ, **settings},
    )  # fmt: skip
    return done.returncode, " ".join(done.stdout.split())


def recap(output: str) -> dict[str, tuple[int, int]]:
    """Return {host: (changed, failed)} from what `play` returned."""
    found = re.findall(r"(\S+) : ok=\d+ changed=(\d+) unreachable=\d+ failed=(\d+)", output)
    return {host: (int(changed), int(failed)) for host, changed, failed in found}
