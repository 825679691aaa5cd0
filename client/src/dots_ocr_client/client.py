"""The clients that programs use: `AsyncDotsOCR`, and `DotsOCR` for code that is not asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, aclosing
from typing import Final, NoReturn, TypedDict, Unpack

from .chain.fallback import Chain, OnUnavailable
from .chain.pipeline import AHEAD, deliver
from .engines.admission import CAP
from .engines.base import Engine, Task
from .engines.defaults import make_engines
from .errors import AllEnginesFailed, InputError
from .loop_thread import LoopThread
from .pages.documents import OpenDocument, Pages, Source, describe, parse_pages
from .pages.rasterizer import Rasterizer
from .prompts import MODES, Mode
from .results import Box, Document, FailedPage, Page

# For one page and all engines together, in seconds; a busy GPU takes 10 to 30 s for a full page.
DEFAULT_TIMEOUT: Final = 120.0


class ClientOptions(TypedDict, total=False):
    """Server, engines and patience; see `AsyncDotsOCR`."""

    api_key: str | None
    model: str
    engines: Sequence[Engine] | None
    timeout: float
    max_in_flight: int
    on_unavailable: OnUnavailable
    max_wait: float | None


class PageOptions(TypedDict, total=False):
    """How to read; see `AsyncDotsOCR.read`."""

    mode: Mode
    password: str | None
    box: Box | tuple[int, int, int, int] | None
    question: str | None
    dpi: int | None


class ReadOptions(PageOptions, total=False):
    """How to read, and which pages."""

    pages: Pages


class AsyncDotsOCR(AbstractAsyncContextManager["AsyncDotsOCR"]):
    """Reads documents: with dots.ocr on a vLLM server, or with the next engine that can.

    It belongs to one event loop, and may do any number of things at once there: they share its limits. Close it, or use
    it in an ``async with`` statement.

    Example:
        ::

            async with AsyncDotsOCR() as ocr:
                document = await ocr.read("invoice.pdf")
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str = "dots.ocr",
        engines: Sequence[Engine] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_in_flight: int = CAP,
        on_unavailable: OnUnavailable = "fallback",
        max_wait: float | None = None,
    ) -> None:
        """Choose server, engines and patience; nothing is sent yet.

        Args:
            base_url: The server's address with ``/v1``. Default: ``DOTS_OCR_BASE_URL`` of the environment, or else
                ``http://127.0.0.1:8000/v1``. Its ``user:password@``, if any, go in the key's place.
            api_key: The server's key. Default: ``DOTS_OCR_API_KEY`` of the environment, or else none.
            model: One of the names that the server serves.
            engines: Asked in this order, and closed with this client. Default: those of `make_engines`: vLLM, Qwen2-VL,
                a PDF's own text, Tesseract (English). With engines of your own the three arguments above are not used.
            timeout: For one page and all engines together, in seconds of their work; waiting for a turn among other
                pages does not count. While others stand behind an engine, it gets three quarters of what is left.
            max_in_flight: Pages at the server at once, at most; how many it really takes is found out.
            on_unavailable: What to do with a page whose engine is not there: ask the next one (``fallback``), wait
                until it is back (``wait``; a restart of vLLM takes minutes), or give the page up (``fail``).
            max_wait: Seconds that a page waits for an engine that went away. Default: 10, or 1,800 with ``wait``.

        Raises:
            ConfigurationError: The base URL is not an http or https URL.
            InvalidKey: The key can be none.
            ValueError: A time or `max_in_flight` is not positive, or there are no engines.
        """
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight!r}")
        if engines is None:
            engines = make_engines(base_url=base_url, api_key=api_key, model=model, max_in_flight=max_in_flight)
        self.max_in_flight = max_in_flight
        self._chain = Chain(engines, timeout, on_unavailable, max_wait)
        self._rasterizer = Rasterizer()
        self._openings = asyncio.Semaphore(self._rasterizer.workers)
        self._turns = asyncio.Semaphore(max(2 * self._rasterizer.workers, round(AHEAD * max_in_flight)))

    async def read(self, document: Source, **options: Unpack[ReadOptions]) -> Document:
        """Read a document.

        Args:
            document: A path, the bytes of a file, a file object, a ``data:`` URL, or a PIL image.
            mode: What to read; `dots_ocr_client.prompts.MODES` has them all.
            pages: Which pages; default: all.
            password: Of an encrypted PDF. Default: ``DOTS_OCR_PASSWORD`` of the environment. It is written nowhere.
            box: For the mode ``grounding``: left, top, right and bottom in pixels of the page, as the boxes of results.
            question: For the mode ``general`` of dots.mocr.
            dpi: At which pages of a PDF are drawn, up to the model's limit. Default: 200, or more for a page whose
                images or smallest type need it.

        Returns:
            The pages in order. One that failed is a `FailedPage` among them; look at ``failures``.

        Raises:
            InputError: The document cannot be read by any engine.
            ConfigurationError: Wrong base URL, model or API key; no other engine is asked.
            AllEnginesFailed: Not one page could be read.
            ValueError: There is no such mode, or it lacks its box or question; or `dpi` is not positive.
        """
        async with aclosing(self.stream(document, **options)) as stream:
            return whole(document, [page async for page in stream])

    async def read_page(self, image: Source, **options: Unpack[PageOptions]) -> Page:
        """Read an image, or any other document of one page; arguments and errors are those of `read`."""
        _task(options)  # before anything is opened
        with await self.open(image, password=options.get("password")) as opened:
            if len(opened.numbers) != 1:
                raise InputError(f"{opened.name} has {len(opened.numbers)} pages, not one: use read()")
            async with aclosing(self.stream(opened, **options)) as results:
                page = await anext(results)
        return page if isinstance(page, Page) else _raise(page)

    async def open(self, document: Source, *, pages: Pages = None, password: str | None = None) -> OpenDocument:
        """Open a document as soon as a process is free for it; `stream` takes it, once or more. Close it afterwards.

        Raises:
            InputError: The document cannot be read by any engine.
        """
        async with self._openings:  # the others wait here, not in front of the pages of documents that are open
            return await self._rasterizer.open(document, pages, password=password)

    async def stream(
        self, document: Source | OpenDocument, **options: Unpack[ReadOptions]
    ) -> AsyncGenerator[Page | FailedPage, None]:
        """Read a document and yield its pages as they finish, in any order.

        Close the generator if you stop early (``contextlib.aclosing``); that cancels what is still at the server.
        Arguments and errors are those of `read`, but a page that fails never raises. What `open` returned stays open.
        """
        task, pages = _task(options), options.get("pages")
        with ExitStack() as ours:
            if not isinstance(document, OpenDocument):
                document = ours.enter_context(await self.open(document, pages=pages, password=options.get("password")))
                pages = None  # they are its numbers
            numbers = document.numbers if pages is None else parse_pages(pages, document.page_count, document.name)
            document.dpi = options.get("dpi") or document.dpi
            draw = self._rasterizer.draw
            async with aclosing(deliver(document, numbers, draw, self._chain, task, self._turns)) as results:
                async for page in results:
                    yield page

    async def aclose(self) -> None:
        """Close the connections and end the processes that draw; a second call does nothing."""
        await asyncio.to_thread(self._rasterizer.close)  # pages that are still asked for fail
        await self._chain.aclose()

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.aclose()


class DotsOCR(AbstractContextManager["DotsOCR"]):
    """`AsyncDotsOCR` for code that is not asynchronous.

    It may be used by several threads, and inside a running event loop (which it blocks). Close it, or use it in a
    ``with`` statement.

    Example:
        ::

            with DotsOCR() as ocr:
                print(ocr.read("invoice.pdf").markdown())
    """

    def __init__(self, base_url: str | None = None, **options: Unpack[ClientOptions]) -> None:
        """Take the arguments of `AsyncDotsOCR`; nothing is sent yet."""
        self._client = AsyncDotsOCR(base_url, **options)
        self._loop = LoopThread()

    def read(self, document: Source, **options: Unpack[ReadOptions]) -> Document:
        """Read a document; see `AsyncDotsOCR.read`."""
        return self._loop.run(self._client.read(document, **options))

    def read_page(self, image: Source, **options: Unpack[PageOptions]) -> Page:
        """Read an image, or any other document of one page; see `AsyncDotsOCR.read_page`."""
        return self._loop.run(self._client.read_page(image, **options))

    def stream(self, document: Source, **options: Unpack[ReadOptions]) -> Iterator[Page | FailedPage]:
        """Read a document and yield its pages as they finish, in any order; see `AsyncDotsOCR.stream`."""
        stream = self._client.stream(document, **options)
        try:
            while (page := self._loop.run(_next(stream))) is not None:
                yield page
        finally:
            if not self._loop.closed:  # closing has ended the stream already
                self._loop.run(stream.aclose())

    def close(self) -> None:
        """Close connections and stop the thread behind this client; a second call does nothing."""
        self._loop.close(self._client.aclose())

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()


async def _next(stream: AsyncGenerator[Page | FailedPage, None]) -> Page | FailedPage | None:
    return await anext(stream, None)


def _task(options: PageOptions) -> Task:
    mode, box, question = options.get("mode", "layout"), options.get("box"), options.get("question")
    if (dpi := options.get("dpi")) is not None and dpi < 1:
        raise ValueError(f"dpi must be at least 1, not {dpi!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    if (mode == "grounding") != (box is not None):
        raise ValueError("the mode 'grounding' needs a box, and only that mode takes one")
    if (mode == "general") != bool(question):
        raise ValueError("the mode 'general' needs a question, and only that mode takes one")
    if box is not None:
        box = Box(*box)
        if not (0 <= box.left < box.right and 0 <= box.top < box.bottom):
            raise ValueError(f"{tuple(box)} is not a box: give left, top, right and bottom in pixels")
    return Task(mode, box, question)


def whole(source: Source, pages: Iterable[Page | FailedPage]) -> Document:
    """Return the document of these pages, in their order; raise what became the first, if all failed."""
    results = sorted(pages, key=lambda page: page.number)
    failures = [page for page in results if isinstance(page, FailedPage)]
    if failures and len(failures) == len(results):
        _raise(failures[0])
    return Document(describe(source), tuple(results))


def _raise(failure: FailedPage) -> NoReturn:
    """Raise what became a failed page, for a document of which nothing else is left."""
    if failure.error == InputError.__name__:
        raise InputError(failure.reason)
    raise AllEnginesFailed(failure.number, failure.attempts)
