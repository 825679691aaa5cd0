"""The text layer of a PDF's page: what it says, where, and how much of the page it accounts for.

A text layer need not be what the page shows: it may be the OCR of a scan, a stamp on one, or letters of a font that
does not say what they mean. So the page is drawn twice, with its text and without: what then differs is text that can
be seen, and what is left is what the layer does not say. That is cheap; PDFium's calls for single characters are not.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from itertools import groupby, pairwise, repeat
from typing import Any, Final, NamedTuple, Self

import pypdfium2
from PIL import Image, ImageChops
from pypdfium2 import raw

from ..texts import encodable
from . import documents, images
from .documents import PageReference
from .pdf_resolution import FAST, objects

MAX_CHARACTERS: Final = 100_000
"""Our own limit; a densely printed A4 page has about 6,000."""
GAP: Final = 0.8
"""Gap between two characters from which on they are in different runs, or what is between them is hidden, as a multiple
of the font's height (our own choice: wider than the spaces of justified text, narrower than that between columns)."""
COARSE: Final = 2
"""The two drawings are so many times smaller than the page's own image, that is, at 100 dpi for most pages (our own
choice: even the dot of an i leaves a trace)."""
VISIBLE: Final = 8
"""Levels (of 255) of any colour by which a character changes the page if it can be seen (our own choice: the two
drawings are made alike, so that there is no noise, and no reader can tell less apart)."""
MARGIN: Final = 1
"""Pixels of the coarse drawing by which PDFium may paint outside the boxes of its characters (measured: up to one)."""
PATCH: Final = 12
"""Side of the patches in which a page is counted, in pixels of the coarse drawing: 3 mm, about the height of a line
(our own choice). Counted in pixels, a single dark photograph would outweigh a page of text."""
SLANT: Final = math.radians(5)
"""Text further than this from a multiple of 90 degrees is slanted, as watermarks are (our own choice)."""

_TEXT_FIELDS: Final = (raw.FPDF_FORMFIELD_TEXTFIELD, raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX)
_SAID: Final = (*documents.MARKS, raw.FPDF_ANNOT_POPUP)  # of which others tell, or which are never drawn
_UNSEEN: Final = raw.FPDF_ANNOT_FLAG_HIDDEN | raw.FPDF_ANNOT_FLAG_NOVIEW
_LINES: Final = re.compile(r"[^ \r\n](?:[^\r\n]*[^ \r\n])?")
_WORDS: Final = re.compile(r"[^ \r\n]+")
_EMPTY: Final = re.compile(rb"\0+")
_HIDDEN_MODES: Final = (raw.FPDF_TEXTRENDERMODE_INVISIBLE, raw.FPDF_TEXTRENDERMODE_CLIP)


class Area(NamedTuple):
    """A rectangle, in pixels of the page's image, or of that image turned; see `turned`."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def middle(self) -> float:
        """Half-way down."""
        return (self.top + self.bottom) / 2

    @property
    def height(self) -> float:
        """In pixels."""
        return self.bottom - self.top

    @property
    def width(self) -> float:
        """In pixels."""
        return self.right - self.left

    @property
    def ratio(self) -> float:
        """The width as a multiple of the height."""
        return self.width / self.height


@dataclass(frozen=True, slots=True)
class Run:
    """Characters one behind the other, without a gap in which a column could begin.

    Attributes:
        text: What they say; U+FFFD stands for those of which the PDF does not say what they mean.
        ink: The area of the characters themselves, `turned` so that they are upright.
        line: The same with the full height of the font, for all characters alike.
        turn: The direction in which they run, in quarter turns clockwise: 0 for text that is upright on the page.
    """

    text: str
    ink: Area
    line: Area
    turn: int


@dataclass(frozen=True, slots=True)
class TextLayer:
    """What can be seen of a text layer, and what else there is on the page.

    Attributes:
        runs: In the order of the file.
        slanted: Lines of text that runs neither along nor across the page, in the order of the file; not in `runs`.
        characters: In both, without white space.
        garbled: Those of them of which the PDF does not say what they mean.
        hidden: Characters of the layer that cannot be seen; they are in no run.
        unread: Part of the patches with anything on them that have no text of the layer, from 0 to 1.
        fields: Form fields with something typed in, and annotations that show text, which is not in the layer.
        beside: What else is on the page, as `documents.beside_text` says it.
        page_size: Width and height of the page's image in pixels, whether it was drawn or not.
        dpi: Pixels of that image per inch.
    """

    runs: tuple[Run, ...]
    slanted: tuple[Run, ...]
    characters: int
    garbled: int
    hidden: int
    unread: float
    fields: int
    page_size: tuple[int, int]
    dpi: int
    beside: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the text layer of which `dataclasses.asdict` made these values, also if they went through JSON."""
        runs = {
            name: tuple(Run(run["text"], Area(*run["ink"]), Area(*run["line"]), run["turn"]) for run in values[name])
            for name in ("runs", "slanted")
        }
        values = {**values, "page_size": tuple(values["page_size"]), "beside": tuple(map(str, values["beside"]))}
        return cls(**{**values, **runs})


class _Word(NamedTuple):
    """Characters in a row, white space before them, and PDFium's number of the first; the areas are turned upright."""

    before: str
    text: str
    first: int
    ink: Area
    line: Area
    turn: int
    slanted: bool
    owner: int | None


def turned(area: Area, turn: int) -> Area:
    """Return where an area is once the page has been turned so that text of that turn is upright.

    The origin stays, so coordinates may become negative. The way back are the other ``4 - turn`` quarter turns.
    """
    for _ in range(turn % 4):
        area = Area(area.top, -area.right, area.bottom, -area.left)
    return area


def around(areas: Sequence[Area]) -> Area:
    """Return the smallest area with all of these inside; there must be one."""
    if len(areas) == 1:
        return areas[0]
    left, top, right, bottom = zip(*areas, strict=True)
    return Area(min(left), min(top), max(right), max(bottom))


def extract(reference: PageReference) -> TextLayer:
    """Take the text layer out of a PDF's page. This blocks, and is for a process of its own; see `rasterizer`.

    Raises:
        InputError: The page is broken, or has more than `MAX_CHARACTERS`.
    """
    with documents.open_page(reference, "read") as (page, drawn), closing(page.get_textpage()) as textpage:
        scale = drawn.scale
        texts = {one.value: one for one, kind, *_ in objects(page.raw) if kind == raw.FPDF_PAGEOBJ_TEXT}
        modes = {owner: FAST.FPDFTextObj_GetTextRenderMode(text) for owner, text in texts.items()}
        hidden = {owner for owner, mode in modes.items() if mode in _HIDDEN_MODES}
        layer = _Layer(page, textpage.raw, scale)
        lines = layer.pieces(_LINES, several=not hidden)
        groups = list(_groups(line for line in lines if line.owner not in hidden))
        unread = 0.0
        if groups:  # otherwise there is nothing to look at
            with_text = _draw(page, scale)
            for owner in modes.keys() - hidden:
                FAST.FPDFTextObj_SetTextRenderMode(texts[owner], raw.FPDF_TEXTRENDERMODE_INVISIBLE)
            without = _draw(page, scale)
            seen = _difference(with_text, without)
            unread = _unread(seen, without)
            parts = [
                [word for line in group for word in layer.pieces(_WORDS, line.first, line.first + len(line.text))]
                if group[0].slanted or _holes(seen, group)  # there may be other text in the area of what is slanted
                else []
                for group in groups
            ]
            masks = {}
            for aslant in (False, True):  # apart, because the ink of the one may be in the area of the other
                kind = [words for words in parts if words and words[0].slanted is aslant]
                lost = aslant or any(list(layer.without(words, _holes(seen, words))) != words for words in kind)
                doubtful = texts.keys() & {word.owner for words in kind for word in words if lost}
                masks[aslant] = seen
                if doubtful:
                    boxes = zip(*(_strip(words, 0.5, seen) for words in kind), strict=True)
                    box = left, top, *_ = [pick(edges) for pick, edges in zip((min, min, max, max), boxes, strict=True)]
                    blank = _draw(page, scale, box)
                    for owner in doubtful:
                        FAST.FPDFTextObj_SetTextRenderMode(texts[owner], modes[owner])
                    masks[aslant] = Image.new("L", seen.size)
                    masks[aslant].paste(_difference(_draw(page, scale, box), blank), (max(0, left), max(0, top)))
                    for owner in doubtful:
                        FAST.FPDFTextObj_SetTextRenderMode(texts[owner], raw.FPDF_TEXTRENDERMODE_INVISIBLE)
            groups = [
                rest
                for group, words in zip(groups, parts, strict=True)
                for rest in (
                    _groups(layer.without(words, _holes(masks[words[0].slanted], words, 0.5))) if words else (group,)
                )
            ]
        fields, beside = _count_fields(page), documents.beside_text(page)
        width, height = page.get_size()
    upright, slanted = (tuple(_run(group) for group in groups if group[0].slanted is kind) for kind in (False, True))
    text = "".join(run.text for run in upright + slanted)
    characters = _count(text)
    return TextLayer(
        runs=upright,
        slanted=slanted,
        characters=characters,
        garbled=text.count("\ufffd"),
        hidden=_count(encodable(layer.text)) - characters,
        unread=unread,
        fields=fields,
        page_size=(math.ceil(width * scale), math.ceil(height * scale)),
        dpi=drawn.dpi,
        beside=beside,
    )


def _count(text: str) -> int:
    return sum(map(len, text.split()))


class _Layer:
    """The text of a page as PDFium gives it, each white space as a space or a line's end, and where it is."""

    def __init__(self, page: Any, textpage: Any, scale: float) -> None:
        edges = raw.FS_RECTF()
        if not raw.FPDF_GetPageBoundingBox(page, edges):
            raise ValueError("it has no bounding box")
        if (count := raw.FPDFText_CountChars(textpage)) > MAX_CHARACTERS:
            raise ValueError(f"its text layer has more than {MAX_CHARACTERS} characters")
        self._textpage, self._scale = textpage, scale
        self._quarters = page.get_rotation() // 90
        self._origin = turned(Area(edges.left, -edges.top, edges.right, -edges.bottom), -self._quarters)[:2]
        self._box, self._loose = (ctypes.c_double * 4)(), (ctypes.c_float * 4)()
        self._sides = [ctypes.byref(self._box, place * ctypes.sizeof(ctypes.c_double)) for place in range(4)]
        self.text = re.sub(r"[\r\n]\s*", lambda found: "\n" * len(found[0]), "".join(_characters(textpage, count)))

    def pieces(
        self, pattern: re.Pattern[str], start: int = 0, end: int = sys.maxsize, *, several: bool = False
    ) -> Iterator[_Word]:
        """Yield `_LINES` or `_WORDS` in the order of the file, each of one object, or of several if they may be."""
        for match in pattern.finditer(self.text, start, end):
            part = range(*match.span())
            boxes = self._boxes(part)
            if len(boxes) <= 1 or (several and _in_a_row(boxes, self._line(part.start))):
                yield self._word(part, boxes)
                continue
            letters = (index for index in part if self.text[index] != " ")
            for _, group in groupby(letters, self._owner):
                first, *others = group
                part = range(first, (others or [first])[-1] + 1)
                yield self._word(part, self._boxes(part))

    def without(self, words: Iterable[_Word], holes: Sequence[tuple[float, float]]) -> Iterator[_Word]:
        """Yield what is left of words once the characters in these holes of their run are gone."""
        if (-math.inf, math.inf) in holes:
            return
        for word in words:
            if not any(left < word.ink.right and word.ink.left < right for left, right in holes):
                yield word
                continue
            lost = "".join(
                "-" if any(left <= middle < right for left, right in holes) else "+"
                for middle in map(self._middle, range(word.first, word.first + len(word.text)))
            )
            for kept in re.finditer(r"\+(?:-?\+)*", lost):  # a single one between others is never lost
                part = range(word.first + kept.start(), word.first + kept.end())
                yield self._word(part, self._boxes(part))

    def _owner(self, index: int) -> int | None:
        owner: int | None = FAST.FPDFText_GetTextObject(self._textpage, index).value
        return owner

    def _word(self, part: range, boxes: Sequence[Area]) -> _Word:
        first, last = part[0], part[-1]
        box, full, angle, turn = self._where(part, boxes)
        ink, (left, top, right, bottom) = self._place(box, turn), self._place(full, turn)
        if top >= bottom:
            top, bottom = ink.top, ink.bottom
        line = Area(left, top, right, max(bottom, top + 1))  # at least a pixel high, whatever the font says
        slanted = abs(angle - turn * math.pi / 2) > SLANT
        before, text = self.text[max(0, first - 1) : first], self.text[first : last + 1]
        return _Word("" if before.strip() else before, text, first, ink, line, turn % 4, slanted, self._owner(first))

    def _middle(self, index: int) -> float:
        """Return where the middle of a character is along its line of text."""
        part = range(index, index + 1)
        box, _, _, turn = self._where(part, self._boxes(part))
        ink = self._place(box, turn)
        return (ink.left + ink.right) / 2

    def _where(self, part: range, boxes: Sequence[Area]) -> tuple[Area, Area, float, int]:
        """Return where characters are, also with the full height of their font, their angle, and that in quarters."""
        first, last = part[0], part[-1]
        angle = FAST.FPDFText_GetCharAngle(self._textpage, first) + self._quarters * math.pi / 2
        box, full = around(boxes), self._line(first)
        if first != last:
            full = around((full, self._line(last)))
        # A font may have no boxes of its own, and PDFium then gives a hair's breadth.
        return box if box.height > full.height / 50 else full, full, angle, round(angle / (math.pi / 2))

    def _boxes(self, part: range) -> list[Area]:
        """Return the areas of the characters, one for each object, as `_line` in points from the left and downwards."""
        boxes = []
        for index in range(FAST.FPDFText_CountRects(self._textpage, part.start, len(part))):
            FAST.FPDFText_GetRect(self._textpage, index, *self._sides)
            left, top, right, bottom = self._box
            boxes.append(Area(left, -top, right, -bottom))
        return boxes

    def _line(self, index: int) -> Area:
        FAST.FPDFText_GetLooseCharBox(self._textpage, index, self._loose)
        left, top, right, bottom = self._loose
        return Area(left, -top, right, -bottom)

    def _place(self, area: Area, turn: int) -> Area:
        """Return where an area is on the page's image, turned upright."""
        left, top, right, bottom = turned(area, -self._quarters)
        (x, y), scale = self._origin, self._scale
        return turned(Area((left - x) * scale, (top - y) * scale, (right - x) * scale, (bottom - y) * scale), turn)


def _characters(textpage: Any, count: int) -> list[str]:
    """Return each character: a space for white space of any width, U+FFFD for one without a meaning."""
    buffer = (ctypes.c_ushort * (count + 1))()
    whole = raw.FPDFText_GetText(textpage, 0, count, buffer) == count + 1  # otherwise PDFium left some out
    codes = buffer[:count] if whole else list(map(FAST.FPDFText_GetUnicode, repeat(textpage), range(count)))
    meanings = {code: _meaning(code) for code in set(codes)}
    characters = [meanings[code] for code in codes]
    for index in (index for index, text in enumerate(characters) if text == "\ufffd"):
        # One at the end of a line has a code of its own.
        if FAST.FPDFText_GetUnicode(textpage, index) == 2 and FAST.FPDFText_IsHyphen(textpage, index) == 1:
            characters[index] = "-"
    errors = map(FAST.FPDFText_HasUnicodeMapError, repeat(textpage), range(count))
    return ["\ufffd" if error == 1 else text for text, error in zip(characters, errors, strict=True)]


def _meaning(code: int) -> str:
    text = chr(code) if code <= sys.maxunicode else "\ufffd"
    if text.isspace():
        return text if text in "\r\n" else " "
    # Control, private use, unassigned. Formatting characters (Cf), such as joiners, have a meaning; so have halves of
    # surrogate pairs (Cs) once they are joined.
    unknown = unicodedata.category(text) in ("Cc", "Co", "Cn")
    return "\ufffd" if unknown else "-" if text == "\xad" else text


def _in_a_row(boxes: Sequence[Area], line: Area) -> bool:
    """Tell whether objects stand in a line of text as one object would."""
    gaps = (right.left - left.right for left, right in pairwise(boxes))
    flat = around(boxes).height <= 2 * GAP * line.height
    return flat and all(-line.height <= gap <= GAP * line.height for gap in gaps)


def _groups(words: Iterable[_Word]) -> Iterator[list[_Word]]:
    """Put words together that stand in a row: the next one begins where the one before ends, or a little behind it.

    Of slanted text, of which that cannot be told, PDFium's lines stay together.
    """
    group: list[_Word] = []
    line = Area(0, 0, 0, 0)  # of the group
    for word in words:
        alike = group and (word.turn, word.slanted) == (group[0].turn, group[0].slanted)
        if alike and word.before != "\n" and (word.slanted or _continues(line, word.line)):
            group.append(word)
            line = around([line, word.line])
            continue
        if group:
            yield group
        group, line = [word], word.line
    if group:
        yield group


def _run(words: Sequence[_Word]) -> Run:
    text = encodable(" ".join("".join(word.before + word.text for word in words).split()))
    return Run(text, around([word.ink for word in words]), around([word.line for word in words]), words[0].turn)


def _continues(line: Area, more: Area) -> bool:
    height = min(line.height, more.height)
    overlap = min(line.bottom, more.bottom) - max(line.top, more.top)
    return overlap > height / 2 and -height <= more.left - line.right <= GAP * height


def _holes(mask: Image.Image, words: Sequence[_Word], across: float = 0.0) -> list[tuple[float, float]]:
    """Return the parts of a run in which nothing can be seen, each from where to where along the line of text."""
    turn = words[0].turn
    box = _strip(words, across, mask)
    ink = _projection(mask.crop(box), turn % 2)[:: 1 if turn < 2 else -1]  # there is nothing beside the page
    begin = turned(Area(*box), turn).left
    if not any(ink):
        return [(-math.inf, math.inf)]
    wide = math.ceil(GAP * max(word.line.height for word in words) / COARSE)
    if words[0].slanted or bytes(min(wide, len(ink) + 1)) not in ink:  # as most are
        return []
    return [
        ((begin + start) * COARSE if start else -math.inf, (begin + end) * COARSE if end < len(ink) else math.inf)
        for start, end in map(re.Match.span, _EMPTY.finditer(ink))
        if end - start >= wide
    ]


def _projection(mask: Image.Image, axis: int) -> bytes:
    """Return for each column (axis 0) or row (1) 0 if all of it is black."""
    if mask.size[1 - axis] > 500:  # of so many pixels with a single white one, the mean may be 0
        return bytes(mask.getprojection()[axis])
    return mask.reduce((mask.width, 1) if axis else (1, mask.height)).tobytes()  # in half the time


def _strip(words: Sequence[_Word], across: float, image: Image.Image) -> tuple[int, int, int, int]:
    """Return where on a coarse drawing the ink of a run may be.

    It may be so far above and below the line, as a multiple of its height: fonts may lie.
    """
    area = around([area for word in words for area in ((word.ink, word.line) if across else (word.ink,))])
    if across:
        more = across * max(word.line.height for word in words)
        area = area._replace(top=area.top - more, bottom=area.bottom + more)
    return _box(turned(area, -words[0].turn), COARSE, image)


def _box(area: Area, unit: float, image: Image.Image, more: int = MARGIN) -> tuple[int, int, int, int]:
    """Return where an area is on an image whose pixels are so many of the page's image, with more pixels around it."""
    sides = image.size * 2
    edges = [min(max(edge / unit, -side), 2 * side) for edge, side in zip(area, sides, strict=True)]  # PDFium may err
    left, top = math.floor(edges[0]) - more, math.floor(edges[1]) - more
    return left, top, math.ceil(edges[2]) + more, math.ceil(edges[3]) + more


def _difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Return the pixels in which two drawings differ in any colour."""
    bands = ImageChops.difference(one, other).split()[:3]  # the fourth is padding
    return reduce(ImageChops.lighter, bands).point(_from(VISIBLE))


def _draw(page: Any, scale: float, box: Sequence[int] | None = None) -> Image.Image:
    """Draw a page coarsely: all of it in grey, or in colour what of a box is on that drawing, at least a pixel."""
    scale /= COARSE
    crop = [0.0, 0.0, 0.0, 0.0]
    if box:
        width, height = (math.ceil(side * scale) for side in page.get_size())
        edges = zip((box[0], height - box[3], width - box[2], box[1]), (width, height) * 2, strict=True)
        crop = [max(0.0, min(edge, side - 1) - 0.5) / scale for edge, side in edges]  # it is rounded up to pixels
    # Pillow takes pixels in this order as they are.
    bitmap = page.render(scale=scale, crop=crop, grayscale=not box, prefer_bgrx=True, rev_byteorder=True)
    image: Image.Image = bitmap.to_pil()
    return image


def _from(level: int) -> list[int]:
    """A table that makes pixels of this level and above white, all others black."""
    return [0] * level + [255] * (256 - level)


def _unread(seen: Image.Image, without: Image.Image) -> float:
    """Count the patches on which there is something, but no text that can be seen."""
    if not ImageChops.invert(without).getbbox():  # a white page
        return 0.0
    histogram = without.histogram()
    background = histogram.index(max(histogram))
    rest = without.point([255 * (abs(level - background) >= images.BLANK_SPREAD) for level in range(256)])
    text, other = (_patches(mask) for mask in (seen, rest))
    read = text.histogram()[255]
    unread = ImageChops.subtract(other, text).histogram()[255]
    return unread / (read + unread) if unread else 0.0


def _patches(mask: Image.Image) -> Image.Image:
    # The mean of a patch with a single white pixel is 2 of 255.
    return mask.reduce(PATCH).point(_from(1))


def _is_seen(text: Any) -> bool:
    left, bottom, right, top = (ctypes.c_float() for _ in range(4))
    FAST.FPDFPageObj_GetBounds(text, *map(ctypes.byref, (left, bottom, right, top)))
    has_area = right.value > left.value and top.value > bottom.value  # which spaces lack
    return has_area and FAST.FPDFTextObj_GetTextRenderMode(text) not in _HIDDEN_MODES


def _count_fields(page: Any) -> int:
    found = 0
    for annotation, kind in documents.annotations_of(page):
        if kind in _SAID or raw.FPDFAnnot_GetFlags(annotation) & _UNSEEN:
            continue
        # The length is in bytes of UTF-16, with a NUL behind it.
        typed = -kind in _TEXT_FIELDS and raw.FPDFAnnot_GetFormFieldValue(page.formenv, annotation, None, 0) > 2
        shown = (
            what == raw.FPDF_PAGEOBJ_TEXT and _is_seen(one) for one, what, *_ in objects(annotation, place="Annot")
        )
        found += typed or kind == raw.FPDF_ANNOT_FREETEXT or any(shown)
    return found


BUILD: Final = f"PDFium {pypdfium2.PDFIUM_INFO.build}"
"""What reads the text layer."""
