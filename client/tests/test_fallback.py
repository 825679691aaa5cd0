from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support import LINES, FakeServer, MakeClient, pdf_of

from dots_ocr_client import (
    AllEnginesFailed,
    Answer,
    DotsOCR,
    EngineMissing,
    InputError,
    PageImage,
    TesseractEngine,
    UnusableAnswer,
    VLLMEngine,
    fallback,
)
from dots_ocr_client.prompts import Mode


class Scripted:
    """An engine that does as it is told."""

    def __init__(self, name: str, result: str | Exception, delay: float = 0.0) -> None:
        self.name, self.result, self.delay = name, result, delay
        self.seconds: list[float] = []
        self.cancelled = self.closed = False

    async def read(self, page: PageImage, mode: Mode, seconds: float) -> Answer:
        self.seconds.append(seconds)
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return Answer(self.result, model="scripted")

    async def aclose(self) -> None:
        self.closed = True


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line)


def test_503_makes_tesseract_read_the_page(client: MakeClient, server: FakeServer, sheet: Image.Image) -> None:
    server.fail_with(503)
    (page,) = client().read(sheet).pages
    (attempt,) = page.attempts
    assert lines(page.text) == LINES
    assert (page.engine, page.model) == ("tesseract", "eng")
    assert (attempt.engine, attempt.outcome, attempt.error) == ("vllm", "failed", "ServerUnavailable")
    assert "503" in attempt.reason


def test_a_refused_connection_makes_tesseract_read_the_page(client: MakeClient, sheet: Image.Image) -> None:
    base_url = f"http://127.0.0.1:{unused_port()}/v1"
    (page,) = client([VLLMEngine(base_url), TesseractEngine()]).read(sheet).pages
    assert lines(page.text) == LINES
    assert (page.attempts[0].error, base_url in page.attempts[0].reason) == ("ServerUnavailable", True)


@pytest.mark.parametrize("finish_reason", ["repetition", "length"])
def test_a_loop_or_a_cut_makes_tesseract_read_the_page(
    finish_reason: str, client: MakeClient, server: FakeServer, sheet: Image.Image
) -> None:
    server.finish_reason = finish_reason
    (page,) = client().read(sheet).pages
    assert (page.engine, lines(page.text), page.attempts[0].error) == ("tesseract", LINES, "UnusableAnswer")


def test_a_server_that_hangs_leaves_time_for_tesseract(
    client: MakeClient, sheet: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "SHARE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, but never answers
        hanging = VLLMEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        (page,) = client([hanging, TesseractEngine()], timeout=15.0).read(sheet).pages
    assert (page.engine, lines(page.text), page.attempts[0].error) == ("tesseract", LINES, "DeadlineExceeded")
    assert 1.4 < page.attempts[0].seconds < 5.0


def test_all_failed_lists_every_cause(client: MakeClient, sheet: Image.Image) -> None:
    engines = [
        Scripted("first", UnusableAnswer("it made no sense")),
        Scripted("second", EngineMissing("install it")),
        Scripted("third", "too late", delay=9),
    ]
    with pytest.raises(AllEnginesFailed) as caught:
        client(engines, timeout=0.3).read(sheet)
    assert [(a.engine, a.outcome, a.error) for a in caught.value.attempts] == [
        ("first", "failed", "UnusableAnswer"),
        ("second", "skipped", "EngineMissing"),
        ("third", "failed", "DeadlineExceeded"),
    ]
    assert all(words in str(caught.value) for words in ("page 1", "it made no sense", "install it", "allow more time"))
    assert engines[2].cancelled


def test_engines_share_one_deadline(client: MakeClient, sheet: Image.Image) -> None:
    engines = [Scripted("slow", "too late", delay=9), Scripted("slower", "too late", delay=9)]
    started = time.monotonic()
    with pytest.raises(AllEnginesFailed):
        client(engines, timeout=0.8).read(sheet)
    assert 0.7 < time.monotonic() - started < 2.5
    assert engines[0].seconds == pytest.approx([0.6], abs=0.05)
    assert 0 < engines[1].seconds[0] < 0.21


def test_an_engine_with_no_time_left_is_skipped(client: MakeClient, sheet: Image.Image) -> None:
    class Blocking(Scripted):
        async def read(self, page: PageImage, mode: Mode, seconds: float) -> Answer:
            time.sleep(0.2)
            raise UnusableAnswer("late")

    second = Scripted("second", "never asked")
    with pytest.raises(AllEnginesFailed) as caught:
        client([Blocking("first", ""), second], timeout=0.1).read(sheet)
    assert (caught.value.attempts[1].outcome, second.seconds) == ("skipped", [])


def test_engines_behind_the_first_that_delivers_are_not_asked(client: MakeClient, sheet: Image.Image) -> None:
    second = Scripted("second", "unused")
    assert client([Scripted("first", "text"), second]).read(sheet).text == "text"
    assert second.seconds == []


@pytest.mark.parametrize("document", [b"rubbish", b"%PDF-1.7 rubbish", pdf_of((90, 90), (90, 90)), "missing.png"])
def test_bad_input_asks_no_engine(document: bytes | str, client: MakeClient, server: FakeServer) -> None:
    second = Scripted("second", "unused")
    with pytest.raises(InputError):
        client([VLLMEngine(server.base_url), second]).read(document)
    assert (server.http.log, second.seconds) == ([], [])


def test_closing_closes_the_engines_and_ends_the_thread(sheet: Image.Image) -> None:
    engine = Scripted("first", "text")
    with DotsOCR(engines=[engine]) as ocr:
        ocr.read(sheet)
        assert "dots-ocr" in [thread.name for thread in threading.enumerate()]
    assert engine.closed
    assert "dots-ocr" not in [thread.name for thread in threading.enumerate()]
    ocr.close()
    with pytest.raises(RuntimeError, match="closed"):
        ocr.read(sheet)


def test_closing_from_another_thread_ends_a_read(sheet: Image.Image) -> None:
    engine = Scripted("first", "text", delay=60)
    ocr = DotsOCR(engines=[engine])
    closer = threading.Timer(0.3, ocr.close)
    closer.start()
    with pytest.raises(RuntimeError, match="closed while it was reading"):
        ocr.read(sheet)
    closer.join()
    assert engine.cancelled


def test_it_works_inside_a_running_event_loop(client: MakeClient, sheet: Image.Image) -> None:
    async def notebook() -> str:
        return client([Scripted("first", "text")]).read(sheet).text

    assert asyncio.run(notebook()) == "text"


def test_two_threads_may_read_at_once(client: MakeClient, sheet: Image.Image) -> None:
    ocr = client([Scripted("first", "text", delay=1.0)])
    threads = [threading.Thread(target=ocr.read, args=(sheet,)) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 3.5


@pytest.mark.parametrize("arguments", [{"timeout": 0}, {"timeout": float("nan")}, {"engines": []}])
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"timeout must be|engines is empty"):
        DotsOCR(**arguments)  # type: ignore[arg-type]


def test_an_unknown_mode_is_refused(client: MakeClient, sheet: Image.Image) -> None:
    with pytest.raises(ValueError, match="'text'"):
        client([Scripted("first", "text")]).read(sheet, mode="layout")  # type: ignore[arg-type]


def test_results_are_frozen_and_become_json_values(client: MakeClient, sheet_file: Path) -> None:
    engines = [Scripted("first", UnusableAnswer("why")), Scripted("second", "text")]
    document = client(engines).read(sheet_file)
    values = document.to_dict()
    assert (values["source"], values["text"]) == (str(sheet_file), "text")
    assert values["pages"][0]["attempts"][0]["reason"] == "why"
    with pytest.raises(AttributeError):
        document.pages[0].text = "other"  # type: ignore[misc]


FakeTesseract = Callable[[str], Path]


def test_tesseract_reads_a_rendered_page(client: MakeClient, sheet: Image.Image) -> None:
    assert lines(client([TesseractEngine()]).read(sheet).text) == LINES


def test_tesseract_reads_widely_spaced_letters_in_a_strip(client: MakeClient) -> None:
    """One letter in each 28 x 28 px cell, as on the sample page of the rehearsal."""
    from PIL import ImageDraw, ImageFont

    rows = ("INVOICE 2026-1047", "Date: 23.11.2026", "Customer: Smith & Sons", "Paper    2 x 14.50    29.00")
    image = Image.new("RGB", (784, 224), "white")
    for row, line in enumerate(rows):
        for column, letter in enumerate(line):
            centre = (column * 28 + 14, row * 28 + 14)
            ImageDraw.Draw(image).text(centre, letter, "black", ImageFont.load_default(26), anchor="mm")
    words = client([TesseractEngine()]).read(image).text.split()
    assert [word for row in rows for word in row.split()] == words


def test_tesseract_is_killed_at_the_deadline(
    client: MakeClient, fake_tesseract: FakeTesseract, sheet: Image.Image, tmp_path: Path
) -> None:
    fake_tesseract(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    started = time.monotonic()
    with pytest.raises(AllEnginesFailed, match="DeadlineExceeded"):
        client([TesseractEngine()], timeout=0.7).read(sheet)
    assert time.monotonic() - started < 10
    process = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{process}").exists(), "it was left running"


def test_tesseract_gets_one_thread_and_no_languages_but_those_asked_for(
    client: MakeClient, fake_tesseract: FakeTesseract, sheet: Image.Image, tmp_path: Path
) -> None:
    fake_tesseract(f'env > {tmp_path}/env; echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/page.png; echo text')
    (page,) = client([TesseractEngine("rus+eng")]).read(sheet).pages
    assert (page.text, page.model) == ("text", "rus+eng")
    assert "OMP_THREAD_LIMIT=1" in (tmp_path / "env").read_text().splitlines()
    assert (tmp_path / "arguments").read_text().startswith("stdin stdout -l rus+eng --psm ")
    assert Image.open(tmp_path / "page.png").tobytes() == sheet.tobytes()


def test_tesseract_missing_says_how_to_install_it(
    client: MakeClient, sheet: Image.Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AllEnginesFailed, match="apt-get install tesseract-ocr tesseract-ocr-eng") as caught:
        client([TesseractEngine()]).read(sheet)
    assert (caught.value.attempts[0].outcome, caught.value.attempts[0].error) == ("skipped", "EngineMissing")


@pytest.mark.parametrize("languages", ["tlh", "eng+chi_sim_vert_nonsense"])
def test_a_missing_language_says_how_to_install_it(languages: str, client: MakeClient, sheet: Image.Image) -> None:
    package = languages.split("+")[-1].replace("_", "-")
    with pytest.raises(AllEnginesFailed, match=f"EngineMissing.*tesseract-ocr-{package}"):
        client([TesseractEngine(languages)]).read(sheet)


def test_tesseract_failing_is_told_with_its_last_words(
    client: MakeClient, fake_tesseract: FakeTesseract, sheet: Image.Image
) -> None:
    fake_tesseract("echo first >&2; echo out of ink >&2; exit 3")
    with pytest.raises(AllEnginesFailed, match="status 3: out of ink"):
        client([TesseractEngine()]).read(sheet)


def test_no_text_on_a_page_that_is_not_blank_is_a_warning(
    client: MakeClient, fake_tesseract: FakeTesseract, sheet: Image.Image
) -> None:
    fake_tesseract("cat > /dev/null")
    ocr = client([TesseractEngine()])
    assert ocr.read(sheet).pages[0].warnings == ("the page is not blank, but no text was found on it",)
    assert ocr.read(Image.new("RGB", (100, 100), "white")).pages[0].warnings == ()
