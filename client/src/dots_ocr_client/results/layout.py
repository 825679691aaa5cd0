r"""From the model's answer to cells: JSON as it should be, or as much as can be saved of what came instead.

The model writes JSON by itself, without a grammar, so it leaves out commas, breaks off, repeats itself, and forgets to
double the backslashes of LaTeX. Whatever is mended or lost is named in `Layout.repairs`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any, Final, get_args

import jiter

from ..errors import UnusableAnswer
from ..prompts import Category
from ..texts import encodable
from . import Box, Cell
from .export import MATH, clean_table

_CATEGORIES: Final = frozenset(get_args(Category))
_FIELDS: Final = frozenset({"bbox", "category", "text"})

# A quote inside a string is escaped, so in sound JSON this matches at the start of a cell and nowhere else.
_CELL_START: Final = re.compile(r'\{\s*+"(?:bbox|category|text)"\s*+:')
_FENCE: Final = re.compile(r"```(?:json)?", re.IGNORECASE)
_FENCED_BLANK: Final = re.compile(r"\s*+(?:```(?:json)?)?+\s*+\[\s*+\]\s*+(?:```)?+\s*+", re.IGNORECASE)
_STRING: Final = re.compile(r'"((?:[^"\\]++|\\.)*+)("|\\?\Z)', re.DOTALL)
_IN_STRING: Final = re.compile(
    r"""(?P<good>\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))|(?P<bad>\\)|(?P<quote>")|(?P<control>[\x00-\x1f])"""
)
_TEXT_FIELD: Final = re.compile(r'(.*?"text"\s*+:\s*+")(.*)', re.DOTALL)
_LATER_FIELD: Final = re.compile(r'"\s*+,\s*+"(?:bbox|category)"\s*+:')
_TEXT_END: Final = re.compile(r'(?<!\\)((?:\\\\)*+)"(\s*+\}?+[\s,\]`]*+)\Z')

_CUT_ESCAPE: Final = re.compile(r"(?<!\\)((?:\\\\)*+)\\(?:u[0-9a-fA-F]{0,3})?\Z")
_BROKEN_BOX: Final = re.compile(r'"bbox"\s*+:[^"{}]*+(["}])')
_NO_NUMBER_COMMA: Final = re.compile(r"(?<=\d)\s++(?=-?\d)")
_NUMBERS: Final = re.compile(r'"bbox"\s*+:\s*+\[[^\]"{}]*+')
_NO_COMMA: Final = re.compile(r'(?<=["\]])\s*+(?="(?:bbox|category|text)"\s*+:)')
# From here on spans are passed over, for the time would grow faster than the answer (our own choice).
MAX_COLUMNS: Final = 100

# What an answer may bring about in what reads it: a page must not stop others, whatever is in it.
_FAULTS: Final = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)

_NOT_TEXT: Final = re.compile("[\0\ud800-\udfff]")
# JSON takes the first two characters of these for an escape if the model wrote one backslash only.
_NAMES: Final = (
    "nu ne ni neq neg not notin nabla nexists nleq ngeq nmid nparallel nsim ncong nsubset nsubseteq nsupset nsupseteq "
    "nprec nsucc nearrow nwarrow natural newline nonumber nolimits normalsize nleqslant ngeqslant nrightarrow "
    "nleftarrow rho rm right rightarrow rightleftharpoons rangle rceil rfloor rbrace rbrack rvert rVert raise rule tau "
    "text textbf textit textrm textsf texttt textstyle theta times to top tan tanh tilde triangle triangleq "
    "triangleleft triangleright tfrac tbinom tag therefore thinspace tiny twoheadrightarrow"
)
_COMMANDS: Final = frozenset(_NAMES.split())
_LETTERS: Final = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_LOST_ANYWHERE: Final = re.compile(r"([\b\f])(?=[A-Za-z])")  # no text has a backspace or form feed before a letter
_LOST_IN_MATH: Final = re.compile(r"([\n\r\t])([A-Za-z]+)")
_LINE_START: Final = re.compile(r"(?:\$\$|\\\\|\\\[|\n|\\begin\{[^{}]*+\}(?:\{[^{}]*+\})?+)[ ]*+\Z")


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a page."""

    cells: tuple[Cell, ...]  # in reading order; empty for a blank page
    # What had to be mended in the answer, or was lost, in short sentences; empty for an answer in order.
    repairs: tuple[str, ...] = ()


def parse(answer: str, seen: tuple[int, int], page: tuple[int, int], *, texts: bool) -> Layout:
    """Read the layout out of an answer. The time it takes grows with the answer's length and no faster.

    Args:
        answer: What the model wrote.
        seen: Width and height of the image as the model saw it, in pixels (`images.smart_resize`).
        page: Width and height of the page's image, in pixels; the boxes of the result refer to it.
        texts: Whether texts were asked for; if not, they are left out.

    Raises:
        UnusableAnswer: There is no cell in the answer, and it does not say that the page is blank (``[]``).
    """
    notes: Counter[str] = Counter()
    try:
        answer = _printable(answer, notes)
        values = _values(answer, notes)
        cells: dict[Cell, None] = {}  # a set that keeps the order
        for value in values or ():
            cell = _cell(value, seen, page, texts, notes)
            if cell is not None and cell in cells:
                notes["cells dropped that repeat an earlier one: {n}"] += 1
            elif cell is not None:
                cells[cell] = None
    except _FAULTS as error:
        raise UnusableAnswer(
            f"the answer is not a layout ({type(error).__name__}): read the page in the mode text"
        ) from None
    if values is None or (values and not cells):
        raise UnusableAnswer(f"the answer is not a layout; it begins {answer[:60]!r}: read the page in the mode text")
    if unknown := {cell.category: None for cell in cells if cell.category not in _CATEGORIES}:
        names = ", ".join(repr(name[:40]) for name in list(unknown)[:5])
        notes[f"categories kept as written that dots.ocr does not have: {{n}} ({names})"] = len(unknown)
    return Layout(tuple(cells), tuple(note.replace("{n}", str(count), 1) for note, count in notes.items() if count))


def to_page(numbers: Sequence[float], seen: tuple[int, int], page: tuple[int, int]) -> Box:
    """Turn a box (left, top, right, bottom) on what the model saw into one on the page, both of a size in pixels.

    It is the smallest in whole pixels that covers it, cut off at the edges of the page.
    """
    left, top, right, bottom = map(Fraction, numbers)
    corners = left * page[0] / seen[0], top * page[1] / seen[1], right * page[0] / seen[0], bottom * page[1] / seen[1]
    return Box(*map(math.floor, corners[:2]), *map(math.ceil, corners[2:])).within(*page)


def to_seen(box: Box, seen: tuple[int, int], page: tuple[int, int]) -> Box:
    """Turn a box on the page into one on what the model sees; the reverse of `to_page`."""
    return to_page(box, page, seen)


def plain_text(cells: Iterable[Cell]) -> str:
    """Join the texts of cells, with an empty line between them.

    Tables become lines with a tab between cells; pictures are left out; Markdown and LaTeX stay as they are.
    """
    texts = (
        "\n".join("\t".join(row) for row in table_rows(cell.text)) if cell.category == "Table" else cell.text.strip()
        for cell in cells
    )
    return "\n\n".join(text for text in texts if text)


def as_answer(cells: Iterable[Cell], *, texts: bool) -> str:
    """Write cells as dots.ocr does, with their boxes as they are: a cell without one has no ``bbox``."""
    values = []
    for cell in cells:
        value: dict[str, Any] = {} if cell.box is None else {"bbox": list(cell.box)}
        value["category"] = cell.category
        if texts and cell.category != "Picture":
            value["text"] = cell.text
        values.append(value)
    return json.dumps(values, ensure_ascii=False)


def _values(answer: str, notes: Counter[str]) -> list[Any] | None:
    """Return the values that should be cells, or ``None`` if there is no sign of any."""
    found: Counter[str] = Counter()
    try:
        value = _decoder(found).decode(answer)
    except (ValueError, RecursionError):  # ValueError also for integers beyond Python's limit
        return _salvage(answer, notes)
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if _FIELDS & value.keys():
            found["single cell taken for a list"] = 1
            value = [value]
        elif len(lists) == 1:
            found["list of cells taken out of an object"] = 1
            found["other fields of that object dropped: {n}"] = len(value) - 1
            value = lists[0]
    if isinstance(value, list) and (not value or any(isinstance(inner, dict) for inner in value)):
        notes.update(found)
        return value
    return _salvage(answer, notes)  # cells may be further inside


def _decoder(notes: Counter[str]) -> json.JSONDecoder:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        notes["fields dropped that occur again later in the same cell: {n}"] += len(pairs) - len(value)
        return value

    return json.JSONDecoder(object_pairs_hook=build)


def _salvage(answer: str, notes: Counter[str]) -> list[Any] | None:
    """Read cell by cell, so that a fault costs no more than the cell that has it."""
    starts = [match.start() for match in _CELL_START.finditer(answer)]
    if not starts:
        if not _FENCED_BLANK.fullmatch(answer):
            return None
        notes["code fence around the JSON removed"] += 1
        return []
    values = []
    outside = [answer[: starts[0]]]
    for start, end in pairwise([*starts, len(answer)]):
        value, rest = _salvage_cell(answer[start:end], notes)
        if value is not None:
            values.append(value)
        outside.append(rest)
    notes["missing commas between cells added: {n}"] += sum("," not in gap for gap in outside[1:-1])
    if "[" in outside[0] and "]" not in outside[-1]:
        notes["the list has no end, so cells may be missing"] += 1
    if any("```" in gap for gap in outside):
        notes["code fence around the JSON removed"] += 1
    dropped = sum(len(re.sub(r"[\s,\[\]]", "", _FENCE.sub("", gap))) for gap in outside)
    notes["characters dropped that stood outside of cells: {n}"] += dropped
    return values or None


def _salvage_cell(chunk: str, notes: Counter[str]) -> tuple[dict[str, Any] | None, str]:
    """Read one cell and return it, or ``None``, with what stands behind it."""
    for mend in (lambda whole, _: whole, _mend_commas, _mend_strings, _mend_text, _drop_box):
        found: Counter[str] = Counter()
        mended = mend(chunk, found)
        try:
            value, end = _decoder(found).raw_decode(mended)
        except (ValueError, RecursionError):
            continue
        notes.update(found)
        return value, mended[end:]
    try:
        value = jiter.from_json(_mend_strings(chunk, Counter()).encode(), partial_mode=True)
    except ValueError:
        value = {}
    if list(value)[-1:] == ["bbox"] and "]" not in chunk[chunk.rfind('"bbox"') :]:
        del value["bbox"]  # its last number may lack digits
    if not value.keys() & {"category", "text"}:
        notes["broken or cut off cells dropped: {n}"] += 1
        return None, ",]"  # neither the comma nor the end of the list was forgotten
    notes["cells kept without the part that is broken or cut off: {n}"] += 1
    return value, ",]"


def _mend_commas(chunk: str, notes: Counter[str]) -> str:
    """Separate the numbers of the box, and the fields."""
    mended = _NO_COMMA.sub(", ", _NUMBERS.sub(lambda box: _NO_NUMBER_COMMA.sub(", ", box[0]), chunk, count=1))
    notes["missing commas inside cells added: {n}"] += mended.count(",") - chunk.count(",")
    return mended


def _mend_strings(chunk: str, notes: Counter[str]) -> str:
    """Escape what may not stand in strings: control characters, and backslashes that begin no escape of JSON."""
    chunk = _mend_commas(chunk, notes)
    return _STRING.sub(lambda string: f'"{_mend_string(string[1], notes)}{string[2]}', chunk)


def _mend_string(text: str, notes: Counter[str], *, quotes: bool = False) -> str:
    def mend(match: re.Match[str]) -> str:
        match match.lastgroup:
            case "bad":
                notes["single backslashes doubled: {n}"] += 1
                return r"\\"
            case "control":
                notes["control characters inside strings escaped: {n}"] += 1
                return json.dumps(match[0])[1:-1]
            case "quote" if quotes:
                notes["quotation marks inside texts escaped: {n}"] += 1
                return r"\""
        return match[0]

    return _IN_STRING.sub(mend, text)


def _mend_text(chunk: str, notes: Counter[str]) -> str:
    """Take everything up to the cell's end for its text, so that quotation marks in it, or no end, do no harm."""
    field = _TEXT_FIELD.match(_mend_commas(chunk, notes))
    if field is None or _LATER_FIELD.search(field[2]):
        return chunk
    head, text = _mend_strings(field[1][:-1], notes) + '"', field[2]
    end = _TEXT_END.search(text)
    if end is None:
        notes["texts that break off kept as far as they go: {n}"] += 1
        text = _CUT_ESCAPE.sub(r"\1", text)
        return f'{head}{_mend_string(text, notes, quotes=True)}"}},]'
    tail = end[2] if "}" in end[2] else "}" + end[2]
    return f'{head}{_mend_string(text[: end.end(1)], notes, quotes=True)}"{tail}'


def _drop_box(chunk: str, notes: Counter[str]) -> str:
    """Write ``null`` for a box that is not JSON, to save the rest of the cell."""
    without = _BROKEN_BOX.sub(lambda match: '"bbox": null' + {'"': ', "', "}": "}"}[match[1]], chunk, count=1)
    return _mend_text(without, notes)


def _cell(value: Any, seen: tuple[int, int], page: tuple[int, int], texts: bool, notes: Counter[str]) -> Cell | None:
    if not isinstance(value, dict) or not _FIELDS & value.keys():
        notes["values dropped that are not cells: {n}"] += 1
        return None
    notes["fields dropped other than bbox, category and text: {n}"] += len(value.keys() - _FIELDS)
    category = value.get("category")
    if not isinstance(category, str) or not category:
        notes["cells without a category taken for Text: {n}"] += 1
        category = "Text"
    category = _printable(category, notes)
    box = _box(value.get("bbox"), seen, page, notes)
    text = _text(value.get("text"), category, notes)
    if text and (not texts or category == "Picture"):
        notes["texts dropped that were not asked for: {n}"] += 1
        text = ""
    return Cell(category, box, text)


def _box(value: Any, seen: tuple[int, int], page: tuple[int, int], notes: Counter[str]) -> Box | None:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        notes["boxes dropped that are not four numbers: {n}"] += 1
        return None
    left, right = sorted((value[0], value[2]))
    top, bottom = sorted((value[1], value[3]))
    if [left, top, right, bottom] != value:
        notes["boxes turned the right way round: {n}"] += 1
    within = [min(max(edge, 0), size) for edge, size in zip((left, top, right, bottom), seen * 2, strict=True)]
    if within[0] == within[2] or within[1] == within[3]:
        notes["boxes dropped that are empty or lie outside the page: {n}"] += 1
        return None
    if within != [left, top, right, bottom]:
        notes["boxes cut off at the edges of the page: {n}"] += 1
    return to_page(within, seen, page)


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _text(value: Any, category: str, notes: Counter[str]) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        notes["texts made of values that are not strings: {n}"] += 1
        try:
            value = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            value = ""
    return _restore(_printable(value, notes), category, notes)


def _printable(text: str, notes: Counter[str]) -> str:
    """Replace what no UTF-8 file and few programs take: NUL, and halves of surrogate pairs."""
    if not _NOT_TEXT.search(text):
        return text
    notes["texts in which NUL or lone surrogates were replaced: {n}"] += 1
    return encodable(text)


def _restore(text: str, category: str, notes: Counter[str]) -> str:
    r"""Put back the backslashes of LaTeX commands that JSON took for escapes, such as ``\frac`` (a form feed)."""

    def restore_math(math_text: str) -> str:
        def restore(match: re.Match[str]) -> str:
            before = math_text[max(0, match.start() - 100) : match.start()]
            command = _LETTERS[match[1]] + match[2]
            if command not in _COMMANDS or (command in ("nu", "ne", "ni") and _LINE_START.search(before)):
                return match[0]  # a line may well begin with a variable u, e or i
            notes["lost backslashes of LaTeX commands put back: {n}"] += 1
            return "\\" + command

        return _LOST_IN_MATH.sub(restore, math_text)

    text, count = _LOST_ANYWHERE.subn(lambda match: "\\" + _LETTERS[match[0]], text)
    notes["lost backslashes of LaTeX commands put back: {n}"] += count
    if category == "Formula":
        return restore_math(text)
    return MATH.sub(lambda match: restore_math(match[0]), text)


class _TableText(HTMLParser):
    """Collects the rows of a table, with empty places where a cell spans; a table inside a cell just adds its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = [[]]
        self._spanned: dict[int, int] = {}  # columns that a cell takes, for so many rows from this one on

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
            self._spanned = {column: rows - 1 for column, rows in self._spanned.items() if rows > 1}
        elif tag in ("td", "th"):
            row = self.rows[-1]
            while len(row) in self._spanned:
                row.append("")
            spans = [dict(attrs).get(name) or "" for name in ("colspan", "rowspan")]
            across, down = (int(span) if re.fullmatch(r"0*+[1-9]\d{0,3}", span) else 1 for span in spans)
            self._spanned |= dict.fromkeys(range(len(row), min(len(row) + across, MAX_COLUMNS)), down)
            row.append("")
        elif tag == "br":
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if not self.rows[-1]:
            if not data.strip():
                return
            self.rows[-1].append("")
        self.rows[-1][-1] += data


def table_rows(text: str) -> list[list[str]]:
    """Return the rows of a table that the model wrote as HTML; of any other text, its lines."""
    if "<" not in text:
        return [[line] for line in text.strip().splitlines()]
    parser = _TableText()
    parser.feed(clean_table(text))  # on tags that never end, the parser by itself takes time with the square of them
    parser.close()
    return [[" ".join(cell.split()) for cell in row] for row in parser.rows if any(row)]
