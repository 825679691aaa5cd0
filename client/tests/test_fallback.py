from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support import LINES, FakeServer

from dots_ocr_client import (
    AllEnginesFailed,
    Answer,
    Attempt,
    Box,
    Cell,
    ConfigurationError,
    Engine,
    EngineMissing,
    Limiter,
    Mode,
    ModeNotSupported,
    Page,
    PageImage,
    Task,
    TesseractEngine,
    UnusableAnswer,
    VLLMEngine,
)
from dots_ocr_client.fallback import SHARE, read_page
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
        self.seconds: list[float] = []
        self.cancelled = False

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        assert self.limiter.in_flight > 0
        self.seconds.append(seconds)
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
            return await read_page(engines, page, Task(mode), timeout)
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
    assert (result.mode, lines(result.text)) == ("text", LINES)
    assert (result.attempts[0].error, base_url in result.attempts[0].reason) == ("ServerUnavailable", True)


@pytest.mark.parametrize(("finish_reason", "error"), [("repetition", "Repetition"), ("length", "CutOff")])
def test_a_loop_or_a_cut_makes_tesseract_read_the_page(
    finish_reason: str, error: str, server: FakeServer, page: PageImage
) -> None:
    server.finish_reason = finish_reason
    result = read([VLLMEngine(server.base_url), TesseractEngine()], page)
    assert (result.engine, lines(result.text), result.attempts[0].error) == ("tesseract", LINES, error)


def test_a_server_that_hangs_leaves_time_for_tesseract(page: PageImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dots_ocr_client.fallback.SHARE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, but never answers
        hanging = VLLMEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        result = read([hanging, TesseractEngine()], page, timeout=12.0)
    assert (result.engine, lines(result.text), result.attempts[0].error) == ("tesseract", LINES, "DeadlineExceeded")
    assert 1.1 < result.attempts[0].seconds < 5.0


def test_a_burst_of_pages_stays_within_the_limit(server: FakeServer, page: PageImage) -> None:
    server.seconds = 0.02
    engine = VLLMEngine(server.base_url, limiter=Limiter(start=2, cap=3))

    async def run() -> list[Page]:
        pages = await asyncio.gather(*(read_page([engine], page, Task("text"), 20.0) for _ in range(12)))
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


def test_wrong_settings_end_the_chain(page: PageImage) -> None:
    second = Scripted("second", "unused")
    with pytest.raises(ConfigurationError, match="wrong key"):
        read([Scripted("first", ConfigurationError("wrong key")), second], page)
    assert second.seconds == []


def test_engines_behind_the_first_that_delivers_are_not_asked(page: PageImage) -> None:
    second = Scripted("second", "unused")
    assert read([Scripted("first", "text"), second], page).text == "text"
    assert second.seconds == []


# Time


def test_engines_share_one_deadline(page: PageImage) -> None:
    engines = [Scripted("slow", "too late", delay=9), Scripted("slower", "too late", delay=9)]
    started = time.monotonic()
    with pytest.raises(AllEnginesFailed):
        read(engines, page, timeout=0.8)
    assert 0.7 < time.monotonic() - started < 2.5
    assert engines[0].seconds == pytest.approx([0.6], abs=0.001)
    assert 0 < engines[1].seconds[0] < 0.21


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
        "second", "skipped", "DeadlineExceeded", "nothing was left of the 0.1 s for the page", 0.0
    )
    assert second.seconds == []


def test_waiting_for_a_slot_does_not_cost_the_page_its_time(page: PageImage) -> None:
    engine = Scripted("only", "text", delay=0.2, slots=1)

    async def run() -> list[Page]:
        return await asyncio.gather(*(read_page([engine], page, Task("text"), 1.0) for _ in range(7)))

    pages = asyncio.run(run())
    assert engine.seconds == [1.0] * 7
    assert all(0.15 < page.seconds < 1.0 for page in pages)


def test_the_caller_hears_once_that_a_page_has_its_first_slot(page: PageImage) -> None:
    heard: list[int] = []

    async def run() -> None:
        first, second = Scripted("first", UnusableAnswer("no"), slots=1), Scripted("second", "text")
        async with first.limiter:
            reading = asyncio.create_task(
                read_page([first, second], page, Task("text"), 9.0, lambda: heard.append(first.limiter.in_flight))
            )
            await asyncio.sleep(0.05)
            assert heard == []
        await reading

    asyncio.run(run())
    assert heard == [1]
