"""Files opened and their pages drawn side by side, in processes with limits, which also read text layers of PDFs.

Whatever decodes a file may crash, loop or want all memory; PDFium is not thread-safe, and Pillow holds up all threads
while it decodes. Here a file that does so loses its process, and nothing else. Worker processes of the standard
library and of anyio run their parent's main program again, which a script without ``if __name__ == "__main__"`` does
not expect; these import only this module, `documents` and `pdf_text`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeVar

from PIL import Image

from ..errors import ConfigurationError, InputError
from ..loop_thread import LoopThread
from . import documents, pdf_text
from .documents import OpenDocument, PageImage, PageReference, Pages, Source
from .pdf_text import TextLayer

Result = TypeVar("Result")
Make = Callable[[dict[str, Any], bytes, PageReference], Result]  # of a worker's answer, its PNG and what was asked for

MAX_WORKERS: Final = 8  # by default; our own choice: together they draw more pages than one server takes in
# Address space of a worker in bytes; our own choice: the largest page takes up to 1.8 GiB (WebP without loss).
WORKER_MEMORY: Final = 2 * 2**30
# Of all memory that the workers may take together; the rest is for engines, and for what waits for them.
MEMORY_SHARE: Final = 0.5
# Of the processor that a single image may take; our own choice, several times what the largest page needs. Pages of
# PDFs, which may be drawings of a million lines, have only the limit of `Rasterizer.draw`.
IMAGE_SECONDS: Final = 20.0
# After which a worker closes its document, so that the space of a removed temporary file becomes free.
IDLE_SECONDS: Final = 10
# Of a worker's environment, for glibc (mallopt(3)): it keeps the memory of a page (A4: some 50 MB) for the next one.
# Getting it anew from the kernel, zeroed, took up to half of a page's time.
MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}

CGROUPS: Final = Path("/sys/fs/cgroup")

_LONGEST = 10**6  # seconds; system calls refuse more than they can count
_MAX_ANSWER = 64 * 2**20  # bytes; a page of MAX_PIXELS that cannot be compressed takes 34 MB
# By the name that this module was imported under: an application may have a dots_ocr_client of its own.
_BOOT = f"import sys, importlib; sys.path[:] = sys.argv[1:]; importlib.import_module({__name__!r})._serve()"


class Rasterizer:
    """Opens files and draws pages in a few processes, started when they are needed. It belongs to one event loop.

    Attributes:
        workers: Processes at once, at most.
        busy: How many of them are at work.
    """

    def __init__(self, workers: int | None = None) -> None:
        """Choose the number of pages drawn at once.

        By default it is that of the processors that this process may use, at most `MAX_WORKERS`, and as many as fit
        into `MEMORY_SHARE` of its memory; at least one.
        """
        self.workers = _default_workers() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"at least one worker is needed, not {workers}")
        self.busy = 0
        self._changed = time.monotonic()
        self._slots = asyncio.Semaphore(self.workers)
        self._threads = ThreadPoolExecutor(self.workers, "dots-ocr-draw")  # a file that hangs holds up no others
        self._idle: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, self._idle, self._threads)

    @property
    def full_for(self) -> float:
        """For how many seconds all workers have been busy, and none has finished anything."""
        return time.monotonic() - self._changed if self.busy == self.workers else 0.0

    async def open(
        self, source: Source, pages: Pages = None, seconds: float = 60, password: str | None = None
    ) -> OpenDocument:
        """Do what `documents.open_document` does, as soon as a worker is free. Cancelling this ends the worker.

        Raises:
            InputError: As for `documents.open_document`; or the document crashes the worker, or takes so many seconds.
            ConfigurationError: There is no Python to start workers with, as in a frozen application.
        """
        with contextlib.ExitStack() as failed:
            document = failed.enter_context(await asyncio.to_thread(documents.take, source, password))
            found = await self._run("opened", document.whole, seconds, documents.look_into, _found)
            await asyncio.to_thread(document.choose, pages, *found)
            failed.pop_all()
        return document

    async def draw(self, reference: PageReference, seconds: float = 60) -> PageImage:
        """Draw a page as soon as a worker is free, which then has so many seconds. Cancelling this ends the worker.

        Raises:
            InputError: The page cannot be drawn, crashes its worker, or takes too long. Other pages are not affected.
        """
        return await self._run("drawn", reference, seconds, documents.draw, _page)

    async def extract_text(self, reference: PageReference, seconds: float = 60) -> TextLayer:
        """Take the text layer out of a PDF's page, as `draw` draws it."""
        return await self._run(
            "read", reference, seconds, pdf_text.extract, lambda fields, *_: TextLayer.from_dict(fields)
        )

    async def _run(
        self,
        verb: str,
        reference: PageReference,
        seconds: float,
        here: Callable[[PageReference], Result],
        make: Make[Result],
    ) -> Result:
        """Have a worker do what would be done `here`, and `make` the result of its answer; see `_answer_to`."""
        async with self._slots:
            self.busy += 1
            self._changed = time.monotonic()
            worker, answered = None, False
            try:
                if reference.in_process:
                    worker = _worker(self._idle, reference, verb)
                    work = partial(worker.ask, verb, reference, seconds, make)
                else:
                    work = partial(here, reference)
                async with asyncio.timeout(seconds):  # wait_for() of Python 3.11 may swallow a cancellation
                    result = await asyncio.get_running_loop().run_in_executor(self._threads, work)
                answered = True
                return result
            except InputError:
                answered = True
                raise
            except TimeoutError as error:
                raise InputError(f"{reference.label} cannot be {verb}: {_too_long(seconds)}") from error
            finally:
                self.busy -= 1
                if worker and answered:
                    self._idle.append(worker)
                elif worker:
                    worker.end()
                if not self._finalizer.alive:
                    _end_all(self._idle)

    def close(self) -> None:
        """End the workers and wait for the threads behind them; otherwise they end with this object or the program."""
        self._finalizer()
        self._threads.shutdown()


@cache
def _for_threads() -> tuple[LoopThread, Rasterizer]:
    return LoopThread(), Rasterizer()


def open_document(
    source: Source, pages: Pages = None, seconds: float = 60, password: str | None = None
) -> OpenDocument:
    """Do what `Rasterizer.open` does, for code that is not asynchronous; any thread may call it."""
    loop, rasterizer = _for_threads()
    return loop.run(rasterizer.open(source, pages, seconds, password))


def draw(reference: PageReference, seconds: float = 60) -> PageImage:
    """Do what `Rasterizer.draw` does, for code that is not asynchronous; any thread may call it."""
    loop, rasterizer = _for_threads()
    return loop.run(rasterizer.draw(reference, seconds))


class _Worker:
    """A process that draws one page at a time. It ends when this process does, because its input ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, *sys.path],  # -P: nothing of the current directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**MALLOC, **{name: text for name, text in os.environ.items() if not name.startswith("DOTS_OCR_")}},
        )
        _workers.add(self)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, verb: str, reference: PageReference, seconds: float, make: Make[Result]) -> Result:
        """Have a page ``drawn`` or ``read``, or a document ``opened``; return what is made of `_answer_to`'s answer."""
        cannot = f"{reference.label} cannot be {verb}"
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            processor = IMAGE_SECONDS if reference.kind == "image" else 0.0
            pickle.dump((verb, reference, seconds, processor), requests)
            requests.flush()
            fields = json.loads(answers.readline(_MAX_ANSWER))
            size = fields.pop("size")
            if type(size) is not int or not 0 <= size <= _MAX_ANSWER:
                raise TypeError(f"a PNG of {size!r} bytes")
            png = answers.read(size)
            if len(png) < size:
                raise EOFError
            if "error" not in fields:
                return make(fields, png, reference)
        except (OSError, ValueError, EOFError) as error:  # BrokenPipeError; half an answer; closed by end()
            self.end(patience=5)
            status = self._process.returncode
            names = {number.value: number.name for number in signal.Signals}  # those for real time have none
            how = f"signal {names.get(-status, -status)}" if status < 0 else f"exit status {status}"
            limit = {-signal.SIGPROF: IMAGE_SECONDS, -signal.SIGALRM: seconds}.get(status)
            why = f"its process ended ({how})" if limit is None else _too_long(limit)
            raise InputError(f"{cannot}: {why}") from error
        except Exception as error:  # a decoder made it answer what no page is
            self.end()
            raise InputError(f"{cannot}: its process gave no sound answer ({type(error).__name__})") from error
        raise InputError(str(fields["error"]))

    def leave(self) -> None:
        """Let go of another process's worker, which would not end with that one; without its pipes' locks."""
        self._process.poll()  # finds no child, so nothing here waits for it or ends it
        null = os.open(os.devnull, os.O_RDWR)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            if not pipe.closed:
                os.dup2(null, pipe.fileno(), inheritable=False)
        os.close(null)

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


def _worker(idle: list[_Worker], reference: PageReference, verb: str) -> _Worker:
    """Take one that is idle, or start one."""
    with contextlib.suppress(IndexError):  # of another thread's last
        while True:
            worker = idle.pop()
            if worker.alive:
                return worker
            worker.end()
    if not sys.executable or hasattr(sys, "frozen"):  # which would start the application again
        raise ConfigurationError(
            "files are decoded in processes of their own, and there is no Python to start them with (sys.executable). "
            "Fix: run this with the interpreter of an environment that has dots-ocr-client, not as a frozen application"
        )
    try:
        return _Worker()
    except OSError as error:
        raise InputError(f"{reference.label} cannot be {verb}: no process can be started: {error}") from error


def _too_long(seconds: float) -> str:
    return f"it takes longer than {seconds:g} s"


def _found(fields: dict[str, Any], _: bytes, __: PageReference) -> tuple[int, tuple[str, ...]]:
    _check_numbers(fields, "count")
    return fields["count"], tuple(map(str, fields["warnings"]))


def _page(fields: dict[str, Any], png: bytes, reference: PageReference) -> PageImage:
    origin = reference if reference.kind == "pdf" else None
    _check_numbers(fields, "number", "width", "height", "sent_width", "sent_height", *["dpi"] * bool(origin))
    return PageImage(**{**fields, "png": png, "warnings": tuple(map(str, fields["warnings"])), "origin": origin})


def _check_numbers(fields: dict[str, Any], *names: str) -> None:
    for name in names:
        if type(fields[name]) is not int or fields[name] < 1:
            raise TypeError(f"{name} is {fields[name]!r}")


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _end(workers: list[_Worker], threads: ThreadPoolExecutor) -> None:
    _end_all(workers)
    threads.shutdown(wait=False, cancel_futures=True)


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()  # all of this process


def _begin_anew() -> None:
    """In a child made by fork: its parent's workers are not its own, and no thread is left to run their loop."""
    for worker in list(_workers):
        worker.leave()
    _workers.clear()
    _for_threads.cache_clear()


os.register_at_fork(after_in_child=_begin_anew)


def _default_workers() -> int:
    return max(1, min(_processors(), MAX_WORKERS, int(MEMORY_SHARE * memory()) // WORKER_MEMORY))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Return the bytes that this process and its children may use: those of the machine, or what their group is given.

    The groups are those of cgroup v2 (https://docs.kernel.org/admin-guide/cgroup-v2.html); systemd's MemoryMax and
    ``docker run --memory`` set their limits.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        group = CGROUPS / _group()
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit ("max"), or above the first group
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits)


def _group() -> str:
    return Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()


_ENDING = (signal.SIGALRM, signal.SIGPROF, signal.SIGIO)  # they end a worker even inside a decoder


def _serve() -> None:
    """Answer requests from standard input; this is what a worker runs."""
    requests = sys.stdin.buffer
    # The answers go where nothing else writes, whatever a library prints.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    fcntl.fcntl(requests, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(requests, fcntl.F_GETFL)
    for number in _ENDING:  # a process inherits what its parent ignores, and what the thread that starts it blocks
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no copy of a document behind
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = WORKER_MEMORY if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    Image.MAX_IMAGE_PIXELS = None  # `documents` reads larger ones, and has limits of its own
    while True:
        if not select.select([requests], [], [], IDLE_SECONDS)[0]:
            documents.forget()
            select.select([requests], [], [])
        try:
            verb, reference, seconds, processor = pickle.load(requests)
        except EOFError:
            return
        # These end this process even inside a decoder; the parent, if it waits at all, is faster than the first.
        signal.setitimer(signal.ITIMER_REAL, min(seconds, _LONGEST) + 1)
        signal.setitimer(signal.ITIMER_PROF, processor)
        # SIGIO ends it when its input ends: no one wants the answer any more.
        fcntl.fcntl(requests, fcntl.F_SETFL, flags | os.O_ASYNC)
        if select.select([requests], [], [], 0)[0]:  # it has ended before
            return
        answer = _answer_to(verb, reference)
        fcntl.fcntl(requests, fcntl.F_SETFL, flags)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.writelines(answer)
        answers.flush()


def _answer_to(verb: str, reference: PageReference) -> tuple[bytes, bytes]:
    """Do it, and return a line of JSON and a PNG: a parent that unpickled the result would trust the decoders."""
    fields: dict[str, Any]
    png = b""
    try:
        if verb == "opened":
            fields = dict(zip(("count", "warnings"), documents.look_into(reference), strict=True))
        elif verb == "read":
            fields = asdict(pdf_text.extract(reference))
        else:
            page = documents.draw(reference)
            png = page.png
            fields = {name: getattr(page, name) for name in page.__slots__ if name not in ("png", "origin")}
    except InputError as error:
        fields = {"error": str(error)}
    except Exception as error:
        fields = {"error": f"{reference.label} cannot be {verb}: {type(error).__name__}: {error}"}
    return json.dumps({**fields, "size": len(png)}).encode() + b"\n", png
