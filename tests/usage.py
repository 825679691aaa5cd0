"""What a part of the tests takes of the processor, with the hosts that it starts."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rehearsal.engine import LABEL, SOCKET

CGROUPS = Path("/sys/fs/cgroup")
# Where the kernel counts for a container, also those inside hosts: version 1, version 2, version 2 with systemd.
PLACES = ("cpuacct/docker/*/cpuacct.usage", "docker/*/cpu.stat", "system.slice/docker-*.scope/cpu.stat")
PAUSE = 5.0  # seconds between two looks: what a host takes after the last one before its end is not seen


class Meter:
    """Adds up the CPU seconds of the rehearsal's hosts whose names begin so, and of the containers inside them."""

    def __init__(self, beginning: str) -> None:
        """Begin to count."""
        self.beginning = beginning
        self.total = 0.0
        self.seen = self._read()

    def look(self) -> None:
        """Add what was used since the last look."""
        for name, used in self._read().items():
            before = self.seen.get(name, 0.0)
            self.total += used - before if used >= before else used  # less: it was restarted
            self.seen[name] = used

    def _read(self) -> dict[str, float]:
        filters = json.dumps({"label": [LABEL], "name": [f"^/?{self.beginning}"]})
        listed = _ask(f"/containers/json?filters={quote(filters)}") or []
        hosts = [_ask(f"/containers/{host['Id']}/json") for host in listed]
        if not (roots := {str(host["State"]["Pid"]) for host in hosts if host}):
            return {}
        counts = {}
        for file in (file for place in PLACES for file in CGROUPS.glob(place)):
            with suppress(OSError):  # it has ended
                processes = " ".join(procs.read_text() for procs in file.parent.rglob("cgroup.procs")).split()
                if processes and roots & set(ancestors(processes[0])):
                    words = file.read_text().split()
                    counts[file.parent.name] = int(words[1]) / 1e6 if len(words) > 1 else int(words[0]) / 1e9
        return counts


class _Engine(http.client.HTTPConnection):
    """The API of the hosts' engine: the program `docker` takes five times as much of what is measured."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PAUSE)
        self.sock.connect(str(SOCKET))


def _ask(path: str) -> Any:
    """Return what the engine answers, nothing if it does not, or no longer has such a container."""
    try:
        with closing(_Engine("engine")) as engine:
            engine.request("GET", path)
            answer = engine.getresponse()
            return json.load(answer) if answer.status == 200 else None
    except OSError:
        return None


def ancestors(process: str) -> Iterator[str]:
    """Yield a process, its parent, and so on."""
    while process != "0":
        yield process
        process = re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)[1]  # type: ignore[index]


@contextmanager
def measured(beginning: str) -> Iterator[Meter]:
    """Look at hosts now and then while something runs."""
    meter, end = Meter(beginning), threading.Event()

    def watch() -> None:
        while not end.wait(PAUSE):
            meter.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        end.set()
        thread.join()
        meter.look()


def processes() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
