from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pytest_httpserver import HTTPServer
from support import LINES, FakeServer

from dots_ocr_client import (
    AllEnginesFailed,
    Answer,
    Attempt,
    Box,
    Cell,
    ConfigurationError,
    DeadlineExceeded,
    Engine,
    EngineMissing,
    Limiter,
    Mode,
    ModelNotServed,
    ModeNotSupported,
    NotApplicable,
    Overloaded,
    Page,
    PageImage,
    RequestRejected,
    ServerUnavailable,
    Task,
    TesseractEngine,
    Unauthorized,
    UnusableAnswer,
    VLLMEngine,
)
from dots_ocr_client.chain import fallback
from dots_ocr_client.chain.fallback import SHARE, Chain, OnUnavailable
from dots_ocr_client.engines import admission, vllm
from dots_ocr_client.engines.qwen import QwenEngine
from dots_ocr_client.pages.documents import PageReference
from dots_ocr_client.prompts import MODES


class Scripted:
    """An engine that does as it is told."""

    def __init__(
        self,
        name: str,
        result: str | Answer | Exception,
        delay: float = 0.0,
        *,
        slots: int = 4,
        modes: frozenset[Mode] = frozenset(MODES),
    ) -> None:
        self.name, self.result, self.delay, self.modes = name, result, delay, modes
        self.limiter = Limiter(slots, slots)
        self.expected_seconds = 0.0
        self.seconds: list[float] = []
        self.pixels = True
        self.seen: list[PageImage] = []
        self.cancelled = False
        self.probes = 0
        self.probe_result: Exception | None = None
        self.probe_delay = 0.0

    async def probe(self, seconds: float) -> None:
        self.probes += 1
        await asyncio.sleep(self.probe_delay)
        if self.probe_result is not None:
            raise self.probe_result

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        assert self.limiter.in_flight > 0
        self.seconds.append(seconds)
        self.seen.append(page)
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result if isinstance(self.result, Answer) else Answer(task.mode, self.result, "scripted")

    async def aclose(self) -> None: ...


def read(engines: Sequence[Engine], page: PageImage, mode: Mode = "text", timeout: float = 60.0) -> Page:
    async def run() -> Page:
        try:
            return await Chain(engines, timeout).ask(page, Task(mode))
        finally:
            for engine in engines:
                await engine.aclose()

    return asyncio.run(run())


def lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line)


# vLLM and Tesseract


@pytest.mark.parametrize(
    ("status", "error"), [(503, "Overloaded"), (500, "ServerUnavailable"), (400, "RequestRejected")]
)
def test_an_error_of_the_server_makes_tesseract_read_the_page(
    status: int, error: str, server: FakeServer, page: PageImage
) -> None:
    server.fail_with(status)
    result = read([VLLMEngine(server.base_url), TesseractEngine()], page)
    (attempt,) = result.attempts
    assert lines(result.text) == LINES
    assert (result.engine, result.model) == ("tesseract", "eng")
    assert (attempt.engine, attempt.outcome, attempt.error) == ("vllm", "failed", error)
    assert str(status) in attempt.reason


def test_a_refused_connection_makes_tesseract_read_the_page(page: PageImage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    result = read([VLLMEngine(base_url), TesseractEngine()], page, "layout")
    assert (result.mode, lines(result.text)) == ("layout", LINES)
    assert (result.attempts[0].error, base_url in result.attempts[0].reason) == ("ServerUnavailable", True)


@pytest.mark.parametrize(("finish_reason", "error"), [("repetition", "Repetition"), ("length", "CutOff")])
def test_a_loop_or_a_cut_makes_tesseract_read_the_page(
    finish_reason: str, error: str, server: FakeServer, page: PageImage
) -> None:
    server.finish_reason = finish_reason
    result = read([VLLMEngine(server.base_url), TesseractEngine()], page)
    assert (result.engine, lines(result.text), result.attempts[0].error) == ("tesseract", LINES, error)


def test_a_server_that_hangs_leaves_time_for_tesseract(page: PageImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dots_ocr_client.chain.fallback.SHARE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, but never answers
        hanging = VLLMEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        result = read([hanging, TesseractEngine()], page, timeout=12.0)
    assert (result.engine, lines(result.text), result.attempts[0].error) == ("tesseract", LINES, "DeadlineExceeded")
    assert 1.1 < result.attempts[0].seconds < 8.0


def test_a_burst_of_pages_stays_within_the_limit(server: FakeServer, page: PageImage) -> None:
    server.seconds = 0.02
    engine = VLLMEngine(server.base_url, limiter=Limiter(start=2, cap=3))

    async def run() -> list[Page]:
        chain = Chain([engine], 20.0)
        pages = await asyncio.gather(*(chain.ask(page, Task("text")) for _ in range(12)))
        await engine.aclose()
        return pages

    assert len(asyncio.run(run())) == 12
    assert server.most_in_flight == 3


# The chain


def test_what_the_engine_read_comes_with_what_is_known_of_the_page(page: PageImage) -> None:
    cells = (Cell("Text", Box(0, 0, 9, 9), "text"),)
    answer = Answer("layout", "text", "model", cells, 7, 8, "stop", ("mended",))
    result = read([Scripted("first", answer)], replace(page, number=3, warnings=("resized",)), "layout")
    assert result == Page(
        number=3,
        width=784,
        height=224,
        mode="layout",
        text="text",
        cells=cells,
        engine="first",
        model="model",
        seconds=result.seconds,
        prompt_tokens=7,
        completion_tokens=8,
        finish_reason="stop",
        warnings=("resized", "mended"),
    )


def test_all_failed_lists_every_cause(page: PageImage) -> None:
    engines = [
        Scripted("first", UnusableAnswer("it made no sense")),
        Scripted("second", EngineMissing("install it")),
        Scripted("third", ModeNotSupported("an older model")),
        Scripted("fourth", "", modes=frozenset({"svg"})),
        Scripted("fifth", "too late", delay=9),
    ]
    with pytest.raises(AllEnginesFailed) as caught:
        read(engines, page, timeout=0.3)
    assert [(a.engine, a.outcome, a.error) for a in caught.value.attempts] == [
        ("first", "failed", "UnusableAnswer"),
        ("second", "skipped", "EngineMissing"),
        ("third", "skipped", "ModeNotSupported"),
        ("fourth", "skipped", "ModeNotSupported"),
        ("fifth", "failed", "DeadlineExceeded"),
    ]
    assert all(words in str(caught.value) for words in ("page 1", "it made no sense", "install it", "allow more time"))
    assert (engines[3].seconds, engines[4].cancelled) == ([], True)


def test_a_box_that_leaves_the_page_is_cut_off(page: PageImage) -> None:
    boxes = (Box(-9, -9, 9_999, 9_999), Box(800, 10, 790, 5), Box(5, 6, 7, 8))
    cells = (Cell("Text", None, "text"), *(Cell("Text", box) for box in boxes))
    result = read([Scripted("careless", Answer("layout", "text", "model", cells))], page)
    assert [cell.box for cell in result.cells] == [None, (0, 0, 784, 224), (784, 10, 784, 10), (5, 6, 7, 8)]
    assert Page.from_dict(result.to_dict()) == result


def test_a_box_may_be_any_four_numbers(page: PageImage) -> None:
    plain: Any = (-9, 6, 9_999, 8)
    result = read([Scripted("careless", Answer("layout", "text", "model", (Cell("Text", plain, "text"),)))], page)
    assert result.cells[0].box == Box(0, 6, 784, 8)
    assert isinstance(result.cells[0].box, Box)


def test_wrong_settings_end_the_chain(page: PageImage) -> None:
    second = Scripted("second", "unused")
    with pytest.raises(ConfigurationError, match="wrong key"):
        read([Scripted("first", ConfigurationError("wrong key")), second], page)
    assert second.seconds == []


def test_engines_behind_the_first_that_delivers_are_not_asked(page: PageImage) -> None:
    second = Scripted("second", "unused")
    assert read([Scripted("first", "text"), second], page).text == "text"
    assert second.seconds == []


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_blank_page_is_nobodys_work(text: str, server: FakeServer) -> None:
    server.script = [(text, "stop")]
    blank = PageImage.of(1, Image.new("RGB", (560, 560), "white"))
    for engine in (VLLMEngine(server.base_url), TesseractEngine(), Scripted("careless", "")):
        result = read([engine], blank, "layout")
        assert (result.text, result.cells, result.engine, result.model) == ("", (), "", "")
        assert Page.from_dict(result.to_dict()) == result


def test_a_page_of_faint_print_is_not_called_blank_before_it_was_read(tmp_path: Path) -> None:
    faint = Image.new("L", (560, 560), "white")
    faint.paste(208, (100, 100, 200, 110))
    with pytest.raises(AllEnginesFailed, match="EngineMissing"):
        read([QwenEngine(folder=tmp_path, device="cpu")], PageImage.of(1, faint))


def test_a_page_without_text_that_is_not_blank_has_a_reader(page: PageImage) -> None:
    picture = Answer("layout_only", "", "model", (Cell("Picture", Box(0, 0, 9, 9)),))
    for answer in ("", picture):
        assert read([Scripted("first", answer)], page).engine == "first"
    blank = PageImage.of(1, Image.new("RGB", (560, 560), "white"))
    assert read([Scripted("first", "a faint word")], blank).engine == "first"


def test_the_engine_behind_a_server_has_read_the_page(page: PageImage) -> None:
    inner = Attempt("vllm", "failed", "ServerUnavailable", "cannot reach it", 1.0)
    answer = Answer("text", "text", "rus", engine="tesseract", attempts=(inner,))
    result = read([Scripted("first", UnusableAnswer("no")), Scripted("second", answer)], page)
    assert (result.engine, result.model) == ("tesseract", "rus")
    assert [attempt.engine for attempt in result.attempts] == ["first", "vllm"]


# Time


def test_engines_share_one_deadline(page: PageImage) -> None:
    engines = [Scripted("slow", "too late", delay=9), Scripted("slower", "too late", delay=9)]
    started = time.monotonic()
    with pytest.raises(AllEnginesFailed):
        read(engines, page, timeout=0.8)
    assert 0.7 < time.monotonic() - started < 8.0
    assert engines[0].seconds == pytest.approx([0.6], abs=0.001)
    assert 0 < engines[1].seconds[0] < 0.21


@pytest.mark.parametrize(("state", "more"), [("", 0.0), ("asleep", vllm.WAKE_SECONDS), ("waking", vllm.WAKE_SECONDS)])
def test_a_page_waits_longer_for_a_server_that_starts_for_it(
    state: str, more: float, page: PageImage, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then: one that answers is not asked for its state again."""
    given: list[float] = []
    ask = VLLMEngine.read

    async def note(self: VLLMEngine, page: PageImage, task: Task, seconds: float) -> Answer:
        given.append(seconds)
        return await ask(self, page, task, seconds)

    monkeypatch.setattr(VLLMEngine, "read", note)
    server.state = state

    async def twice() -> None:
        chain = Chain([VLLMEngine(server.base_url), Scripted("second", "unused")], 10.0)
        await chain.ask(page, Task("text"))
        server.state = ""
        await chain.ask(page, Task("text"))
        await chain.aclose()

    asyncio.run(twice())
    assert given == [(10.0 + more) * SHARE, 10.0 * SHARE]
    assert server.asked_for("/health") == 1


def test_an_engine_shares_its_time_only_with_those_that_know_the_mode(page: PageImage) -> None:
    first, second = Scripted("first", "text"), Scripted("second", "", modes=frozenset({"text"}))
    read([first, second], page, "svg", timeout=10.0)
    read([first, second], page, "text", timeout=10.0)
    assert first.seconds == [10.0, 10.0 * SHARE]


def test_an_engine_with_no_time_left_is_skipped(page: PageImage) -> None:
    class Blocking(Scripted):
        async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
            time.sleep(0.2)
            raise UnusableAnswer("late")

    second = Scripted("second", "never asked")
    with pytest.raises(AllEnginesFailed) as caught:
        read([Blocking("first", ""), second], page, timeout=0.1)
    assert caught.value.attempts[1] == Attempt(
        "second", "skipped", "NotApplicable", "nothing was left of the 0.1 s for the page", 0.0
    )
    assert second.seconds == []


def test_waiting_for_a_slot_does_not_cost_the_page_its_time(page: PageImage) -> None:
    engine = Scripted("only", "text", delay=0.5, slots=1)

    async def run() -> list[Page]:
        chain = Chain([engine], 4.0)
        return await asyncio.gather(*(chain.ask(page, Task("text")) for _ in range(7)))

    pages = asyncio.run(run())
    assert engine.seconds == [4.0] * 7
    assert all(0.4 < page.seconds < 3.0 for page in pages)  # the last one waited 3 s


def test_the_caller_hears_once_that_a_page_has_its_first_slot(page: PageImage) -> None:
    heard: list[int] = []

    async def run() -> None:
        first, second = Scripted("first", UnusableAnswer("no"), slots=1), Scripted("second", "text")
        async with first.limiter:
            reading = asyncio.create_task(
                Chain([first, second], 9.0).ask(page, Task("text"), lambda: heard.append(first.limiter.in_flight))
            )
            await asyncio.sleep(0.05)
            assert heard == []
        await reading

    asyncio.run(run())
    assert heard == [1]


@pytest.mark.parametrize(
    ("results", "slots"),
    [(["text"], []), ([NotApplicable("no"), "text"], [1]), ([NotApplicable("no"), UnusableAnswer("no"), "text"], [1])],
)
def test_a_page_is_drawn_once_and_only_for_an_engine_that_asks_for_pixels(
    results: list[str | Exception], slots: list[int], page: PageImage
) -> None:
    """What waits for a later engine is drawn when that has a slot, or any number of drawn pages would wait there."""
    engines = [Scripted(f"engine {place}", result) for place, result in enumerate(results)]
    engines[0].pixels = False
    reference = PageReference("a.pdf", 7, "pdf", "a.pdf", None, True, ("the file is odd",))
    taken: list[int] = []

    async def draw() -> PageImage:
        taken.append(engines[1].limiter.in_flight)
        return replace(page, number=7)

    engines[0].result = Answer("text", "text", "m", size=(30, 40)) if results == ["text"] else results[0]
    chain = Chain(engines, 9.0)
    read = asyncio.run(chain.ask(PageImage.undrawn(reference), Task("text"), lambda: None, draw))
    assert (read.number, read.text, taken) == (7, "text", slots)
    assert (engines[0].seen[0].png, engines[0].seen[0].origin) == (b"", reference)
    assert all(engine.seen[0].png == page.png for engine in engines[1:])
    assert (read.width, read.height) == ((page.width, page.height) if slots else (30, 40))
    assert read.warnings == (() if slots else ("the file is odd",))


def test_a_page_is_drawn_for_its_first_engine_before_that_has_a_slot(page: PageImage) -> None:
    engine = Scripted("first", "text", slots=1)
    drawn: list[int] = []

    async def draw() -> PageImage:
        drawn.append(engine.limiter.in_flight)
        return page

    asyncio.run(Chain([engine], 9.0).ask(page, Task("text"), lambda: None, draw))
    assert drawn == [0]


# An engine that is not there


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a fraction of a second."""
    monkeypatch.setattr(admission, "PAUSE", 0.1)
    monkeypatch.setattr(admission, "MAX_PAUSE", 0.1)
    monkeypatch.setattr(fallback, "LOOK_SECONDS", 0.01)


GONE = ServerUnavailable("cannot reach it")


async def read_all(chain: Chain, page: PageImage, count: int) -> list[Page]:
    """One page after the other."""
    return [await chain.ask(page, Task("text")) for _ in range(count)]


@pytest.mark.parametrize(
    ("failure", "asked"),
    [
        (GONE, 3),
        (DeadlineExceeded("too slow"), 3),
        (Overloaded("full"), 5),
        (UnusableAnswer("nonsense"), 5),
        (RequestRejected("too large"), 5),
        (EngineMissing("install it"), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_an_engine_that_is_not_there_is_left_alone(failure: Exception, asked: int, page: PageImage) -> None:
    first = Scripted("first", failure)
    pages = asyncio.run(read_all(Chain([first, Scripted("second", "text")], 9.0), page, 5))
    assert [page.engine for page in pages] == ["second"] * 5
    assert len(first.seconds) == asked
    last = pages[-1].attempts[0]
    assert (last.error == "CircuitOpen", last.outcome == "skipped") == (
        (True, True) if asked == 3 else (False, isinstance(failure, EngineMissing))
    )
    assert str(failure) in last.reason


def test_an_engine_that_hangs_costs_only_the_first_pages_their_time(page: PageImage) -> None:
    hanging = Scripted("first", "too late", delay=60)
    pages = asyncio.run(read_all(Chain([hanging, Scripted("second", "text")], 0.2), page, 6))
    assert [page.attempts[0].error for page in pages] == ["DeadlineExceeded"] * 3 + ["CircuitOpen"] * 3


@pytest.mark.usefixtures("quick")
def test_one_page_probes_while_the_others_go_on(page: PageImage) -> None:
    first, second = Scripted("first", GONE), Scripted("second", "text", slots=64)
    chain = Chain([first, second], 9.0)

    async def run() -> list[Page]:
        await read_all(chain, page, 3)
        await asyncio.sleep(0.12)
        first.result, first.probe_delay = "better text", 0.1
        return await asyncio.gather(*(chain.ask(page, Task("text")) for _ in range(20)))

    pages = asyncio.run(run())
    assert first.probes == 1
    assert [page.engine for page in pages].count("first") == 1
    assert {page.attempts[0].error for page in pages if page.engine == "second"} == {"CircuitOpen"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "probe_result", [GONE, ConfigurationError("it serves another model"), TimeoutError(), None], ids=repr
)
def test_the_best_engine_is_asked_again_only_after_a_probe_that_went_well(
    probe_result: Exception | None, page: PageImage
) -> None:
    first = Scripted("first", GONE)
    chain = Chain([first, Scripted("second", "text")], 9.0)

    async def run() -> list[Page]:
        await read_all(chain, page, 3)
        first.result, first.probe_result = "better text", probe_result
        await asyncio.sleep(0.12)
        return await read_all(chain, page, 2)

    pages = asyncio.run(run())
    assert [page.engine for page in pages] == ["first" if probe_result is None else "second"] * 2
    if isinstance(probe_result, ConfigurationError):
        assert "another model" in pages[0].attempts[0].reason


def test_a_wrong_key_that_a_probe_finds_out_is_not_hidden_by_the_next_engine(page: PageImage) -> None:
    first, second = Scripted("first", GONE), Scripted("second", "text")
    first.probe_result = Unauthorized("it refuses the key")

    async def run() -> None:
        chain = Chain([first, second], 60.0)
        for _ in range(admission.FAILURES):
            await chain.ask(page, Task("text"))
        chain._breakers[0]._probe_at = 0.0
        for _ in range(2):  # each page, and not only the one that probes
            with pytest.raises(Unauthorized):
                await chain.ask(page, Task("text"))

    asyncio.run(run())
    assert len(second.seconds) == admission.FAILURES


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_back_gets_few_pages_at_first(page: PageImage) -> None:
    first = Scripted("first", "text")
    first.limiter = Limiter(2, 32)
    chain = Chain([first], 9.0)

    async def run() -> None:
        await asyncio.gather(*(read_and_grow() for _ in range(40)))
        assert first.limiter.limit > 8
        first.result = GONE
        for _ in range(3):
            with pytest.raises(AllEnginesFailed):
                await chain.ask(page, Task("text"))
        first.result = "text"
        await asyncio.sleep(0.12)
        await chain.ask(page, Task("text"))
        assert first.limiter.limit == 2

    async def read_and_grow() -> None:
        await chain.ask(page, Task("text"))
        async with first.limiter:
            first.limiter.succeeded()

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
def test_a_probe_that_is_cancelled_leaves_the_next_one_free(page: PageImage) -> None:
    first = Scripted("first", GONE)
    chain = Chain([first, Scripted("second", "text")], 9.0)

    async def run() -> Page:
        await read_all(chain, page, 3)
        await asyncio.sleep(0.12)
        first.result, first.probe_delay = "better text", 9.0
        probing = asyncio.create_task(chain.ask(page, Task("text")))
        await asyncio.sleep(0.05)
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
        first.probe_delay = 0.0
        return await chain.ask(page, Task("text"))

    assert asyncio.run(run()).engine == "first"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("probe_delay", [1.6, 60.0])
def test_a_probe_costs_the_page_its_time(probe_delay: float, page: PageImage) -> None:
    first, second = Scripted("first", GONE), Scripted("second", "text")
    chain = Chain([first, second], 4.0)

    async def run() -> float:
        await read_all(chain, page, 3)
        first.probe_delay, first.result, first.delay = probe_delay, "too late", 60.0
        await asyncio.sleep(0.12)
        started = time.monotonic()
        assert (await chain.ask(page, Task("text"))).engine == "second"
        return time.monotonic() - started

    assert asyncio.run(run()) < 6.0
    if probe_delay < 4.0:
        assert 0.4 < first.seconds[-1] <= 4.0 * SHARE - probe_delay + 0.01


@pytest.mark.usefixtures("quick")
def test_pages_that_wait_are_all_read_by_the_engine_when_it_is_back(page: PageImage) -> None:
    first, second = Scripted("first", GONE, slots=2), Scripted("second", "worse text")
    first.probe_result = GONE
    chain = Chain([first, second], 9.0, "wait", max_wait=20.0)

    async def run() -> list[Page]:
        reading = [asyncio.create_task(chain.ask(page, Task("text"))) for _ in range(10)]
        await asyncio.sleep(0.6)
        assert not any(task.done() for task in reading)
        asked = len(first.seconds)
        first.result, first.probe_result = "text", None
        pages = await asyncio.gather(*reading)
        assert len(first.seconds) == asked + 10
        return pages

    pages = asyncio.run(run())
    assert [page.engine for page in pages] == ["first"] * 10
    assert second.seconds == []
    assert first.seconds[-1] == 9.0 * SHARE


@pytest.mark.usefixtures("quick")
def test_waiting_ends_with_the_reason(page: PageImage) -> None:
    first, second = Scripted("first", GONE), Scripted("second", "text")
    first.probe_result = GONE
    started = time.monotonic()
    with pytest.raises(AllEnginesFailed, match="cannot reach it"):
        asyncio.run(Chain([first, second], 9.0, "wait", max_wait=0.5).ask(page, Task("text")))
    assert 0.3 < time.monotonic() - started < 5.0
    assert second.seconds == []


def unavailable(message: str, status: int | None = None, *, passing: bool = True) -> ServerUnavailable:
    error = ServerUnavailable(message)
    error.status, error.passing = status, passing
    return error


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gone", [GONE, unavailable("bad gateway", 502)], ids=str)
def test_an_engine_that_is_away_for_a_moment_loses_no_page(gone: ServerUnavailable, page: PageImage) -> None:
    first, second = Scripted("first", gone, slots=2), Scripted("second", "worse text")
    first.probe_result = GONE
    chain = Chain([first, second], 9.0, max_wait=10.0)

    async def run() -> list[Page]:
        reading = [asyncio.create_task(chain.ask(page, Task("text"))) for _ in range(10)]
        await asyncio.sleep(0.4)
        reading += [asyncio.create_task(chain.ask(page, Task("text"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in reading)
        first.result, first.probe_result = "text", None
        return await asyncio.gather(*reading)

    pages = asyncio.run(run())
    assert [page.engine for page in pages] == ["first"] * 15
    assert second.seconds == []
    assert first.seconds[-1] == 9.0 * SHARE  # the time anew


def test_a_server_that_starts_while_a_page_waits_reads_it(page: PageImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "PAUSE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def run() -> Page:
        chain = Chain([VLLMEngine(f"http://127.0.0.1:{port}/v1"), TesseractEngine()], 20.0, max_wait=20.0)
        reading = asyncio.create_task(chain.ask(page, Task("text")))
        await asyncio.sleep(0.3)
        with HTTPServer(port=port, threaded=True) as late:
            FakeServer(late)
            result = await reading
            await chain.aclose()
        return result

    result = asyncio.run(run())
    assert (result.engine, result.text) == ("vllm", "read by the server")
    assert [attempt.error for attempt in result.attempts] == ["ServerUnavailable"]


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_known_to_be_down_is_not_waited_for_again(page: PageImage) -> None:
    first, second = Scripted("first", GONE), Scripted("second", "text")
    first.probe_result = GONE
    chain = Chain([first, second], 9.0, max_wait=0.5)

    async def timed(count: int) -> float:
        started = time.monotonic()
        assert {page.engine for page in await read_all(chain, page, count)} == {"second"}
        return time.monotonic() - started

    async def run() -> None:
        assert 0.3 < await timed(1) < 5.0
        assert await timed(10) < 0.3  # for one page alone it is not worth while to wait twice
        first.result, first.probe_result = "text", None
        await asyncio.sleep(0.12)
        assert (await chain.ask(page, Task("text"))).engine == "first"
        first.result = first.probe_result = GONE
        assert 0.3 < await timed(1) < 5.0

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("failure", "most"),
    [
        (GONE, fallback.RETURNS + admission.FAILURES),
        (unavailable("internal error", 500), 1),
        (unavailable("no memory", passing=False), 1),
        (Overloaded("full"), 1),
        (DeadlineExceeded("too slow"), 1),
    ],
    ids=str,
)
def test_a_page_that_an_engine_cannot_take_does_not_wait_for_it(failure: Exception, most: int, page: PageImage) -> None:
    first, second = Scripted("first", failure), Scripted("second", "text")
    started = time.monotonic()
    assert asyncio.run(Chain([first, second], 9.0, max_wait=30.0).ask(page, Task("text"))).engine == "second"
    assert 1 <= len(first.seconds) <= most
    assert time.monotonic() - started < 10.0


def test_a_gateway_with_nobody_behind_it_is_away_and_not_full(server: FakeServer, page: PageImage) -> None:
    server.fail_with(503)
    server.health = 503
    engine = VLLMEngine(server.base_url)

    async def run() -> list[Page]:
        chain = Chain([engine, Scripted("second", "text")], 20.0)
        pages = await read_all(chain, page, admission.FAILURES + 2)
        await chain.aclose()
        return pages

    pages = asyncio.run(run())
    failures = [page.attempts[0].error for page in pages]
    assert failures == ["ServerUnavailable"] * admission.FAILURES + ["CircuitOpen"] * 2
    assert "/health answered 503" in pages[0].attempts[0].reason
    assert len(server.requests) == admission.FAILURES


@pytest.mark.parametrize("on_unavailable", ["wait", "fail"])
def test_an_answer_of_no_use_is_no_reason_to_wait_or_to_fail(on_unavailable: OnUnavailable, page: PageImage) -> None:
    chain = Chain([Scripted("first", UnusableAnswer("no")), Scripted("second", "text")], 9.0, on_unavailable)
    assert asyncio.run(chain.ask(page, Task("text"))).engine == "second"


def test_without_fallback_the_page_fails_at_once(page: PageImage) -> None:
    first, second = Scripted("first", GONE), Scripted("second", "text")
    with pytest.raises(AllEnginesFailed) as caught:
        asyncio.run(Chain([first, second], 9.0, "fail").ask(page, Task("text")))
    assert [attempt.error for attempt in caught.value.attempts] == ["ServerUnavailable"]
    assert (len(first.seconds), second.seconds) == (1, [])


def test_an_engine_that_is_too_slow_for_the_time_left_is_passed_over_for_others_only(page: PageImage) -> None:
    slow, quick = Scripted("slow", "better text"), Scripted("quick", "text")
    slow.expected_seconds = 480.0
    result = read([slow, quick], page, timeout=120.0)
    assert (result.engine, result.attempts[0].error, result.attempts[0].outcome) == (
        "quick",
        "NotApplicable",
        "skipped",
    )
    assert "480" in result.attempts[0].reason
    assert read([slow, quick], page, timeout=500.0).engine == "slow"
    assert read([slow], page, timeout=120.0).engine == "slow"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"engines": []}, "engines is empty"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"max_wait": -1.0}, "max_wait"),
        ({"on_unavailable": "wat"}, "'wait', 'fallback', 'fail', not 'wat'"),
    ],
    ids=repr,
)
def test_wrong_arguments_are_named(wrong: dict[str, object], words: str) -> None:
    arguments: dict[str, Any] = {"engines": [Scripted("only", "text")], "timeout": 9.0, **wrong}
    with pytest.raises(ValueError, match=words):
        Chain(**arguments)


# vLLM that goes, and comes back as something else


@pytest.mark.usefixtures("quick")
def test_a_server_that_comes_back_with_another_model_is_not_used(server: FakeServer, page: PageImage) -> None:
    chain = Chain([VLLMEngine(server.base_url), TesseractEngine()], 20.0)

    async def run() -> list[Page]:
        before = await read_all(chain, page, 1)
        server.models = {"facebook/opt-125m": 2048}
        server.fail_with(404)
        during = await read_all(chain, page, 4)
        server.models, server.answer = {"dots.ocr": 16_384}, None
        await asyncio.sleep(0.12)
        after = await read_all(chain, page, 1)
        await chain.aclose()
        return [*before, *during, *after]

    pages = asyncio.run(run())
    assert [page.engine for page in pages] == ["vllm", *["tesseract"] * 4, "vllm"]
    assert "facebook/opt-125m" in pages[1].attempts[0].reason


def test_a_server_that_never_had_the_model_is_a_wrong_setting(server: FakeServer, page: PageImage) -> None:
    server.models = {"facebook/opt-125m": 2048}
    with pytest.raises(ModelNotServed):
        read([VLLMEngine(server.base_url), TesseractEngine()], page)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (404, True), (500, False), (503, False)])
def test_a_probe_asks_for_health_and_model(status: int, healthy: bool, server: FakeServer) -> None:
    server.health = status

    async def probe() -> None:
        engine = VLLMEngine(server.base_url)
        try:
            await engine.probe(5.0)
        finally:
            await engine.aclose()

    if healthy:
        asyncio.run(probe())
        assert server.asked_for("/v1/models") == 1
    else:
        with pytest.raises(ServerUnavailable, match=f"/health answered {status}"):
            asyncio.run(probe())


def test_a_probe_of_a_server_that_is_not_there_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with pytest.raises(ServerUnavailable, match="cannot reach"):
        asyncio.run(VLLMEngine(base_url).probe(5.0))
