from __future__ import annotations

import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageDraw, ImageFont

from dots_ocr_client import Box, Cell, FailedPage, Page
from dots_ocr_client.results import hocr

CHINESE = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")
FONT = ImageFont.truetype("DejaVuSans.ttf", 26)
TEXT = "Three crates of apples were counted twice, and entered under number 4071. Это было в тумане, — сказал он."


def page_of(*cells: Cell, text: str = "") -> Page:
    return Page(1, 1000, 1000, "layout", text, cells, "vllm", "dots.ocr", 1.0)


def printed(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> list[tuple[str, Box]]:
    """Print a paragraph, and return where its words are."""
    x, words = float(left), []
    for word in text.split():
        if x + draw.textlength(word, font=FONT) > left + width:
            x, top = float(left), top + 38
        draw.text((x, top), word, "black", font=FONT)
        words.append((word, Box(*map(round, draw.textbbox((x, top), word, font=FONT)))))
        x += draw.textlength(word + " ", font=FONT)
    return words


def around(words: list[tuple[str, Box]]) -> Box:
    left, top, right, bottom = zip(*(box for _, box in words), strict=True)
    return Box(min(left) - 3, min(top) - 3, max(right) + 3, max(bottom) + 3)


def flat(lines: list[list[hocr.Word]]) -> list[hocr.Word]:
    return [word for line in lines for word in line]


def assert_near(found: list[hocr.Word], words: list[tuple[str, Box]], pixels: int = 4) -> None:
    assert [word.text for word in found] == [text for text, _ in words]
    for word, (_, box) in zip(found, words, strict=True):
        assert abs(word.box.left - box.left) <= pixels, word
        assert abs(word.box.right - box.right) <= pixels, word
        assert box.top - 12 <= word.box.top < word.box.bottom <= box.bottom + 12, word


@pytest.mark.parametrize("width", [260, 411, 640, 900])
@pytest.mark.parametrize("paper", ["white", "#d8d0c0"])
def test_words_are_found_in_the_picture(width: int, paper: str) -> None:
    picture = Image.new("RGB", (1000, 1000), paper)
    words = printed(ImageDraw.Draw(picture), TEXT, 50, 60, width)
    cell = Cell("Text", around(words), f"**{TEXT}**")
    assert_near(flat(hocr.words(cell, page_of(cell), picture)), words)


def test_picture_of_another_size_does_as_well() -> None:
    picture = Image.new("L", (1000, 1000), 255)
    words = printed(ImageDraw.Draw(picture), TEXT, 50, 60, 600)
    cell = Cell("Text", around(words), TEXT)
    assert_near(flat(hocr.words(cell, page_of(cell), picture.resize((1500, 1500)))), words)


@pytest.mark.parametrize("text", ["All full bills", "HILL IN TILL", "2**10 and a__b"])
def test_letters_that_fill_a_tight_box_are_no_rules(text: str) -> None:
    picture = Image.new("RGB", (1000, 1000), "white")
    words = printed(ImageDraw.Draw(picture), text, 50, 60, 900)
    left, top, right, bottom = around(words)
    cell = Cell("Text", Box(left + 3, top + 3, right - 3, bottom - 3), text)
    assert_near(flat(hocr.words(cell, page_of(cell), picture)), words)


def test_rules_of_a_table_are_no_letters() -> None:
    picture = Image.new("RGB", (1000, 1000), "white")
    draw = ImageDraw.Draw(picture)
    words, rows = [], (("apples", "12"), ("pears and plums", "7"))
    for row, texts in enumerate(rows):
        for column, text in enumerate(texts):
            words += printed(draw, text, 120 + 400 * column, 110 + 60 * row, 390)
    for edge in range(3):
        draw.line((100, 100 + 60 * edge, 900, 100 + 60 * edge), "black", 3)
        draw.line((100 + 400 * edge, 100, 100 + 400 * edge, 220), "black", 3)
    html = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in texts)}</tr>" for texts in rows)
    cell = Cell("Table", Box(98, 98, 903, 223), f"<table>{html}</table>")
    assert_near(flat(hocr.words(cell, page_of(cell), picture)), words)


def test_text_that_runs_to_the_left_begins_at_the_right() -> None:
    picture = Image.new("RGB", (1000, 1000), "white")
    words = printed(ImageDraw.Draw(picture), "wide narrow x", 50, 60, 900)
    texts = ["\u05d0\u05d1", "\u05d2\u05d3\u05d4\u05d5", "\u05d6\u05d7\u05d8"]
    cell = Cell("Text", around(words), " ".join(texts))
    expected = [(text, box) for text, (_, box) in zip(texts, reversed(words), strict=True)]
    assert_near(flat(hocr.words(cell, page_of(cell), picture)), expected)


def test_signs_without_spaces_end_lines_where_the_page_does() -> None:
    picture = Image.new("RGB", (1000, 1000), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype(str(CHINESE), 40)
    lines = ("\u65e5\u672c\u8a9e\u306e\u6587\u5b57\u5217", "\u4e2d\u56fd\u6c49\u5b57\u6587\u672c\u662f", "\u77ed")
    for row, line in enumerate(lines):
        draw.text((60, 60 + 60 * row), line, "black", font=font)
    cell = Cell("Text", Box(55, 55, 400, 240), "".join(lines))
    found = hocr.words(cell, page_of(cell), picture)
    assert [[word.text for word in line] for line in found] == [[line] for line in lines]
    for row, line in enumerate(lines):
        left, _, right, _ = draw.textbbox((60, 60 + 60 * row), line, font=font)
        assert abs(found[row][0].box.left - left) <= 10
        assert abs(found[row][0].box.right - right) <= 10


@pytest.mark.parametrize("picture", [None, Image.new("RGB", (1000, 1000), "white")], ids=["none", "blank"])
def test_without_ink_lines_of_equal_height_stand_for_them(picture: Image.Image | None) -> None:
    cell = Cell("Text", Box(100, 100, 500, 220), "one two\nthree four five\nsix")
    lines = hocr.words(cell, page_of(cell), picture)
    assert [[word.text for word in line] for line in lines] == [["one", "two"], ["three", "four", "five"], ["six"]]
    assert [line[0].box[:2] for line in lines] == [(100, 100), (100, 140), (100, 180)]
    assert all(line[-1].box.right == 500 for line in lines)


@pytest.mark.parametrize("words", [1, 30, 20_000])
@pytest.mark.parametrize("box", [Box(0, 0, 1000, 1000), Box(5, 5, 6, 6), Box(0, 0, 1000, 1), None])
def test_no_word_is_lost_wherever_it_can_stand(words: int, box: Box | None) -> None:
    chance = random.Random(words)
    picture = Image.effect_noise((1000, 1000), 200)
    text = " ".join("ab"[chance.randrange(2)] * chance.randrange(1, 12) for _ in range(words))
    cell = Cell("Text", box, text)
    for one in (picture, None):
        found = flat(hocr.words(cell, page_of(cell), one))
        assert " ".join(word.text for word in found) == text
        assert all(0 <= word.box.left < word.box.right and word.box.top < word.box.bottom for word in found)


@pytest.mark.parametrize("box", [Box(5, 5, 5, 9), Box(0, 9, 9, 9)])
def test_box_without_an_area_has_no_place_for_words(box: Box) -> None:
    cell = Cell("Text", box, "lost?")
    assert hocr.words(cell, page_of(cell)) == []


def test_document_is_xml_with_every_page_in_its_place() -> None:
    cell = Cell("Page-header", Box(1, 2, 300, 40), "a < b & \x01\ud800 c")
    pages = (page_of(cell), FailedPage(2, "InputError", "why"), page_of(text="of a page without boxes"))
    written = "".join(hocr.document_hocr("<name>\udc80.pdf", pages, {1: Image.new("L", (10, 10))}.get))
    root = ElementTree.fromstring(written)
    texts = [
        ["".join(word.itertext()) for word in page.findall(".//{*}span") if word.get("class") == "ocrx_word"]
        for page in root.findall(".//{*}div")
        if page.get("class") == "ocr_page"
    ]
    assert texts == [["a", "<", "b", "&", "\ufffd?", "c"], ["of", "a", "page", "without", "boxes"]]
    assert "<!-- page 2 could not be read -->" in written
    assert re.search('class="ocr_header" title="bbox 1 2 300 40"', written)
