"""The text that a PDF has by itself: exact, and read in a fraction of a second, where it is what the page shows."""

from __future__ import annotations

import asyncio
import math
import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from statistics import median
from typing import Final

from ..errors import EngineError, InputError, NotApplicable
from ..pages.documents import PageImage
from ..pages.pdf_text import BUILD, Area, Run, TextLayer, around, turned
from ..pages.rasterizer import Rasterizer
from ..prompts import Mode
from ..results import Box, Cell
from .admission import Limiter
from .base import Answer, Task

MAX_GARBLED: Final = 0.02
"""Part of the characters that may be without a meaning (our own choice: the bullets of a list drawn with a font of
symbols, but no font whose letters are all unknown)."""
MAX_UNREAD: Final = 0.5
"""Part of what is on the page that may be something else than text of the layer (our own choice: a page with a chart or
a photograph, but no scan with a stamp, and no text drawn as outlines)."""
MUCH_UNREAD: Final = 0.2
"""The same, from which on the reader is told (our own choice: more than rules and a logo)."""
MIN_RUN: Final = 2.0
"""Characters without a gap, on average (our own choice: in words there are more). Fewer are vertical writing or letters
spaced out, whose order this module does not know."""
MAX_VERTICAL: Final = 0.1
"""Part of the characters that may be in vertical writing, whose columns this module does not know (our own choice: the
labels of a table)."""
MAX_RUNS: Final = 3_000
"""Our own limit, because the time to find columns may grow with its square; a newspaper's page has about 1,500."""

SAME_LINE: Final = 0.5
"""Two runs are in one line if their middles are less than this apart, as a multiple of the lower one's height."""
MIN_COLUMN: Final = 6.0
"""Width of a typical line of a column, as a multiple of its height (our own choice: some twelve letters). In narrower
ones, such as those of a table, the text goes on to the right rather than below."""
PARAGRAPH: Final = 1.3
"""A paragraph ends where the next line is further away than usual by this factor (our own choice, as `HEADING`)."""
HEADING: Final = 1.2
"""A paragraph ends where the size of the font changes by this factor."""
SPACED: Final = 1.5
"""Widest space between words of a justified line, as a multiple of its height (our own choice)."""
BESIDE: Final = 0.2
"""Cells of a row are up to this far above one another, as a multiple of their height (our own choice)."""
GUTTER: Final = 0.5
"""Width of the space between columns at least, as a multiple of the height of a line (our own choice)."""
TAIL: Final = 0.7
"""Below the shorter of two columns, the longer one goes on as far as it has lines of this part of its width (our own
choice). What comes then is something else, such as a table, and is read after both."""
TOUCHING: Final = 0.15
"""Runs of one line have no space between them if they are closer than this, as a multiple of their height."""

_STATEMENT = re.compile(r"[^\W\d].*[\d)%]")  # a name with a figure behind it


class TextLayerEngine:
    """Reads the text layer of PDFs, if it is sound: `NotApplicable` says why it is not.

    A layer whose characters all have a meaning, but the wrong one, cannot be told from a sound one.
    """

    name = "textlayer"
    pixels = False
    modes: frozenset[Mode] = frozenset({"text", "layout"})
    expected_seconds = 0.5
    """Measured: 0.02 s for a page of 3,800 characters, and 0.3 s for the first, whose process has to be started."""

    def __init__(self) -> None:
        """Choose how many pages are read at once: as many as there are processors."""
        self._rasterizer = Rasterizer()  # starts nothing before it is asked
        processors = len(os.sched_getaffinity(0))
        self.limiter = Limiter(start=processors, cap=processors)

    async def probe(self, seconds: float) -> None:
        """Nothing can be missing: PDFium came with this package."""

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page, in a process of its own, which is ended when this call is cancelled.

        Raises:
            NotApplicable: The page is none of a PDF, or its text layer is not sound.
            EngineError: PDFium crashed over the page, took too long, or the file is gone.
        """
        if page.origin is None or page.origin.kind != "pdf":
            raise NotApplicable("only pages of PDFs have a text layer")
        try:
            layer = await self._rasterizer.extract_text(page.origin, seconds)
        except InputError as error:
            raise EngineError(str(error)) from error
        _check(layer)
        cells = await asyncio.to_thread(lay_out, layer)
        return Answer(
            mode=task.mode,
            text="\n\n".join(cell.text for cell in cells),
            model=BUILD,
            cells=cells if task.mode == "layout" else (),
            warnings=(*_warnings(layer), *(said for said in layer.beside if said not in page.warnings)),
            size=layer.page_size,
            dpi=layer.dpi,
        )

    async def aclose(self) -> None:
        """End the processes."""
        await asyncio.to_thread(self._rasterizer.close)


def _check(layer: TextLayer) -> None:
    """Raise `NotApplicable` unless the layer is sound."""
    if not layer.runs:
        if layer.slanted:
            raise NotApplicable(f"the text is slanted ({layer.characters} characters), so that its lines are not known")
        if layer.hidden:
            raise NotApplicable(f"the text layer cannot be seen ({layer.hidden} characters): it may be OCR of a scan")
        raise NotApplicable("the page has no text layer")
    runs = layer.runs + layer.slanted
    if layer.garbled > MAX_GARBLED * layer.characters:
        raise NotApplicable(
            f"the text layer does not say what {layer.garbled} of its {layer.characters} characters mean"
        )
    if layer.unread > MAX_UNREAD:
        raise NotApplicable(f"{layer.unread:.0%} of what the page shows is not in its text layer")
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for run in runs for letter in run.text):
        raise NotApplicable("the text layer has text from right to left, whose order is not known")
    if _count_vertical(layer) > MAX_VERTICAL * layer.characters:
        raise NotApplicable("the text layer has vertical writing, whose order is not known")
    if not layer.characters / MIN_RUN >= len(runs) <= MAX_RUNS:
        raise NotApplicable("the letters of the text layer stand apart, so that their order is not known")


def _count_vertical(layer: TextLayer) -> int:
    """Count what runs downwards: side by side, two characters of Chinese, Japanese or Korean are wider than high."""
    high = [run.text for run in layer.runs if run.ink.width < run.ink.height]
    wide = [sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in text) for text in high]
    return sum(count for count in wide if count > 1)


def _warnings(layer: TextLayer) -> Iterator[str]:
    if layer.unread > MUCH_UNREAD:
        yield f"{layer.unread:.0%} of what the page shows (pictures, drawings) is not in its text layer"
    if layer.fields:
        yield f"what form fields and annotations say is not in the text layer: {layer.fields}"
    if layer.hidden:
        yield f"characters of the text layer that cannot be seen on the page were left out: {layer.hidden}"
    if layer.garbled:
        yield f"characters of which the text layer does not say what they mean: {layer.garbled}"
    if number := _count_vertical(layer):
        yield f"characters of vertical writing, which may be out of order: {number}"
    if layer.slanted:
        count = sum(len("".join(run.text.split())) for run in layer.slanted)
        yield f"characters of slanted text, which was put at the end: {count}"


def lay_out(layer: TextLayer) -> tuple[Cell, ...]:
    """Put the runs of a text layer into paragraphs, column by column.

    Returns:
        Paragraphs in reading order; those that do not stand upright on the page come last, lines of slanted text after
        them.
    """
    cells = []
    upright = (_paragraphs_of([run for run in layer.runs if run.turn == turn]) for turn in range(4))
    for lines in chain(*upright, ([[run]] for run in layer.slanted)):
        ink = turned(around([piece.ink for line in lines for piece in line]), -lines[0][0].turn)
        box = Box(
            max(0, math.floor(ink.left)),
            max(0, math.floor(ink.top)),
            min(layer.page_size[0], math.ceil(ink.right)),
            min(layer.page_size[1], math.ceil(ink.bottom)),
        )
        cells.append(Cell("Text", box, "\n".join(map(_join, lines))))
    return tuple(cells)


_Line = list[Run]
_Halves = dict[tuple[int, int], tuple[_Line, _Line]]  # by the line's id and where it is divided


def _paragraphs_of(pieces: Sequence[Run]) -> Iterator[list[_Line]]:
    """Yield paragraphs in reading order: where there are columns, each of them from top to bottom."""
    if not pieces:
        return
    lines = _lines(pieces)
    whole = around([piece.line for piece in pieces])
    least = GUTTER * median(piece.line.height for piece in pieces)
    start = position = 0
    known: _Halves = {}
    while position < len(lines):
        count, gutter = _columns(lines[position:], whole, least, known)
        if not count:
            position += 1
            continue
        yield from _split(lines[start:position])
        inside = [piece for line in lines[position : position + count] for piece in line]
        yield from _paragraphs_of([piece for piece in inside if piece.line.left < gutter])
        yield from _paragraphs_of([piece for piece in inside if piece.line.left >= gutter])
        start = position = position + count
    yield from _split(lines[start:])


def _lines(pieces: Sequence[Run]) -> list[_Line]:
    lines: list[_Line] = []
    for piece in sorted(pieces, key=lambda piece: piece.line.middle):
        if lines and _apart(piece, lines[-1][0]) < SAME_LINE:
            lines[-1].append(piece)
        else:
            lines.append([piece])
    for line in lines:
        line.sort(key=lambda piece: piece.line.left)
    return lines


def _columns(lines: Sequence[_Line], whole: Area, least: float, known: _Halves) -> tuple[int, float]:
    """Look for columns that begin with the first line.

    Args:
        lines: From the first one on.
        whole: What is around these lines and those above them.
        least: Width of a gutter at least.
        known: What `_halve` returned before for these lines.

    Returns:
        How many lines they have, as many as possible, and where the second column begins; 0 if there are none.
    """
    free = [(whole.left, whole.right)]
    best = (0, 0.0)
    for count, line in enumerate([*lines, None]):
        left_over: list[tuple[float, float]] = []
        for gap in free:
            rest = [] if line is None else [part for part in _without(gap, line) if part[1] - part[0] >= least]
            ends_here = not rest and whole.left < gap[0] and gap[1] < whole.right  # and is not a margin
            if ends_here and (height := _height_of_columns(lines[:count], gap, known)):
                best = max(best, (height, gap[1]))
            left_over += rest
        free = left_over
        if not free:
            break
    return best


def _without(gap: tuple[float, float], line: _Line) -> Iterator[tuple[float, float]]:
    left, right = gap
    for piece in line:
        if piece.line.right > left and piece.line.left < right:
            yield left, piece.line.left
            left = piece.line.right
    yield left, right


def _height_of_columns(lines: Sequence[_Line], gap: tuple[float, float], known: _Halves) -> int:
    """Return how many of the lines, from the first one on, are in two columns with this gap between."""
    phrases = [_halve(line, gap[1], known) for line in lines]
    if not _are_columns(phrases):
        return 0
    widest = [max(phrase.line.width for row in phrases for phrase in row[side]) for side in (0, 1)]
    end = 0
    for count, row in enumerate(phrases, start=1):
        full = any(phrase.line.width >= TAIL * widest[side] for side in (0, 1) for phrase in row[side])
        if full or all(row) or (end == count - 1 and end and _apart(lines[end - 1][0], lines[end][0]) <= PARAGRAPH):
            end = count
    return end


def _halve(line: _Line, gutter: float, known: _Halves) -> tuple[_Line, _Line]:
    """Return the phrases of a line before and behind a gutter; most gutters divide a line in the same few ways."""
    split = bisect_left(line, gutter, key=lambda piece: piece.line.left)
    if (id(line), split) not in known:
        known[id(line), split] = list(_phrases(line[:split])), list(_phrases(line[split:]))
    return known[id(line), split]


def _are_columns(rows: Sequence[Sequence[_Line]]) -> bool:
    """Tell whether what is left and right of a gap are columns, rather than cells of one table.

    Only what is next to the gap counts. Cells of a row stand side by side; lines of prose beside cells do so by chance,
    and many begin inside a sentence. Where both halves of a row are a name and a figure, there are two tables.
    """
    sides = [[row[side] for row in rows if row[side]] for side in (0, 1)]
    if min(map(len, sides)) < 2:
        return False
    widest = [max(phrase.line.width for half in side for phrase in half) for side in sides]
    named = all(max(half[0].line.ratio for half in side) >= MIN_COLUMN for side in sides)
    votes = 0
    for index, (left, right) in enumerate(rows):
        if left and right and _apart(left[-1], right[0]) <= BESIDE:
            pair = left[-1], right[0]
            wide = [piece.line.ratio >= MIN_COLUMN for piece in pair]
            long = [piece.line.width >= TAIL * most for piece, most in zip(pair, widest, strict=True)]
            begun = any(wide[side] and long[side] and pair[side].text[0].islower() for side in (0, 1))
            far = pair[1].line.left - pair[0].line.right > SPACED * pair[1].line.height
            tables = named and all(_STATEMENT.fullmatch(_join(half)) for half in (left, right))
            votes += 1 if all(wide) or tables or (begun and far) else -1
        elif right:
            near = [row[0][-1] for row in rows[max(0, index - 1) : index + 2] if row[0]]
            votes += any(
                _apart(one, right[0]) < 1 and max(one.line.ratio, right[0].line.ratio) >= MIN_COLUMN for one in near
            )
    return votes > 0


def _apart(one: Run, other: Run) -> float:
    """Return how far above one another two pieces are, as a multiple of the lower one's height."""
    return abs(one.line.middle - other.line.middle) / min(one.line.height, other.line.height)


def _phrases(line: _Line) -> Iterator[Run]:
    """Yield what belongs together in a line even if it is justified: several pieces as one."""
    together: _Line = []
    for piece in line:
        if together and piece.line.left - together[-1].line.right > SPACED * piece.line.height:
            yield _one(together)
            together = []
        together.append(piece)
    if together:
        yield _one(together)


def _one(line: _Line) -> Run:
    ink, areas = around([piece.ink for piece in line]), around([piece.line for piece in line])
    return Run(_join(line), ink, areas, line[0].turn)


def _split(lines: Sequence[_Line]) -> Iterator[list[_Line]]:
    """Yield the paragraphs of one column."""
    heights = [median(piece.line.height for piece in line) for line in lines]
    middles = [median(piece.line.middle for piece in line) for line in lines]
    pitches = [below - above for above, below in pairwise(middles)]
    # A distance of more than two lines is none between lines of a paragraph, whatever is usual on this page.
    near = [pitch for pitch, height in zip(pitches, heights, strict=False) if pitch <= 2 * height]
    usual = median(near) if near else 0.0
    paragraph: list[_Line] = []
    for index, line in enumerate(lines):
        if paragraph:
            low, high = sorted(heights[index - 1 : index + 1])
            if pitches[index - 1] > PARAGRAPH * usual or high > HEADING * low:
                yield paragraph
                paragraph = []
        paragraph.append(line)
    if paragraph:
        yield paragraph


def _join(line: _Line) -> str:
    text = line[0].text
    for before, piece in pairwise(line):
        touching = piece.line.left - before.line.right < TOUCHING * piece.line.height
        text += piece.text if touching else " " + piece.text
    return text
