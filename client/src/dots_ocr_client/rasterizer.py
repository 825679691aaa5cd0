"""Pages drawn side by side, those of PDFs in processes of their own, which also read their text layers.

PDFium is not thread-safe, so threads would not help. A page that crashes it, loops or wants all memory loses its
process, and nothing else. Worker processes of the standard library and of anyio run their parent's main program again,
which a script without ``if __name__ == "__main__"`` does not expect; these import only this module, `documents` and
`pdf_text`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any, Final, TypeVar

from . import documents, pdf_text
from .documents import PageImage, PageReference
from .errors import InputError
from .pdf_text import TextLayer

Result = TypeVar("Result")

MAX_WORKERS: Final = 8
"""By default; our own choice: together they draw more pages than one server takes in."""
WORKER_MEMORY: Final = 2 * 2**30
"""Address space of a worker in bytes; our own choice, several times what the largest page needs."""
IDLE_SECONDS: Final = 10
"""After which a worker closes its document, so that the space of a removed temporary file becomes free."""

_MAX_ANSWER = 64 * 2**20  # bytes; a page of MAX_PIXELS that cannot be compressed takes 34 MB
# By the name that this module was imported under: an application may have a dots_ocr_client of its own.
_BOOT = f"import sys, importlib; sys.path[:] = sys.argv[1:]; importlib.import_module({__name__!r})._serve()"


class Rasterizer:
    """Draws pages in a few processes, which it starts when they are needed. It belongs to one event loop.

    Attributes:
        workers: Pages at once, at most.
    """

    def __init__(self, workers: int | None = None) -> None:
        """Choose the number of pages drawn at once.

        Args:
            workers: By default the processors that this process may use, at most `MAX_WORKERS`.

        Raises:
            ValueError: ``workers`` is not positive.
        """
        self.workers = min(_processors(), MAX_WORKERS) if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"at least one worker is needed, not {workers}")
        self._slots = asyncio.Semaphore(self.workers)
        self._threads = ThreadPoolExecutor(self.workers, "dots-ocr-draw")
        self._idle: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, self._idle, self._threads)

    async def draw(self, reference: PageReference, seconds: float = 60) -> PageImage:
        """Draw a page as soon as a worker is free. Cancelling this ends the worker.

        Args:
            reference: The page.
            seconds: How long drawing may take, not counting the wait for a worker.

        Raises:
            InputError: The page cannot be drawn, crashes its worker, or takes too long. Other pages are not affected.
        """
        return await self._run(_draw, reference, seconds, "drawn")

    async def read_text(self, reference: PageReference, seconds: float = 60) -> TextLayer:
        """Read the text layer of a PDF's page, as `draw` draws it.

        Raises:
            InputError: As for `draw`.
        """
        return await self._run(_read_text, reference, seconds, "read")

    async def _run(
        self,
        job: Callable[[_Worker | None, PageReference, float], Result],
        reference: PageReference,
        seconds: float,
        verb: str,
    ) -> Result:
        async with self._slots:
            worker = self._worker(reference, verb) if reference.in_process else None
            answered = False
            try:
                run = asyncio.get_running_loop().run_in_executor
                async with asyncio.timeout(seconds):  # wait_for() of Python 3.11 may swallow a cancellation
                    result = await run(self._threads, job, worker, reference, seconds)
                answered = True
                return result
            except InputError:
                answered = True
                raise
            except TimeoutError as error:
                raise InputError(f"{reference.label} cannot be {verb}: it takes longer than {seconds:g} s") from error
            finally:
                if worker is not None:
                    if answered and worker.alive and self._finalizer.alive:
                        self._idle.append(worker)
                    else:
                        worker.end()

    def close(self) -> None:
        """End the workers and wait for the threads behind them; otherwise they end with this object or the program."""
        self._finalizer()
        self._threads.shutdown()

    def _worker(self, reference: PageReference, verb: str) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            worker.end()
        try:
            return _Worker()
        except OSError as error:
            raise InputError(f"{reference.label} cannot be {verb}: no process can be started: {error}") from error


class _Worker:
    """A process that draws one page at a time. It ends when this process does, because its input ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, verb: str, reference: PageReference, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Have a page ``drawn`` or ``read``; return what `_answer` sends.

        Raises:
            InputError: It cannot be, or the process ended over it.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            pickle.dump((verb, reference, seconds), requests)
            requests.flush()
            fields = json.loads(answers.readline(_MAX_ANSWER))
            size = fields.pop("size")
            png = answers.read(min(size, _MAX_ANSWER))
            if len(png) < size:
                raise EOFError
        except (OSError, ValueError, EOFError) as error:  # BrokenPipeError; half an answer; closed by end()
            self.end(patience=5)
            status = self._process.returncode
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise InputError(f"{reference.label} cannot be {verb}: its process ended ({how})") from error
        if "error" in fields:
            raise InputError(fields["error"])
        return fields, png

    def end(self, patience: float = 0) -> None:
        """End the process, in whatever state it is; after some seconds of patience, which leave it its exit status."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not sent is lost
                pipe.close()


def _draw(worker: _Worker | None, reference: PageReference, seconds: float) -> PageImage:
    if worker is None:
        return documents.draw(reference)
    fields, png = worker.ask("drawn", reference, seconds)
    origin = reference if reference.kind == "pdf" else None
    return PageImage(**{**fields, "png": png, "warnings": tuple(fields["warnings"]), "origin": origin})


def _read_text(worker: _Worker | None, reference: PageReference, seconds: float) -> TextLayer:
    assert worker is not None, "only PDFs have a text layer, and they are for workers"
    return TextLayer.from_dict(worker.ask("read", reference, seconds)[0])


def _end(workers: list[_Worker], threads: ThreadPoolExecutor) -> None:
    for worker in workers:
        worker.end()
    workers.clear()
    threads.shutdown(wait=False, cancel_futures=True)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve() -> None:
    """Answer requests from standard input; this is what a worker runs."""
    requests = sys.stdin.buffer
    # The answers go where nothing else writes, whatever a library prints.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no copy of a document behind
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = WORKER_MEMORY if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    while True:
        if not select.select([requests], [], [], IDLE_SECONDS)[0]:
            documents.forget()
            select.select([requests], [], [])
        try:
            verb, reference, seconds = pickle.load(requests)
        except EOFError:
            return
        # Ends this process even inside PDFium, and even if the parent is gone; otherwise the parent is faster.
        signal.setitimer(signal.ITIMER_REAL, min(seconds, 10**6) + 1)
        _answer(answers, verb, reference)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(answers: IO[bytes], verb: str, reference: PageReference) -> None:
    """Do it and send the result, as a line of JSON and a PNG: a parent that unpickled it would trust PDFium."""
    fields: dict[str, Any]
    png = b""
    try:
        if verb == "read":
            fields = asdict(pdf_text.read(reference))
        else:
            page = documents.draw(reference)
            png = page.png
            fields = {name: getattr(page, name) for name in page.__slots__ if name not in ("png", "origin")}
    except InputError as error:
        fields = {"error": str(error)}
    except Exception as error:
        fields = {"error": f"{reference.label} cannot be {verb}: {type(error).__name__}: {error}"}
    answers.write(json.dumps({**fields, "size": len(png)}).encode() + b"\n" + png)
    answers.flush()
