"""Pages as hOCR, in which every word has its place.

The model tells where a paragraph is, not where its words are. They are found in the page's picture: rows of ink inside
the paragraph's box are its lines, the widest gaps of a line are its spaces. Without a picture, or where it shows
nothing, lines of equal height stand for them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

from PIL import Image, ImageChops

from ..errors import InputError
from ..pages.documents import PageImage
from . import Box, Cell, FailedPage, Page, layout

# Grey levels (of 255) by which ink differs from the paper around it (our own choice: print on a grey ground does).
INK: Final = 48
# Part of a box's width or height from which on ink is a rule of a table, not letters (our own choice).
RULE: Final = 0.8
# Width of a letter as a part of the height of a line, where there is no picture (our own choice: print of most kinds
# has between 0.4 and 0.5).
SQUARE: Final = 0.45
LONG: Final = 30  # letters of a word from which on it is taken for several without spaces (our own choice)
# Pixels of a letter's width from which on words are dealt to lines (our own choice: no smaller one can be read).
LEAST: Final = 2.0
# Words times lines of a paragraph up to which each word's own width counts (our own choice: a second a page).
FINE: Final = 40_000
# Pixels of a box's height from which on a column of ink can be a rule (our own choice: lower ones are letters).
TALL: Final = 100
# Lines by which words may run ahead of the room for them, or behind it, while they are dealt (our own choice).
SLACK: Final = 2.5

_MARKS: Final = re.compile(r"^#+ |(?<!\w)(\*\*|__|`)(?=\S)(.+?)(?<=\S)\1(?!\w)", re.MULTILINE)
_GLUE: Final = "\0"  # in front of a piece that belongs to the one before
_WIDTHS: Final = {
    _GLUE: -1.0,
    **dict.fromkeys("fijlrtI1.,:;!|'()[]-«»\"", 0.6),
    **dict.fromkeys("mwMWшщжюфмШЩЖЮФМ@%—", 1.5),  # noqa: RUF001
}
_CLASSES: Final = {"Page-header": "ocr_header", "Page-footer": "ocr_footer", "Caption": "ocr_caption"}

_Spans = Sequence[tuple[int, int]]  # beginnings and ends of ink along a line, in pixels


class Word(NamedTuple):
    """A word and where it is, in pixels of the page's image."""

    text: str
    box: Box


def words(cell: Cell, page: Page, picture: Image.Image | None = None) -> list[list[Word]]:
    """Return the words of a cell, line by line; one without a box is taken for the whole page.

    `picture` is the page's image, of the same proportions, if there is one.
    """
    box = (cell.box or Box(0, 0, page.width, page.height)).within(page.width, page.height)
    lines = _MARKS.sub(r"\2", layout.plain_text([cell])).replace(_GLUE, "\ufffd").splitlines()
    texts = [[piece for word in line.split() for piece in _pieces(word)] for line in lines if line.strip()]
    if not texts or box.left == box.right or box.top == box.bottom:
        return []
    scale = (page.width / picture.width, page.height / picture.height) if picture else (1.0, 1.0)
    ink = picture and _ink(picture.crop(layout.to_page(box, (page.width, page.height), picture.size)))
    rows = _rows(ink) if ink else []
    if ink and rows:
        bands = [ink.crop((0, top, ink.width, bottom)) for top, bottom in rows]
        spans = [_stretches(band.getprojection()[0]) for band in bands]
    else:
        count = _guess(texts, box)
        scale, height = (1.0, 1.0), (box.bottom - box.top) / count
        rows = [(round(height * row), max(round(height * (row + 1)), round(height * row) + 1)) for row in range(count)]
        spans = [[(0, box.right - box.left)]] * count

    def placed(left: float, right: float, row: tuple[int, int]) -> Box:
        edges = [box.left + left * scale[0], box.top + row[0] * scale[1]]
        edges += [box.left + right * scale[0], box.top + row[1] * scale[1]]
        place = Box(*map(round, edges)).within(page.width, page.height)
        return place._replace(right=max(place.right, place.left + 1), bottom=max(place.bottom, place.top + 1))

    found = []
    for line, row, span in zip(_dealt(texts, spans), rows, spans, strict=True):
        joined: list[Word] = []
        for piece, (left, right) in zip(line, _apart(line, span), strict=True):
            word = Word(piece.lstrip(_GLUE), placed(left, right, row))
            if joined and piece[0] == _GLUE:
                before = joined.pop()
                word = Word(before.text + word.text, _around((before.box, word.box)))
            joined.append(word)
        found += [joined] if joined else []
    return found


def page_hocr(page: Page, picture: Image.Image | None = None) -> str:
    """Return the ``div`` of a page; arguments as for `words`."""
    number = page.number
    parts = [f'<div class="ocr_page" id="page_{number}" title="{_title(0, 0, page.width, page.height, number - 1)}">']
    for index, cell in enumerate(page.cells or ((Cell("Text", None, page.text),) if page.text.strip() else ()), 1):
        lines = words(cell, page, picture)
        if not lines:
            continue
        kind, name = _CLASSES.get(cell.category, "ocr_line"), f"{number}_{index}"
        area = _title(*_around(word.box for line in lines for word in line))
        parts.append(f'<div class="ocr_carea" id="block_{name}" title="{area}"><p class="ocr_par" title="{area}">')
        for line in lines:
            spans = " ".join(
                f'<span class="ocrx_word" title="{_title(*word.box)}">{escape(_xml(word.text))}</span>' for word in line
            )
            title = _title(*_around(word.box for word in line))
            parts.append(f'<span class="{kind}" title="{title}">{spans}</span>')
        parts.append("</p></div>")
    return "\n".join([*parts, "</div>"])


def document_hocr(
    source: str, pages: Iterable[Page | FailedPage], draw: Callable[[int], Image.Image | None]
) -> Iterator[str]:
    """Yield a document as hOCR, a page at a time; a page that failed is left out, with a comment in its place.

    `draw` gives the image of a page, if there is one, by the page's number.
    """
    yield (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml">\n<head>'
        f"<title>{escape(_xml(source))}</title>\n"
        '<meta http-equiv="Content-Type" content="text/html; charset=utf-8" />\n'
        '<meta name="ocr-system" content="dots-ocr" />\n'
        '<meta name="ocr-capabilities" content="ocr_page ocr_carea ocr_par ocr_line ocrx_word" />\n</head>\n<body>\n'
    )
    for page in pages:
        if isinstance(page, Page):
            yield page_hocr(page, draw(page.number)) + "\n"
        else:
            yield f"<!-- page {page.number} could not be read -->\n"
    yield "</body>\n</html>\n"


def drawn(draw: Callable[[int], PageImage], number: int) -> Image.Image | None:
    """Return the image of a page; none of one that was read, and now cannot be drawn."""
    try:
        return draw(number).image
    except InputError:
        return None


def _title(left: int, top: int, right: int, bottom: int, page: int | None = None) -> str:
    return f"bbox {left} {top} {right} {bottom}" + ("" if page is None else f"; ppageno {page}")


def _around(boxes: Iterable[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return Box(min(left), min(top), max(right), max(bottom))


def _xml(text: str) -> str:
    """Replace what cannot stand in XML."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", text)


def _ink(picture: Image.Image) -> Image.Image:
    """Return a picture with white for ink and black for paper, and without the rules of tables."""
    grey = picture.convert("L")
    histogram = grey.histogram()
    paper = Image.new("L", grey.size, histogram.index(max(histogram)))
    ink = ImageChops.difference(grey, paper).point([0] * INK + [255] * (256 - INK))
    for down in (True, False) if ink.height >= TALL else (False,):
        size = (ink.width, 1) if down else (1, ink.height)
        means: Any = ink.convert("F").resize(size, Image.Resampling.BOX).get_flattened_data()
        for at, mean in enumerate(means):  # of each column or row
            if mean > RULE * 255:
                ink.paste(0, (at, 0, at + 1, ink.height) if down else (0, at, ink.width, at + 1))
    return ink


def _stretches(inked: Sequence[int]) -> list[tuple[int, int]]:
    """Return where there is ink (1) along a line, as beginnings and ends."""
    marks = [0, *inked, 0]
    edges = [at for at, (before, after) in enumerate(pairwise(marks)) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _rows(ink: Image.Image) -> list[tuple[int, int]]:
    """Return the upper and lower edges of lines; dots and accents belong to the line that is nearest."""
    rows = _stretches(ink.getprojection()[1])
    if not rows:
        return []
    usual = sorted(bottom - top for top, bottom in rows)[len(rows) // 2]
    merged: list[tuple[int, int]] = []
    for index, (top, bottom) in enumerate(rows):
        above = top - rows[index - 1][1] if index else math.inf
        below = rows[index + 1][0] - bottom if index + 1 < len(rows) else math.inf
        if merged and (merged[-1][1] >= top or (bottom - top < usual / 2 and above <= min(below, usual / 2))):
            merged[-1] = (merged[-1][0], bottom)
        elif bottom - top < usual / 2 and below <= usual / 2:
            rows[index + 1] = (top, rows[index + 1][1])
        else:
            merged.append((top, bottom))
    return merged


def _guess(texts: Sequence[Sequence[str]], box: Box) -> int:
    """Return how many lines a text takes in a box: as many as fill it with letters of usual proportions."""
    width, height = box.right - box.left, box.bottom - box.top
    letters = sum(_width(" ".join(line)) for line in texts)
    return max(1, min(max(len(texts), round(math.sqrt(letters * SQUARE * height / width))), height))


def _pieces(word: str) -> list[str]:
    """Return a word, or its letters where a line may end at any: of East Asia, and of scripts without spaces."""
    if len(word) <= LONG and not any(unicodedata.east_asian_width(one) in "WF" for one in word):
        return [word]
    pieces: list[str] = []
    for one in word:
        if pieces and unicodedata.category(one)[0] == "M":
            pieces[-1] += one
        else:
            pieces.append(_GLUE + one if pieces else one)
    return pieces


def _width(text: str) -> float:
    """Return about how wide a text is, in letters: signs of East Asia take two, accents none."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else _WIDTHS.get(one, 1.0)
        for one in text
    )


def _dealt(texts: list[list[str]], spans: Sequence[_Spans]) -> list[list[str]]:
    """Deal a text's words to the lines that were found, so that each word is about as wide as its letters are."""
    if len(texts) == len(spans):  # the model broke the lines as the page does
        return texts
    words = [word for line in texts for word in line]
    # The gaps inside of signs are as wide as those between them.
    fine = len(words) * len(spans) <= FINE and not any(word[0] == _GLUE for word in words)
    room = [span[-1][1] - span[0][0] if span else 0 for span in spans]
    widths = [_width(word) for word in words]
    before = [0.0, *accumulate(width + 1 for width in widths)]  # letters before each word
    unit = sum(room) / max(1.0, before[-1] - len(room))  # pixels of a letter
    if unit < LEAST:  # far more words than there is room for
        return [words, *([] for _ in room[1:])]
    filled, slack = 0.0, SLACK * max(room)
    # The cheapest way to end each line, in squares of pixels by which lines and words are too wide or too narrow.
    costs, ways = [0.0] + [math.inf] * len(words), []
    for span, wide in zip(spans, room, strict=True):
        best, way = [math.inf] * len(costs), [0] * len(costs)
        for begin, cost in enumerate(costs):
            if cost == math.inf or abs(before[begin] * unit - filled) > slack:
                continue
            for end in range(begin, len(words) + 1):
                excess = unit * max(0.0, before[end] - before[begin] - 1) - wide
                if excess > wide / 2 and end > begin + 1:
                    break
                total = cost + excess**2
                if fine and excess > -wide / 2 and total < best[end]:
                    places = _apart(words[begin:end], span)
                    total += sum(
                        (right - left - unit * width) ** 2
                        for (left, right), width in zip(places, widths[begin:end], strict=True)
                    )
                if total < best[end]:
                    best[end], way[end] = total, begin
        costs = best
        filled += wide
        ways.append(way)
    end = len(words)
    if costs[end] == math.inf:
        return [words, *([] for _ in room[1:])]
    dealt = []
    for way in reversed(ways):
        dealt.append(words[way[end] : end])
        end = way[end]
    return dealt[::-1]


def _apart(line: Sequence[str], span: _Spans) -> list[tuple[float, float]]:
    """Return where each word of a line begins and ends: between its widest gaps, else in proportion to its letters."""
    if line and any(unicodedata.bidirectional(one) in ("R", "AL") for one in line[0]):  # it runs to the left
        mirrored = _along(line, [(-right, -left) for left, right in reversed(span)])
        return [(-right, -left) for left, right in mirrored]
    return _along(line, span)


def _along(line: Sequence[str], span: _Spans) -> list[tuple[float, float]]:
    first, last = (span[0][0], span[-1][1]) if span else (0, 1)
    gaps = sorted(range(1, len(span)), key=lambda at: span[at - 1][1] - span[at][0])[: max(0, len(line) - 1)]
    if len(gaps) == len(line) - 1:
        edges = [0, *sorted(gaps), len(span)]
        return [(span[begin][0], span[end - 1][1]) for begin, end in pairwise(edges)]
    letters = sum(map(_width, line)) + len(line) - 1
    places, at = [], 0.0
    for word in line:
        end = at + _width(word)
        places.append((first + (last - first) * at / letters, first + (last - first) * end / letters))
        at = end + 1
    return places
