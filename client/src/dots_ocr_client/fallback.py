"""The chain: one engine after the other, until one delivers or the time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

from .documents import PageImage
from .engines.base import Engine, Task
from .errors import AllEnginesFailed, DeadlineExceeded, EngineError, EngineMissing, ModeNotSupported
from .results import Attempt, Page

SHARE: Final = 0.75
"""Part of the remaining time that an engine may use while others stand behind it (our own choice). Without this a
server that hangs would use up the time in which Tesseract, at 2 to 4 s for a page, could have read it."""


async def read_page(
    engines: Sequence[Engine],
    page: PageImage,
    task: Task,
    timeout: float,
    started: Callable[[], None] = lambda: None,
) -> Page:
    """Read one page with the first engine that can.

    Args:
        engines: In the order in which they are to be tried.
        page: The page.
        task: What to read.
        timeout: For all engines together, in seconds. It is a hard limit: whoever is at work then is cancelled. Waiting
            for a slot of an engine does not count, because whoever holds the slot has a limit of its own.
        started: Called once, when the first engine has a slot for the page; not at all if none ever has.

    Raises:
        AllEnginesFailed: None could.
        ConfigurationError: The settings of one are wrong; those behind it are not tried.
    """
    left = timeout
    waiting = True
    attempts: list[Attempt] = []

    def note(engine: Engine, error: EngineError, seconds: float | None) -> None:
        skipped = seconds is None or isinstance(error, EngineMissing | ModeNotSupported)
        outcome: Literal["failed", "skipped"] = "skipped" if skipped else "failed"
        attempts.append(Attempt(engine.name, outcome, type(error).__name__, str(error), round(seconds or 0.0, 3)))

    for position, engine in enumerate(engines, start=1):
        if task.mode not in engine.modes:
            note(engine, ModeNotSupported(f"{engine.name} cannot read in the mode {task.mode!r}"), None)
            continue
        if left <= 0:
            note(engine, DeadlineExceeded(f"nothing was left of the {timeout:g} s for the page"), None)
            continue
        others = any(task.mode in other.modes for other in engines[position:])
        seconds = left * SHARE if others else left
        async with engine.limiter:
            if waiting:
                waiting = False
                started()
            begin = time.monotonic()
            failure: EngineError
            try:
                async with asyncio.timeout(seconds):
                    answer = await engine.read(page, task, seconds)
            except TimeoutError:
                failure = DeadlineExceeded(f"no answer within {seconds:.1f} s: look at its load, or allow more time")
            except EngineError as error:
                failure = error
            else:
                return Page(
                    number=page.number,
                    width=page.width,
                    height=page.height,
                    mode=answer.mode,
                    text=answer.text,
                    cells=answer.cells,
                    engine=engine.name,
                    model=answer.model,
                    seconds=round(time.monotonic() - begin, 3),
                    prompt_tokens=answer.prompt_tokens,
                    completion_tokens=answer.completion_tokens,
                    finish_reason=answer.finish_reason,
                    attempts=tuple(attempts),
                    warnings=(*page.warnings, *answer.warnings),
                )
            spent = time.monotonic() - begin
        left -= spent
        note(engine, failure, spent)
    raise AllEnginesFailed(page.number, tuple(attempts))
