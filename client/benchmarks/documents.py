"""Documents of any number of A4 pages: printed text, or a scan."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

A4 = (595, 842)  # points
A6 = (298, 420)
LINES = 52


def write_text_pdf(file: Path, pages: int, size: tuple[int, int] = A4) -> None:
    """Write a PDF of printed pages, each with its number and text from edge to edge."""
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    _write(file, pages, size, _text, f"<< /Font << /F {_shared_id(pages)} 0 R >> >>", font)


def write_scan_pdf(file: Path, pages: int) -> None:
    """Write a PDF whose pages show the same scanned sheet: A4 at 200 dpi, slightly turned, with noise."""
    sheet = Image.new("L", (1654, 2339), 235)
    draw = ImageDraw.Draw(sheet)
    for line in range(LINES):
        draw.text((140, 120 + 40 * line), _sentence(0, line), 30, font=ImageFont.load_default(28))
    sheet = sheet.rotate(0.7, Image.Resampling.BICUBIC, fillcolor=235)
    noise = Image.effect_noise(sheet.size, 24)
    sheet = Image.blend(sheet, noise, 0.12).filter(ImageFilter.GaussianBlur(0.6)).convert("RGB")
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    picture = (
        f"<< /Type /XObject /Subtype /Image /Width {sheet.width} /Height {sheet.height} /ColorSpace /DeviceRGB"
        f" /BitsPerComponent 8 /Filter /DCTDecode /Length {len(buffer.getvalue())} >>\nstream\n"
    ).encode()
    _write(
        file,
        pages,
        A4,
        lambda page: b"q %d 0 0 %d 0 0 cm /F Do Q" % A4,
        f"<< /XObject << /F {_shared_id(pages)} 0 R >> >>",
        picture + buffer.getvalue() + b"\nendstream",
    )


def write_images(folder: Path, count: int) -> None:
    """Write small PNG files, each a few printed lines with its number."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (784, 224), "white")
        draw = ImageDraw.Draw(image)
        for line in range(4):
            draw.text((20, 15 + 50 * line), _sentence(number, line), "black", font=ImageFont.load_default(18))
        image.save(folder / f"{number:04d}.png")


def _sentence(page: int, line: int) -> str:
    return (
        f"{page:5d}.{line:02d}  The quick brown fox jumps over the lazy dog, {page * 7919 + line * 104729:09d} times."
    )


def _text(page: int) -> bytes:
    lines = "\n".join(f"({_sentence(page, line)}) Tj T*" for line in range(LINES))
    return f"BT /F 11 Tf 14.5 TL 50 790 Td\n{lines}\nET".encode()


def _shared_id(pages: int) -> int:
    return 3 + 2 * pages


def _write(
    file: Path, pages: int, size: tuple[int, int], content: Callable[[int], bytes], resources: str, shared: bytes
) -> None:
    """Write a PDF whose pages have a content each, and one object in common."""

    def objects() -> Iterator[bytes]:
        yield b"<< /Type /Catalog /Pages 2 0 R >>"
        kids = " ".join(f"{3 + 2 * page} 0 R" for page in range(pages))
        yield f"<< /Type /Pages /Count {pages} /Kids [{kids}] >>".encode()
        for page in range(pages):
            yield (
                f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Resources {resources}"
                f" /Contents {4 + 2 * page} 0 R >>"
            ).encode()
            stream = content(page)
            yield b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream)
        yield shared

    with file.open("wb") as pdf:
        pdf.write(b"%PDF-1.4\n")
        offsets = []
        for number, body in enumerate(objects(), start=1):
            offsets.append(pdf.tell())
            pdf.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
        start = pdf.tell()
        pdf.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(offsets) + 1))
        pdf.writelines(b"%010d 00000 n \n" % offset for offset in offsets)
        pdf.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(offsets) + 1, start))
