"""At which resolution a page of a PDF loses nothing: its images, its smallest type and its unit say so."""

from __future__ import annotations

import ctypes
import io
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pypdfium2
from pypdfium2 import raw

from . import images

PDF_DPI: Final = 200  # resolution at which pages are drawn that hold nothing finer, as in dots.ocr's own client
# The finest at which a page is drawn for its images (our own choice: at more, OCR reads no better).
SCAN_DPI: Final = 300
# Up to here a page without text is drawn finer, as a scan can be on a page of any size (our own choice: A4 at 300).
SCAN_PIXELS: Final = 9_000_000
# Type of this size can be read at `PDF_DPI` (our own choice: an x has 7 pixels); smaller type is drawn as large.
TYPE_POINTS: Final = 5
# Small type counts from this length, as a multiple of its size (our own choice: 20 letters, not a footnote's mark).
TYPE_LENGTH: Final = 10
MAX_OBJECTS: Final = 5_000  # of a page that are looked at. Our own limit: drawings have millions
# Of a PDF whose pages are asked for their unit. Our own limit: it takes a copy of all that a page refers to.
MAX_UNIT_BYTES: Final = 16 * 2**20

_HIDDEN_MODES: Final = (raw.FPDF_TEXTRENDERMODE_INVISIBLE, raw.FPDF_TEXTRENDERMODE_CLIP)
_Matrix = tuple[float, float, float, float]
_Weighed = list[tuple[float, float]]


class _Pointer(ctypes.c_void_p):
    """A type of its own, so that ctypes makes no number of it."""


class _Fast:
    """PDFium's functions without the checks of ctypes, which take longer: give them only `ctypes` objects and ints."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(raw, name)
        result = _Pointer if hasattr(function.restype, "contents") else function.restype
        setattr(self, name, ctypes.PYFUNCTYPE(result)(ctypes.cast(function, ctypes.c_void_p).value or 0))
        return getattr(self, name)


FAST: Final = _Fast()


class Resolution(NamedTuple):
    """How large a page is drawn: in pixels per unit of the page, per inch, and per inch without the model's limit."""

    scale: float
    dpi: int
    wanted: int


def choose(page: Any, number: int, file_bytes: int, dpi: int | None = None) -> Resolution:
    """Choose how large a page, of type `pypdfium2.PdfPage`, is drawn: at ``dpi``, or as what it holds needs."""
    width, height = page.get_size()
    unit = _unit(page, number) if file_bytes <= MAX_UNIT_BYTES else 1.0
    wanted = (dpi or PDF_DPI) / 72 * unit
    scale = limited(width, height, wanted)
    if dpi is None:
        area = width * height
        pictures, small, shows_text = _look(page, TYPE_POINTS / unit)
        most = SCAN_DPI / 72 * unit
        if not shows_text:
            most = max(most, math.sqrt(SCAN_PIXELS / area))
        wanted = max(wanted, min(_first(sorted(pictures, reverse=True), area / 2), most))
        if smallest := _first(sorted(small), TYPE_LENGTH):
            wanted = max(wanted, PDF_DPI / 72 * TYPE_POINTS / smallest)
        scale = limited(width, height, wanted)
    return Resolution(scale, round(scale * 72 / unit), round(wanted * 72 / unit))


def limited(width: float, height: float, scale: float) -> float:
    """Return pixels per unit: as many as are wanted, or fewer for a page that would be larger than the model takes."""
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"a page of {width} x {height} points has no area")
    # PDFium stores sizes in single precision and pypdfium2 rounds up, so 784.0000001 would become 785 pixels.
    scale *= 1 - 1e-6
    if math.ceil(width * scale) * math.ceil(height * scale) > images.MAX_PIXELS:
        # Rounded up, the sides are less than (width * scale + 1) and (height * scale + 1): solve for their product.
        half = (width + height) / 2
        area = width * height
        scale = (math.sqrt(half**2 + area * (images.MAX_PIXELS - 1)) - half) / area
    images.smart_resize(math.ceil(width * scale), math.ceil(height * scale))
    return scale


def _unit(page: Any, number: int) -> float:
    """Return the size of a page's unit in points: its UserUnit, which PDFium neither heeds nor tells, but copies."""
    copy, buffer = pypdfium2.PdfDocument.new(), io.BytesIO()
    try:
        copy.import_pages(page.pdf, [number - 1])
        copy.save(buffer)
    except pypdfium2.PdfiumError:  # which need not keep it from being drawn
        return 1.0
    finally:
        copy.close()
    # PDFium writes a dictionary in the order of its keys, and the page that was asked for before any other.
    found = re.search(rb"/Type/Page(?!s)(?:/UserUnit (\d{1,9}\.?\d{0,9})\b(?! \d+ R))?", buffer.getvalue())
    return max(1.0, float(found[1])) if found and found[1] else 1.0


def _look(page: Any, small: float) -> tuple[_Weighed, _Weighed, bool]:
    """Find out what a page holds.

    Returns:
        Of images the pixels per unit and the area; of type below ``small`` units the size and the length as a multiple
        of it; whether there is text to be seen.
    """
    pictures, types, text = [], [], False
    size, left, bottom, right, top = (ctypes.c_float() for _ in range(5))
    wide, high = ctypes.c_uint(), ctypes.c_uint()
    edges = [ctypes.byref(edge) for edge in (left, bottom, right, top)]
    for one, kind, grow, (a, b, c, d) in itertools.islice(objects(page.raw), MAX_OBJECTS):
        across, up = math.hypot(a, b), math.hypot(c, d)
        if kind == raw.FPDF_PAGEOBJ_IMAGE:
            FAST.FPDFImageObj_GetImagePixelSize(one, ctypes.byref(wide), ctypes.byref(high))
            if across and up:
                pictures.append((max(wide.value / across, high.value / up), abs(a * d - b * c)))
            continue
        if kind != raw.FPDF_PAGEOBJ_TEXT:
            continue
        FAST.FPDFTextObj_GetFontSize(one, ctypes.byref(size))
        is_small = size.value * up < small
        if (is_small or not text) and FAST.FPDFTextObj_GetTextRenderMode(one) not in _HIDDEN_MODES:
            text = True
            if is_small and FAST.FPDFPageObj_GetBounds(one, *edges):
                sides = (right.value - left.value) * grow, (top.value - bottom.value) * grow
                length, height = sides if abs(a) >= abs(b) else sides[::-1]
                # A font may say that its size is 1 and have large letters.
                if small / 50 < (real := max(size.value * up, height)) < small:
                    types.append((real, length / real))
    return pictures, types, text


def objects(
    holder: Any, outer: _Matrix = (1, 0, 0, 1), place: str = "Page"
) -> Iterator[tuple[Any, int, float, _Matrix]]:
    """Yield what a page draws, also in groups: the object, its kind, how much its group is enlarged, its matrix.

    Of a path, of which drawings have many, it is the matrix of its group.
    """
    a, b, c, d = outer
    own, grow = raw.FS_MATRIX(), math.sqrt(abs(a * d - b * c))
    name = "GetObjectCount" if place == "Annot" else "CountObjects"
    count, get = getattr(FAST, f"FPDF{place}_{name}"), getattr(FAST, f"FPDF{place}_GetObject")
    for index in range(count(holder)):
        one = get(holder, index)
        inner = outer
        if (kind := FAST.FPDFPageObj_GetType(one)) != raw.FPDF_PAGEOBJ_PATH:
            FAST.FPDFPageObj_GetMatrix(one, ctypes.byref(own))
            inner = own.a * a + own.b * c, own.a * b + own.b * d, own.c * a + own.d * c, own.c * b + own.d * d
        if kind == raw.FPDF_PAGEOBJ_FORM:
            yield from objects(one, inner, "FormObj")
        else:
            yield one, kind, grow, inner


def _first(found: _Weighed, enough: float) -> float:
    """Return the first value for which its weight and those before it are enough; 0 if they never are."""
    for value, weight in found:
        enough -= weight
        if enough <= 0:
            return value
    return 0.0
