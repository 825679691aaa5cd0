from __future__ import annotations

import base64
import io
import math
import os
import pickle
import random
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pypdfium2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from support import encrypted_pdf, jpeg_of_scans, pdf_of

from dots_ocr_client import InputError
from dots_ocr_client.pages import documents, images, pdf_resolution, rasterizer
from dots_ocr_client.pages.documents import PageImage, Source, draw, open_document

FORMATS = documents.FORMATS
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def frames(format: str, count: int = 3) -> bytes:
    """A file of several frames, each a little wider than the one before."""
    all_frames = [Image.new("RGB", (60 + number, 60), "white") for number in range(1, count + 1)]
    if format != "TIFF":  # the frames of an animation have one size
        all_frames = [Image.new("RGB", (60, 60), color) for color in ("red", "lime", "blue")]
    return encode(all_frames[0], format, save_all=True, append_images=all_frames[1:])


HELVETICA = b"/Type /Font /Subtype /Type1 /BaseFont /Helvetica"


def raw_pdf(
    content: str = "", *, size: tuple[int, int] = (72, 72), image: str = "", data: bytes = b"", page: str = ""
) -> bytes:
    """A PDF of one page written by hand; PDFium finds the objects without a table of them."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %d %d] /Contents 4 0 R" % size
        + b" /Resources << /XObject << /I 5 0 R >> /Font << /F << %s >> >> >> %s >>" % (HELVETICA, page.encode()),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content.encode()),
        b"<< /Type /XObject /Subtype /Image %s /Length %d >>\nstream\n" % (image.encode(), len(data))
        + data
        + b"\nendstream",
    ]
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, text) for number, text in enumerate(objects, 1))
    return b"%PDF-1.4\n" + body + b"trailer << /Root 1 0 R /Size 6 >>\n%%EOF"


def scan_pdf(width: int, height: int, size: tuple[int, int], more: str = "", place: str = "") -> bytes:
    """A page with a black picture of so many pixels, by default all over it."""
    values = f"/Width {width} /Height {height} /ColorSpace /DeviceGray /BitsPerComponent 8 /Filter /FlateDecode"
    content = f"q {place or f'{size[0]} 0 0 {size[1]} 0 0'} cm /I Do Q {more}"
    return raw_pdf(content, size=size, image=values, data=zlib.compress(bytes(width * height), 1))


def typed(size: float, matrix: str = "1 0 0 1 72 72", text: str = "Total due: 241.85 euros") -> str:
    return f"BT /F {size} Tf {matrix} Tm ({text}) Tj ET "


def read_all(source: Source, pages: str | None = None) -> list[PageImage]:
    with open_document(source, pages) as document:
        return [draw(document.reference(number)) for number in document.numbers]


# Sources


def test_every_kind_of_source_gives_the_same_page(sheet: Image.Image, sheet_file: Path) -> None:
    data = sheet_file.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (sheet_file, str(sheet_file), data, io.BytesIO(data), url, f"data:,{quote(data)}", sheet):
        (page,) = read_all(source)
        assert (page.number, page.image.tobytes()) == (1, sheet.tobytes())


def test_every_kind_of_source_gives_the_same_pdf(tmp_path: Path) -> None:
    data = pdf_of((144, 72), (72, 144))
    path = tmp_path / "two.pdf"
    path.write_bytes(data)
    url = "data:application/pdf;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, io.BytesIO(data), url):
        assert [(page.width, page.height) for page in read_all(source)] == [(400, 200), (200, 400)]


def test_a_file_object_is_read_from_where_it_stands_and_stays_open() -> None:
    data = encode(Image.new("RGB", (60, 60), "red"), "PNG")
    file = io.BytesIO(b"rubbish" + data)
    file.seek(7)
    assert read_all(file)[0].width == 60
    assert not file.closed


def test_a_text_file_object_is_bad_input(sheet_file: Path) -> None:
    with sheet_file.open(encoding="latin-1") as file, pytest.raises(InputError, match='open it with "rb"'):
        open_document(file)  # type: ignore[arg-type]


def test_names_say_what_the_source_was(sheet: Image.Image) -> None:
    sources: list[Source] = ["a.pdf", Path("a.pdf"), b"", io.BytesIO(), sheet, "data:,x"]
    names = ["a.pdf", "a.pdf", "<bytes>", "<file>", "<image>", "<data URL>"]
    assert [documents.describe(source) for source in sources] == names


def test_the_callers_image_stays_open_and_unchanged(sheet: Image.Image) -> None:
    before = sheet.tobytes()
    read_all(sheet)
    assert sheet.tobytes() == before


def test_temporary_files_are_private_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_document(io.BytesIO(pdf_of((72, 72), (72, 72)))) as document:
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="broken PDF"):
        open_document(io.BytesIO(b"%PDF-1.7 rubbish"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="cannot read page 1 of <file>"):
        draw(document.reference(1))


# Pages


@pytest.mark.parametrize(
    ("pages", "numbers"),
    [
        (None, (1, 2, 3, 4, 5)),
        ("2", (2,)),
        ("4-", (4, 5)),
        ("1-3,2,5", (1, 2, 3, 5)),
        (" 5 , 1 - 2 ", (1, 2, 5)),
        ([5, 1, 1], (1, 5)),
        (range(2, 4), (2, 3)),
    ],
)
def test_pages_can_be_chosen(pages: str | list[int] | None, numbers: tuple[int, ...]) -> None:
    with open_document(pdf_of(*[(72, 72)] * 5), pages) as document:
        assert (document.page_count, document.numbers) == (5, numbers)


@pytest.mark.parametrize(
    "pages", ["", "0", "6", "3-1", "-2", "1,,2", "1-9", "all", "٢", "1" * 5000, "9-\n", [0], [6], [-1], []]
)
def test_pages_that_do_not_exist_are_bad_input_that_says_how_many_there_are(pages: str | list[int]) -> None:
    with pytest.raises(InputError, match=r"<bytes> has 5 pages, counted from 1$"):
        open_document(pdf_of(*[(72, 72)] * 5), pages)


@pytest.mark.parametrize("pages", [None, "2-", "1-40000,50001-60001", range(1, 50_002)])
def test_of_a_pdf_that_says_it_has_a_million_pages_some_can_be_named(pages: str | range | None) -> None:
    million = raw_pdf().replace(b"/Count 1", b"/Count 1000000")
    with open_document(million, "1,999999-") as document:
        assert document.numbers == (1, 999_999, 1_000_000)
    with pytest.raises(InputError, match=r"more than 50000 pages are wanted: <bytes> has 1000000 pages.*Fix: name few"):
        open_document(million, pages)


@given(st.text("0123456789-, ", max_size=12) | st.text(max_size=5))
def test_any_page_range_is_understood_or_bad_input(pages: str) -> None:
    try:
        numbers = documents.parse_pages(pages, 20, "x")
    except InputError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert numbers == tuple(sorted(set(numbers)))
        assert set(numbers) <= set(range(1, 21))


def test_a_reference_is_small_and_can_be_drawn_after_pickling(tmp_path: Path) -> None:
    with open_document(pdf_of((72, 72), (144, 72))) as document:
        pickled = pickle.dumps(document.reference(2))
        assert len(pickled) < 1000
        assert draw(pickle.loads(pickled)) == draw(document.reference(2))
        with pytest.raises(ValueError, match="no page 3"):
            document.reference(3)


def test_files_are_drawn_in_other_processes(sheet: Image.Image) -> None:
    sources: list[Source] = [pdf_of((72, 72)), frames("TIFF"), frames("TIFF", 1), encode(sheet, "PNG"), sheet]
    apart = []
    for source in sources:
        with open_document(source) as document:
            apart.append(document.reference(1).in_process)
    assert apart == [True, True, True, True, False]


def test_a_file_that_changes_is_not_mixed_up(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_of((72, 72), (72, 72)))
    with open_document(path) as document:
        draw(document.reference(1))
        path.write_bytes(pdf_of((144, 144), (144, 144), (1, 1)))
        with pytest.raises(InputError, match=r"page 2 of .*a\.pdf.*has changed since"):
            draw(document.reference(2))
    assert read_all(path, "2")[0].width == 400


def test_a_relative_path_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf_of((72, 72)))
    monkeypatch.chdir(tmp_path)
    with open_document("a.pdf") as document:
        monkeypatch.chdir("/")
        assert (document.name, draw(document.reference(1)).width) == ("a.pdf", 200)


# PDF


def test_a_pdf_page_is_drawn_at_200_dpi_to_the_pixel() -> None:
    (page,) = read_all(pdf_of((282.24, 80.64)))
    assert (page.width, page.height, page.sent_width, page.sent_height) == (784, 224, 784, 224)
    assert page.warnings == ()


def test_a_picture_inside_a_pdf_is_drawn_on_white(sheet: Image.Image) -> None:
    (page,) = read_all(encode(sheet, "PDF", resolution=200))
    assert (page.image.size, page.image.mode) == (sheet.size, "RGB")
    assert page.image.getpixel((0, 0)) == WHITE
    assert page.image.convert("L").getextrema()[0] < 60  # type: ignore[operator]


def test_colours_of_a_pdf_are_not_swapped() -> None:
    (page,) = read_all(raw_pdf("1 0 0 rg 0 0 72 72 re f"))
    assert page.image.getpixel((99, 99)) == RED


@pytest.mark.parametrize(("side", "dpi"), [(1300, 186), (14_400, 17)])
def test_a_large_pdf_page_is_drawn_smaller_at_once_with_a_warning(side: int, dpi: int) -> None:
    (page,) = read_all(pdf_of((side, side)))
    assert (page.width, page.height) == (page.sent_width, page.sent_height)
    assert 0.998 * images.MAX_PIXELS < page.width * page.height <= images.MAX_PIXELS
    assert page.warnings == (f"the page was drawn at {dpi} dpi instead of 200, to keep the model's limits",)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_no_pdf_page_is_drawn_larger_than_the_model_accepts(width: float, height: float) -> None:
    try:
        scale = pdf_resolution.limited(width, height, 200 / 72)
    except ValueError:
        assert max(width, height) > 190 * min(width, height)
    else:
        assert math.ceil(width * scale) * math.ceil(height * scale) <= images.MAX_PIXELS


A4 = (595, 842)
NORMAL = typed(11, "1 0 0 1 72 500")


@pytest.mark.parametrize(
    ("data", "size", "dpi"),
    [
        (scan_pdf(2480, 3508, A4), (2480, 3510), 300),
        (scan_pdf(4960, 7016, A4), (2522, 3569), 305),  # finer than OCR has use for
        (scan_pdf(1240, 1754, A4), (1653, 2339), 200),
        (scan_pdf(2480, 3508, A4, typed(40)), (2480, 3509), 300),
        (scan_pdf(4960, 7016, A4, typed(40)), (2480, 3509), 300),
        (scan_pdf(2480, 3508, (144, 204)), (2480, 3514), 1240),  # its program wrote a wrong resolution
        (scan_pdf(2480, 3508, (144, 204), typed(1).replace("Tm", "Tm 3 Tr")), (2480, 3514), 1240),  # searchable
        (scan_pdf(1728, 1100, (612, 792)), (1728, 2237), 203),  # a fax: its pixels are no squares
        (scan_pdf(2480, 3508, (842, 595), place="0 595 -842 0 842 0"), (3510, 2480), 300),
        (scan_pdf(600, 600, A4, place="50 0 0 50 0 0"), (1653, 2339), 200),  # a logo
        (raw_pdf(typed(5) + NORMAL, size=A4), (1653, 2339), 200),
        (raw_pdf(typed(4) + NORMAL, size=A4), (2066, 2924), 250),
        (raw_pdf(typed(1, "4 0 0 4 72 72") + NORMAL, size=A4), (2066, 2924), 250),
        (raw_pdf(typed(4, "0 1 -1 0 72 72") + NORMAL, size=A4), (2066, 2924), 250),
        (raw_pdf(f"q 0.25 0 0 0.25 0 0 cm {typed(16)} Q {NORMAL}", size=A4), (2066, 2924), 250),
        (raw_pdf(typed(3, text="1") + NORMAL, size=A4), (1653, 2339), 200),  # the mark of a footnote
        (raw_pdf(typed(0.01) + NORMAL, size=A4), (1653, 2339), 200),  # nothing that anybody could read
        (raw_pdf(typed(2), size=(100, 140), page="/UserUnit 6"), (1667, 2334), 200),
        (raw_pdf(typed(1), size=(100, 140), page="/UserUnit 4.5"), (1389, 1945), 222),
        (raw_pdf(NORMAL, size=A4, page="/UserUnit 0.001"), (1653, 2339), 200),  # nothing would be left
        (raw_pdf(NORMAL, size=A4, page="/PieceInfo << /A (/UserUnit 6) >>"), (1653, 2339), 200),  # only a text
    ],
)
def test_a_pdf_page_is_drawn_as_large_as_what_it_holds_needs(data: bytes, size: tuple[int, int], dpi: int) -> None:
    (page,) = read_all(data)
    assert (page.width, page.height, page.dpi) == (*size, dpi)
    assert (page.image.size, page.warnings) == (size, ())


def test_small_type_in_a_group_within_a_group_is_found() -> None:
    values = "/Type /XObject /Subtype /Form /BBox [0 0 600 850] /Matrix [0.5 0 0 0.5 0 0]"
    font = f"/Resources << /Font << /F << {HELVETICA.decode()} >> >> >>"
    data = raw_pdf("q 0.5 0 0 0.5 0 0 cm /I Do Q", size=A4, image=f"{values} {font}", data=typed(16).encode())
    (page,) = read_all(data.replace(b"/Subtype /Image", b""))
    assert page.dpi == 250


def test_a_font_that_hides_its_size_is_measured() -> None:
    font = b"""/Type /Font /Subtype /Type3 /FontBBox [0 0 9 9] /FontMatrix [1 0 0 1 0 0] /FirstChar 97 /LastChar 97
        /Widths [9] /Encoding << /Differences [97 /a] >> /CharProcs << /a 5 0 R >>"""
    data = raw_pdf(typed(1, text="a" * 40), size=A4, data=b"9 0 0 0 9 9 d1 0 0 8 8 re f")
    (page,) = read_all(data.replace(HELVETICA, font))
    assert (page.dpi, page.image.convert("L").getextrema()) == (200, (0, 255))


def test_type_that_would_need_more_than_the_model_accepts_is_said() -> None:
    (page,) = read_all(raw_pdf(typed(2), size=A4))
    assert 0.998 * images.MAX_PIXELS < page.width * page.height <= images.MAX_PIXELS
    assert page.warnings == ("the page was drawn at 342 dpi instead of 500, to keep the model's limits",)


@pytest.mark.parametrize(("wanted", "dpi", "size"), [(100, 100, (827, 1170)), (250, 250, (2066, 2924)), (600, 342, ())])
def test_a_resolution_that_is_asked_for_is_kept_up_to_the_models_limit(
    wanted: int, dpi: int, size: tuple[int, ...]
) -> None:
    with open_document(scan_pdf(1240, 1754, A4, typed(4))) as document:
        document.dpi = wanted
        page = draw(document.reference(1))
    assert page.dpi == dpi
    if size:
        assert ((page.width, page.height), page.warnings) == (size, ())
    else:
        assert page.warnings == (f"the page was drawn at {dpi} dpi instead of {wanted}, to keep the model's limits",)


def test_a_page_of_which_a_box_lies_outside_the_other_is_read_as_a_whole() -> None:
    (page,) = read_all(raw_pdf("1 0 0 rg 0 0 72 72 re f", page="/CropBox [100 100 200 200]"))
    assert (page.width, page.height, page.image.getpixel((99, 99))) == (200, 200, RED)


def test_a_pdf_of_50_000_pages_opens_in_no_more_time_than_it_takes_to_make(tmp_path: Path) -> None:
    path = tmp_path / "long.pdf"
    start = time.monotonic()
    path.write_bytes(pdf_of(*[(72, 72)] * 50_000))
    made, start = time.monotonic() - start, time.monotonic()
    with open_document(path, "49999-") as document:
        assert document.numbers == (49_999, 50_000)
        assert draw(document.reference(50_000)).width == 200
    assert time.monotonic() - start < 2 * made


def test_a_broken_page_leaves_the_others_readable() -> None:
    with open_document(raw_pdf().replace(b"[3 0 R] /Count 1", b"[3 0 R 9 0 R 3 0 R] /Count 3")) as document:
        assert [draw(document.reference(number)).width for number in (1, 3)] == [200, 200]
        with pytest.raises(InputError, match="page 2 of <bytes> cannot be drawn"):
            draw(document.reference(2))


def test_memory_does_not_grow_with_the_pages_of_a_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    side, count = 1400, 60  # 2 MB each
    monkeypatch.setattr(documents, "KEPT_BYTES", 10 * side**2)
    values = f"/Width {side} /Height {side} /ColorSpace /DeviceGray /BitsPerComponent 8"
    page = raw_pdf("72 0 0 72 0 0 cm /I Do", image=values, data=b"\x7f" * side**2)
    head, image = page.split(b"5 0 obj", 1)
    image = image.split(b"endobj")[0]
    path = tmp_path / "scan.pdf"
    with path.open("wb") as file:
        numbers = range(100, 100 + 2 * count, 2)
        kids = b"".join(b"%d 0 R " % number for number in numbers)
        file.write(head.replace(b"[3 0 R] /Count 1", b"[%s] /Count %d" % (kids, count)))
        for number in numbers:
            own = head.split(b"3 0 obj")[1].split(b"endobj")[0].replace(b"5 0 R", b"%d 0 R" % (number + 1))
            file.write(b"%d 0 obj%sendobj\n%d 0 obj%sendobj\n" % (number, own, number + 1, image))
        file.write(b"trailer << /Root 1 0 R /Size 999 >>\n%%EOF")
    with open_document(path) as document:
        assert draw(document.reference(1)).image.getpixel((99, 99)) == (127, 127, 127)
        before = resident()
        for number in document.numbers:
            draw(document.reference(number))
        assert resident() - before < count * side**2 / 2


# Images


@pytest.mark.parametrize("format", FORMATS)
def test_every_promised_format_is_read(format: str, sheet: Image.Image) -> None:
    (page,) = read_all(encode(sheet, format))
    assert page.image.size == sheet.size


@pytest.mark.parametrize(("format", "mode"), [("TIFF", "I;16"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("PNG", "LA")])
def test_unusual_pixels_survive_the_file(format: str, mode: str) -> None:
    white = Image.new("L", (60, 60), 255).convert(mode) if mode != "I;16" else Image.new(mode, (60, 60), 65535)
    (page,) = read_all(encode(white, format))
    assert page.image.getpixel((20, 20)) == WHITE


def test_the_size_of_a_rotated_photograph_is_that_of_the_upright_page() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (page,) = read_all(encode(Image.new("RGB", (80, 60)), "JPEG", exif=exif))
    assert (page.width, page.height, page.image.size) == (60, 80, (60, 80))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("format", ["TIFF", "PNG", "JPEG"])
def test_a_fax_is_read_with_square_pixels(format: str, orientation: int) -> None:
    fax = Image.new("L", (204, 98), 255)
    fax.paste(0, (51, 0, 153, 49))  # upright: 1.0 x 0.5 inches
    exif = Image.Exif()
    exif[0x0112] = orientation
    (page,) = read_all(encode(fax, format, dpi=(204, 98), exif=exif))
    assert (page.width, page.height, page.image.size, page.warnings) == (204, 204, (204, 204), ())
    black = page.image.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    assert black is not None
    expected = (51, 0, 153, 102) if orientation == 1 else (102, 51, 204, 153)
    assert all(abs(one - other) <= 1 for one, other in zip(black, expected, strict=True))


def test_a_tiff_of_16_bits_in_the_order_of_macs_is_read() -> None:
    def entry(tag: int, value: int) -> bytes:
        return struct.pack(">HHII", tag, 4, 1, value)

    tags = {256: 60, 257: 60, 258: 16, 259: 1, 262: 1, 273: 122, 277: 1, 278: 60, 279: 7200}
    head = struct.pack(">2sHIH", b"MM", 42, 8, len(tags)) + b"".join(entry(*tag) for tag in tags.items()) + bytes(4)
    (page,) = read_all(head + struct.pack(">60H", *[65_535] * 59, 0) * 60)
    assert [page.image.getpixel((x, 30)) for x in (20, 59)] == [WHITE, (0, 0, 0)]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_jpeg_whose_end_is_missing_is_read_with_a_warning(cut: int, progressive: bool) -> None:
    data = encode(NOISE_IMAGE, "JPEG", progressive=progressive)
    (page,) = read_all(data[:-cut])
    assert page.warnings == ("the file is cut off: the last few rows of pixels may be missing, or finer details",)
    assert page.image.crop((0, 0, 200, 180)).tobytes() == read_all(data)[0].image.crop((0, 0, 200, 180)).tobytes()


@pytest.mark.parametrize(
    ("progressive", "share", "lost"), [(False, 0.8, "2[0-9]%"), (False, 0.1, "9[0-9]%"), (True, 0.2, "100%")]
)
def test_a_jpeg_that_lacks_a_part_of_the_picture_says_how_much(progressive: bool, share: float, lost: str) -> None:
    data = encode(NOISE_IMAGE, "JPEG", progressive=progressive)
    with pytest.raises(InputError, match=rf"<bytes> is cut off: {lost} of it are missing\. Fix: "):
        read_all(data[: int(share * len(data))])


@pytest.mark.parametrize(
    ("format", "mode", "size", "options"),
    [
        ("JPEG", "L", (7_000, 6_500), {}),
        ("JPEG", "RGB", (7_000, 6_500), {}),
        ("TIFF", "1", (7_000, 6_501), {"compression": "group4"}),
        ("TIFF", "RGB", (7_001, 6_500), {"compression": "tiff_lzw"}),
        ("TIFF", "I;16", (7_000, 6_500), {"compression": "tiff_lzw"}),
    ],
)
def test_an_image_too_large_for_its_full_size_is_decoded_smaller(
    format: str, mode: str, size: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_PAGE_PIXELS", 40_000_000)
    image = Image.new(mode, size, "white" if mode != "I;16" else 65_535)
    image.paste(0, (0, 0, size[0] // 2, size[1] // 2))
    (page,) = read_all(encode(image, format, **options))
    sent = images.smart_resize(*size)
    assert (page.width, page.height, page.sent_width, page.sent_height) == (*size, *sent)
    read = page.image
    dark, light = (read.getpixel((int(sent[0] * part), int(sent[1] * part))) for part in (0.49, 0.51))
    assert (dark, light) == ((0, 0, 0), WHITE)
    assert len(page.warnings) == 1


def test_a_worker_decodes_smaller_what_pillow_refuses(tmp_path: Path) -> None:
    Image.new("1", (13_500, 13_400), 1).save(tmp_path / "plan.tif", compression="group4")
    with rasterizer.open_document(tmp_path / "plan.tif") as document:
        page = rasterizer.draw(document.reference(1))
    assert (page.width, page.height, page.image.getpixel((9, 9))) == (13_500, 13_400, WHITE)


def test_an_image_beyond_the_models_limits_is_sent_smaller_with_a_warning() -> None:
    page = PageImage.of(7, Image.new("L", (5000, 4000)), ("before",))
    sent = images.smart_resize(5000, 4000)
    assert (page.number, page.width, page.height) == (7, 5000, 4000)
    assert page.image.size == (page.sent_width, page.sent_height) == sent
    text = f"the image of 5000 x 4000 px was sent as {sent[0]} x {sent[1]} px, to keep the model's limits"
    assert page.warnings == ("before", text)


def test_metadata_does_not_reach_the_png() -> None:
    secret = encode(Image.new("RGB", (60, 60)), "JPEG", comment=b"secret", icc_profile=b"secret")
    assert b"secret" not in read_all(secret)[0].png


def test_every_page_of_a_tiff_is_read() -> None:
    assert [(page.number, page.width) for page in read_all(frames("TIFF"))] == [(1, 61), (2, 62), (3, 63)]


def broken_tiff(*numbers: int) -> bytes:
    """A TIFF of five pages, each a little wider than the one before; these have a compression that does not exist."""
    data = frames("TIFF", 5)
    with Image.open(io.BytesIO(data)) as image:
        for number in numbers:
            image.seek(number - 1)
            at = data.index(b"\x03\x01\x03\x00", image.tag_v2._offset) + 8  # type: ignore[attr-defined]
            data = data[:at] + b"\xff\xff" + data[at + 2 :]
    return data


@pytest.mark.parametrize("broken", [[2], [2, 3], [3, 4, 5]])
def test_broken_pages_of_a_tiff_leave_the_others_readable(broken: list[int]) -> None:
    with open_document(broken_tiff(*broken)) as document:
        assert document.page_count == 5
        good = {*document.numbers}.difference(broken)
        assert {draw(document.reference(number)).width - 60 for number in good} == good
        for number in broken:
            with pytest.raises(InputError, match=f"page {number} of <bytes> cannot be decoded"):
                draw(document.reference(number))


def test_a_tiff_whose_first_page_is_broken_is_said_to_be_one() -> None:
    with pytest.raises(InputError, match=r"<bytes> is a TIFF whose first page cannot be decoded.* Fix: "):
        open_document(broken_tiff(1))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame_is_read_with_a_warning(format: str) -> None:
    if format not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    (page,) = read_all(frames(format))
    assert page.warnings[0] == "only the first of several frames was read"
    red, green, _ = page.image.getpixel((30, 30))  # type: ignore[misc]
    assert red > 240 > 20 > green


@pytest.mark.parametrize("start", [b"P5 60 60 255\n", b"P5\n# by a scanner\n60 60\n255\n"])
def test_of_netpbm_pictures_one_behind_the_other_the_first_is_read_with_a_warning(start: bytes) -> None:
    for count in (1, 2):
        (page,) = read_all((start + b" " * 3600) * count)
        assert page.warnings == ("only the first of several frames was read",) * (count - 1)


def test_of_a_photograph_with_previews_only_the_photograph_is_read() -> None:
    (page,) = read_all(frames("MPO"))
    assert page.warnings == ()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_its_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pi_heif", "pillow_heif"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'dots-ocr-client\[heic\]'"):
        open_document(HEIC)


def test_heic_is_read_with_a_plugin(monkeypatch: pytest.MonkeyPatch, sheet: Image.Image) -> None:
    """The plugin is not installed everywhere, so a stand-in does what it does: it registers a reader for HEIF."""

    class Reader(Image.Image):
        format = "HEIF"
        n_frames = 2

    def open_heif(file: io.BytesIO, name: object) -> Image.Image:
        image = Reader()
        image.__dict__.update(sheet.copy().__dict__)
        return image

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (open_heif, lambda head: head[8:12] == b"heic"))

    monkeypatch.setitem(sys.modules, "pi_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    (page,) = read_all(HEIC)
    assert page.image.tobytes() == sheet.tobytes()
    assert page.warnings == ("only the first of several frames was read",)


# What is there besides pages and text


def box(ticked: bool, flags: str = "") -> str:
    state = "/Yes" if ticked else "/Off"
    looks = "/AP << /N << /Yes 4 0 R /Off 4 0 R >> >>"
    return f"/Subtype /Widget /FT /Btn {flags} /T ({random.random()}) /V {state} /AS {state} {looks}"


def pdf_with(*annotations: str, catalog: str = "", form: str = "", text: str = "", pages: int = 1) -> bytes:
    """A PDF whose every page has these annotations, all of them in its form."""
    numbers = range(6, 6 + len(annotations))
    listed = " ".join(f"{number} 0 R" for number in numbers)
    content = f"BT /F 0.5 Tf 9 40 Td ({text}) Tj ET" if text else ""
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [{listed}] {form} >> {catalog} >>",
        f"<< /Type /Pages /Kids [{'3 0 R ' * pages}] /Count {pages} >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 72] /Contents 5 0 R /Annots [{listed}]"
        " /Resources << /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        "<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Length 0 >>\nstream\n\nendstream",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        *(f"<< /Type /Annot /Rect [9 9 30 30] {annotation} >>" for annotation in annotations),
    ]
    body = "".join(f"{number} 0 obj\n{text}\nendobj\n" for number, text in enumerate(objects, 1))
    return f"%PDF-1.7\n{body}trailer << /Root 1 0 R /Size {len(objects) + 1} >>\n%%EOF".encode("latin-1")


SIGNATURE = "/Subtype /Widget /FT /Sig /T (s)"
TYPED = "/Subtype /Widget /FT /Tx /T (t) /V (typed)"
RADIO = 1 << 15  # ISO 32000-1, table 226


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ([], ""),
        (["/Subtype /Link", "/Subtype /Highlight", TYPED], ""),
        (["/Subtype /Stamp", "/Subtype /Stamp"], "stamps: 2"),
        (["/Subtype /Ink"], "drawings by hand: 1"),
        (["/Subtype /Text /Contents (pay at once)"], "comments: 1"),
        (["/Subtype /Highlight /Contents (?)", "/Subtype /Caret /Contents (x)", "/Subtype /Square"], "comments: 2"),
        (["/Subtype /Link /Contents (x)", "/Subtype /Popup /Contents (x)", "/Subtype /FreeText /Contents (x)"], ""),
        (["/Subtype /FileAttachment"], "attached files: 1"),
        ([f"/Subtype /{kind}" for kind in ("Sound", "Movie", "Screen", "RichMedia", "3D")], "media: 5"),
        ([SIGNATURE], "signature fields: 1"),
        ([box(True), box(False), box(True)], "check boxes: 3, ticked of these: 2"),
        ([box(False)], "check boxes: 1"),
        ([box(True, f"/Ff {RADIO}")], "check boxes: 1, ticked of these: 1"),
    ],
)
def test_what_is_on_a_page_besides_text_is_said(annotations: list[str], said: str) -> None:
    warnings = [f"the page has more than text, which may be missing here: {said}. Fix: look at the page"]
    for page in read_all(pdf_with(*annotations, pages=2)):
        assert [*page.warnings] == warnings * bool(said)


@pytest.mark.parametrize(("end", "is_cut"), [("", True), ("%%EOF" + "\n\0" * 2048, False)])
def test_a_pdf_without_the_mark_of_its_end_may_be_cut_off(end: str, is_cut: bool) -> None:
    data = pdf_with(pages=2).removesuffix(b"%%EOF") + end.encode()
    said = "the file lacks the mark of its end: it may be cut off, and its last pages blank. Fix: copy it again"
    assert [page.warnings for page in read_all(data)] == [(said,) * is_cut, ()]


@pytest.mark.parametrize("between", [b"", b"\r\n", b"\0" * 999, b"%" + b"x" * (2**20 - 600) + b"\n%%EOF\n"])
def test_pdfs_that_were_joined_are_read_as_the_last_with_a_warning(between: bytes) -> None:
    said = "several PDFs were joined end to end: only the last of them was read. Fix: read each by itself"
    pages = read_all(pdf_of((72, 72), (72, 72)) + between + pdf_of((144, 144)))
    assert [page.warnings for page in pages] == [(said,)]


@pytest.mark.parametrize(
    ("before", "attached"),
    [(b"", 2 * pdf_of((72, 72))), (b"rubbish in front, so that no offset is right\n", pdf_of((72, 72)))],
)
def test_a_pdf_inside_of_another_is_no_joined_one(before: bytes, attached: bytes) -> None:
    outer = pdf_of((72, 72))
    table = outer.rpartition(b"startxref")[2].split()[0].decode()
    data = outer + f"9 0 obj\n<< /Length {len(attached)} >>\nstream\n".encode() + attached + b"\nendstream\nendobj\n"
    trailer = f"trailer\n<< /Root 1 0 R /Size 10 /Prev {table} >>\nstartxref\n{len(data)}\n%%EOF\n"
    data += f"xref\n9 1\n{len(outer):010} 00000 n \n{trailer}".encode()
    assert [page.warnings for page in read_all(before + data)] == [()]


def test_files_attached_to_a_pdf_are_named_once() -> None:
    document = pypdfium2.PdfDocument(pdf_of((72, 72), (72, 72), (72, 72)))
    for name in ("a.xlsx", "b\n.pdf", *"cdefg"):
        document.new_attachment(name).set_data(b"x")
    buffer = io.BytesIO()
    document.save(buffer)
    names = r"a.xlsx, b\n.pdf, c, d, e"
    said = f"attached files were not read: 7 ({names}). Fix: save them with a PDF reader, and read them, too"
    for pages in (None, "2-"):
        assert [page.warnings for page in read_all(buffer.getvalue(), pages)][:2] == [(said,), ()]


ADOBE = "Please wait... See www.adobe.com"
GERMAN = "Bitte warten... Siehe www.adobe.com"
DYNAMIC = "/NeedsRendering true"


@pytest.mark.parametrize(
    ("text", "catalog", "annotations", "pages", "is_notice"),
    [
        (ADOBE, DYNAMIC, [], 1, True),
        (ADOBE, "", [], 1, True),
        ("Please wait...", "", [], 1, True),
        (GERMAN, "", [], 1, True),
        (GERMAN, "", [SIGNATURE], 1, True),
        ("", DYNAMIC, [], 1, True),
        ("Name:", "", [], 1, False),
        (ADOBE, DYNAMIC, [TYPED], 1, False),
        (ADOBE + "x" * 1000, DYNAMIC, [], 1, False),
        ("Page", DYNAMIC, [], 2, False),
    ],
)
def test_the_notice_in_place_of_an_xfa_form_is_no_page(
    text: str, catalog: str, annotations: list[str], pages: int, is_notice: bool
) -> None:
    fix = "Fix: open it with Adobe Acrobat, print it into a PDF, and read that"
    data = pdf_with(*annotations, catalog=catalog, form="/XFA [(template) 4 0 R]", text=text, pages=pages)
    if is_notice:
        with pytest.raises(
            InputError, match=f"^<bytes> has a notice in place of its page, which is an XFA form. {fix}$"
        ):
            open_document(data)
    else:
        said = f"this is an XFA form: what it has besides its pages was not read. {fix}"
        assert [said in page.warnings for page in read_all(data)] == [True, False][:pages]
    assert "XFA" not in str(read_all(pdf_with(text=text))[0].warnings)  # without a form, it is the page


def tiff(*kinds: dict[int, int]) -> bytes:
    """A TIFF of one frame for each of these sets of tags, each frame a little wider than the one before."""
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer, new=True) as file:
        for number, tags in enumerate(kinds, 1):
            Image.new("1", (60 + number, 60), 1).save(
                file, "TIFF", tiffinfo={k: v for k, v in tags.items() if k != 262}
            )
            file.newFrame()
    data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        for number, tags in enumerate(kinds):
            if 262 in tags:
                image.seek(number)
                at = data.index(b"\x06\x01\x03\x00", image.tag_v2._offset) + 8  # type: ignore[attr-defined]
                data = data[:at] + bytes([tags[262]]) + data[at + 1 :]
    return data


def test_an_xfa_form_with_a_broken_page_is_bad_input() -> None:
    broken = pdf_with(form="/XFA 4 0 R", text=ADOBE).replace(b"/Kids [3 0 R ]", b"/Kids [99 0 R]")
    with pytest.raises(InputError, match=r"^<bytes> cannot be opened: Failed to load page"):
        open_document(broken)


PAGE: dict[int, int] = {}
OF_SEVERAL, SMALLER, OLD_SMALLER, MASK, OLD_MASK = {254: 2}, {254: 1}, {255: 2}, {254: 4}, {262: 4}


@pytest.mark.parametrize(
    ("kinds", "widths", "found"),
    [
        ([PAGE], [61], 0),
        ([PAGE, PAGE], [61, 62], 0),
        ([OF_SEVERAL, OF_SEVERAL], [61, 62], 0),
        ([PAGE, MASK], [61], 1),
        ([PAGE, OLD_MASK, PAGE], [61, 63], 1),
        ([SMALLER, PAGE, {254: 3}, OF_SEVERAL, {254: 6}, OLD_SMALLER, {255: 1}], [62, 64, 67], 4),
        ([SMALLER], [61], 1),
        ([SMALLER, SMALLER], [61, 62], 2),
    ],
)
def test_smaller_copies_and_masks_in_a_tiff_are_no_pages_unless_there_is_nothing_else(
    kinds: list[dict[int, int]], widths: list[int], found: int
) -> None:
    pages = read_all(tiff(*kinds))
    assert [page.width for page in pages] == widths
    said = "the file has smaller copies or masks of its pages, which are read only if there is nothing else"
    assert [page.warnings for page in pages] == [(f"{said}: {found}",) * bool(found), *[()] * (len(pages) - 1)]


# Bad input


@pytest.mark.parametrize("password", ["sesame", "Käse", "two words ", "x" * 32])
def test_an_encrypted_pdf_is_read_with_its_password(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encrypted_pdf(password)
    with open_document(data, password=password) as document:
        assert draw(document.reference(1)).image.getpixel((9, 9)) == RED
        assert password not in repr(document.reference(1))
    monkeypatch.setenv("DOTS_OCR_PASSWORD", password)
    assert read_all(data)[0].image.getpixel((9, 9)) == RED
    for needs_none, color in ((raw_pdf(), WHITE), (encrypted_pdf(""), RED)):  # which does not mind one
        assert read_all(needs_none, "1")[0].image.getpixel((9, 9)) == color


def test_without_the_right_password_an_encrypted_pdf_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    fix = r"Fix: give the right one by --password-file, DOTS_OCR_PASSWORD in the environment, or password=$"
    for password in (None, ""):
        with pytest.raises(InputError, match=rf"^<bytes> is encrypted and needs a password\. {fix}"):
            open_document(encrypted_pdf("sesame"), password=password)
    monkeypatch.setenv("DOTS_OCR_PASSWORD", "sesame")
    for password in ("open up", "sesam\udce9"):
        with pytest.raises(InputError, match=rf"^<bytes> does not open with the password given\. {fix}"):
            open_document(encrypted_pdf("sesame"), password=password)


def test_whoever_lacks_the_password_gets_no_page_of_a_pdf_that_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(encrypted_pdf("sesame"))
    with open_document(path, password="sesame") as document:
        reference = document.reference(1)
        draw(reference)
        with pytest.raises(InputError, match="does not open with the password given"):
            draw(replace(reference, password="open up"))


NOISE_IMAGE = Image.effect_noise((200, 200), 90)
NOISE = encode(NOISE_IMAGE, "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "<bytes> is empty"),
        (b"hello", "neither a PDF nor an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "neither a PDF nor an image"),
        (NOISE[:9000], "cannot be decoded"),
        (b"%PDF-1.7 rubbish", "broken PDF"),
        (b"PK\3\4\x14\0\0\0\0\0a.pdf" + raw_pdf(), "is a ZIP archive.* Fix: unpack it"),
        (raw_pdf().replace(b"/Kids [3 0 R] /Count 1", b"/Kids [] /Count 0"), "no pages"),
        (pdf_of((14_400, 20)), "too narrow"),
        (encode(Image.new("L", (2000, 10)), "PNG"), "too narrow"),
        (encode(Image.new("1", (1, 100_000)), "PNG"), "too narrow"),
        (encode(Image.new("F", (40, 40)), "TIFF"), "floating-point"),
    ],
)
def test_bad_documents_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_all(data)


def locked_pdf() -> bytes:
    """With what a bookshop's program locks a document by."""
    return raw_pdf().replace(b"trailer << ", b"trailer << /Encrypt << /Filter /EBX_HANDLER /V 4 >> /ID [<00><00>] ")


def test_the_reason_of_one_pdf_is_not_that_of_the_one_before() -> None:
    for before, message in ((encrypted_pdf("sesame"), "encrypted and needs"), (locked_pdf(), r"\(DRM\).*Fix: ")):
        with pytest.raises(InputError, match=message):
            open_document(before)
        with pytest.raises(InputError, match="broken PDF, or has no pages"):
            open_document(pdf_of())


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,%%%", "data:;base64,ä", "data:,\udcff"]
)
def test_a_bad_data_url_is_bad_input(url: str) -> None:
    with pytest.raises(InputError, match="<data URL> is"):
        open_document(url)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 9_000)])
def test_a_decompression_bomb_is_bad_input(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"too large|lower resolution"):
        read_all(encode(Image.new("1", size), "PNG"))


@pytest.mark.parametrize(("format", "mode", "limit"), [("PNG", "1", 2**40), ("TIFF", "L", 89_478_485)])
def test_an_image_that_is_too_large_says_the_size_to_use(
    format: str, mode: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in workers
    monkeypatch.setattr(documents, "MAX_DECODED_BYTES", limit)
    with pytest.raises(InputError, match=r"has 9000 x 10000 px, .* Fix: .* save it at 8973 x 9970 px"):
        read_all(encode(Image.new(mode, (9_000, 10_000)), format))


@pytest.mark.parametrize("lazily", [False, True])
def test_a_jpeg_of_thousands_of_scans_is_bad_input(lazily: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_SCANNED_PIXELS", 100 * 64**2)
    assert read_all(jpeg_of_scans(90))
    bomb = jpeg_of_scans(2000)
    with pytest.raises(InputError, match=r"is a JPEG of 2006 scans, and one of its size may have 100\. Fix: "):
        read_all(Image.open(io.BytesIO(bomb)) if lazily else bomb)


def test_scans_behind_a_false_marker_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_SCANNED_PIXELS", 20 * 64**2)
    data = encode(Image.new("L", (64, 64), 255), "JPEG", progressive=True, restart_marker_blocks=8)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2].replace(b"\xff\xd0", b"\xff\x02\xff\xff\xff\xd0", 1)  # as if with a length of 64 KiB
    with pytest.raises(InputError, match=r"is a JPEG of 56 scans"):
        read_all(data[:last] + scan * 51 + b"\xff\xd9")


def test_what_only_looks_like_a_scan_is_none(monkeypatch: pytest.MonkeyPatch, sheet: Image.Image) -> None:
    monkeypatch.setattr(documents, "MAX_SCANNED_PIXELS", 20 * sheet.width * sheet.height)
    video = b"\0\2\xff\xda" * 50  # behind the photograph, as some phones write it
    (page,) = read_all(encode(sheet, "JPEG", progressive=True, comment=b"\xff\xda" * 50) + video)
    assert page.image.size == sheet.size


def test_a_picture_in_a_pdf_is_not_decoded_in_full() -> None:
    side = 20_000
    packed = zlib.compress(bytes(side * side // 8), 1)
    values = f"/Width {side} /Height {side} /ColorSpace /DeviceGray /BitsPerComponent 1 /Filter /FlateDecode"
    (page,) = read_all(raw_pdf("72 0 0 72 0 0 cm /I Do", image=values, data=packed))
    assert page.image.getpixel((99, 99)) == (0, 0, 0)


@pytest.mark.parametrize(("head", "limit"), [(b"\x89PNG", 2**28), (b"%PDF-1.7", 2**32)])
def test_a_large_file_is_not_read(head: bytes, limit: int, tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(limit + 1)  # takes no space
    with pytest.raises(InputError, match=f"larger than {limit // 2**20} MiB"):
        open_document(path)


def test_an_endless_file_object_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_FILE_BYTES", 10 * 2**20)
    with Path("/dev/zero").open("rb") as file, pytest.raises(InputError, match="<file> is larger"):
        open_document(file)


@pytest.mark.parametrize(
    "name",
    ["", "missing.png", ".", "pipe", "socket", "loop", "nul\0byte", "x" * 999, "/dev/zero", "/dev/null", "sheet.png/x"],
)
def test_what_is_not_a_file_is_bad_input(
    name: str, tmp_path: Path, sheet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(InputError, match=r"cannot read|not a regular file") as caught:
            open_document(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["pdf", "png"])
@pytest.mark.parametrize("name", ["line\nbreak", "\udcff\udcfe", "~", "-", "файл", "\x1b[31m"])
def test_any_file_name_is_read_and_shown_printable(name: str, kind: str, tmp_path: Path, sheet: Image.Image) -> None:
    path = tmp_path / name
    path.write_bytes(encode(sheet, kind, **({"resolution": 200} if kind == "pdf" else {})))
    with open_document(path) as document:
        assert draw(document.reference(1)).width == sheet.width
        assert document.name.isprintable()
    path.write_bytes(b"%PDF-1.7" if kind == "pdf" else b"rubbish")
    with pytest.raises(InputError) as caught:
        open_document(path)
    assert str(caught.value).isprintable()


def test_the_content_decides_not_the_extension(tmp_path: Path, sheet: Image.Image) -> None:
    path = tmp_path / "image.pdf"
    sheet.save(path, "PNG")
    assert read_all(path)[0].width == sheet.width


def test_a_picture_whose_file_was_closed_is_bad_input() -> None:
    with io.BytesIO(encode(Image.new("RGB", (60, 60)), "JPEG")) as file:
        image = Image.open(file)
    with pytest.raises(InputError, match=r"<image> cannot be decoded: .*closed file"):
        read_all(image)


def test_nonsense_instead_of_a_source_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        open_document(3)  # type: ignore[arg-type]


# Damage

SMALL = Image.effect_noise((64, 64), 90).convert("RGB")
SAMPLES: dict[str, Callable[[], bytes]] = {
    **{format: (lambda format=format: encode(SMALL, format)) for format in FORMATS},  # type: ignore[misc]
    "TIFF of pages": lambda: frames("TIFF"),
    "TIFF in LZW": lambda: encode(SMALL, "TIFF", compression="tiff_lzw"),
    "GIF of frames": lambda: frames("GIF"),
    "PDF": lambda: encode(SMALL, "PDF", resolution=200),
    "PDF of pages": lambda: pdf_of((72, 72), (72, 72)),
}


def load_or_bad_input(data: bytes) -> None:
    try:
        document = open_document(data)
    except InputError:
        return
    with document:
        for number in document.numbers[:3]:
            try:
                page = draw(document.reference(number))
            except InputError as error:
                assert str(error).isprintable()  # noqa: PT017
            else:
                assert page.image.size == (page.sent_width, page.sent_height)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that is damaged; as errors they would hide what follows
@pytest.mark.parametrize("kind", SAMPLES)
def test_a_damaged_file_is_read_or_bad_input(kind: str) -> None:
    data = SAMPLES[kind]()
    chance = random.Random(kind)
    for _ in range(25):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 3, 20))):
            damaged[chance.randrange(min(len(damaged), chance.choice((64, 512, 10**9))))] = chance.randrange(256)
        load_or_bad_input(bytes(damaged[: chance.choice((len(data), len(data), chance.randrange(len(data))))]))


@settings(max_examples=100)
@given(
    st.sampled_from([b"", b"%PDF-1.7\n", b"II*\0", b"MM\0*", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"BM"]),
    st.binary(max_size=300),
)
def test_random_bytes_are_read_or_bad_input(magic: bytes, rest: bytes) -> None:
    load_or_bad_input(magic + rest)
