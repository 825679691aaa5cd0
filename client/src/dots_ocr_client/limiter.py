"""How many pages an engine may be given at once: found out by trying, as TCP does for a connection.

The limit starts at what any server of this project takes in, and is halved when the server says that it is overloaded;
from then on it grows by one per round. A larger burst would be worse than useless: a vLLM server spends seconds on
preparing the images of pages that it then turns away. A server that was away and is back begins with few pages, and the
limit grows with each page that is read (slow start, as TCP: it doubles about once per round trip).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from types import TracebackType
from typing import Final, Self

START: Final = 32
"""Pages at once in the beginning. Our own choice: the smallest GPU server of this project takes 40 before it turns any
away. Whoever starts with less loses a whole round of the server's time in finding out."""
AGAIN: Final = 4
"""The same for a server that is back: it may have gone under its load (our own choice)."""
CAP: Final = 32
"""Pages at once at most; upstream advises 32 to 128, and a single GPU gains little beyond."""
PATIENCE: Final = 1.0
"""Seconds after a halving in which further complaints are taken for the same overload: they come from pages that were
sent before it."""


class Limiter:
    """Slots for pages in flight; use it in an ``async with`` statement to hold one.

    It belongs to one event loop. First come, first served.
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
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved_at = float("-inf")

    @property
    def limit(self) -> int:
        """Slots at present."""
        return int(self._limit)

    @property
    def in_flight(self) -> int:
        """Slots that are held."""
        return self._in_flight

    def succeeded(self) -> None:
        """Note a page that the engine read: the limit grows, if it was what kept others waiting."""
        if self._in_flight >= self.limit or self._waiting:
            self._limit = min(self._cap, self._limit + (1 if self._slow_start else 1 / self._limit))
            self._wake()

    def overloaded(self) -> None:
        """Note that the engine has too much to do: the limit is halved."""
        now = time.monotonic()
        if now - self._halved_at >= PATIENCE:
            self._halved_at = now
            self._slow_start = False
            self._limit = max(1.0, self._limit / 2)

    def restart(self) -> None:
        """Begin anew with few slots: whatever was found out, was found out about another state of the engine."""
        self._limit = float(min(AGAIN, self._start, self._limit))
        self._slow_start = True

    async def __aenter__(self) -> Self:
        """Wait for a slot."""
        if self._in_flight < self.limit and not self._waiting:
            self._in_flight += 1
            return self
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # `_wake` may have passed over it already
                    self._waiting.remove(turn)
            else:  # given and not taken
                self._release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the slot back."""
        self._release()

    def _release(self) -> None:
        self._in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._in_flight < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)
