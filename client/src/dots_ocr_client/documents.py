"""Files, bytes and images into page images, within limits."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pypdfium2
from PIL import Image, UnidentifiedImageError

from . import images
from .errors import InputError

PDF_DPI: Final = 200
"""Resolution at which PDF pages are drawn, as in dots.ocr's own client."""
MAX_FILE_BYTES: Final = 256 * 2**20
"""Our own limit: an uncompressed page of `MAX_PAGE_PIXELS` in RGB takes just this much."""
MAX_PAGE_PIXELS: Final = 89_478_485
"""Pillow's threshold for a decompression bomb: 1/4 GiB of RGB, or an A3 page at 680 dpi."""
FORMATS: Final = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may open. Its other readers are rarely used, and one of them starts Ghostscript."""

# PDFium must not be entered by two threads at once, not even for different documents.
_pdfium = threading.Lock()

Source = str | os.PathLike[str] | bytes | Image.Image


@dataclass(frozen=True, slots=True)
class PageImage:
    """One page as it is given to an engine.

    Attributes:
        number: Counted from 1.
        image: Upright, 8-bit RGB, at the document's own resolution (a PDF's page at 200 dpi).
    """

    number: int
    image: Image.Image


def describe(document: Source) -> str:
    """Name a document for results and messages."""
    if isinstance(document, bytes):
        return "<bytes>"
    return "<image>" if isinstance(document, Image.Image) else os.fspath(document)


def load(document: Source) -> list[PageImage]:
    """Load the page of a document.

    Args:
        document: Path of an image or a PDF, the bytes of one, or a PIL image (its current frame).

    Raises:
        InputError: It does not exist, is broken, encrypted, too large, of an unknown kind, or has several pages.
    """
    name = describe(document)
    if isinstance(document, Image.Image):
        return [_page(document, name)]
    data = document if isinstance(document, bytes) else _read_file(Path(document))
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{name} is larger than {MAX_FILE_BYTES} bytes: save it smaller")
    if b"%PDF-" in data[:1024]:  # PDF readers accept some rubbish in front
        return [_page(_draw_pdf(data, name), name)]
    return [_page(_open_image(data, name), name)]


def _read_file(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file: give the path of an image or a PDF")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _page(image: Image.Image, name: str) -> PageImage:
    _check_pixels(image.width, image.height, name)
    try:
        images.smart_resize(*image.size)
        return PageImage(1, images.to_rgb(image))
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise InputError(f"{name} cannot be decoded: {error or type(error).__name__}") from error


def _check_pixels(width: float, height: float, name: str) -> None:
    if width * height > MAX_PAGE_PIXELS:
        raise InputError(
            f"{name} has {width:.0f} x {height:.0f} px, more than {MAX_PAGE_PIXELS} in all: "
            "scan it at a lower resolution, or cut it into pieces"
        )


def _open_image(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large to be one page: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is neither a PDF nor an image of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # see _page
        raise InputError(f"{name} cannot be opened: {error or type(error).__name__}") from error
    frames = getattr(image, "n_frames", 1)
    # MPO is a photograph with previews behind it: phones write it under the name of JPEG.
    if frames > 1 and image.format != "MPO":
        raise InputError(f"{name} has {frames} pages; only one can be read: split it, and read the pages one by one")
    return image


def _draw_pdf(data: bytes, name: str) -> Image.Image:
    with _pdfium:
        try:
            pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            raise InputError(f"{name} is a broken or encrypted PDF: repair it or remove the password") from error
        try:
            if len(pdf) != 1:
                raise InputError(
                    f"{name} has {len(pdf)} pages; only one can be read: split it, and read the pages one by one"
                )
            pdf.init_forms()  # otherwise what was typed into a form is left out
            page = pdf[0]
            # PDFium stores sizes in single precision and pypdfium2 rounds up, so 784.0000001 would become 785 pixels.
            scale = PDF_DPI / 72 * (1 - 1e-6)
            width, height = page.get_size()
            _check_pixels(width * scale, height * scale, name)
            image: Image.Image = page.render(scale=scale).to_pil()
            return image.convert("RGB")
        except pypdfium2.PdfiumError as error:
            raise InputError(f"{name} has a page that cannot be drawn: repair the PDF, or give an image") from error
        finally:
            pdf.close()
