from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from support import pdf_of

from dots_ocr_client import InputError, documents


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_a_path_its_text_bytes_and_an_image_are_the_same_page(sheet: Image.Image, sheet_file: Path) -> None:
    for document in (sheet_file, str(sheet_file), sheet_file.read_bytes(), sheet):
        (page,) = documents.load(document)
        assert (page.number, page.image.tobytes()) == (1, sheet.tobytes())


def test_a_pdf_page_is_drawn_at_200_dpi_to_the_pixel() -> None:
    (page,) = documents.load(pdf_of((282.24, 80.64)))
    assert (page.image.size, page.image.mode) == ((784, 224), "RGB")


def test_a_picture_inside_a_pdf_is_drawn_on_white(sheet: Image.Image) -> None:
    (page,) = documents.load(encode(sheet, "PDF", resolution=200))
    assert page.image.size == sheet.size
    assert page.image.getpixel((0, 0)) == (255, 255, 255)
    assert page.image.convert("L").getextrema()[0] < 60  # type: ignore[operator]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"])
def test_every_promised_format_is_read(format: str, sheet: Image.Image) -> None:
    (page,) = documents.load(encode(sheet, format))
    assert page.image.size == sheet.size


@pytest.mark.parametrize(("format", "mode"), [("TIFF", "I;16"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("PNG", "LA")])
def test_unusual_pixels_survive_the_file(format: str, mode: str) -> None:
    white = Image.new("L", (40, 40), 255).convert(mode) if mode != "I;16" else Image.new(mode, (40, 40), 65535)
    (page,) = documents.load(encode(white, format))
    assert page.image.getpixel((20, 20)) == (255, 255, 255)


def test_the_callers_image_stays_open_and_unchanged(sheet: Image.Image) -> None:
    before = sheet.tobytes()
    documents.load(sheet)
    assert sheet.tobytes() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither a PDF nor an image"),
        (b"hello", "neither a PDF nor an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "neither a PDF nor an image"),
        (encode(Image.effect_noise((200, 200), 90), "PNG")[:9000], "cannot be decoded"),
        (b"%PDF-1.7 rubbish", "broken or encrypted"),
        (pdf_of((100, 100), (100, 100)), "has 2 pages.*split it"),
        (pdf_of((14_000, 14_000)), "lower resolution"),
        (encode(Image.new("L", (2000, 10)), "PNG"), "too narrow"),
        (encode(Image.new("F", (40, 40)), "TIFF"), "floating-point"),
        (
            encode(Image.new("1", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("1", (9, 9))]),
            "has 2 pages.*split it",
        ),
    ],
)
def test_bad_documents_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        documents.load(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 9_000)])
def test_a_decompression_bomb_is_bad_input(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"too large|lower resolution"):
        documents.load(encode(Image.new("1", size), "PNG"))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(documents.MAX_FILE_BYTES + 1)
    with pytest.raises(InputError, match="save it smaller"):
        documents.load(path)


@pytest.mark.parametrize("name", ["missing.png", ".", "pipe", "nul\0byte"])
def test_what_is_not_a_file_is_bad_input(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"cannot read|not a regular file"):
        documents.load(tmp_path / name)
