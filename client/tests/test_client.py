from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from PIL import Image
from support import encrypted_pdf, pdf_of

from dots_ocr_client import (
    AllEnginesFailed,
    Answer,
    AsyncDotsOCR,
    Box,
    ConfigurationError,
    DotsOCR,
    EngineError,
    FailedPage,
    InputError,
    Limiter,
    Mode,
    Page,
    PageImage,
    Task,
)
from dots_ocr_client.chain import pipeline
from dots_ocr_client.chain.pipeline import AHEAD
from dots_ocr_client.pages.documents import OpenDocument, Source, open_document
from dots_ocr_client.pages.rasterizer import Rasterizer
from dots_ocr_client.prompts import MODES

SHEET = (200.0, 100.0)  # points
OTHER = (150.0, 100.0)


class Recorder:
    """An engine that answers with the page's number, after a while if told so, or fails on some pages."""

    name = "recorder"
    modes: frozenset[Mode] = frozenset(MODES)
    expected_seconds = 0.0

    def __init__(
        self, seconds: float = 0, slots: int = 4, broken: Callable[[int], bool] = lambda number: False
    ) -> None:
        self.limiter = Limiter(slots, slots)
        self.seconds = seconds
        self.broken = broken
        self.tasks: list[Task] = []
        self.running = self.most = self.cancelled = 0
        self.closed = False

    async def probe(self, seconds: float) -> None: ...

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        self.tasks.append(task)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.broken(page.number):
            raise EngineError("it is torn")
        return Answer(task.mode, f"{page.number}: {page.width} x {page.height}", "model")

    async def wait(self) -> None:
        await asyncio.sleep(self.seconds)

    async def aclose(self) -> None:
        self.closed = True


def test_the_pages_of_a_pdf_come_back_in_order() -> None:
    with DotsOCR(engines=[Recorder()]) as ocr:
        document = ocr.read(pdf_of(SHEET, OTHER, SHEET))
    assert document.text == "1: 556 x 278\n\n2: 417 x 278\n\n3: 556 x 278"
    assert [page.number for page in document.pages] == [1, 2, 3]


def test_only_the_pages_that_were_asked_for_are_read() -> None:
    with DotsOCR(engines=[Recorder()]) as ocr:
        document = ocr.read(pdf_of(SHEET, OTHER, SHEET), pages="3,1")
    assert [page.number for page in document.pages] == [1, 3]


def test_pages_are_drawn_at_the_resolution_that_is_asked_for() -> None:
    document = pdf_of(SHEET)
    with DotsOCR(engines=[Recorder()]) as ocr:
        read = [
            ocr.read(document, dpi=100).pages[0],
            ocr.read_page(document, dpi=100),
            *ocr.stream(document, dpi=100),
            ocr.read_page(document),
        ]
        with pytest.raises(ValueError, match="dpi must be at least 1"):
            ocr.read(document, dpi=0)
    sizes = [(page.width, page.height, page.dpi) for page in read if isinstance(page, Page)]
    assert sizes == [(278, 139, 100)] * 3 + [(556, 278, 200)]


def test_a_page_that_fails_does_not_lose_the_others() -> None:
    with DotsOCR(engines=[Recorder(broken=lambda number: number == 2)]) as ocr:
        document = ocr.read(pdf_of(SHEET, SHEET, SHEET))
    assert [type(page) for page in document.pages] == [Page, FailedPage, Page]
    (failure,) = document.failures
    assert (failure.number, failure.error, failure.attempts[0].reason) == (2, "AllEnginesFailed", "it is torn")
    assert "[page 2 could not be read]" in document.text


def test_a_document_of_which_nothing_was_read_is_an_error() -> None:
    with DotsOCR(engines=[Recorder(broken=lambda number: True)]) as ocr:
        with pytest.raises(AllEnginesFailed, match="it is torn") as caught:
            ocr.read(pdf_of(SHEET, SHEET))
        assert (caught.value.page, caught.value.attempts[0].engine) == (1, "recorder")
        with pytest.raises(InputError, match="neither a PDF nor an image"):
            ocr.read(b"nothing")


def test_wrong_settings_end_the_whole_document() -> None:
    class Misled(Recorder):
        async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
            if self.running:
                raise ConfigurationError("wrong key")
            return await super().read(page, task, seconds)

    engine = Misled(seconds=20, slots=2)
    with DotsOCR(engines=[engine]) as ocr, pytest.raises(ConfigurationError, match="wrong key"):
        ocr.read(pdf_of(*[SHEET] * 5))
    assert (engine.running, engine.cancelled > 0) == (0, True)


def test_pages_come_as_they_finish() -> None:
    class Slow(Recorder):
        async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
            async with asyncio.timeout(60):
                while page.number == 1 and len(self.tasks) < 2:
                    await asyncio.sleep(0.05)
            return await super().read(page, task, seconds)

    with DotsOCR(engines=[Slow()]) as ocr:
        assert [page.number for page in ocr.stream(pdf_of(SHEET, SHEET, SHEET))][-1] == 1


def test_an_open_document_is_read_without_being_opened_again_and_stays_open() -> None:
    async def main() -> None:
        async with AsyncDotsOCR(engines=[Recorder()]) as ocr:
            with await ocr.open(pdf_of(SHEET, OTHER, SHEET)) as document:
                assert document.numbers == (1, 2, 3)
                for pages, numbers in (("2-", {2, 3}), (None, {1, 2, 3})):
                    results = [page async for page in ocr.stream(document, pages=pages)]
                    assert {page.number for page in results if isinstance(page, Page)} == numbers
                with pytest.raises(InputError, match="no page 4"):
                    await anext(ocr.stream(document, pages=[4]))

    asyncio.run(main())


def test_documents_that_wait_for_being_opened_do_not_stand_before_the_pages_of_others(
    monkeypatch: pytest.MonkeyPatch, sheet_file: Path
) -> None:
    most, at_once = 0, 0

    async def look(self: Rasterizer, source: Source, pages: None = None, password: None = None) -> OpenDocument:
        nonlocal most, at_once
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        at_once -= 1
        return open_document(source)

    async def main() -> int:
        async with AsyncDotsOCR(engines=[Recorder()]) as ocr:
            await asyncio.gather(*(ocr.open(sheet_file) for _ in range(20)))
            return ocr._rasterizer.workers

    monkeypatch.setattr(Rasterizer, "open", look)
    assert asyncio.run(main()) == most


def test_every_way_to_read_takes_a_password() -> None:
    data = encrypted_pdf("sesame")
    with DotsOCR(engines=[Recorder()]) as ocr:
        assert ocr.read(data, password="sesame").text == "1: 200 x 200"
        assert ocr.read_page(data, password="sesame").text == "1: 200 x 200"
        assert [page.number for page in ocr.stream(data, password="sesame")] == [1]
        with pytest.raises(InputError, match="needs a password"):
            ocr.read(data)

    async def main() -> int:
        async with AsyncDotsOCR(engines=[Recorder()]) as ocr:
            with await ocr.open(data, password="sesame") as document:
                return len([page async for page in ocr.stream(document)])

    assert asyncio.run(main()) == 1


def test_who_stops_early_stops_the_work() -> None:
    engine = Recorder(seconds=20, slots=2)

    async def read_two() -> None:
        engine.seconds = 0
        async with (
            asyncio.timeout(60),
            AsyncDotsOCR(engines=[engine]) as ocr,
            aclosing(ocr.stream(pdf_of(*[SHEET] * 9))) as stream,
        ):
            await anext(stream)
            engine.seconds = 20
            await asyncio.sleep(0.5)
            while engine.running < 2:
                await asyncio.sleep(0.01)

    asyncio.run(read_two())
    assert (engine.running, engine.cancelled) == (0, 2)
    with DotsOCR(engines=[engine]) as ocr:
        engine.seconds = 0
        for _ in ocr.stream(pdf_of(*[SHEET] * 9)):
            engine.seconds = 20
            break
    assert engine.running == 0


def test_who_stops_early_is_not_held_up_by_pages_that_wait_to_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BACKLOG", 2)
    engine = Recorder()

    async def read_one() -> bool:
        async with (
            asyncio.timeout(30) as limit,
            AsyncDotsOCR(engines=[engine]) as ocr,
            aclosing(ocr.stream(pdf_of(*[SHEET] * 9))) as stream,
        ):
            await anext(stream)
            while len(engine.tasks) < 9 or engine.running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        return limit.expired()  # an end that waits swallows that it is cancelled

    assert not asyncio.run(read_one())


def test_the_engine_sees_no_more_pages_at_once_than_it_has_slots_for() -> None:
    class Full(Recorder):
        async def wait(self) -> None:
            while self.most < 3:  # however slowly pages are drawn
                await asyncio.sleep(0.01)
            await super().wait()

    engine = Full(seconds=0.02, slots=3)
    document = pdf_of(*[SHEET] * 6)

    async def read_three() -> None:
        async with asyncio.timeout(60), AsyncDotsOCR(engines=[engine]) as ocr:
            await asyncio.gather(*(ocr.read(document) for _ in range(3)))

    asyncio.run(read_three())
    assert (len(engine.tasks), engine.most) == (18, 3)


def test_pages_are_drawn_only_shortly_before_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder(seconds=20, slots=2)
    drawn: list[int] = []
    draw = Rasterizer.draw

    async def note(self: Rasterizer, reference: object, *arguments: object) -> PageImage:
        page = await draw(self, reference, *arguments)  # type: ignore[arg-type]
        drawn.append(page.number)
        return page

    monkeypatch.setattr(Rasterizer, "draw", note)

    async def start() -> None:
        async with (
            asyncio.timeout(60),
            AsyncDotsOCR(engines=[engine], max_in_flight=16) as ocr,
            aclosing(ocr.stream(pdf_of(*[SHEET] * 60))) as stream,
        ):
            first = asyncio.ensure_future(anext(stream))
            seen = -1
            while engine.most < 2 or len(drawn) > seen:  # until no more pages are drawn
                seen = len(drawn)
                await asyncio.sleep(0.5)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    asyncio.run(start())
    assert engine.most == 2
    assert 2 < len(drawn) <= 2 + max(2 * Rasterizer().workers, AHEAD * 16)


def test_one_page_is_a_page(sheet: Image.Image) -> None:
    with DotsOCR(engines=[Recorder()]) as ocr:
        page = ocr.read_page(sheet)
        assert (page.text, page.mode, page.engine) == ("1: 784 x 224", "layout", "recorder")
        with pytest.raises(InputError, match="2 pages, not one"):
            ocr.read_page(pdf_of(SHEET, SHEET))
    with (
        DotsOCR(engines=[Recorder(broken=lambda number: True)]) as ocr,
        pytest.raises(AllEnginesFailed, match="it is torn"),
    ):
        ocr.read_page(sheet)


def test_box_and_question_reach_the_engine(sheet: Image.Image) -> None:
    engine = Recorder()
    with DotsOCR(engines=[engine]) as ocr:
        ocr.read(sheet, mode="grounding", box=(1, 2, 30, 40))
        ocr.read(sheet, mode="general", question="What is this?")
    assert engine.tasks == [Task("grounding", Box(1, 2, 30, 40)), Task("general", None, "What is this?")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "prompt_ocr"}, "mode must be one of 'layout'"),
        ({"mode": "grounding"}, "needs a box"),
        ({"box": (1, 2, 3, 4)}, "needs a box"),
        ({"mode": "grounding", "box": (3, 2, 1, 4)}, "is not a box"),
        ({"mode": "general"}, "needs a question"),
        ({"question": "why?"}, "needs a question"),
    ],
)
def test_wrong_tasks_are_refused_before_anything_is_read(
    arguments: dict[str, object], message: str, sheet: Image.Image
) -> None:
    engine = Recorder()
    with DotsOCR(engines=[engine]) as ocr, pytest.raises(ValueError, match=message):
        ocr.read(sheet, **arguments)  # type: ignore[arg-type]
    assert not engine.tasks


@pytest.mark.parametrize(
    "arguments", [{"timeout": 0}, {"timeout": float("nan")}, {"max_in_flight": 0}, {"engines": []}]
)
def test_wrong_settings_are_refused_at_once(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DotsOCR(**arguments)  # type: ignore[arg-type]


def test_it_works_in_several_threads_and_inside_a_running_loop(sheet_file: Path) -> None:
    texts: list[str] = []
    with DotsOCR(engines=[Recorder()]) as ocr:
        threads = [threading.Thread(target=lambda: texts.append(ocr.read(sheet_file).text)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        async def inside() -> str:
            return ocr.read(sheet_file).text

        texts.append(asyncio.run(inside()))
    assert texts == ["1: 784 x 224"] * 3


def test_closing_closes_the_engines_and_ends_the_thread(sheet: Image.Image) -> None:
    engine = Recorder()
    threads = set(threading.enumerate())
    ocr = DotsOCR(engines=[engine])
    ocr.read(sheet)
    ocr.close()
    ocr.close()
    assert (engine.closed, set(threading.enumerate()) - threads) == (True, set())
    with pytest.raises(RuntimeError, match="closed: make a new one"):
        ocr.read(sheet)


def test_closing_from_another_thread_ends_a_read(sheet: Image.Image) -> None:
    engine = Recorder(seconds=20)
    ocr = DotsOCR(engines=[engine])
    threading.Timer(0.3, ocr.close).start()
    with pytest.raises(RuntimeError, match="closed while it was reading"):
        ocr.read(sheet)
    assert engine.cancelled == 1
