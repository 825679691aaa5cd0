"""A circuit breaker: leaves an engine alone that is not there, and finds out with a single probe when it is back.

Closed, every page is let through. After `FAILURES` in a row it opens: pages are refused at once, so that each of them
does not wait out the same timeout. When its pause is over, one page at a time is let in as a probe; if that fails the
next pause is twice as long. Then it closes, and the pages follow.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Final, Literal

FAILURES: Final = 3
"""In a row, until it opens (our own choice: one may be the page's fault, three are not)."""
PATIENCE: Final = 10.0
"""Seconds for which an engine that went away counts as one that will soon be back (our own choice: a short restart)."""
PAUSE: Final = 1.0
"""Seconds between two probes while patience lasts (our own choice: pages wait, and a probe costs little)."""
MAX_PAUSE: Final = 10.0
"""Seconds between two probes at most: how late the return of an engine is noticed. A vLLM server takes minutes to
start."""
JITTER: Final = 0.5
"""Each pause is shortened by up to this part, at random, so that many clients do not probe at the same moment."""

Clock = Callable[[], float]


class Breaker:
    """The state of one engine. It belongs to one event loop and holds no lock: its methods never wait."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Begin closed.

        Args:
            clock: Seconds that only ever grow.
        """
        self._clock = clock
        self._failures = 0
        self._pause = PAUSE
        self._probe_at: float | None = None
        self._probing = False
        self._age = 0
        self._reason = ""
        self._gone_at: float | None = None

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Whether pages pass, are refused, or are refused while one of them probes."""
        if self._probe_at is None:
            return "closed"
        return "half-open" if self._probing else "open"

    @property
    def age(self) -> int:
        """How often it has closed: tells a failure of now from one of a page that was sent before."""
        return self._age

    @property
    def seconds_left(self) -> float:
        """Until the next probe may begin; 0 if it may now, or the breaker is closed."""
        return 0.0 if self._probe_at is None else max(0.0, self._probe_at - self._clock())

    @property
    def gone_for(self) -> float:
        """Seconds since the engine was first found away; endless if it never was, or is there but hangs or fails."""
        return math.inf if self._gone_at is None else self._clock() - self._gone_at

    @property
    def reason(self) -> str:
        """Why it opened last, or why the last probe failed."""
        return self._reason

    def begin_probe(self) -> bool:
        """Tell whether the caller is to probe; only one is until it calls `close`, `open` or `abandon_probe`."""
        if self.state != "open" or self.seconds_left > 0:
            return False
        self._probing = True
        return True

    def abandon_probe(self) -> None:
        """Let another page probe: this one was cancelled."""
        self._probing = False

    def succeeded(self) -> None:
        """Note that the engine did its part, whatever came of the page."""
        self._failures = 0
        if self.state == "closed":  # otherwise a page that was sent before the engine went away
            self._gone_at = None

    def failed(self, age: int, reason: str, *, gone: bool = False) -> None:
        """Note that the engine was not there, and open after `FAILURES` of these in a row.

        Args:
            age: What `age` was when the page was let through.
            reason: For those that are turned away.
            gone: It could not be reached, or broke its answer off.
        """
        if self.state != "closed" or age != self._age:
            return
        if gone and (self._gone_at is None or not self._failures):
            self._gone_at = self._clock()
        self._failures += 1
        if self._failures >= FAILURES:
            self._pause = PAUSE
            self.open(reason)

    def open(self, reason: str) -> None:
        """Refuse pages for a pause: after failures, or after a probe that failed, then longer each time.

        Args:
            reason: For those that are turned away.
        """
        self._reason = reason
        self._probing = False
        self._probe_at = self._clock() + self._pause * (1 - JITTER * random.random())
        if self.gone_for >= PATIENCE:
            self._pause = min(MAX_PAUSE, 2 * self._pause)

    def close(self) -> None:
        """Let pages through again."""
        self._probing = False
        self._probe_at = None
        self.succeeded()
        self._age += 1
