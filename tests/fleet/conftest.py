"""One load for all events, and their table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic

import pytest

from tests.fleet.hosts import GATEWAY, KEY, address
from tests.fleet.load import Event, Load, percentile

RATE = 2.0  # pages per second: Tesseract has to read them all for a while, beside what else the machine does
QUIET = 20  # pages before the first event, for the usual p95
AFTER = 5  # pages after an event, to see it end

TABLE = ["| event | kind | pages | lost | p95, s | steady after, s |", "|---|---|--:|--:|--:|--:|"]


@dataclass
class Happening:
    """What the test of an event knows at its end: `event` is set then."""

    event: Event = field(init=False)


Events = Callable[..., AbstractContextManager[Happening]]


@dataclass
class Record:
    """All that happened."""

    load: Load
    usual: float = 0.0
    rows: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def during(self, name: str, *, planned: bool) -> Iterator[Happening]:
        """Watch the pages while something happens, from before it to after it, and note what came of them."""
        self.load.wait_for(AFTER)
        begin, happening = monotonic(), Happening()
        yield happening
        self.load.wait_for(AFTER)
        pages = [page for page in self.load.pages if page.end >= begin]
        happening.event = Event(name, planned, pages, begin, self.usual)
        self.rows.append(happening.event.row())


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Iterator[Record]:
    """Send pages from now on, and show the table at the end."""
    load = Load(f"http://{address(GATEWAY)}:8080", KEY, RATE)
    found = Record(load)
    load.wait_for(QUIET)
    found.usual = percentile([page.seconds for page in load.pages])
    found.rows.append(Event("nothing", True, list(load.pages), load.pages[0].start, found.usual).row())
    assert not [page for page in load.pages if page.fault], "pages are lost while nothing happens"
    yield found
    load.stop()
    pytestconfig.stash[ROWS] = found.rows


@pytest.fixture
def during(record: Record) -> Events:
    """Return how to watch the pages while something happens."""
    return record.during


ROWS = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what each event did."""
    rows = terminalreporter.config.stash.get(ROWS, [])
    for line in [*TABLE, *rows] if rows else []:
        terminalreporter.write_line(line)
