"""Render text as the page image that the tiny model reads.

A page is a grid of 28 columns x 8 rows of 28 x 28 px cells (784 x 224 px), one character in each cell. After dots.ocr's
2 x 2 merge of 14 px patches one cell is exactly one image token. A thin grey rule at the right margin marks the end of
every line.

    python page.py golden OUT.png OUT.txt    # the golden page and its lines
    python page.py render OUT.png < LINES    # any other page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 28
ROWS = 8
CELL = 28  # px, both sides: patch size 14 x spatial merge 2
WIDTH = COLUMNS * CELL
HEIGHT = ROWS * CELL

# No quotation mark and no backslash: a line goes into a JSON string as it stands.
ALPHABET = " ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;-+/()#%$&@!?"

DEFAULT_FONT = Path("/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf")  # Debian: fonts-dejavu-core

# Glyphs are drawn in a narrower cell and stretched to the square one: unstretched, the gaps between letters are so wide
# that Tesseract's automatic page segmentation takes them for word gaps or columns.
FONT_SIZE = 24  # px
GLYPH_WIDTH = 18  # px, before stretching to CELL
BASELINE = 21  # px below the top of the cell

MARGIN_RULE_WIDTH = 2  # px
MARGIN_RULE_GREY = 200  # light enough that binarisation drops it

GOLDEN_LINES = (
    "Northwind Paper Supply Ltd.",
    "Invoice No. 2026-0473",
    "Date: 18 November 2026",
    "",
    "12 Printer paper A4   $54.60",
    "3 Toner cartridge    $187.25",
    "",
    "Total due (USD)      $241.85",
)


class PageError(ValueError):
    """The text does not fit the page or its alphabet."""


def check_lines(lines: Sequence[str]) -> None:
    """Raise `PageError` unless the lines fit on one page and use the alphabet only."""
    if len(lines) > ROWS:
        raise PageError(f"{len(lines)} lines, but a page has {ROWS} rows")
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            raise PageError(f"line {number} has {len(line)} characters, but a row has {COLUMNS} columns: {line!r}")
        for character in line:
            if character not in ALPHABET:
                raise PageError(f"line {number} contains {character!r}, which is not in the alphabet: {line!r}")


def pad_lines(lines: Sequence[str]) -> list[str]:
    """Return exactly `ROWS` lines of exactly `COLUMNS` characters, filled up with blanks."""
    check_lines(lines)
    filled = [*lines, *[""] * (ROWS - len(lines))]
    return [line.ljust(COLUMNS) for line in filled]


@cache
def load_font(path: Path = DEFAULT_FONT) -> ImageFont.FreeTypeFont:
    """Load the page font, with Pillow's own text layout, so that no optional library changes the picture."""
    if not path.is_file():
        raise PageError(f"font file {path} does not exist (Debian package fonts-dejavu-core)")
    return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def render_cell(character: str, font: ImageFont.FreeTypeFont, *, last_column: bool = False) -> Image.Image:
    """Render one character as a `CELL` x `CELL` px greyscale image, with the margin rule in the last column."""
    narrow = Image.new("L", (GLYPH_WIDTH, CELL), 255)
    ImageDraw.Draw(narrow).text((GLYPH_WIDTH / 2, BASELINE), character, font=font, fill=0, anchor="ms")
    image = narrow.resize((CELL, CELL), Image.Resampling.BICUBIC)
    if last_column:
        left = CELL - MARGIN_RULE_WIDTH
        ImageDraw.Draw(image).rectangle((left, 0, CELL - 1, CELL - 1), fill=MARGIN_RULE_GREY)
    return image


def render_page(lines: Sequence[str], font_file: Path = DEFAULT_FONT) -> Image.Image:
    """Render at most `ROWS` lines as a `WIDTH` x `HEIGHT` px RGB image."""
    font = load_font(font_file)
    page = Image.new("L", (WIDTH, HEIGHT), 255)
    for row, line in enumerate(pad_lines(lines)):
        for column, character in enumerate(line):
            cell = render_cell(character, font, last_column=column == COLUMNS - 1)
            page.paste(cell, (column * CELL, row * CELL))
    return page.convert("RGB")


def main() -> None:
    """Write the golden page or the page of the lines on standard input."""
    parser = argparse.ArgumentParser(description="Render text as the page image that the tiny model reads.")
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    commands = parser.add_subparsers(dest="command", required=True)
    golden = commands.add_parser("golden", help="write the golden page and its lines")
    golden.add_argument("png", type=Path)
    golden.add_argument("txt", type=Path)
    render = commands.add_parser("render", help="write the page of the lines on standard input")
    render.add_argument("png", type=Path)
    arguments = parser.parse_args()

    try:
        if arguments.command == "golden":
            render_page(GOLDEN_LINES, arguments.font).save(arguments.png)
            arguments.txt.write_text("\n".join(GOLDEN_LINES) + "\n", encoding="utf-8")
        else:
            render_page(sys.stdin.read().splitlines(), arguments.font).save(arguments.png)
    except PageError as error:
        raise SystemExit(f"page.py: {error}") from None


if __name__ == "__main__":
    main()
