from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from support import LINES

from dots_ocr_client import Answer, Box, EngineError, EngineMissing, PageImage, RequestRejected, Task, TesseractEngine
from dots_ocr_client.prompts import MODES, Mode

FakeTesseract = Callable[[str], Path]


def read(page: PageImage, task: Task | Mode = "text", languages: str = "eng", seconds: float = 60.0) -> Answer:
    async def run() -> Answer:
        async with asyncio.timeout(seconds):
            asked = task if isinstance(task, Task) else Task(task)
            return await TesseractEngine(languages).read(page, asked, seconds)

    return asyncio.run(run())


def lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line)


def test_it_reads_a_rendered_page(page: PageImage) -> None:
    answer = read(page)
    assert lines(answer.text) == LINES
    assert (answer.mode, answer.model, answer.warnings) == ("text", "eng", ())


def test_a_layout_comes_as_text_with_a_warning(page: PageImage) -> None:
    answer = read(page, "layout")
    assert (answer.mode, lines(answer.text), answer.cells) == ("text", LINES, ())
    assert answer.warnings == ("tesseract reads text without layout",)


@pytest.mark.parametrize("own", [(784, 224), (7840, 2240)])
def test_a_box_is_read_alone(own: tuple[int, int], page: PageImage) -> None:
    width, height = own
    page = PageImage(1, width, height, page.png, page.sent_width, page.sent_height)
    box = Box(0, height * 70 // 224, width, height * 130 // 224)
    answer = read(page, Task("grounding", box=box))
    assert (answer.mode, lines(answer.text), answer.warnings) == ("grounding", (LINES[1],), ())


def test_a_box_that_hangs_over_the_edge_is_cut_off_there(page: PageImage) -> None:
    assert lines(read(page, Task("grounding", box=Box(-50, -50, 9_000, 65))).text) == LINES[:1]


@pytest.mark.parametrize("box", [Box(800, 0, 900, 50), Box(10, 10, 10, 50)])
def test_a_box_without_any_part_of_the_page_is_refused(box: Box, page: PageImage) -> None:
    with pytest.raises(RequestRejected, match="outside the page of 784 x 224 px"):
        read(page, Task("grounding", box=box))


def test_it_knows_the_modes_that_need_no_model() -> None:
    assert TesseractEngine().modes == {"text", "layout", "grounding"}
    assert TesseractEngine().modes < set(MODES)


def test_it_reads_as_many_pages_at_once_as_there_are_processors() -> None:
    assert TesseractEngine().limiter.limit == len(os.sched_getaffinity(0))


def test_it_reads_widely_spaced_letters_in_a_strip() -> None:
    """One letter in each 28 x 28 px cell, as on the sample page of the rehearsal."""
    rows = ("INVOICE 2026-1047", "Date: 23.11.2026", "Customer: Smith & Sons", "Paper    2 x 14.50    29.00")
    image = Image.new("RGB", (784, 224), "white")
    for row, line in enumerate(rows):
        for column, letter in enumerate(line):
            centre = (column * 28 + 14, row * 28 + 14)
            ImageDraw.Draw(image).text(centre, letter, "black", ImageFont.load_default(26), anchor="mm")
    words = read(PageImage.of(1, image)).text.split()
    assert [word for row in rows for word in row.split()] == words


def test_it_is_killed_at_the_deadline(fake_tesseract: FakeTesseract, page: PageImage, tmp_path: Path) -> None:
    fake_tesseract(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        read(page, seconds=0.7)
    assert time.monotonic() - started < 10
    process = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{process}").exists(), "it was left running"


def test_it_gets_the_page_one_thread_and_no_languages_but_those_asked_for(
    fake_tesseract: FakeTesseract, page: PageImage, tmp_path: Path
) -> None:
    fake_tesseract(f'env > {tmp_path}/env; echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/page.png; echo text')
    answer = read(page, languages="rus+eng")
    assert (answer.text, answer.model) == ("text", "rus+eng")
    assert "OMP_THREAD_LIMIT=1" in (tmp_path / "env").read_text().splitlines()
    assert (tmp_path / "arguments").read_text().startswith("stdin stdout -l rus+eng --psm ")
    assert (tmp_path / "page.png").read_bytes() == page.png


def test_missing_it_says_how_to_install_it(page: PageImage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineMissing, match="apt-get install tesseract-ocr tesseract-ocr-eng"):
        read(page)


@pytest.mark.parametrize("languages", ["tlh", "eng+chi_sim_vert_nonsense"])
def test_a_missing_language_says_how_to_install_it(languages: str, page: PageImage) -> None:
    package = languages.split("+")[-1].replace("_", "-")
    with pytest.raises(EngineMissing, match=f"tesseract-ocr-{package}"):
        read(page, languages=languages)


def test_failing_it_is_told_with_its_last_words(fake_tesseract: FakeTesseract, page: PageImage) -> None:
    fake_tesseract("echo first >&2; echo out of ink >&2; exit 3")
    with pytest.raises(EngineError, match="status 3: out of ink"):
        read(page)


def test_no_text_on_a_page_that_is_not_blank_is_a_warning(fake_tesseract: FakeTesseract, page: PageImage) -> None:
    fake_tesseract("cat > /dev/null")
    assert read(page).warnings == ("the page is not blank, but no text was found on it",)
    assert read(PageImage.of(1, Image.new("RGB", (100, 100), "white"))).warnings == ()
