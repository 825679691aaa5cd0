"""What a part of the tests takes of the processor, with the hosts that it starts."""

from __future__ import annotations

import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rehearsal.engine import LABEL

CGROUPS = Path("/sys/fs/cgroup")
# Where the kernel counts for a container: version 1, version 2, version 2 with systemd; nanoseconds or microseconds.
PLACES = (
    ("cpuacct/docker/{}/cpuacct.usage", 1e9),
    ("docker/{}/cpu.stat", 1e6),
    ("system.slice/docker-{}.scope/cpu.stat", 1e6),
)
PAUSE = 5.0  # seconds between two looks: what a host takes after the last one before its end is not seen


class Meter:
    """Adds up the CPU seconds of the rehearsal's hosts whose names begin so, over all their lives."""

    def __init__(self, beginning: str) -> None:
        """Begin to count."""
        self.beginning = beginning
        self.before = self._read()
        self.seen = Counter(self.before)

    def look(self) -> None:
        """Take what was used until now."""
        for host, used in self._read().items():
            if used < self.seen[host]:  # it was started anew
                self.before[host] -= self.seen[host]
            self.seen[host] = used

    def seconds(self) -> float:
        """Return the CPU seconds since the beginning."""
        self.look()
        return sum(self.seen.values()) - sum(self.before.values())

    def _read(self) -> Counter[str]:
        command = ["docker", "ps", "--no-trunc", "--filter", f"label={LABEL}", "--format", "{{.ID}} {{.Names}}"]
        rows = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        hosts = [row.split() for row in rows]
        return Counter({ident: used(ident) for ident, name in hosts if name.startswith(self.beginning)})


def used(container: str) -> float:
    """Return the CPU seconds of a container since its start; 0 where the kernel does not tell."""
    for place, unit in PLACES:
        file = CGROUPS / place.format(container)
        if file.exists():
            return int(file.read_text().split()[1 if file.name == "cpu.stat" else 0]) / unit
    return 0.0


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


def processes() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
