"""Engines side by side: the same pages, in the same run, on the same machine.

Every page is read by each engine directly, not through the chain, and everything that an engine did not read is counted
as such and never as fast.
"""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...engines.admission import Limiter
from ...engines.base import Answer, Engine, Task
from ...engines.server import REHEARSES
from ...errors import (
    ConfigurationError,
    DotsOCRError,
    EngineMissing,
    ModeNotSupported,
    NotApplicable,
    ServerUnavailable,
)
from ...pages.documents import PageImage
from ...prompts import Mode
from .pages import BenchmarkPage

# At each concurrency at least so many pages are read for each page at once, so that most of the time all slots are
# taken (our own choice).
READS_PER_SLOT: Final = 2

_ABSENT = (ConfigurationError, EngineMissing, ModeNotSupported, NotApplicable, ServerUnavailable)


@dataclass(frozen=True, slots=True)
class Load:
    """How an engine did with so many pages at once."""

    at_once: int
    read: int
    failures: Mapping[str, int]  # how many were not, by kind of error
    seconds: float  # from the first page's start to the last one's end
    pages_per_second: float  # pages that were read, by `seconds`
    p50: float | None  # median seconds of the pages that were read, by nearest rank; ``None`` if there are none
    p95: float | None  # the same of the 95th percentile: with fewer than 20 pages, the slowest
    tokens_per_second: float | None  # tokens of the answers, by `seconds`; ``None`` if the engine does not count them


@dataclass(frozen=True, slots=True)
class Measurement:
    """How an engine did."""

    engine: str
    unavailable: str | None = None  # why it was not measured; everything below is empty then
    # What exactly read the pages; behind a server that tells, the engines that it had read them.
    model: str | None = None
    # How long the first page took, with everything that is loaded for it; ``None`` if it failed.
    first_seconds: float | None = None
    load_seconds: float | None = None  # how much longer that was than the same page once more
    loads: tuple[Load, ...] = ()  # by pages at once, ascending
    # By language, ``all`` for all together: edits needed to make the text that was read the right one (Levenshtein,
    # white space collapsed), by the length of the right one. Only of pages that were read, each once, and whose text is
    # known. Empty without such pages or without rapidfuzz.
    character_errors: Mapping[str, float] = field(default_factory=dict)
    compared: int = 0  # how many pages `character_errors` is of
    # Peak memory of this process until then, which engines measured earlier count towards as well.
    process_mib: float | None = None
    # The same of its largest child process, such as one Tesseract. An upper bound: Linux counts what this process had
    # when it started the child as the child's.
    child_mib: float | None = None

    @property
    def best(self) -> Load | None:
        """Where most pages per second were read."""
        return max(self.loads, key=lambda load: load.pages_per_second, default=None)

    @property
    def failed(self) -> int:
        """How often a page was not read for another reason than that it is nothing for the engine."""
        counts = (load.failures for load in self.loads)
        return sum(sum(failures.values()) - failures.get(NotApplicable.__name__, 0) for failures in counts)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One try to read one page."""

    page: BenchmarkPage
    seconds: float
    answer: Answer | None = None
    error: Exception | None = None


def ratios(measurement: Measurement, first: Measurement | None) -> dict[str, float]:
    """Compare an engine with the first one: ``pages_per_second`` at its best, and ``p50`` at the lowest concurrency."""
    if first is None or not measurement.loads or not first.loads:
        return {}
    ours, theirs = measurement.loads[0].p50, first.loads[0].p50
    found = {"p50": ours / theirs} if ours and theirs else {}
    best, their_best = measurement.best, first.best
    if best and their_best and their_best.pages_per_second:
        found["pages_per_second"] = best.pages_per_second / their_best.pages_per_second
    return found


def first_measured(measurements: Sequence[Measurement]) -> Measurement | None:
    """Return the first one that was available."""
    return next((one for one in measurements if one.unavailable is None), None)


async def measure(
    engine: Engine,
    pages: Sequence[BenchmarkPage],
    concurrency: Sequence[int],
    *,
    mode: Mode = "text",
    seconds: float = 120.0,
    say: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Measure an engine: its first page, the same once more, and all pages at each concurrency (pages at once).

    The engine stays open. Its limiter's present limit bounds the concurrency, and is not used otherwise. A page that
    takes longer than so many seconds has failed. `say` is told what comes next. Nothing is raised for what fails.
    """
    if mode not in engine.modes:
        return Measurement(engine.name, f"it does not know the mode {mode}")
    task, most = Task(mode), engine.limiter.limit
    say(f"{engine.name}: first page")
    found = await _first(engine, pages, task, seconds)
    if isinstance(found, str):
        return Measurement(engine.name, found)
    first, again = found
    loads: list[Load] = []
    whole: list[_Reading] = []  # each page once
    variant = 1
    for at_once in sorted({min(wanted, most) for wanted in concurrency}):
        rounds = math.ceil(READS_PER_SLOT * at_once / len(pages))
        say(f"{engine.name}: {rounds * len(pages)} pages, {at_once} at once")
        readings, took = await _sweep(engine, pages, task, seconds, at_once, range(variant, variant + rounds))
        variant += rounds
        loads.append(_load(at_once, readings, took))
        whole = whole or readings[: len(pages)]
    errors, compared = await asyncio.to_thread(_character_errors, whole)
    answers = [reading.answer for reading in (first, *whole) if reading.answer is not None]
    readers = dict.fromkeys(
        f"{one.engine} ({one.model})" if one.engine not in (None, engine.name) else one.model
        for one in answers
        if one.text or one.cells
    )
    return Measurement(
        engine=engine.name,
        model=", ".join(readers) or None,
        first_seconds=first.seconds if first.answer else None,
        load_seconds=max(0.0, first.seconds - again.seconds) if first.answer and again.answer else None,
        loads=tuple(loads),
        character_errors=errors,
        compared=compared,
        process_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts in KiB
        child_mib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    )


async def _first(
    engine: Engine, pages: Sequence[BenchmarkPage], task: Task, seconds: float
) -> tuple[_Reading, _Reading] | str:
    """Read the first page that is something for the engine, twice; or say why the engine cannot be measured."""
    try:
        async with asyncio.timeout(seconds):
            await engine.probe(seconds)
    except (DotsOCRError, TimeoutError) as error:
        return str(error) or f"no answer within {seconds:g} s"
    reasons: list[str] = []
    for page in pages:
        first = await _time(engine, page, page.image, task, seconds)
        if str(first.error) == REHEARSES:
            return REHEARSES
        if not isinstance(first.error, _ABSENT):
            again = await _time(engine, page, await asyncio.to_thread(page.variant, 0), task, seconds)
            return first, again
        reasons.append(str(first.error))
        if not isinstance(first.error, NotApplicable):
            break
    return "; ".join(dict.fromkeys(reasons))


async def _time(engine: Engine, page: BenchmarkPage, image: PageImage, task: Task, seconds: float) -> _Reading:
    started = time.perf_counter()
    try:
        async with asyncio.timeout(seconds):
            answer = await engine.read(image, task, seconds)
    except (DotsOCRError, TimeoutError) as error:
        return _Reading(page, time.perf_counter() - started, error=error)
    return _Reading(page, time.perf_counter() - started, answer)


async def _sweep(
    engine: Engine, pages: Sequence[BenchmarkPage], task: Task, seconds: float, at_once: int, variants: range
) -> tuple[list[_Reading], float]:
    """Read variants of all pages; return the readings in that order, and the seconds that they took together."""
    images = await asyncio.to_thread(lambda: [page.variant(number) for number in variants for page in pages])
    limiter = Limiter(at_once, at_once)

    async def read(page: BenchmarkPage, image: PageImage) -> _Reading:
        async with limiter:
            return await _time(engine, page, image, task, seconds)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        pairs = zip([*pages] * len(variants), images, strict=True)
        tasks = [group.create_task(read(page, image)) for page, image in pairs]
    return [task.result() for task in tasks], time.perf_counter() - started


def _load(at_once: int, readings: Sequence[_Reading], seconds: float) -> Load:
    read = [reading for reading in readings if reading.answer is not None]
    latencies = sorted(reading.seconds for reading in read)
    tokens = [reading.answer.completion_tokens for reading in read if reading.answer is not None]
    counted = [number for number in tokens if number is not None]
    errors = (reading.error for reading in readings if reading.error is not None)
    kinds = Counter("DeadlineExceeded" if isinstance(one, TimeoutError) else type(one).__name__ for one in errors)
    return Load(
        at_once=at_once,
        read=len(read),
        failures=dict(kinds),
        seconds=seconds,
        pages_per_second=len(read) / seconds,
        p50=percentile(latencies, 0.5),
        p95=percentile(latencies, 0.95),
        tokens_per_second=sum(counted) / seconds if tokens and len(counted) == len(tokens) else None,
    )


def percentile(ascending: Sequence[float], part: float) -> float | None:
    """Return the smallest value that so large a part of all values does not exceed (nearest rank); ``None`` of none."""
    return ascending[max(0, math.ceil(part * len(ascending)) - 1)] if ascending else None


def _character_errors(readings: Sequence[_Reading]) -> tuple[dict[str, float], int]:
    """Return the rates by language and for all, and the number of pages that they are of."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        return {}, 0
    edits: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    compared = 0
    for reading in readings:
        if reading.answer is None or reading.page.truth is None:
            continue
        truth, said = (" ".join(text.split()) for text in (reading.page.truth, reading.answer.text))
        compared += 1
        for language in (reading.page.language, "all"):
            edits[language] += Levenshtein.distance(truth, said)
            letters[language] += len(truth)
    return {language: edits[language] / max(1, letters[language]) for language in letters}, compared
