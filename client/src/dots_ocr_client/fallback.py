"""The chain: one engine after the other, until one delivers or the time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final, Literal

from .documents import PageImage
from .engines.base import Engine
from .errors import AllEnginesFailed, DeadlineExceeded, EngineError, EngineMissing
from .prompts import Mode
from .results import Attempt, Page

SHARE: Final = 0.75
"""Part of the remaining time that an engine may use while others stand behind it (our own choice). Without this a
server that hangs would use up the time in which Tesseract, at 2 to 4 s for a page, could have read it."""


async def read_page(engines: Sequence[Engine], page: PageImage, mode: Mode, timeout: float) -> Page:
    """Read one page with the first engine that can.

    Args:
        engines: In the order in which they are to be tried.
        page: The page.
        mode: What to read.
        timeout: For all engines together, in seconds. It is a hard limit: whoever is at work then is cancelled.

    Raises:
        AllEnginesFailed: None could.
        ConfigurationError: The settings of one are wrong; those behind it are not tried.
    """
    deadline = time.monotonic() + timeout
    attempts: list[Attempt] = []

    def note(engine: Engine, outcome: Literal["failed", "skipped"], error: EngineError, seconds: float) -> None:
        attempts.append(Attempt(engine.name, outcome, type(error).__name__, str(error), round(seconds, 3)))

    for position, engine in enumerate(engines, start=1):
        started = time.monotonic()
        seconds = deadline - started
        if seconds <= 0:
            note(engine, "skipped", DeadlineExceeded(f"nothing was left of the {timeout:g} s for the page"), 0)
            continue
        if position < len(engines):
            seconds *= SHARE
        try:
            async with asyncio.timeout(seconds):
                answer = await engine.read(page, mode, seconds)
        except TimeoutError:
            late = DeadlineExceeded(f"no answer within {seconds:.1f} s: look at its load, or allow more time")
            note(engine, "failed", late, time.monotonic() - started)
        except EngineMissing as error:
            note(engine, "skipped", error, time.monotonic() - started)
        except EngineError as error:
            note(engine, "failed", error, time.monotonic() - started)
        else:
            return Page(
                number=page.number,
                text=answer.text,
                engine=engine.name,
                model=answer.model,
                seconds=round(time.monotonic() - started, 3),
                finish_reason=answer.finish_reason,
                attempts=tuple(attempts),
                warnings=answer.warnings,
            )
    raise AllEnginesFailed(page.number, tuple(attempts))
