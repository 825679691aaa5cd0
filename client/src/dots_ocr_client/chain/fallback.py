"""The chain: one engine after the other, until one delivers or the time is up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

from .. import errors
from ..engines.admission import PATIENCE, Breaker
from ..engines.base import Answer, Engine, Task
from ..pages.documents import PageImage
from ..results import Attempt, Box, Page

# Part of the remaining time that an engine may use while others stand behind it (our own choice). Without this a server
# that hangs would use up the time in which Tesseract, at 2 to 4 s for a page, could have read it.
SHARE: Final = 0.75
# How long a probe may take: a server that is there tells its health at once, however busy it is.
PROBE_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.25  # how long a page that waits for an engine leaves it alone at least
# How long a page waits for an engine to come back with ``wait`` at most, in seconds: as long as this project's servers
# may take to start (``dots_ocr_server_ready_timeout``).
MAX_WAIT: Final = 1800.0
# After a page failed more often with an engine that was there again, the page is to blame (our own choice).
RETURNS: Final = 3

# What to do with a page whose engine is not there: wait for it, ask the next engine, or give the page up.
OnUnavailable = Literal["wait", "fallback", "fail"]
Draw = Callable[[], Awaitable[PageImage]]


@dataclass(slots=True)
class _Clock:
    """The time of one page. It runs only while an engine works: whoever holds a slot has a limit of its own."""

    page: PageImage
    draw: Draw | None
    left: float
    started: Callable[[], None] | None
    wait_until: float = math.inf
    returns: int = 0
    attempts: dict[str, Attempt] = field(default_factory=dict)

    async def draw_for(self, engine: Engine) -> None:
        if self.draw is not None and getattr(engine, "pixels", True):
            self.page, self.draw = await self.draw(), None


class Chain:
    """Reads pages with the first engine that can. It belongs to one event loop.

    Each engine has a circuit breaker, which all pages share: what one of them finds out, the others need not.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        timeout: float,
        on_unavailable: OnUnavailable = "fallback",
        max_wait: float | None = None,
    ) -> None:
        """Choose engines and patience.

        Args:
            engines: In the order in which they are to be asked.
            timeout: For one page and all engines together, in seconds. It is a hard limit: whoever is at work then is
                cancelled. Waiting for a slot, or for an engine to come back, does not count.
            on_unavailable: What to do with a page whose engine is not there. ``wait`` starts its time anew when the
                engine is back. It is about engines, not about pages: an answer of no use always leads to the next one.
            max_wait: With ``wait``: for each page in all, in seconds; after that it fails. Default: `MAX_WAIT`. With
                ``fallback``: from when the engine went away until it counts as down. Default: `admission.PATIENCE`.

        Raises:
            ValueError: There are no engines, a time is none, or there is no such `OnUnavailable`.
        """
        if not engines:
            raise ValueError("engines is empty: give at least one, or None for the default chain")
        if max_wait is None:
            max_wait = MAX_WAIT if on_unavailable == "wait" else PATIENCE
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        if not 0 <= max_wait < math.inf:
            raise ValueError(f"max_wait must be a number of seconds, not {max_wait!r}")
        if on_unavailable not in get_args(OnUnavailable):
            known = ", ".join(map(repr, get_args(OnUnavailable)))
            raise ValueError(f"on_unavailable must be one of {known}, not {on_unavailable!r}")
        self.engines = tuple(engines)
        self._breakers = [Breaker() for _ in engines]
        self._timeout = timeout
        self._on_unavailable = on_unavailable
        self._max_wait = max_wait

    async def ask(
        self, page: PageImage, task: Task, started: Callable[[], None] | None = None, draw: Draw | None = None
    ) -> Page:
        """Read one page.

        Args:
            page: If `draw` is given, `PageImage.undrawn`; what it raises is passed on.
            task: What to read.
            started: Called once, when the first engine has a slot for the page; not at all if none ever has.
            draw: Draws the page.

        Raises:
            AllEnginesFailed: No engine could, or none was to be asked any more.
            ConfigurationError: The settings of one are wrong; those behind it are not tried.
        """
        clock = _Clock(page, draw, self._timeout, started)
        for position, (engine, breaker) in enumerate(zip(self.engines, self._breakers, strict=True), start=1):
            others = any(task.mode in other.modes for other in self.engines[position:])
            while True:
                before = clock.left
                failure: errors.EngineError
                try:
                    answer = await self._ask_one(engine, breaker, task, clock, others=others)
                except errors.EngineError as error:
                    failure = error
                else:
                    empty = not (answer.text or answer.cells) and bool(clock.page.png)
                    if empty and await asyncio.to_thread(clock.page.is_blank):
                        answer = replace(answer, engine="", model="")
                    return _page(clock.page, engine, answer, before - clock.left, tuple(clock.attempts.values()))
                _note(clock, engine, failure, before - clock.left)
                # One deadline may be the page's fault, several are not.
                hangs = isinstance(failure, errors.DeadlineExceeded) and breaker.state != "closed"
                if not hangs and not isinstance(failure, errors.ServerUnavailable):
                    break
                if not await self._is_back(failure, breaker, clock):
                    if self._on_unavailable == "fallback":
                        break
                    raise errors.AllEnginesFailed(page.number, tuple(clock.attempts.values())) from failure
                clock.left = self._timeout
        raise errors.AllEnginesFailed(page.number, tuple(clock.attempts.values()))

    async def aclose(self) -> None:
        """Close the engines."""
        for engine in self.engines:
            await engine.aclose()

    async def _is_back(self, failure: errors.EngineError, breaker: Breaker, clock: _Clock) -> bool:
        """Wait until a page may ask again, perhaps as a probe; tell whether it may wait, and there was time enough."""
        patience = self._max_wait
        if self._on_unavailable == "fallback":
            there = breaker.state == "closed"
            clock.returns += there
            patience -= 0.0 if there else breaker.gone_for
            if not _is_gone(failure) or clock.returns > RETURNS:
                return False
        clock.wait_until = min(clock.wait_until, time.monotonic() + patience)
        while self._on_unavailable != "fail":
            pause = max(LOOK_SECONDS, breaker.seconds_left)
            if pause >= clock.wait_until - time.monotonic():
                return False
            await asyncio.sleep(pause)
            if breaker.state != "half-open" and breaker.seconds_left == 0:
                return True
        return False

    async def _ask_one(self, engine: Engine, breaker: Breaker, task: Task, clock: _Clock, *, others: bool) -> Answer:
        """Ask one engine."""
        if task.mode not in engine.modes:
            raise errors.ModeNotSupported(f"{engine.name} cannot read in the mode {task.mode!r}")
        if clock.left <= 0:
            raise errors.NotApplicable(f"nothing was left of the {self._timeout:g} s for the page")
        if others and engine.expected_seconds > clock.left:
            raise errors.NotApplicable(
                f"{engine.name} takes {engine.expected_seconds:g} s for a page or more, and {clock.left:.1f} s were "
                "left: allow more time (timeout=), or ask no other engine"
            )
        _refuse(breaker)
        if clock.started:  # while the page waits for its first engine
            await clock.draw_for(engine)
        async with engine.limiter:
            await clock.draw_for(engine)
            if clock.started:
                clock.started()
                clock.started = None
            if more_seconds := getattr(engine, "more_seconds", None):
                clock.left += await more_seconds()
            begin = time.monotonic()
            try:
                seconds = clock.left * SHARE if others else clock.left
                seconds -= await _admit(engine, breaker, min(PROBE_SECONDS, seconds))
                age = breaker.age
                try:
                    async with asyncio.timeout(seconds):
                        answer = await engine.read(clock.page, task, seconds)
                except TimeoutError:
                    message = f"no answer within {seconds:.1f} s: look at its load, or allow more time"
                    breaker.failed(age, message)
                    raise errors.DeadlineExceeded(message) from None
                except errors.Overloaded:
                    raise
                except (errors.ServerUnavailable, errors.DeadlineExceeded) as error:
                    breaker.failed(age, str(error), gone=_is_gone(error))
                    raise
                except errors.EngineError:
                    breaker.succeeded()
                    raise
                breaker.succeeded()
                return answer
            finally:
                clock.left -= time.monotonic() - begin


async def _admit(engine: Engine, breaker: Breaker, seconds: float) -> float:
    """Let a page through to its engine, if need be after a probe, which may take so many seconds; return what it took.

    Raises:
        CircuitOpen: The engine is not there, or another page is finding out whether it is.
        Unauthorized: It is there again, and refuses the key.
    """
    if not breaker.begin_probe():
        _refuse(breaker)
        return 0.0
    begin = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            await engine.probe(seconds)
    except errors.Unauthorized:
        breaker.abandon_probe()
        raise  # the engines behind this one would hide a wrong key on every page
    except (errors.EngineError, errors.ConfigurationError, TimeoutError) as error:
        reason = str(error) or f"no answer within {seconds:.1f} s"
        breaker.open(reason)
        raise errors.CircuitOpen(f"{engine.name} is not back: {reason}") from error
    except BaseException:
        breaker.abandon_probe()
        raise
    engine.limiter.restart()
    breaker.close()
    return time.monotonic() - begin


def _refuse(breaker: Breaker) -> None:
    """Refuse a page while the breaker is open and no probe is due."""
    was = "it was unavailable several times in a row"
    match breaker.state:
        case "half-open":
            raise errors.CircuitOpen(f"{was}; another page is finding out if it is back; last: {breaker.reason}")
        case "open" if (seconds := breaker.seconds_left) > 0:
            raise errors.CircuitOpen(f"{was}; it is asked again in {seconds:.1f} s; last: {breaker.reason}")


def _is_gone(failure: errors.EngineError) -> bool:
    """Tell whether the engine is away and may soon be back: it is not full, and does not fail over the page."""
    there = isinstance(failure, errors.Overloaded) or failure.status not in (None, 502, 503)
    return isinstance(failure, errors.ServerUnavailable) and failure.passing and not there


def _note(clock: _Clock, engine: Engine, error: errors.EngineError, seconds: float) -> None:
    """Keep why an engine did not deliver; of one that was asked again and again, the last real failure."""
    skipped = isinstance(
        error, errors.EngineMissing | errors.ModeNotSupported | errors.NotApplicable | errors.CircuitOpen
    )
    if isinstance(error, errors.CircuitOpen) and engine.name in clock.attempts:
        return
    clock.attempts[engine.name] = Attempt(
        engine.name,
        "skipped" if skipped else "failed",
        type(error).__name__,
        str(error),
        0.0 if skipped else round(seconds, 3),
    )


def _page(page: PageImage, engine: Engine, answer: Answer, seconds: float, attempts: tuple[Attempt, ...]) -> Page:
    width, height = answer.size or (page.width, page.height)
    return Page(
        number=page.number,
        width=width,
        height=height,
        mode=answer.mode,
        text=answer.text,
        # An engine of somebody else's may be careless, and what is not a result could not be read back.
        cells=tuple(
            cell if cell.box is None else replace(cell, box=Box(*cell.box).within(width, height))
            for cell in answer.cells
        ),
        engine=engine.name if answer.engine is None else answer.engine,
        model=answer.model,
        seconds=round(seconds, 3),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason,
        attempts=(*attempts, *answer.attempts),
        warnings=(*page.warnings, *answer.warnings),
        dpi=page.dpi or answer.dpi,
    )
