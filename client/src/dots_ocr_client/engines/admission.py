"""Which pages an engine is given, and when: how many at once, and none while it is not there.

How many pages an engine may be given at once, its `Limiter` finds out by trying, as TCP does for a connection.
The limit starts at what any server of this project takes in, and is halved when the server says that it is overloaded;
from then on it grows by one per round. A larger burst would be worse than useless: a vLLM server spends seconds on
preparing the images of pages that it then turns away. A server that was away and is back begins with few pages, and the
limit grows with each page that is read (slow start, as TCP: it doubles about once per round trip).

An engine that is not there is left alone by its `Breaker`, which finds out with a single probe when it is back.
Closed, every page is let through. After `FAILURES` in a row it opens: pages are refused at once, so that each of them
does not wait out the same timeout. When its pause is over, one page at a time is let in as a probe; if that fails the
next pause is twice as long. Then it closes, and the pages follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable
from typing import Final, Literal, Self

# Pages at once in the beginning. Our own choice: the smallest GPU server of this project takes 40 before it turns any
# away. Whoever starts with less loses a whole round of the server's time in finding out.
START: Final = 32
AGAIN: Final = 4  # the same for a server that is back: it may have gone under its load (our own choice)
CAP: Final = 32  # pages at once at most; upstream advises 32 to 128, and a single GPU gains little beyond
# Seconds after a halving in which further complaints are taken for the same overload: they come from pages that were
# sent before it.
SAME_OVERLOAD: Final = 1.0

FAILURES: Final = 3  # in a row, until it opens (our own choice: one may be the page's fault, three are not)
# Seconds for which an engine that went away counts as one that will soon be back (our own choice: a short restart).
PATIENCE: Final = 10.0
# Seconds between two probes while patience lasts (our own choice: pages wait, and a probe costs little).
PAUSE: Final = 1.0
# Seconds between two probes at most: how late the return of an engine is noticed. A vLLM server takes minutes to start.
MAX_PAUSE: Final = 10.0
# Each pause is shortened by up to this part, at random, so that many clients do not come back at the same moment.
JITTER: Final = 0.5

Clock = Callable[[], float]


class Limiter:
    """Slots for pages in flight; use it in an ``async with`` statement to hold one.

    It belongs to one event loop. First come, first served.

    Attributes:
        in_flight: Slots that are held.
    """

    def __init__(self, start: int = START, cap: int = CAP) -> None:
        """Choose the limits.

        Args:
            start: Slots in the beginning.
            cap: Slots at most. With ``start == cap`` the limit only ever changes for an overload.

        Raises:
            ValueError: Not ``1 <= start <= cap``.
        """
        if not 1 <= start <= cap:
            raise ValueError(f"the limits must be 1 <= start <= cap, not {start} and {cap}")
        self._start = start
        self._cap = cap
        self._limit = float(start)
        self._slow_start = True
        self.in_flight = 0
        self._slots = asyncio.Semaphore(start)
        self._there_are = start  # slots, free or held: for a while more than the limit, after it was lowered
        self._halved_at = float("-inf")

    @property
    def limit(self) -> int:
        """Slots at present."""
        return int(self._limit)

    def succeeded(self) -> None:
        """Note a page that the engine read: the limit grows, if it was what kept others waiting."""
        if self.in_flight >= self.limit or self._slots.locked():
            self._limit = min(self._cap, self._limit + (1 if self._slow_start else 1 / self._limit))
            if self._there_are < self.limit:
                self._there_are += 1
                self._slots.release()

    def overloaded(self) -> None:
        """Note that the engine has too much to do: the limit is halved."""
        now = time.monotonic()
        if now - self._halved_at >= SAME_OVERLOAD:
            self._halved_at = now
            self._slow_start = False
            self._limit = max(1.0, self._limit / 2)

    def restart(self) -> None:
        """Begin anew with few slots: whatever was found out, was found out about another state of the engine."""
        self._limit = float(min(AGAIN, self._start, self._limit))
        self._slow_start = True

    async def __aenter__(self) -> Self:
        """Wait for a slot."""
        await self._slots.acquire()
        while self._there_are > self.limit:
            self._there_are -= 1
            await self._slots.acquire()
        self.in_flight += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give the slot back."""
        self.in_flight -= 1
        if self._there_are > self.limit:
            self._there_are -= 1
        else:
            self._slots.release()


class Breaker:
    """The state of one engine. It belongs to one event loop and holds no lock: its methods never wait."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Begin closed; the clock's seconds only ever grow."""
        self._clock = clock
        self._failures = 0
        self._pause = PAUSE
        self._probe_at: float | None = None
        self._probing = False
        self.age = 0
        self.reason = ""
        self._gone_at: float | None = None

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Whether pages pass, are refused, or are refused while one of them probes."""
        if self._probe_at is None:
            return "closed"
        return "half-open" if self._probing else "open"

    @property
    def seconds_left(self) -> float:
        """Until the next probe may begin; 0 if it may now, or the breaker is closed."""
        return 0.0 if self._probe_at is None else max(0.0, self._probe_at - self._clock())

    @property
    def gone_for(self) -> float:
        """Seconds since the engine was first found away; endless if it never was, or is there but hangs or fails."""
        return math.inf if self._gone_at is None else self._clock() - self._gone_at

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

        `age` is what it was when the page was let through; `gone`: it could not be reached, or broke its answer off.
        """
        if self.state != "closed" or age != self.age:
            return
        if gone and (self._gone_at is None or not self._failures):
            self._gone_at = self._clock()
        self._failures += 1
        if self._failures >= FAILURES:
            self._pause = PAUSE
            self.open(reason)

    def open(self, reason: str) -> None:
        """Refuse pages for a pause: after failures, or after a probe that failed, then longer each time."""
        self.reason = reason
        self._probing = False
        self._probe_at = self._clock() + self._pause * (1 - JITTER * random.random())
        if self.gone_for >= PATIENCE:
            self._pause = min(MAX_PAUSE, 2 * self._pause)

    def close(self) -> None:
        """Let pages through again."""
        self._probing = False
        self._probe_at = None
        self.succeeded()
        self.age += 1


def turn(turns: asyncio.Semaphore) -> Callable[..., None]:
    """Return what gives a place among the pages that are drawn ahead back, once, whatever it is called with."""
    place = contextlib.ExitStack()
    place.callback(turns.release)
    return lambda *_: place.close()
