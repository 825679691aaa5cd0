"""Unit tests of the page renderer: Pillow and the font only, no torch."""

from pathlib import Path

import pytest
from PIL import Image, ImageChops

# isort: split
from page import (
    ALPHABET,
    CELL,
    COLUMNS,
    DEFAULT_FONT,
    GOLDEN_LINES,
    HEIGHT,
    MARGIN_RULE_GREY,
    MARGIN_RULE_WIDTH,
    ROWS,
    WIDTH,
    PageError,
    check_lines,
    load_font,
    pad_lines,
    render_cell,
    render_page,
)

GOLDEN_FOLDER = Path(__file__).parents[2] / "roles" / "dots_ocr_server" / "files" / "golden"

needs_font = pytest.mark.skipif(not DEFAULT_FONT.is_file(), reason="Debian package fonts-dejavu-core is not installed")


def ink_box(cell: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.invert(cell).getbbox()


def test_alphabet_needs_no_json_escape_and_has_no_duplicates() -> None:
    assert len(set(ALPHABET)) == len(ALPHABET)
    assert ALPHABET.isascii()
    assert ALPHABET.isprintable()
    assert not set(ALPHABET) & set('"\\')


def test_pad_lines_fills_the_grid() -> None:
    padded = pad_lines(["ab", "c" * COLUMNS])
    assert len(padded) == ROWS
    assert {len(line) for line in padded} == {COLUMNS}
    assert [line.rstrip() for line in padded] == ["ab", "c" * COLUMNS] + [""] * (ROWS - 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x"] * (ROWS + 1), f"9 lines, but a page has {ROWS} rows"),
        (["ok", "x" * (COLUMNS + 1)], f"line 2 has 29 characters, but a row has {COLUMNS} columns"),
        (["naïve"], "line 1 contains 'ï', which is not in the alphabet"),
        (['say "hi"'], "not in the alphabet"),
        (["tab\there"], "not in the alphabet"),
    ],
)
def test_text_that_does_not_fit_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(PageError, match=message):
        check_lines(lines)


def test_missing_font_is_named(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"nowhere\.ttf does not exist"):
        load_font(tmp_path / "nowhere.ttf")


@needs_font
def test_every_glyph_is_distinct_and_inside_its_cell() -> None:
    font = load_font()
    cells = {character: render_cell(character, font) for character in ALPHABET}
    assert len({cell.tobytes() for cell in cells.values()}) == len(ALPHABET)
    assert ink_box(cells[" "]) is None
    for character in ALPHABET[1:]:
        left, top, right, bottom = ink_box(cells[character])
        assert left > 0, character
        assert top > 0, character
        assert right < CELL, character
        assert bottom < CELL, character


@needs_font
def test_margin_rule_marks_the_last_column_only() -> None:
    page = render_page(["x" * COLUMNS]).convert("L")
    rule = page.crop((WIDTH - MARGIN_RULE_WIDTH, 0, WIDTH, HEIGHT))
    assert rule.getextrema() == (MARGIN_RULE_GREY, MARGIN_RULE_GREY)
    first_cell = page.crop((0, 0, CELL, CELL))
    assert first_cell.tobytes() == render_cell("x", load_font()).tobytes()


@needs_font
def test_page_size_is_the_same_for_any_text() -> None:
    for lines in ([], ["x"], ["x" * COLUMNS] * ROWS):
        page = render_page(lines)
        assert page.size == (WIDTH, HEIGHT)
        assert page.mode == "RGB"


def test_golden_lines_fill_a_page_without_trailing_blanks() -> None:
    check_lines(GOLDEN_LINES)
    assert len(GOLDEN_LINES) == ROWS
    assert all(line == line.rstrip() for line in GOLDEN_LINES)


@needs_font
@pytest.mark.skipif(not GOLDEN_FOLDER.is_dir(), reason="the golden page is not part of this checkout")
def test_golden_page_in_the_role_is_up_to_date() -> None:
    assert (GOLDEN_FOLDER / "page.txt").read_text(encoding="utf-8") == "\n".join(GOLDEN_LINES) + "\n"
    with Image.open(GOLDEN_FOLDER / "page.png") as stored:
        difference = ImageChops.difference(stored.convert("RGB"), render_page(GOLDEN_LINES))
    # Not byte equality: FreeType releases differ by a few grey levels.
    assert max(high for _, high in difference.getextrema()) <= 32
