from __future__ import annotations

import difflib
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from support import FakeServer

from dots_ocr_client import Document, DotsOCR, TesseractEngine, VLLMEngine

FONTS = Path("/usr/share/fonts/truetype")
PAGES = {
    "eng": ("dejavu/DejaVuSans.ttf", "Invoice 1047 of 3 May 2026, total 1240.50 EUR"),
    "rus": ("dejavu/DejaVuSans.ttf", "Счёт 1047 от 3 мая 2026 года, всего 1240,50 рублей"),
    "chi_sim": ("wqy/wqy-microhei.ttc", "发票号码二零二六年五月三日合计人民币一千二百四十元"),
}


@pytest.fixture(params=PAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def line(language: str) -> str:
    return PAGES[language][1]


@pytest.fixture
def page(language: str, line: str) -> Image.Image:
    image = Image.new("RGB", (1400, 140), "white")
    font = ImageFont.truetype(FONTS / PAGES[language][0], 40)
    ImageDraw.Draw(image).text((40, 40), line, "black", font=font)
    return image


def test_tesseract_reads_it(language: str, line: str, page: Image.Image) -> None:
    with DotsOCR(engines=[TesseractEngine(language)]) as ocr:
        text = ocr.read_page(page, mode="text").text
    alike = difflib.SequenceMatcher(None, text.replace(" ", ""), line.replace(" ", ""), autojunk=False).ratio()
    assert alike > 0.95, text


def test_every_form_of_the_result_has_it_as_it_is(line: str, page: Image.Image, server: FakeServer) -> None:
    server.text = line
    with DotsOCR(engines=[VLLMEngine(server.base_url)]) as ocr:
        document = ocr.read(page)
    assert document.text == line
    assert line in document.markdown()
    assert line in document.html()
    assert Document.from_dict(document.to_dict()) == document
