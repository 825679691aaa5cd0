from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support import children, pdf_of

from dots_ocr_client import AllEnginesFailed, Answer, DotsOCR, EngineError, NotApplicable, Page, PageImage, Task
from dots_ocr_client.engines.textlayer import TextLayerEngine
from dots_ocr_client.pages import pdf_text
from dots_ocr_client.pages.documents import PageReference, draw, open_document
from dots_ocr_client.pages.rasterizer import Rasterizer
from dots_ocr_client.prompts import Mode

SCAN = b"q %d 0 0 %d %d %d cm /Scan Do Q\n"
"""Puts the picture there: width, height, left, bottom."""
SENTENCE = "The quick brown fox jumps over the lazy dog near the river"


def pdf(content: bytes, page: bytes = b"", font: bytes = b"", more: tuple[bytes, ...] = ()) -> bytes:
    """A PDF of one page of 400 x 300 points.

    Args:
        content: What is drawn, with the font ``/F`` (Helvetica) and the picture ``/Scan``: a checkerboard.
        page: Further entries of the page.
        font: Further entries of the font.
        more: Further objects, numbered from 7.
    """
    picture = bytes((row + column) % 2 * 255 for row in range(40) for column in range(40))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [7 0 R] /DR << /Font << /F 5 0 R >> >> >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 300] " + page + b" /Contents 4 0 R"
        b" /Resources << /Font << /F 5 0 R >> /XObject << /Scan 6 0 R /Form 7 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica " + font + b" >>",
        b"<< /Type /XObject /Subtype /Image /Width 40 /Height 40 /ColorSpace /DeviceGray /BitsPerComponent 8"
        b" /Length %d >>\nstream\n%s\nendstream" % (len(picture), picture),
        *more,
    ]
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, text) for number, text in enumerate(objects, 1))
    return b"%PDF-1.4\n" + body + b"trailer << /Root 1 0 R /Size %d >>\n%%%%EOF" % (len(objects) + 1)


def line(left: float, bottom: float, text: str, size: float = 12, state: str = "0 Tr") -> bytes:
    return f"BT {state} /F {size} Tf {left} {bottom} Td ({text}) Tj ET\n".encode()


def column(left: float, top: float, *texts: str, size: float = 12) -> bytes:
    return b"".join(line(left, top - 14 * row, text, size) for row, text in enumerate(texts))


@contextlib.contextmanager
def page_of(document: bytes) -> Iterator[PageImage]:
    with open_document(document) as opened:
        yield draw(opened.reference(1))


# One for all tests, which starts a process at the first page.
RUNNER, ENGINE = asyncio.Runner(), TextLayerEngine()


@pytest.fixture(scope="session", autouse=True)
def end_of_the_engine() -> Iterator[None]:
    yield
    RUNNER.run(ENGINE.aclose())
    RUNNER.close()


def ask(page: PageImage, mode: Mode = "layout", seconds: float = 30) -> Answer:
    return RUNNER.run(ENGINE.read(page, Task(mode), seconds))


def read(document: bytes, mode: Mode = "layout") -> Answer:
    with page_of(document) as page:
        return ask(page, mode)


def refusal(document: bytes) -> str:
    with pytest.raises(NotApplicable) as caught:
        read(document)
    return str(caught.value)


def texts(answer: Answer) -> list[str]:
    return [cell.text for cell in answer.cells]


# Text and layout


LETTER = column(40, 250, "Dear customer,", "thank you for the order.") + column(40, 180, "Yours", "the shop")


def test_a_layout_has_a_cell_for_each_paragraph() -> None:
    answer = read(pdf(LETTER))
    assert (answer.mode, answer.warnings) == ("layout", ())
    assert answer.model.startswith("PDFium ")
    assert texts(answer) == ["Dear customer,\nthank you for the order.", "Yours\nthe shop"]
    assert {cell.category for cell in answer.cells} == {"Text"}


def test_the_text_is_that_of_the_layout() -> None:
    text, layout = read(pdf(LETTER), "text"), read(pdf(LETTER))
    assert text.text == layout.text == "\n\n".join(texts(layout))
    assert (text.mode, text.cells) == ("text", ())


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", [b"", b"/CropBox [30 140 230 280]"])
def test_boxes_enclose_the_ink_on_the_page_as_it_is_drawn(rotation: int, crop: bytes) -> None:
    """In all rotations, because the layer turns with the page."""
    with page_of(pdf(column(40, 250, "Dear customer,", "good bye"), b"/Rotate %d %s" % (rotation, crop))) as page:
        (cell,) = ask(page).cells
        ink = page.image.convert("L").point(lambda level: 255 * (level < 128)).getbbox()
    assert cell.text == "Dear customer,\ngood bye"
    assert cell.box == pytest.approx(ink, abs=3)


def test_boxes_refer_to_the_image_of_a_page_too_large_for_200_dpi() -> None:
    large = pdf(b"8 0 0 8 0 0 cm " + line(40, 250, "Poster"), b"/MediaBox [0 0 3200 2400]")
    with page_of(large) as page:
        (cell,) = ask(page).cells
        ink = page.image.convert("L").point(lambda level: 255 * (level < 128)).getbbox()
    assert page.warnings
    assert cell.box == pytest.approx(ink, abs=3)


def test_columns_are_read_one_after_the_other_below_a_title_across_both() -> None:
    """Also when the file has their lines alternately, and a paragraph ends at the same height in both."""
    left = ["left one and some words", "left two and some words", "", "left three and some words"]
    right = ["right one and some words", "right two and some words", "", "right three and more words"]
    rows = b"".join(
        line(20, 220 - 14 * row, one, 10) + line(210, 220 - 14 * row, other, 10)
        for row, (one, other) in enumerate(zip(left, right, strict=True))
    )
    title = line(60, 260, "A title that reaches across both of the columns")
    answer = read(pdf(rows + title))
    expected = ["A title that reaches across both of the columns"]
    for lines in (left, right):
        expected += ["\n".join(lines[:2]), lines[3]]
    assert texts(answer) == expected


def test_columns_of_justified_lines_are_found() -> None:
    """Their words stand as far apart as the columns do."""
    left = column(20, 220, "wide apart on the left", "and the second line", size=10)
    right = column(215, 220, "wide apart on the right", "and another line", size=10)
    justified = (left + right).replace(b"0 Tr", b"0 Tr 8 Tw")
    assert texts(read(pdf(justified))) == [
        "wide apart on the left\nand the second line",
        "wide apart on the right\nand another line",
    ]


def test_what_is_below_columns_comes_after_both_unless_it_is_the_rest_of_the_longer_one() -> None:
    left = column(20, 280, *(f"left {n} and some more words" for n in range(6)), size=10)
    right = column(210, 280, *(f"right {n} and some more words" for n in range(3)), size=10)
    below = column(20, 150, "Paper", "Pens") + column(80, 150, "14.50", "9.90")
    assert texts(read(pdf(left + right + below))) == [
        "\n".join(f"left {n} and some more words" for n in range(6)),
        "\n".join(f"right {n} and some more words" for n in range(3)),
        "Paper 14.50\nPens 9.90",
    ]


def test_a_table_is_read_row_by_row() -> None:
    rows = [("Paper", "2", "14.50"), ("Pens", "10", "9.90"), ("Ink", "1", "24.00")]
    content = b"".join(
        line(40 + 120 * place, 250 - 14 * row, text)
        for row, cells in enumerate(rows)
        for place, text in enumerate(cells)
    )
    assert read(pdf(content)).text == "Paper 2 14.50\nPens 10 9.90\nInk 1 24.00"


def grid(left: float, top: float, rows: Sequence[Sequence[str]], step: float, pitch: float = 14) -> bytes:
    """Short texts in rows, each so far behind the one before."""
    return b"".join(
        line(left + step * place, top - pitch * row, text, 10)
        for row, cells in enumerate(rows)
        for place, text in enumerate(cells)
    )


LEFT, RIGHT = ([f"{side} {n} and some more words" for n in range(9)] for side in ("left", "right"))
FIGURES = [["2024", "2025", "2026"], ["275.5", "295.6", "319.4"], ["8.8", "10.3", "12.2"], ["4.4", "5.6", "7.1"]]


@pytest.mark.parametrize("pitch", [14, 13, 10])
@pytest.mark.parametrize("place", ["right", "left", "above the right column"])
def test_columns_survive_a_sidebar_of_short_cells(pitch: float, place: str) -> None:
    """Also if its rows happen to stand on the columns' lines."""
    start = 150 if place == "left" else 20
    prose = column(start, 250, *LEFT, size=10) + column(start + 180, 250, *RIGHT, size=10)
    figures = grid(20 if place == "left" else 400, 278 if place.startswith("above") else 250, FIGURES, 40, pitch)
    columns = ["\n".join(LEFT), "\n".join(RIGHT)]
    cells = "\n".join(map(" ".join, FIGURES))
    found = texts(read(pdf(prose + figures, b"/MediaBox [0 0 560 300]")))
    if place == "left":
        columns.insert(0, cells)
    else:
        columns.append(cells)
    assert [part for part in found if part not in cells] == [part for part in columns if part != cells]
    assert "\n".join(part for part in found if part in cells) == cells


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_table_of_short_cells_inside_a_column_does_not_join_it_with_the_other(side: str) -> None:
    rows = [["a", "12", "3"], ["b", "4", "5"], ["c", "77", "8"], ["d", "9", "10"]]
    parts = {"left": column(20, 280, *LEFT, size=10), "right": column(210, 280, *RIGHT, size=10)}
    whole = {"left": "\n".join(LEFT), "right": "\n".join(RIGHT)}
    prose = (LEFT if side == "left" else RIGHT)[:4]
    start = 20 if side == "left" else 210
    parts[side] = column(start, 280, *prose, size=10) + grid(start, 210, rows, 40, 15)
    whole[side] = "\n".join([*prose, *map(" ".join, rows)])
    answer = read(pdf(parts["left"] + parts["right"]))
    assert answer.text.replace("\n\n", "\n") == whole["left"] + "\n" + whole["right"]


def test_statements_side_by_side_are_read_one_after_the_other() -> None:
    profit = [["Revenue from sales", "1,200"], ["Cost of materials", "(800)"], ["Other income", "35"]]
    assets = [["Cash at bank", "600"], ["Trade receivables", "250"], ["Inventories", "120"]]
    rows = grid(20, 250, [one + other for one, other in zip(profit, assets, strict=True)], 100)
    assert texts(read(pdf(rows))) == ["\n".join(map(" ".join, profit)), "\n".join(map(" ".join, assets))]


@pytest.mark.parametrize(
    "rows",
    [
        [["Printer paper A4, 80 g", "12", "54.60"], ["Pens, blue, box of ten", "3", "9.90"], ["Ink", "1", "24.00"]],
        [["Name", "City", "Country"], ["Ada Smith", "London", "England"], ["Eve Petit", "Paris", "France"]],
        [["Invoice number:", "2026-0473"], ["Customer:", "Northwind Paper Supply Ltd."], ["Total:", "241.85"]],
        [["Paper", "2", "pcs", "14.50"], ["Pens", "10", "box", "9.90"], ["Ink", "1", "pcs", "24.00"]],
    ],
    ids=["a long name first", "words only", "a form", "names and figures by turns"],
)
def test_what_is_one_table_stays_one(rows: list[list[str]]) -> None:
    assert read(pdf(grid(20, 250, rows, 130 if len(rows[0]) < 4 else 90))).text == "\n".join(map(" ".join, rows))


def test_a_cell_of_several_lines_does_not_part_a_table() -> None:
    words = ["Printer paper A4, 80 g, in", "boxes of five packs", "Pens, blue, box of ten,", "also black"]
    figures = grid(200, 250, [["12", "54.60"], ["3", "9.90"]], 60, 28)
    assert read(pdf(column(20, 250, *words, size=10) + figures)).text.splitlines() == [
        "Printer paper A4, 80 g, in 12 54.60",
        "boxes of five packs",
        "Pens, blue, box of ten, 3 9.90",
        "also black",
    ]


@pytest.mark.parametrize("caption", ["Figure 1: what reaches across both of the columns on a page", "Figure 1: short"])
def test_a_caption_across_columns_parts_them(caption: str) -> None:
    upper = column(20, 280, *LEFT[:4], size=10) + column(200, 280, *RIGHT[:4], size=10)
    lower = column(20, 180, *LEFT[4:], size=10) + column(200, 180, *RIGHT[4:], size=10)
    content = upper + line(20 if len(caption) > 20 else 135, 208, caption, 10) + lower
    assert texts(read(pdf(content))) == [
        *("\n".join(lines[:4]) for lines in (LEFT, RIGHT)),
        caption,
        *("\n".join(lines[4:]) for lines in (LEFT, RIGHT)),
    ]


def test_a_heading_is_a_paragraph_of_its_own() -> None:
    assert texts(read(pdf(line(40, 252, "Heading", 18) + line(40, 234, "and what follows")))) == [
        "Heading",
        "and what follows",
    ]


def test_text_that_runs_upwards_comes_last_and_does_not_disturb_the_lines() -> None:
    sideways = b"BT /F 12 Tf 0 1 -1 0 25 60 Tm (printed sideways) Tj ET\n"
    with page_of(pdf(sideways + column(60, 250, *(f"line number {n}" for n in range(9))))) as page:
        upright, turned = ask(page).cells
    assert upright.text.splitlines() == [f"line number {n}" for n in range(9)]
    assert turned.text == "printed sideways"
    assert turned.box is not None
    assert turned.box.bottom - turned.box.top > 3 * (turned.box.right - turned.box.left)


def test_words_are_kept_apart_and_hyphens_kept() -> None:
    assert read(pdf(b"BT /F 12 Tf 40 250 Td [(Hel) 20 (lo) -400 (world)] TJ ET")).text == "Hello world"
    assert read(pdf(column(40, 250, "a long hyphen-", "ated word"))).text == "a long hyphen-\nated word"


def test_text_inside_a_form_is_part_of_the_layer() -> None:
    form = line(0, 0, "inside a form")
    form = (
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 400 300] /Resources << /Font << /F 5 0 R >> >>"
        b" /Length %d >>\nstream\n%s\nendstream" % (len(form), form)
    )
    with page_of(pdf(b"1 0 0 1 100 200 cm /Form Do", more=(form,))) as page:
        (cell,) = ask(page).cells
        ink = page.image.convert("L").point(lambda level: 255 * (level < 128)).getbbox()
    assert cell.text == "inside a form"
    assert cell.box == pytest.approx(ink, abs=3)


# What is no sound text layer


FULL = column(20, 280, *(SENTENCE for _ in range(8)), size=11)


def test_only_pages_of_pdfs_have_a_text_layer(page: PageImage) -> None:
    with pytest.raises(NotApplicable, match="only pages of PDFs"):
        ask(page)


@pytest.mark.parametrize("content", [b"", SCAN % (400, 300, 0, 0), line(40, 250, "   ")])
def test_a_page_without_text_has_no_layer(content: bytes) -> None:
    assert refusal(pdf(content)) == "the page has no text layer"


OCR = b"".join(line(20, 280 - 14 * row, SENTENCE, 10, "3 Tr") for row in range(19))


@pytest.mark.parametrize("size", [6, 8, 9, 10, 11, 12, 14])
@pytest.mark.parametrize("colour", ["0 g", "0.75 g", "1 0.8 0.8 rg"], ids=["black", "grey", "pale"])
def test_no_comma_point_or_dash_is_lost(size: float, colour: str) -> None:
    """Their ink is next to nothing, and PDFium paints some of it outside the box that it gives."""
    sentence = "Total due, as of 1.2.26: $241.85 - i.e. now; see p. 7, l. 1, or ask: a-b."
    rows = b"".join(line(20 + row / 7, 280 - 20.3 * row, sentence, size) for row in range(12))
    answer = read(pdf(f"{colour} ".encode() + rows, b"/MediaBox [0 0 560 300]"))
    assert (answer.text.replace("\n\n", "\n").splitlines(), answer.warnings) == ([sentence] * 12, ())


def test_letters_are_seen_whose_colour_is_as_bright_as_what_is_behind_them() -> None:
    page = b"0.3 g 0 0 400 300 re f 1 0 0 rg " + FULL
    assert read(pdf(page)).text == read(pdf(FULL)).text


def test_each_letter_may_be_an_object_of_its_own() -> None:
    places = (40, 47.3, 54, 57.3, 60.7, 67.3, 70, 72.7)
    apart = b"".join(line(left, 100, letter) for left, letter in zip(places, "To, all.", strict=True) if letter != " ")
    assert read(pdf(FULL + apart)).text.splitlines()[-1] == "To, all."


def test_letters_are_seen_of_a_font_without_boxes() -> None:
    """PDFium then gives boxes without height, although it paints the letters in another font."""
    text = b"BT /T 12 Tf 40 100 Td <%s> Tj ET" % "Hello, you".encode("utf-16-be").hex().encode()
    more = (
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 400 300] /Resources << /Font << /T 8 0 R >> >> /Length %d >>"
        b"\nstream\n%s\nendstream" % (len(text), text),
        b"<< /Type /Font /Subtype /Type0 /BaseFont /Nobody /Encoding /UniJIS-UCS2-H /DescendantFonts [9 0 R] >>",
        b"<< /Type /Font /Subtype /CIDFontType0 /BaseFont /Nobody /FontDescriptor 10 0 R"
        b" /CIDSystemInfo << /Registry (Adobe) /Ordering (Japan1) /Supplement 5 >> >>",
        b"<< /Type /FontDescriptor /FontName /Nobody /Flags 32 /FontBBox [0 0 0 0] /ItalicAngle 0 /Ascent 0 /Descent 0"
        b" /CapHeight 0 /StemV 80 >>",
    )
    answer = read(pdf(FULL + b"/Form Do", more=more))
    assert (answer.text.splitlines()[-1], answer.warnings) == ("Hello, you", ())


COVERED = {
    "a word covered": (b"1 0 0 rg 94 270 55 20 re f", "The quick jumps over"),
    "a word's end covered": (b"1 0 0 rg 121 270 63 20 re f", "The quick brow over"),
    "the end covered": (b"0 g 149 270 200 20 re f", "The quick brown fox"),
    "the page's end": (b"", "The quick brown fox jumps over"),
}


@pytest.mark.parametrize("how", COVERED)
def test_what_is_covered_in_a_line_is_left_out_and_counted(how: str) -> None:
    """The rest of the line stays, and whoever reads it is told."""
    cover, rest = COVERED[how]
    sentence = "The quick brown fox jumps over"
    answer = read(pdf(line(40, 275, sentence) + cover + b" 0 g " + column(20, 240, *[SENTENCE] * 5, size=11)))
    assert answer.text.splitlines()[0] == rest
    count = len(sentence.replace(" ", "")) - len(rest.replace(" ", ""))
    warning = f"characters of the text layer that cannot be seen on the page were left out: {count}"
    assert [text for text in answer.warnings if "cannot be seen" in text] == [warning] * bool(count)


HIDDEN = {
    "invisible over a scan": SCAN % (400, 300, 0, 0) + OCR,
    "below a scan": OCR.replace(b"3 Tr", b"0 Tr") + SCAN % (400, 300, 0, 0),
    "white on white": b"1 g " + line(40, 250, "nothing to see"),
    "outside the page": line(900, 250, "nothing to see"),
    "cut off by the crop box": line(40, 20, "nothing to see"),
}


@pytest.mark.parametrize("how", HIDDEN)
def test_text_that_cannot_be_seen_is_not_sound(how: str) -> None:
    assert "cannot be seen" in refusal(pdf(HIDDEN[how], b"/CropBox [0 100 400 300]" if how.startswith("cut") else b""))


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize(("left", "words"), [(360, "shown unseen unseen"), (-80, "unseen unseen shown")])
def test_words_beside_the_page_are_left_out(rotation: int, left: int, words: str) -> None:
    answer = read(pdf(line(left, 250, words), b"/Rotate %d" % rotation))
    assert answer.text == "shown"
    assert any("cannot be seen on the page were left out: 12" in warning for warning in answer.warnings)


STAMP = line(100, 150, "RECEIVED 3 May 2026")


@pytest.mark.parametrize(
    "content",
    [
        SCAN % (400, 300, 0, 0) + STAMP,
        SCAN % (400, 300, 0, 0) + OCR + STAMP,
        SCAN % (360, 220, 20, 20) + line(100, 270, "RECEIVED 3 May 2026"),
        b"".join(b"%d %d 5 8 re f " % (x, y) for x in range(20, 380, 8) for y in range(20, 260, 14)) + STAMP,
    ],
    ids=["scan", "scan with OCR", "smaller scan", "letters drawn as outlines"],
)
def test_a_page_that_is_mostly_something_else_is_not_sound(content: bytes) -> None:
    assert "of what the page shows is not in its text layer" in refusal(pdf(content))


def meaning(code: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """Entries of a font that says that its A is something else, and the object they need."""
    table = b"1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfchar <41> <%s> endbfchar" % code
    table = b"/CIDInit /ProcSet findresource begin begincmap " + table + b" endcmap end"
    return b"/ToUnicode 7 0 R", (b"<< /Length %d >>\nstream\n%s\nendstream" % (len(table), table),)


def test_characters_beyond_16_bits_are_read() -> None:
    font, more = meaning(b"D835DC65")
    answer = read(pdf(line(40, 250, "AAA AA"), font=font, more=more))
    assert (answer.text, answer.warnings) == ("\U0001d465" * 3 + " " + "\U0001d465" * 2, ())


@pytest.mark.parametrize("code", [b"0001", b"E005", b"FFFD", b"D83D", b"DC65"])
def test_letters_without_a_meaning_are_not_sound(code: bytes) -> None:
    font, more = meaning(code)
    message = refusal(pdf(line(40, 250, "AAAAA AAAAA AAAAA"), font=font, more=more))
    assert message == "the text layer does not say what 15 of its 15 characters mean"


def test_a_few_letters_without_a_meaning_are_marked_with_a_warning() -> None:
    font, more = meaning(b"F0B7")  # what text processors write for a bullet
    answer = read(pdf(line(8, 280, "A") + FULL, font=font, more=more))
    assert answer.text.startswith("\ufffd The quick")
    assert answer.warnings == ("characters of which the text layer does not say what they mean: 1",)


def test_text_from_right_to_left_is_for_another_engine() -> None:
    font, more = meaning(b"05D0")
    assert "from right to left" in refusal(pdf(line(40, 250, "AAAAA") + FULL, font=font, more=more))


def vertical(columns: int, more: bytes = b"") -> bytes:
    """A page with so many columns of three characters from top to bottom, and more in Helvetica."""
    table = b"1 begincodespacerange <0000> <FFFF> endcodespacerange 1 beginbfrange <0001> <0020> <4E01> endbfrange"
    table = b"/CIDInit /ProcSet findresource begin begincmap " + table + b" endcmap end"
    inner = b"/CIDSystemInfo << /Registry (Adobe) /Ordering (Japan1) /Supplement 2 >> /FontDescriptor << /Flags 4 >>"
    objects = (
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(table), table),
        b"<< /Type /Font /Subtype /CIDFontType0 /BaseFont /HeiseiMin-W3 /DW 1000 %s >>" % inner,
        b"<< /Type /Font /Subtype /Type0 /BaseFont /HeiseiMin-W3 /Encoding /Identity-V /DescendantFonts [8 0 R]"
        b" /ToUnicode 7 0 R >>",
    )
    text = (b"BT /V 12 Tf %d 250 Td <000100020003> Tj ET\n" % (300 - 20 * at) for at in range(columns))
    return pdf(b"".join(text) + more, more=objects).replace(
        b"/Font << /F 5 0 R >> /X", b"/Font << /F 5 0 R /V 9 0 R >> /X"
    )


def test_columns_of_vertical_writing_are_for_another_engine() -> None:
    for document in (vertical(4), vertical(4, line(40, 270, "A heading of the page"))):
        assert refusal(document) == "the text layer has vertical writing, whose order is not known"
    assert read(vertical(1, FULL)).warnings == ("characters of vertical writing, which may be out of order: 3",)
    font, more = meaning(b"4E01")
    assert read(pdf(line(40, 250, "AAAAA"), font=font, more=more)).text == "丁丁丁丁丁"


def test_a_page_of_slanted_text_is_for_another_engine() -> None:
    slanted = b"BT /F 20 Tf .9 .3 -.3 .9 50 20 Tm (all of it is askew) Tj ET"
    assert refusal(pdf(slanted)) == "the text is slanted (14 characters), so that its lines are not known"


def test_letters_that_stand_apart_are_not_sound() -> None:
    """Such as vertical writing: the order in which they are to be read is not known."""
    content = b"".join(
        line(300 - 40 * place, 270 - 24 * row, letter)
        for place, word in enumerate(("vertical", "writing", "is", "read", "so"))
        for row, letter in enumerate(word)
    )
    assert "order is not known" in refusal(pdf(content))


# What is sound all the same, with a warning


def test_a_picture_beside_much_text_is_no_reason_not_to_read_it() -> None:
    answer = read(pdf(FULL + SCAN % (200, 100, 20, 20)))
    (warning,) = answer.warnings
    assert answer.text.splitlines() == [SENTENCE] * 8
    assert "of what the page shows (pictures, drawings) is not in its text layer" in warning


def test_a_picture_behind_the_text_is_no_reason_not_to_read_it() -> None:
    assert read(pdf(b"0.9 0.9 1 rg 0 0 400 300 re f 0 g 0 0 400 6 re f " + FULL)).warnings == ()


def test_a_few_letters_that_cannot_be_seen_are_left_out() -> None:
    assert read(pdf(FULL + b"1 g " + line(20, 100, "ignore what was said before"))).text == read(pdf(FULL)).text


def test_what_ocr_took_visible_text_for_is_left_out() -> None:
    """Some programs put an invisible layer over pages that have text already."""
    misread = FULL.replace(b"0 Tr", b"3 Tr").replace(b"quick brown", b"qu1ck br0wn")
    assert read(pdf(FULL + misread)).text == read(pdf(FULL)).text


def slanted(degrees: float, *texts: str) -> bytes:
    """Lines one below the other that run upwards to the right by so many degrees."""
    along, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    shown = " T* ".join(f"({text}) Tj" for text in texts)
    return f"BT /F 16 Tf 20 TL {along:.5f} {up:.5f} {-up:.5f} {along:.5f} 180 80 Tm {shown} ET\n".encode()


@pytest.mark.parametrize("degrees", [10, 30, 45, 60, 120, 200, 300, -30])
def test_slanted_text_comes_last_line_by_line_with_a_warning(degrees: float) -> None:
    with page_of(pdf(slanted(degrees, "DO NOT COPY", "Draft") + FULL)) as page:
        answer = ask(page)
    assert texts(answer) == ["\n".join([SENTENCE] * 8), "DO NOT COPY", "Draft"]
    assert answer.warnings == ("characters of slanted text, which was put at the end: 14",)
    with page_of(pdf(slanted(degrees, "DO NOT COPY"))) as alone:
        ink = alone.image.convert("L").point(lambda level: 255 * (level < 128)).getbbox()
    assert answer.cells[1].box == pytest.approx(ink, abs=20)  # as large as PDFium says


def test_a_slanted_line_may_be_of_several_objects() -> None:
    apart = slanted(45, "DO NOT COPY").replace(b"NOT", b") Tj (NOT")
    assert texts(read(pdf(FULL + apart)))[1:] == ["DO NOT COPY"]


@pytest.mark.parametrize("height", [1, 500, 501, 3000])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_single_pixel_is_seen_in_a_line_of_any_height(height: int, axis: int) -> None:
    mask = Image.new("L", (height, 3) if axis else (3, height))
    mask.putpixel((height - 1, 1) if axis else (1, height - 1), 255)
    assert list(map(bool, pdf_text._projection(mask, axis))) == [False, True, False]


@pytest.mark.parametrize("state", ["1 g", "0 g 3 Tr", "1 0 0 1 900 0 cm"], ids=["white", "invisible", "elsewhere"])
def test_slanted_text_that_cannot_be_seen_is_left_out(state: str) -> None:
    """Also where other text is, whose ink is not its own."""
    answer = read(pdf(FULL + state.encode() + b" " + slanted(45, "DRAFT")))
    assert texts(answer) == ["\n".join([SENTENCE] * 8)]
    assert answer.warnings == ("characters of the text layer that cannot be seen on the page were left out: 5",)


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        (column(20, 160, *["hidden white words " * 3] * 6, size=11), slanted(45, "DRAFT COPY")),
        (slanted(45, "SECRET WORDS"), line(150, 110, "Name            Value")),
    ],
    ids=["under a watermark", "slanted over a gap"],
)
def test_ink_of_slanted_text_shows_no_other_text_nor_the_reverse(hidden: bytes, shown: bytes) -> None:
    answer = read(pdf(b"q 1 g " + hidden + b"Q " + FULL + shown))
    assert "hidden" not in answer.text
    assert "SECRET" not in answer.text
    assert "DRAFT COPY" in answer.text or "Value" in answer.text


def test_a_meaning_that_is_missing_in_slanted_text_counts_as_well() -> None:
    font, more = meaning(b"E005")
    answer = read(pdf(slanted(45, "DRAFT") + FULL, font=font, more=more))
    assert answer.text.endswith("DR\ufffdFT")
    assert "characters of which the text layer does not say what they mean: 1" in answer.warnings


@pytest.mark.parametrize(("value", "count"), [(b"(Smith)", 1), (b"()", 0)])
def test_what_was_typed_into_a_form_is_missed_with_a_warning(value: bytes, count: int) -> None:
    field = (
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V %s /Rect [20 40 200 60] /DA (/F 12 Tf 0 g) /F 4 >>"
        % value
    )
    answer = read(pdf(FULL, b"/Annots [7 0 R]", more=(field,)))
    assert answer.warnings == ("what form fields and annotations say is not in the text layer: 1",) * count


FIELD = b"/Widget /T (a) /FT "


@pytest.mark.parametrize(
    "kind", [FIELD + b"/Tx", FIELD + b"/Btn /Ff 65536", b"/FreeText", b"/Watermark", b"/Redact", b"/Square", b"/Other"]
)
@pytest.mark.parametrize(
    ("flags", "nested", "text"),
    [
        (4, True, line(2, 5, "to be seen")),
        (4, False, line(2, 5, "to be seen")),
        (2, False, line(2, 5, "to be seen")),
        (4, False, line(2, 5, " ")),
        (4, False, line(2, 5, "never seen").replace(b"0 Tr", b"3 Tr")),
    ],
)
def test_text_that_an_annotation_shows_is_missed_with_a_warning(
    kind: bytes, flags: int, nested: bool, text: bytes
) -> None:
    annotation = b"<< /Type /Annot /Subtype %s /Rect [20 40 200 60] /AP << /N 8 0 R >> /F %d >>" % (kind, flags)
    form = b"<< /Subtype /Form /BBox [0 0 180 20] /Resources << /Font << /F 5 0 R >> /XObject << /Form 9 0 R >> >>"
    more = (
        form + b" /Length %d >>\nstream\n%s\nendstream" % (len(content), content)
        for content in ((b"/Form Do" if nested else text), text)
    )
    answer = read(pdf(FULL, b"/Annots [7 0 R]", more=(annotation, *more)))
    said = flags == 4 and (kind == b"/FreeText" or b"to be seen" in text)
    assert answer.warnings == ("what form fields and annotations say is not in the text layer: 1",) * said


# Processes and time


@pytest.mark.parametrize("rotation", [0, 90])
def test_a_page_is_not_drawn_for_its_text(rotation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size and its boxes are those of the image all the same."""
    document = pdf(LETTER, b"/Rotate %d" % rotation)
    with page_of(document) as page:
        expected = ask(page)
    drawn: list[int] = []
    draw = Rasterizer.draw

    async def note(self: Rasterizer, reference: PageReference, seconds: float = 60) -> PageImage:
        drawn.append(reference.number)
        return await draw(self, reference, seconds)

    monkeypatch.setattr(Rasterizer, "draw", note)
    with DotsOCR(engines=[TextLayerEngine()]) as ocr:
        (read,) = ocr.read(document).pages
        assert isinstance(read, Page)
        assert drawn == []
        assert (read.width, read.height, read.cells) == (page.width, page.height, expected.cells)
        with pytest.raises(AllEnginesFailed, match="only pages of PDFs"):
            ocr.read(Image.new("RGB", (300, 300)))


def test_it_starts_no_process_before_it_is_asked_and_leaves_none_behind() -> None:
    async def run() -> None:
        before = children()
        engine = TextLayerEngine()
        await engine.probe(1)
        assert children() == before
        with page_of(pdf(LETTER)) as page:
            await engine.read(page, Task("text"), 30)
            assert len(children() - before) == 1
        await engine.aclose()
        assert children() == before

    asyncio.run(run())


def test_it_reads_as_many_pages_at_once_as_there_are_processors() -> None:
    assert TextLayerEngine().limiter.limit == len(os.sched_getaffinity(0))


def test_a_file_that_is_gone_or_was_changed_is_an_error_of_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(LETTER))
    with open_document(path) as opened:
        page = draw(opened.reference(1))
    path.write_bytes(pdf(STAMP))
    with pytest.raises(EngineError, match="cannot be read: the file has changed"):
        ask(page)
    path.unlink()
    with pytest.raises(EngineError, match="No such file"):
        ask(page)


def test_a_page_that_takes_for_ever_ends_in_time() -> None:
    forms = tuple(
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 400 300] /Resources << /XObject << /Form %d 0 R >>"
        b" /Font << /F 5 0 R >> >> /Length %d >>\nstream\n%s\nendstream" % (number + 1, len(content), content)
        for number in range(7, 13)
        for content in [b"/Form Do " * 100 if number < 12 else line(40, 250, "deep")]
    )
    with open_document(pdf(b"/Form Do", more=forms)) as opened:
        reference = opened.reference(1)
        page = replace(PageImage.of(1, Image.new("RGB", (1112, 834), "white")), origin=reference)
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"cannot be read: it takes longer than 0\.5 s"):
            ask(page, seconds=0.5)
    assert time.monotonic() - started < 5


def test_far_too_much_text_is_an_error_of_the_engine() -> None:
    with page_of(pdf(b"BT /F 1 Tf 1 TL 10 290 Td " + b"(%s) ' " % (b"x" * 500) * 210 + b"ET")) as page:  # noqa: SIM117
        with pytest.raises(EngineError, match="more than 100000 characters"):
            ask(page)


def test_a_blank_page_is_for_another_engine() -> None:
    assert refusal(pdf_of((200, 200))) == "the page has no text layer"


def test_what_is_beside_the_text_is_said_once() -> None:
    stamp = b"<< /Type /Annot /Subtype /Stamp /Rect [9 9 30 30] >>"
    said = "the page has more than text, which may be missing here: stamps: 1. Fix: look at the page"
    with page_of(pdf(LETTER, b"/Annots [7 0 R]", more=(stamp,))) as page:
        assert (*page.warnings, *ask(page).warnings) == (said,)
        assert ask(replace(page, warnings=())).warnings == (said,)
