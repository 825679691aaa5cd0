"""The way of a document's pages: drawn (if need be) a little ahead of their turn, read, handed over as they finish."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final

from ..engines import admission
from ..engines.base import Task
from ..errors import AllEnginesFailed, ConfigurationError, InputError
from ..pages.documents import OpenDocument, PageImage, PageReference
from ..results import FailedPage, Page
from .fallback import Chain

# Pages drawn before their turn, as a part of those that may be in flight. Pages that were sent together come back
# together, and then as many others are wanted at once. They and the pages in flight are all that is in memory.
AHEAD: Final = 0.5
# Finished pages that may wait for a slow receiver; after that reading pauses. They hold text, not images.
BACKLOG: Final = 64

Draw = Callable[[PageReference], Awaitable[PageImage]]


async def deliver(
    document: OpenDocument, numbers: Sequence[int], draw: Draw, chain: Chain, task: Task, turns: asyncio.Semaphore
) -> AsyncGenerator[Page | FailedPage, None]:
    """Read pages of a document and yield them as they finish.

    The document stays open. Close the generator if you stop early.

    Args:
        document: Any.
        numbers: Which of its pages, counted from 1.
        draw: Draws one.
        chain: Reads one.
        task: What to read.
        turns: Pages that may be drawn and not yet be with an engine, of all documents; see `AHEAD`.

    Raises:
        ConfigurationError: Wrong base URL, model or API key; pages that are not finished are given up.
    """
    finished: asyncio.Queue[Page | FailedPage | None] = asyncio.Queue()
    places = asyncio.Semaphore(BACKLOG)  # for pages in the queue; its end always fits, even if nobody reads on

    async def finish(number: int, end_turn: Callable[..., None]) -> None:
        page: Page | FailedPage
        try:
            reference = document.reference(number)
            undrawn = PageImage.undrawn(reference)
            page = await chain.ask(undrawn, task, end_turn, lambda: draw(reference))
        except (InputError, AllEnginesFailed) as error:
            page = FailedPage(number, type(error).__name__, str(error), getattr(error, "attempts", ()))
        await places.acquire()
        finished.put_nowait(page)

    async def feed() -> None:
        wrong: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for number in numbers:
                    await turns.acquire()
                    end_turn = admission.turn(turns)
                    page = group.create_task(finish(number, end_turn))
                    page.add_done_callback(end_turn)  # also of one that is cancelled before it began
        except* ConfigurationError as errors:
            wrong = errors.exceptions[0]  # what is raised here, Python 3.11.2 hands on in a group
        finally:
            finished.put_nowait(None)
        if wrong is not None:
            raise wrong from None

    feeder = asyncio.create_task(feed())
    try:
        while (page := await finished.get()) is not None:
            places.release()
            yield page
        await feeder
    finally:
        feeder.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConfigurationError):
            await feeder
