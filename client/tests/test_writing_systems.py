# ruff: noqa: RUF001  # Cyrillic and Chinese are meant
from __future__ import annotations

import ctypes
import difflib
import io
import random
from collections.abc import Iterator
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from pypdfium2 import raw
from rapidfuzz.distance import Levenshtein
from support import FakeServer

from dots_ocr_client import Document, DotsOCR, Page, TesseractEngine, VLLMEngine
from dots_ocr_client.engines.textlayer import TextLayerEngine

FONTS = Path("/usr/share/fonts/truetype")
PAGES = {
    "eng": ("dejavu/DejaVuSans.ttf", "Invoice 1047 of 3 May 2026, total 1240.50 EUR"),
    "rus": ("dejavu/DejaVuSans.ttf", "Счёт 1047 от 3 мая 2026 года, всего 1240,50 рублей"),
    "chi_sim": ("wqy/wqy-microhei.ttc", "发票号码二零二六年五月三日合计人民币一千二百四十元"),
}
PARAGRAPHS = {
    "eng": (
        "The ferry left at seven in the morning, an hour later than the timetable said. Most of the passengers were "
        "farmers on the way to the market, with baskets of apples, eggs and fresh bread.",
        "Nobody complained about the delay. The captain had waited for the doctor, who was called to the island "
        "during the night and had not slept since (it was her third journey in a week).",
        "By noon the harbour was quiet again. A boy counted the boats: 14 red ones, 9 blue ones, and a single white "
        "one that had been there for 27 years.",
    ),
    "rus": (
        "Паром отошёл в семь утра, на час позже, чем значилось в расписании. Большинство пассажиров были крестьяне, "
        "которые везли на рынок корзины с яблоками, яйцами и свежим хлебом.",
        "Никто не жаловался на задержку. Капитан ждал врача: её вызвали на остров ночью, и с тех пор она не спала "
        "(это была уже третья поездка за неделю).",
        "К полудню в гавани снова стало тихо. Мальчик считал лодки: 14 красных, 9 синих и одна белая, которая стояла "
        "здесь уже 27 лет.",
    ),
    "chi_sim": (
        "渡船早上七点离开码头，比时刻表晚了一个小时。大多数乘客是去市场的农民，他们带着一篮一篮的苹果、鸡蛋和新鲜面包。",
        "没有人抱怨晚点。船长一直在等医生，她夜里被叫到岛上去，从那时起就没有睡过觉，这已经是她一周里的第三次出诊。",
        "到了中午，港口又安静下来。一个男孩在数船：红色的有十四条，蓝色的有九条，白色的只有一条，它在那里已经停了二十七年。",
    ),
}
CHARACTERS_PER_LINE = {"eng": 66, "rus": 62, "chi_sim": 34}
POINTS = 11

CLEAN, SCAN = "clean", "scan"
MOST_ERRORS = {
    ("eng", CLEAN): 0.005,
    ("eng", SCAN): 0.005,
    ("rus", CLEAN): 0.005,
    ("rus", SCAN): 0.005,
    ("chi_sim", CLEAN): 0.01,
    ("chi_sim", SCAN): 0.03,
}
"""Measured with Tesseract 5.3.0: 0 in English and Russian; in Chinese 0.006 (one mark), and 0.018 in the scan."""


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


# How many characters are read wrongly on a page of three paragraphs


def wrapped(paragraph: str, width: int) -> Iterator[str]:
    """Break a paragraph into lines, at spaces where it has any."""
    while len(paragraph) > width:
        end = paragraph.rfind(" ", 0, width + 1)
        end = width if end < 0 else end
        yield paragraph[:end]
        paragraph = paragraph[end:].lstrip()
    yield paragraph


def typeset(language: str) -> Iterator[tuple[float, str]]:
    """Yield the lines of the page, each with the place of its baseline, in points from the top."""
    baseline = 80.0
    for paragraph in PARAGRAPHS[language]:
        for text in wrapped(paragraph, CHARACTERS_PER_LINE[language]):
            yield baseline, text
            baseline += 1.4 * POINTS
        baseline += POINTS


def printed(language: str) -> Image.Image:
    """The page at 200 dpi."""
    image = Image.new("RGB", (1654, 1000), "white")
    font = ImageFont.truetype(FONTS / PAGES[language][0], round(POINTS * 200 / 72))
    for baseline, text in typeset(language):
        ImageDraw.Draw(image).text((200, baseline * 200 / 72), text, "black", font=font, anchor="ls")
    return image


def scanned(page: Image.Image) -> Image.Image:
    """The page as a scanner sees it: half a degree askew, on grey paper, out of focus and noisy; always the same."""
    grey = page.convert("L").rotate(0.5, Image.Resampling.BICUBIC, fillcolor=255).point(lambda level: 40 + 0.75 * level)
    noise = Image.frombytes("L", grey.size, random.Random(1).randbytes(grey.width * grey.height))
    noise = noise.point(lambda level: level / 6)
    return ImageChops.subtract(grey.filter(ImageFilter.GaussianBlur(1)), noise).convert("RGB")


def pdf_of(language: str) -> bytes:
    """The page as a PDF with embedded font and text."""
    document = pypdfium2.PdfDocument.new()
    data = (FONTS / PAGES[language][0]).read_bytes()
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    font = raw.FPDFText_LoadFont(document, buffer, len(data), raw.FPDF_FONT_TRUETYPE, True)
    page = document.new_page(595, 360)
    for baseline, text in typeset(language):
        drawn = raw.FPDFPageObj_CreateTextObj(document, font, POINTS)
        encoded = ctypes.create_string_buffer((text + "\0").encode("utf-16-le"))
        raw.FPDFText_SetText(drawn, ctypes.cast(encoded, ctypes.POINTER(ctypes.c_ushort)))
        raw.FPDFPageObj_Transform(drawn, 1, 0, 0, 1, 72, 360 - baseline)
        raw.FPDFPage_InsertObject(page, drawn)
    page.gen_content()
    raw.FPDFFont_Close(font)
    result = io.BytesIO()
    document.save(result)
    document.close()
    return result.getvalue()


def error_rate(language: str, text: str) -> float:
    """Return the part of the characters that would have to be changed; white space counts only where words part."""
    space = "" if language == "chi_sim" else " "
    expected, read = (space.join(one.split()) for one in ("\n".join(PARAGRAPHS[language]), text))
    return Levenshtein.distance(read, expected) / len(expected)


@pytest.mark.parametrize("quality", [CLEAN, SCAN])
def test_tesseract_reads_few_characters_wrongly(language: str, quality: str) -> None:
    page = printed(language) if quality == CLEAN else scanned(printed(language))
    with DotsOCR(engines=[TesseractEngine(language)]) as ocr:
        text, layout = (ocr.read_page(page, mode=mode) for mode in ("text", "layout"))
    assert error_rate(language, text.text) <= MOST_ERRORS[language, quality], text.text
    assert layout.text == text.text
    assert len(layout.cells) == len(PARAGRAPHS[language])


def test_a_text_layer_is_read_without_any_error(language: str) -> None:
    with DotsOCR(engines=[TextLayerEngine()]) as ocr:
        (page,) = ocr.read(pdf_of(language)).pages
    assert isinstance(page, Page), page
    assert error_rate(language, page.text) == 0.0
    assert len(page.cells) == len(PARAGRAPHS[language])
