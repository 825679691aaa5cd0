"""How far a batch has come, for people who watch it and for logs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from ..results import FailedPage, Page

EVERY_SECONDS: Final = 10.0
"""Between two lines about pages in a log (our own choice)."""


def shown() -> Bar | Lines:
    """Return a bar for a terminal that can draw one, or else lines."""
    return Bar() if _is_terminal() else Lines()


def shown_on_terminals() -> Bar | Silent:
    """Return a bar for a terminal that can draw one, which goes when all is done, or else nothing that is seen."""
    return Bar(transient=True) if _is_terminal() else Silent()


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class _Counts:
    """What both kinds count; they are what `dots_ocr_client.batch.Progress` describes."""

    def __init__(self) -> None:
        self._started = self._spoke = time.monotonic()
        self._documents = self._done = self._opened = self._pages = self._finished = 0
        self._open: set[str] = set()
        self._never_opened = 0

    def documents(self, total: int) -> None:
        """Note how many documents there are."""
        self._documents = total
        self._show()

    def opened(self, name: str, pages: int) -> None:
        """Note a document that is begun, and how many of its pages will be read."""
        self._opened += 1
        self._open.add(name)
        self._pages += pages
        self._show()

    def page(self, name: str, page: Page | FailedPage) -> None:
        """Note a page that is finished."""
        self._finished += 1
        self._show()

    def done(self, name: str, status: str) -> None:
        """Note a document that is finished."""
        self._done += 1
        self._never_opened += name not in self._open
        self._open.discard(name)
        self._say(f"{status}: {printable(name)}")
        self._show()

    @property
    def _expected(self) -> int:
        """Pages in all; those of documents that are not open yet are taken for as many as the others have."""
        still_closed = self._documents - self._opened - self._never_opened
        return self._pages + round(still_closed * self._pages / self._opened) if self._opened else still_closed

    @property
    def _rate(self) -> float:
        return self._finished / max(time.monotonic() - self._started, 1e-3)

    def aside(self) -> AbstractContextManager[object]:
        """Leave the terminal to others for a moment."""
        return nullcontext()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def _say(self, line: str) -> None:
        """Tell what became of a document."""

    def _show(self) -> None:
        """Show how far it has come."""


class Silent(_Counts):
    """Shows nothing."""


class Lines(_Counts):
    """A line for each finished document, and in between one about pages from time to time."""

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        print(line, file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._finished and time.monotonic() - self._spoke >= EVERY_SECONDS:
            self._say(f"{self._finished} of about {self._expected} pages, {self._rate:.1f} pages/s")


class Bar(_Counts):
    """A bar of pages with their rate and the time that is left; documents that failed are listed above it."""

    def __init__(self, *, transient: bool = False) -> None:
        """Prepare the bar; it appears when the number of documents is known, and may vanish in the end."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        self._bar: RichProgress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("pages, {task.fields[rate]:.1f}/s, left:"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            transient=transient,
        )
        self._task = self._bar.add_task("", total=None, rate=0.0)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the terminal for a moment."""
        self._bar.stop()
        yield
        self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the drawing."""
        self._bar.stop()

    def documents(self, total: int) -> None:
        """Note how many documents there are, and draw the bar."""
        super().documents(total)
        self._bar.start()

    def _say(self, line: str) -> None:
        if not line.startswith(("read:", "unchanged:")):
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        self._bar.update(
            self._task,
            description=f"{self._done} of {self._documents} documents",
            completed=self._finished,
            total=self._expected,
            rate=self._rate,
        )


def printable(text: str) -> str:
    """Write what has no glyph (control characters, bytes of a name that is no UTF-8) as an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def count(number: int, noun: str) -> str:
    """Write a number and what it counts."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
