"""The text layer of a PDF's page: what it says, where, and how much of the page it accounts for.

A text layer need not be what the page shows: it may be the OCR of a scan, a stamp on one, or letters of a font that
does not say what they mean. So the page is drawn twice, with its text and without: what then differs is text that can
be seen, and what is left is what the layer does not say.
"""

from __future__ import annotations

import ctypes
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import pypdfium2
from PIL import Image, ImageChops
from pypdfium2 import raw

from . import documents, images
from .documents import PageReference

MAX_CHARACTERS: Final = 100_000
"""Our own limit; a densely printed A4 page has about 6,000."""
GAP: Final = 0.8
"""Space between two characters from which on they are in different runs, as a multiple of the font's height (our own
choice: wider than the spaces of justified text, narrower than the one between columns)."""
COARSE: Final = 3
"""The two drawings are so many times smaller than the page's own image, that is, at 67 dpi (our own choice: even the
dot of an i leaves a trace)."""
VISIBLE: Final = 8
"""Grey levels (of 255) by which a character changes the page if it can be seen (our own choice: the two drawings are
made alike, so that there is no noise, and no reader can tell less apart)."""
PATCH: Final = 8
"""Side of the patches in which a page is counted, in pixels of the coarse drawing: 3 mm, about the height of a line
(our own choice). Counted in pixels, a single dark photograph would outweigh a page of text."""
SLANT: Final = math.radians(5)
"""Text further than this from a multiple of 90 degrees is slanted, as watermarks are (our own choice)."""

_TEXT_FIELDS: Final = (raw.FPDF_FORMFIELD_TEXTFIELD, raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX)
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


@dataclass(frozen=True, slots=True)
class Run:
    """Characters one behind the other, without a gap in which a column could begin.

    Attributes:
        text: What they say; U+FFFD stands for those of which the PDF does not say what they mean.
        ink: The area of the characters themselves.
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
        characters: In all runs, without white space.
        garbled: Those of them of which the PDF does not say what they mean.
        hidden: Characters of the layer that cannot be seen; they are in no run.
        slanted: Characters that run neither along nor across the page; they are in no run.
        unread: Part of the patches with anything on them that have no text of the layer, from 0 to 1.
        fields: Form fields with something typed in, and text notes: what they say is not in the layer.
        beside: What else is on the page, as `documents.beside_text` says it.
    """

    runs: tuple[Run, ...]
    characters: int
    garbled: int
    hidden: int
    slanted: int
    unread: float
    fields: int
    beside: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the text layer of which `dataclasses.asdict` made these values, also if they went through JSON."""
        runs = tuple(Run(run["text"], Area(*run["ink"]), Area(*run["line"]), run["turn"]) for run in values["runs"])
        return cls(**{**values, "runs": runs, "beside": tuple(map(str, values["beside"]))})


class _Glyph(NamedTuple):
    text: str
    ink: Area
    line: Area
    turn: int
    drawn: bool
    slanted: bool


def turned(area: Area, turn: int) -> Area:
    """Return where an area is once the page has been turned so that text of that turn is upright.

    The origin stays, so coordinates may become negative. The way back are the other ``4 - turn`` quarter turns.
    """
    for _ in range(turn % 4):
        area = Area(area.top, -area.right, area.bottom, -area.left)
    return area


def around(areas: Sequence[Area]) -> Area:
    """Return the smallest area with all of these inside; there must be one."""
    left, top, right, bottom = zip(*areas, strict=True)
    return Area(min(left), min(top), max(right), max(bottom))


def read(reference: PageReference) -> TextLayer:
    """Read the text layer of a PDF's page. This blocks, and is for a process of its own; see `rasterizer`.

    Raises:
        InputError: The page is broken, or has more than `MAX_CHARACTERS`.
    """
    with documents.open_page(reference, "read") as (page, scale):
        textpage = page.get_textpage()
        try:
            glyphs = list(_glyphs(page, textpage, scale))
        finally:
            textpage.close()
        fields, beside = _count_fields(page), documents.beside_text(page)
        with_text = _draw(page, scale)
        for text in page.get_objects(filter=[raw.FPDF_PAGEOBJ_TEXT]):
            raw.FPDFTextObj_SetTextRenderMode(text, raw.FPDF_TEXTRENDERMODE_INVISIBLE)
        without = _draw(page, scale)
    seen = ImageChops.difference(with_text, without).point(_from(VISIBLE))
    kept: list[_Glyph | None] = []
    hidden = slanted = 0
    for glyph in glyphs:
        if glyph is None or glyph.text == " ":
            kept.append(glyph)
        elif not (glyph.drawn and _shows(seen, glyph.ink)):
            hidden += 1
        elif glyph.slanted:
            slanted += 1
        else:
            kept.append(glyph)
    runs = tuple(_runs(kept))
    texts = ["".join(run.text.split()) for run in runs]
    return TextLayer(
        runs=runs,
        characters=sum(map(len, texts)),
        garbled=sum(text.count("\ufffd") for text in texts),
        hidden=hidden,
        slanted=slanted,
        unread=_unread(seen, without),
        fields=fields,
        beside=beside,
    )


def _glyphs(page: Any, textpage: Any, scale: float) -> Iterator[_Glyph | None]:
    """Yield the characters in the order of the file, and nothing at all where PDFium begins another line."""
    count = textpage.count_chars()
    if count > MAX_CHARACTERS:
        raise ValueError(f"its text layer has more than {MAX_CHARACTERS} characters")
    edges = raw.FS_RECTF()
    if not raw.FPDF_GetPageBoundingBox(page, edges):
        raise ValueError("it has no bounding box")
    quarters = page.get_rotation() // 90
    whole = turned(Area(edges.left, -edges.top, edges.right, -edges.bottom), -quarters)

    def place(left: float, bottom: float, right: float, top: float) -> Area:
        area = turned(Area(left, -top, right, -bottom), -quarters)
        return Area(*((value - whole[side % 2]) * scale for side, value in enumerate(area)))

    left, bottom, right, top = (ctypes.c_double() for _ in range(4))
    loose = raw.FS_RECTF()
    for index in range(count):
        text = _character(textpage, index)
        if text in ("\r", "\n"):
            yield None
            continue
        raw.FPDFText_GetCharBox(textpage, index, left, right, bottom, top)
        raw.FPDFText_GetLooseCharBox(textpage, index, loose)
        angle = raw.FPDFText_GetCharAngle(textpage, index) + quarters * math.pi / 2
        turn = round(angle / (math.pi / 2))
        owner = raw.FPDFText_GetTextObject(textpage, index)
        yield _Glyph(
            text,
            place(left.value, bottom.value, right.value, top.value),
            place(loose.left, loose.bottom, loose.right, loose.top),
            turn % 4,
            drawn=bool(owner) and raw.FPDFTextObj_GetTextRenderMode(owner) not in _HIDDEN_MODES,
            slanted=abs(angle - turn * math.pi / 2) > SLANT,
        )


def _character(textpage: Any, index: int) -> str:
    """Return one character: a space for white space of any width, U+FFFD for one without a meaning."""
    code = raw.FPDFText_GetUnicode(textpage, index)
    if raw.FPDFText_IsHyphen(textpage, index) == 1 or code == 0xAD:  # at the end of a line; PDFium makes it U+0002
        return "-"
    if code > 0x10FFFF or raw.FPDFText_HasUnicodeMapError(textpage, index) == 1:
        return "\ufffd"
    text = chr(code)
    if text in ("\r", "\n"):
        return text
    if text.isspace():
        return " "
    # Control, private use, surrogate, unassigned. Formatting characters (Cf), such as joiners, have a meaning.
    return "\ufffd" if unicodedata.category(text) in ("Cc", "Co", "Cs", "Cn") else text


def _runs(glyphs: Iterable[_Glyph | None]) -> Iterator[Run]:
    text, space = "", False
    ink = line = Area(0, 0, 0, 0)  # both turned upright
    turn = 0
    for glyph in glyphs:
        if glyph is None or glyph.text == " ":
            space = True
            if glyph is None and text:
                yield Run(text, turned(ink, -turn), turned(line, -turn), turn)
                text = ""
            continue
        new_ink, new_line = turned(glyph.ink, glyph.turn), _full_height(glyph)
        if text and (glyph.turn != turn or not _continues(line, new_line)):
            yield Run(text, turned(ink, -turn), turned(line, -turn), turn)
            text = ""
        if text:
            text += " " + glyph.text if space else glyph.text
            ink, line = around([ink, new_ink]), around([line, new_line])
        else:
            text, ink, line, turn = glyph.text, new_ink, new_line, glyph.turn
        space = False
    if text:
        yield Run(text, turned(ink, -turn), turned(line, -turn), turn)


def _full_height(glyph: _Glyph) -> Area:
    """Return the area with the font's height, turned upright; at least a pixel high, whatever the font says."""
    line, ink = turned(glyph.line, glyph.turn), turned(glyph.ink, glyph.turn)
    top, bottom = (line.top, line.bottom) if line.top < line.bottom else (ink.top, ink.bottom)
    return Area(line.left, top, line.right, max(bottom, top + 1))


def _continues(line: Area, more: Area) -> bool:
    height = min(line.bottom - line.top, more.bottom - more.top)
    overlap = min(line.bottom, more.bottom) - max(line.top, more.top)
    return overlap > height / 2 and -height <= more.left - line.right <= GAP * height


def _draw(page: Any, scale: float) -> Image.Image:
    image: Image.Image = page.render(scale=scale / COARSE, grayscale=True).to_pil()
    return image.copy()  # its pixels are PDFium's


def _from(level: int) -> list[int]:
    """A table that makes pixels of this level and above white, all others black."""
    return [0] * level + [255] * (256 - level)


def _shows(seen: Image.Image, ink: Area) -> bool:
    left, top = (max(0, math.floor(value / COARSE)) for value in ink[:2])
    right, bottom = (math.ceil(value / COARSE) for value in ink[2:])
    if left >= seen.width or top >= seen.height or right <= 0 or bottom <= 0:
        return False
    area = (left, top, min(max(right, left + 1), seen.width), min(max(bottom, top + 1), seen.height))
    return seen.crop(area).getbbox() is not None


def _unread(seen: Image.Image, without: Image.Image) -> float:
    """Count the patches on which there is something, but no text that can be seen."""
    histogram = without.histogram()
    background = histogram.index(max(histogram))
    rest = ImageChops.difference(without, Image.new("L", without.size, background)).point(_from(images.BLANK_SPREAD))
    text, other = (_patches(mask) for mask in (seen, rest))
    read = text.histogram()[255]
    unread = ImageChops.subtract(other, text).histogram()[255]
    return unread / (read + unread) if unread else 0.0


def _patches(mask: Image.Image) -> Image.Image:
    # The mean of a patch with a single white pixel is 4 of 255.
    return mask.reduce(PATCH).point(_from(1))


def _count_fields(page: Any) -> int:
    found = 0
    for annotation, kind in documents.annotations_of(page):
        if -kind in _TEXT_FIELDS:  # the length is in bytes of UTF-16, with a NUL behind it
            found += raw.FPDFAnnot_GetFormFieldValue(page.formenv, annotation, None, 0) > 2
        found += kind == raw.FPDF_ANNOT_FREETEXT
    return found


BUILD: Final = f"PDFium {pypdfium2.PDFIUM_INFO.build}"
"""What reads the text layer."""
