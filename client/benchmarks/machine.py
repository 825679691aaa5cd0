"""How busy the machine was with anything else: what was measured meanwhile is worth nothing, and is not printed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

LIMIT: Final = 0.1
"""Share of all processors that others may take on average; our own choice."""
LOOK_SECONDS: Final = 3.0
"""How long `refuse_if_busy` looks."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class BusyError(Exception):
    """Others took more of the processors than `LIMIT`; the message says how much, and what to do."""


def busy_seconds(stat: str) -> float:
    """Return the seconds of all processors together that were not idle, from the text of /proc/stat (proc(5)).

    What a hypervisor took away (steal) counts; guests are in user and nice already.
    """
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def own_seconds() -> float:
    """Return the seconds of this process, and of its children that have ended and were waited for."""
    return sum(os.times()[:4])


class Watch:
    """Looks at the processors from its making on; ask it when all processes of the measurement have ended."""

    def __init__(self) -> None:
        """Begin."""
        self._load = os.getloadavg()[0]
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return busy_seconds(Path("/proc/stat").read_text()), own_seconds(), time.monotonic()

    def others(self) -> float:
        """Return the share of all processors, from 0 to 1, that others took so far."""
        busy, own, seconds = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return others(busy, own, seconds)

    def record(self, limit: float = LIMIT) -> str:
        """Say how busy the machine was; stands under what was measured.

        Args:
            limit: Share of all processors that others may have taken.

        Raises:
            BusyError: They took more.
        """
        share = self.others()
        if share > limit:
            raise BusyError(
                f"others took {share:.0%} of the processors meanwhile, and {limit:.0%} is the limit. "
                "Fix: end what keeps them busy, and measure again"
            )
        return (
            f"Others took {share:.0%} of {os.cpu_count()} processors; load average at the beginning {self._load:.2f}."
        )


def others(busy: float, own: float, seconds: float) -> float:
    """Return the share of all processors that others took.

    Args:
        busy: Seconds that all processors together were not idle.
        own: Seconds of them that were for the measurement itself.
        seconds: How long it took.
    """
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def refuse_if_busy(limit: float = LIMIT) -> str:
    """Look at the machine for `LOOK_SECONDS`, before a measurement whose own processes are no children of this one.

    Raises:
        BusyError: As `Watch.record`.
    """
    watch = Watch()
    time.sleep(LOOK_SECONDS)
    return watch.record(limit)
