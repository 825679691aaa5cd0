"""The way of a document's pages: drawn (if need be) a little ahead of their turn, read, handed over as they finish."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Final

from ..engines import admission
from ..engines.base import Task
from ..errors import AllEnginesFailed, ConfigurationError, InputError
from ..pages.documents import OpenDocument, PageImage, Source
from ..pages.rasterizer import Rasterizer
from ..results import FailedPage, Page
from .fallback import Chain

# Pages drawn before their turn, as a part of those that may be in flight. Pages that were sent together come back
# together, and then as many others are wanted at once. They and the pages in flight are all that is in memory.
AHEAD: Final = 0.5
# Finished pages that may wait for a slow receiver; after that reading pauses. They hold text, not images.
BACKLOG: Final = 64


class Pipeline:
    """Reads the pages of any number of documents at once; all share its limits."""

    def __init__(self, chain: Chain, max_in_flight: int) -> None:
        """Take the chain that reads the pages, and how many it may have at once."""
        self._chain = chain
        self._rasterizer = Rasterizer()
        self._openings = asyncio.Semaphore(self._rasterizer.workers)
        self._turns = asyncio.Semaphore(max(2 * self._rasterizer.workers, round(AHEAD * max_in_flight)))

    async def open(
        self, source: Source, pages: str | Iterable[int] | None = None, password: str | None = None
    ) -> OpenDocument:
        """Open a document; see `Rasterizer.open`."""
        async with self._openings:  # the others wait here, not in front of the pages of documents that are open
            return await self._rasterizer.open(source, pages, password=password)

    async def deliver(
        self, document: OpenDocument, task: Task, numbers: Sequence[int] | None = None
    ) -> AsyncGenerator[Page | FailedPage, None]:
        """Read pages of a document, by default those for which it was opened, and yield them as they finish.

        The document stays open. Close the generator if you stop early.

        Raises:
            ConfigurationError: Wrong base URL, model or API key; pages that are not finished are given up.
        """
        finished: asyncio.Queue[Page | FailedPage | None] = asyncio.Queue(BACKLOG)

        async def finish(number: int, end_turn: Callable[..., None]) -> None:
            page: Page | FailedPage
            try:
                reference = document.reference(number)
                undrawn = PageImage.undrawn(reference)
                page = await self._chain.ask(undrawn, task, end_turn, lambda: self._rasterizer.draw(reference))
            except InputError as error:
                page = FailedPage(number, type(error).__name__, str(error))
            except AllEnginesFailed as error:
                page = FailedPage(number, type(error).__name__, str(error), error.attempts)
            await finished.put(page)

        async def feed() -> None:
            wrong: BaseException | None = None
            try:
                async with asyncio.TaskGroup() as group:
                    for number in numbers or document.numbers:
                        await self._turns.acquire()
                        end_turn = admission.turn(self._turns)
                        page = group.create_task(finish(number, end_turn))
                        page.add_done_callback(end_turn)  # also of one that is cancelled before it began
            except* ConfigurationError as errors:
                wrong = errors.exceptions[0]  # what is raised here, Python 3.11.2 hands on in a group
            finally:
                await finished.put(None)
            if wrong is not None:
                raise wrong from None

        feeder = asyncio.create_task(feed())
        try:
            while (page := await finished.get()) is not None:
                yield page
            await feeder
        finally:
            feeder.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConfigurationError):
                await feeder

    async def aclose(self) -> None:
        """End the processes that draw; pages that are still asked for fail."""
        await asyncio.to_thread(self._rasterizer.close)
