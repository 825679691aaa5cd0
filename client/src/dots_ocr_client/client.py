"""The client that programs use."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from . import documents
from .engines.base import Engine
from .engines.tesseract import TesseractEngine
from .engines.vllm import VLLMEngine
from .fallback import read_page
from .prompts import PROMPTS, Mode
from .results import Document

DEFAULT_TIMEOUT: Final = 120.0
"""For one page and all engines together, in seconds; a busy GPU takes 10 to 30 s for a full page."""

T = TypeVar("T")


class DotsOCR:
    """Reads documents: first with dots.ocr on a vLLM server, then with Tesseract.

    It may be used by several threads, and inside a running event loop (which it blocks). Close it, or use it in a
    ``with`` statement.

    Example:
        ::

            with DotsOCR() as ocr:
                print(ocr.read("invoice.pdf").text)
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str = "dots.ocr",
        engines: Sequence[Engine] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """Choose server, engines and patience; nothing is sent yet.

        Args:
            base_url: The server's address with ``/v1``. Default: ``DOTS_OCR_BASE_URL`` of the environment, or else
                ``http://127.0.0.1:8000/v1``.
            api_key: The server's key. Default: ``DOTS_OCR_API_KEY`` of the environment, or else none.
            model: One of the names that the server serves.
            engines: Asked in this order, and closed with this client. Default: vLLM, then Tesseract (English). With
                engines of your own the three arguments above are not used.
            timeout: For one page and all engines together, in seconds. While others stand behind an engine, it gets
                three quarters of what is left.

        Raises:
            ConfigurationError: The base URL is not an http or https URL.
            ValueError: The timeout is not a positive number, or there are no engines.
        """
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        if engines is None:
            engines = (VLLMEngine(base_url, api_key=api_key, model=model), TesseractEngine())
        if not engines:
            raise ValueError("engines is empty: give at least one, or None for the default chain")
        self._engines = tuple(engines)
        self._timeout = timeout
        self._loop = _LoopThread()

    def read(self, document: documents.Source, *, mode: Mode = "text") -> Document:
        """Read one image or a one-page PDF.

        Args:
            document: A path, the bytes of a file, or a PIL image.
            mode: What to read; ``text`` is plain text in reading order.

        Returns:
            The text, and for the page which engine delivered it, and why others before it did not.

        Raises:
            InputError: The document cannot be read by any engine; none was asked.
            ConfigurationError: Wrong base URL, model or API key.
            AllEnginesFailed: No engine could read the page in the time allowed.
            ValueError: There is no such mode.
        """
        if mode not in PROMPTS:
            raise ValueError(f"mode must be one of {', '.join(map(repr, PROMPTS))}, not {mode!r}")
        pages = documents.load(document)
        results = [self._loop.run(read_page(self._engines, page, mode, self._timeout)) for page in pages]
        return Document(source=documents.describe(document), pages=tuple(results))

    def close(self) -> None:
        """Close connections and stop the thread behind this client; a second call does nothing."""
        self._loop.close(*(engine.aclose() for engine in self._engines))

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()


class _LoopThread:
    """An event loop in a thread of its own, started when first needed.

    The engines are asynchronous, because only cancellation ends a request or a program at a deadline for certain. A
    loop of our own lets the client stay synchronous, keep its connections, and work where another loop is running.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                work.close()
                raise RuntimeError("this client is closed: make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="dots-ocr", daemon=True)
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("this client was closed while it was reading") from None
        except BaseException:
            future.cancel()  # for Ctrl-C: do not leave the server at work
            raise

    def close(self, *last_work: Coroutine[Any, Any, None]) -> None:
        with self._lock:
            self._closed = True
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            for work in last_work:
                work.close()
            return
        asyncio.run_coroutine_threadsafe(_end(last_work), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(last_work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Cancel what is still running, then do the last work."""
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for work in last_work:
        await work
