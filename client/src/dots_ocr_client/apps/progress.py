"""How far a batch has come, for people who watch it and for logs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from ..texts import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from ..results import FailedPage, Page

EVERY_SECONDS: Final = 10.0  # between two lines about pages in a log (our own choice)


def shown(elsewhere: type[Silent]) -> Silent:
    """Return a bar for a terminal that can draw one, else what is given; beside nothing, the bar goes in the end."""
    draws = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return Bar(transient=elsewhere is Silent) if draws else elsewhere()


class Silent(AbstractContextManager["Silent"]):
    """Counts what it is told, and shows nothing."""

    def __init__(self) -> None:
        """Begin to count."""
        self._started = self._spoke = time.monotonic()
        self._documents = self._done = self._opened = self._pages = self._finished = 0
        self._begun: set[str] = set()  # documents that were opened, or finished without that

    def documents(self, total: int) -> None:
        """Note that the batch begins, and how many documents were found."""
        self._documents = total
        self._show()

    def opened(self, name: str, pages: int) -> None:
        """Note a document that is begun, and how many of its pages are to be read now, each announced with `page`."""
        self._opened += 1
        self._begun.add(name)
        self._pages += pages
        self._show()

    def page(self, name: str, page: Page | FailedPage) -> None:
        """Note a page that is finished, and safe."""
        self._finished += 1
        self._show()

    def done(self, name: str, status: str) -> None:
        """Note a document that is finished; one that was not opened before is unchanged, or failed."""
        self._done += 1
        self._begun.add(name)
        self._say(f"{status}: {printable(name)}")
        self._show()

    @property
    def _expected(self) -> int:
        """Pages in all; those of documents that are not open yet are taken for as many as the others have."""
        still_closed = self._documents - len(self._begun)
        return self._pages + round(still_closed * self._pages / self._opened) if self._opened else still_closed

    @property
    def _rate(self) -> float:
        return self._finished / max(time.monotonic() - self._started, 1e-3)

    def aside(self) -> AbstractContextManager[object]:
        """Leave the terminal to others for a moment."""
        return nullcontext()

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def _say(self, line: str) -> None:
        """Tell what became of a document."""

    def _show(self) -> None:
        """Show how far it has come."""


class Lines(Silent):
    """A line for each finished document, and in between one about pages from time to time."""

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        print(line, file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._finished and time.monotonic() - self._spoke >= EVERY_SECONDS:
            self._say(f"{self._finished} of about {self._expected} pages, {self._rate:.1f} pages/s")


class Bar(Silent):
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

    def __exit__(self, *_: object) -> None:
        """End the drawing."""
        self._bar.stop()

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
        self._bar.start()  # which does nothing from the second time on
