"""The text that a PDF has by itself: exact, and read in a fraction of a second, where it is what the page shows."""

from __future__ import annotations

import asyncio
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from ..documents import PageImage
from ..errors import EngineError, InputError, NotApplicable
from ..limiter import Limiter
from ..pdf_text import BUILD, Area, TextLayer, around, turned
from ..prompts import Mode
from ..rasterizer import Rasterizer
from ..results import Box, Cell
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
GUTTER: Final = 0.5
"""Width of the space between columns at least, as a multiple of the height of a line (our own choice)."""
TAIL: Final = 0.7
"""Below the shorter of two columns, the longer one goes on as far as it has lines of this part of its width (our own
choice). What comes then is something else, such as a table, and is read after both."""
TOUCHING: Final = 0.15
"""Runs of one line have no space between them if they are closer than this, as a multiple of their height."""


class TextLayerEngine:
    """Reads the text layer of PDFs, if it is sound: `NotApplicable` says why it is not.

    A layer whose characters all have a meaning, but the wrong one, cannot be told from a sound one.
    """

    name = "textlayer"
    modes: frozenset[Mode] = frozenset({"text", "layout"})
    expected_seconds = 0.5
    """Measured: 0.1 s for a page of 3,700 characters, and 0.3 s for the first, whose process has to be started."""

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
            layer = await self._rasterizer.read_text(page.origin, seconds)
        except InputError as error:
            raise EngineError(str(error)) from error
        _check(layer)
        cells = await asyncio.to_thread(lay_out, layer, page.width, page.height)
        return Answer(
            mode=task.mode,
            text="\n\n".join(cell.text for cell in cells),
            model=BUILD,
            cells=cells if task.mode == "layout" else (),
            warnings=(*_warnings(layer), *(said for said in layer.beside if said not in page.warnings)),
        )

    async def aclose(self) -> None:
        """End the processes."""
        await asyncio.to_thread(self._rasterizer.close)


def _check(layer: TextLayer) -> None:
    """Raise `NotApplicable` unless the layer is sound."""
    if not layer.characters:
        if layer.hidden:
            raise NotApplicable(f"the text layer cannot be seen ({layer.hidden} characters): it may be OCR of a scan")
        raise NotApplicable("the page has no text layer")
    if layer.garbled > MAX_GARBLED * layer.characters:
        raise NotApplicable(
            f"the text layer does not say what {layer.garbled} of its {layer.characters} characters mean"
        )
    if layer.unread > MAX_UNREAD:
        raise NotApplicable(f"{layer.unread:.0%} of what the page shows is not in its text layer")
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for run in layer.runs for letter in run.text):
        raise NotApplicable("the text layer has text from right to left, whose order is not known")
    if not layer.characters / MIN_RUN >= len(layer.runs) <= MAX_RUNS:
        raise NotApplicable("the letters of the text layer stand apart, so that their order is not known")


def _warnings(layer: TextLayer) -> Iterator[str]:
    if layer.unread > MUCH_UNREAD:
        yield f"{layer.unread:.0%} of what the page shows (pictures, drawings) is not in its text layer"
    if layer.fields:
        yield f"what was typed into form fields or notes is not in the text layer: {layer.fields}"
    if layer.garbled:
        yield f"characters of which the text layer does not say what they mean: {layer.garbled}"
    if layer.slanted:
        yield f"characters of slanted text were left out: {layer.slanted}"


def lay_out(layer: TextLayer, width: int, height: int) -> tuple[Cell, ...]:
    """Put the runs of a text layer into paragraphs, column by column.

    Args:
        layer: With boxes in pixels of the page's image.
        width: Of that image, in pixels.
        height: As above.

    Returns:
        Paragraphs in reading order; those that do not stand upright on the page come last.
    """
    cells = []
    for turn in range(4):
        pieces = [
            _Piece(run.text, turned(run.ink, turn), turned(run.line, turn)) for run in layer.runs if run.turn == turn
        ]
        for lines in _paragraphs_of(pieces):
            text = "\n".join(map(_join, lines))
            ink = turned(around([piece.ink for line in lines for piece in line]), -turn)
            box = Box(
                max(0, math.floor(ink.left)),
                max(0, math.floor(ink.top)),
                min(width, math.ceil(ink.right)),
                min(height, math.ceil(ink.bottom)),
            )
            cells.append(Cell("Text", box, text))
    return tuple(cells)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run, turned upright."""

    text: str
    ink: Area
    line: Area

    @property
    def height(self) -> float:
        return self.line.bottom - self.line.top

    @property
    def width(self) -> float:
        return self.line.right - self.line.left


_Line = list[_Piece]


def _paragraphs_of(pieces: Sequence[_Piece]) -> Iterator[list[_Line]]:
    """Yield paragraphs in reading order: where there are columns, each of them from top to bottom."""
    if not pieces:
        return
    lines = _lines(pieces)
    whole = around([piece.line for piece in pieces])
    least = GUTTER * median(piece.height for piece in pieces)
    start = position = 0
    while position < len(lines):
        count, gutter = _columns(lines[position:], whole, least)
        if not count:
            position += 1
            continue
        yield from _split(lines[start:position])
        inside = [piece for line in lines[position : position + count] for piece in line]
        yield from _paragraphs_of([piece for piece in inside if piece.line.left < gutter])
        yield from _paragraphs_of([piece for piece in inside if piece.line.left >= gutter])
        start = position = position + count
    yield from _split(lines[start:])


def _lines(pieces: Sequence[_Piece]) -> list[_Line]:
    lines: list[_Line] = []
    for piece in sorted(pieces, key=lambda piece: piece.line.middle):
        first = lines[-1][0] if lines else None
        if first is not None and piece.line.middle - first.line.middle < SAME_LINE * min(piece.height, first.height):
            lines[-1].append(piece)
        else:
            lines.append([piece])
    for line in lines:
        line.sort(key=lambda piece: piece.line.left)
    return lines


def _columns(lines: Sequence[_Line], whole: Area, least: float) -> tuple[int, float]:
    """Look for columns that begin with the first line.

    Args:
        lines: From the first one on.
        whole: What is around these lines and those above them.
        least: Width of a gutter at least.

    Returns:
        How many lines they have, as many as possible, and where the second column begins; 0 if there are none.
    """
    free = [(whole.left, whole.right)]
    best = (0, 0.0)
    for count, line in enumerate([*lines, None]):
        left_over: list[tuple[float, float]] = []
        for gap in free:
            rest = [] if line is None else [part for part in _without(gap, line) if part[1] - part[0] >= least]
            ends_here = not rest and whole.left < gap[0] and gap[1] < whole.right  # and is no margin
            if ends_here and (height := _height_of_columns(lines[:count], gap)):
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


def _height_of_columns(lines: Sequence[_Line], gap: tuple[float, float]) -> int:
    """Return how many of the lines, from the first one on, are two columns of running text with this gap between."""
    rows = [
        [[piece for piece in line if (piece.line.left >= gap[1]) is right] for right in (False, True)] for line in lines
    ]
    phrases = [[list(_phrases(half)) for half in row] for row in rows]
    sides = [[phrase for row in phrases for phrase in row[side]] for side in (0, 1)]
    if not all(len(side) > 1 and median(piece.width / piece.height for piece in side) >= MIN_COLUMN for side in sides):
        return 0
    widest = [max(phrase.width for phrase in side) for side in sides]
    end = 0
    for count, row in enumerate(phrases, start=1):
        full = any(phrase.width >= TAIL * widest[side] for side in (0, 1) for phrase in row[side])
        if full or all(row) or (end == count - 1 and end and _distance(lines[end - 1], lines[end]) <= PARAGRAPH):
            end = count
    return end


def _distance(above: _Line, below: _Line) -> float:
    """Return how far apart two lines are, as a multiple of their height."""
    height = max(above[0].height, below[0].height)
    return (below[0].line.middle - above[0].line.middle) / height


def _phrases(line: _Line) -> Iterator[_Piece]:
    """Yield what belongs together in a line even if it is justified: several pieces as one."""
    together: _Line = []
    for piece in line:
        if together and piece.line.left - together[-1].line.right > SPACED * piece.height:
            yield _one(together)
            together = []
        together.append(piece)
    if together:
        yield _one(together)


def _one(line: _Line) -> _Piece:
    return _Piece(
        _join(line),
        around([piece.ink for piece in line]),
        around([piece.line for piece in line]),
    )


def _split(lines: Sequence[_Line]) -> Iterator[list[_Line]]:
    """Yield the paragraphs of one column."""
    heights = [median(piece.height for piece in line) for line in lines]
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
        touching = piece.line.left - before.line.right < TOUCHING * piece.height
        text += piece.text if touching else " " + piece.text
    return text
