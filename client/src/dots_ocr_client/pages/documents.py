"""Documents of any kind into page images, one page at a time, within limits."""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import io
import math
import os
import re
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Literal
from urllib.parse import unquote_to_bytes

import pypdfium2
from PIL import Image, ImageChops, UnidentifiedImageError
from pypdfium2 import raw

from ..errors import InputError
from ..texts import printable
from . import images, pdf_resolution

# Of an image. Our own limit: an uncompressed page of `MAX_PAGE_PIXELS` in RGB takes just this much.
MAX_FILE_BYTES: Final = 256 * 2**20
MAX_PDF_BYTES: Final = 4 * 2**30  # of a PDF, which is not read into memory. Our own limit: scans of 5,000 pages fit
# Of an image. Pillow's threshold for a decompression bomb: 1/4 GiB of RGB, or an A3 page at 680 dpi.
MAX_PAGE_PIXELS: Final = 89_478_485
PASSWORD_VARIABLE: Final = "DOTS_OCR_PASSWORD"  # the environment's variable with the password of encrypted PDFs
# How much of a PDF is read before it is closed and opened again, because PDFium keeps all that it has read in memory.
# Our own choice; counted in pages of average size.
KEPT_BYTES: Final = 256 * 2**20
# Scans of a JPEG times its pixels: a file may have thousands of scans, and each goes through the whole picture. Our own
# choice: encoders make 10 to 20 scans, and the largest picture may have 33.
MAX_SCANNED_PIXELS: Final = 3 * 10**9
# Our own limit: counting the pages takes time that grows with the square of their number.
MAX_TIFF_PAGES: Final = 10_000
# That are read of a document at once. Our own limit: a PDF of 314 bytes may say that it has a million.
MAX_PAGES: Final = 50_000
# What Pillow may open, and HEIF with a plugin. Its other readers are rarely used, and one starts Ghostscript.
FORMATS: Final = (
    *(("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()),  # since Pillow 11.3
    *("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"),
)

# Rows of pixels that may be missing at the end of a file that is cut off, or 2 % of all (our own choice: two rows of a
# JPEG's blocks, less than a margin).
MAX_LOST: Final = 32
SHARP_SCANS: Final = 6  # with so many scans begun, libjpeg's progressive pictures have all that makes letters legible
# Formats of which a picture of more than `MAX_PAGE_PIXELS` is decoded smaller.
REDUCED: Final = ("JPEG", "MPO", "JPEG2000", "TIFF")
# Of such a picture, at its full size if it is a TIFF. Our own limit: A0 in black and white at 600 dpi.
MAX_DECODED_BYTES: Final = 8 * MAX_PAGE_PIXELS

_HEAD = 1024  # PDF readers accept this much rubbish in front of a PDF
_CHUNK = 2**20
# With a length (ITU T.81, B.1.1): no stuffing and no restart; nor the reserved ones below, which libjpeg skips without
# their length while it looks for a restart, and refuses elsewhere.
_JPEG_SEGMENT = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12

_MAGIC = re.compile(
    rb"(?:.{0,1000}[\r\n])?%PDF-\d|\x89PNG|\xff\xd8\xff|II[*+]\0|MM\0[*+]|GIF8|BM.{4}\0{4}|RIFF.{4}WEBP"
    rb"|P[1-6]\s+(?:#|\d+\s+\d+\s)|\0\0\0\x0cjP  |\xff\x4f\xff\x51|.{4}ftyp(?:avi|hei|hev|mif|msf)",
    re.DOTALL,
)
# How a Netpbm picture begins; the limits keep the search quick. Noise looks so once in thousands of the largest files.
_NETPBM = re.compile(rb"P[1-6]\s+(?:#[^\n]{0,200}\n\s*){0,9}\d+\s+\d+\s")
MARKS: Final = {  # kinds of annotations, as `annotations_of` gives them, that are no text, or none of the page
    raw.FPDF_ANNOT_STAMP: "stamps",
    raw.FPDF_ANNOT_INK: "drawings by hand",
    raw.FPDF_ANNOT_TEXT: "comments",
    raw.FPDF_ANNOT_FILEATTACHMENT: "attached files",
    **{getattr(raw, f"FPDF_ANNOT_{kind}"): "media" for kind in ("SOUND", "MOVIE", "SCREEN", "RICHMEDIA", "THREED")},
    **dict.fromkeys((-raw.FPDF_FORMFIELD_CHECKBOX, -raw.FPDF_FORMFIELD_RADIOBUTTON), "check boxes"),
    -raw.FPDF_FORMFIELD_SIGNATURE: "signature fields",
}
_NOTICE = re.compile("adobe|please wait", re.IGNORECASE)  # in place of an XFA form; of some 700 characters

# PDFium must not be entered by two threads at once, not even for different documents.
_pdfium = threading.Lock()


def _renew_lock() -> None:
    """In a child made by fork, where no thread is left to release it."""
    global _pdfium
    _pdfium = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)

# A path, a ``data:`` URL, the bytes of a file, a file opened for reading bytes, or a PIL image (its current frame).
Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image
# Which pages of a document: such as ``"1-3,7,10-"`` or numbers counted from 1; ``None`` for all.
Pages = str | Iterable[int] | None


@dataclass(frozen=True, slots=True)
class PageImage:
    """One page as it is given to an engine.

    Attributes:
        number: Counted from 1.
        width: Of the page's own image in pixels, which boxes refer to: an image upright at its own size, a PDF's page
            as it was drawn.
        height: As above.
        png: The page within the model's limits, as an upright 8-bit PNG, grey or RGB, without metadata; empty if
            `undrawn`.
        sent_width: Of ``png``, in pixels.
        sent_height: As above.
        warnings: What a reader of the results should know.
        origin: Where a page comes from that is of a PDF or `undrawn`, for engines that read more than pixels.
        dpi: Pixels of ``width`` per inch of a PDF's page; ``None`` for images, and if `undrawn`.
    """

    number: int
    width: int
    height: int
    png: bytes = field(repr=False)
    sent_width: int
    sent_height: int
    warnings: tuple[str, ...] = ()
    origin: PageReference | None = None
    dpi: int | None = None

    @property
    def image(self) -> Image.Image:
        """The page as engines get it, decoded anew at every use."""
        return Image.open(io.BytesIO(self.png), formats=("PNG",)).convert("RGB")

    def is_blank(self) -> bool:
        """Tell whether the page shows nothing at all; that takes a moment."""
        return images.is_blank(self.image)

    @classmethod
    def of(cls, number: int, image: Image.Image, warnings: tuple[str, ...] = ()) -> PageImage:
        """Make a page of any PIL image (its current frame), which is not changed.

        Args:
            number: The page's number, counted from 1.
            image: Of any size up to `MAX_PAGE_PIXELS` and any mode but ``F``.
            warnings: To be passed on.

        Raises:
            InputError: It is too large, too narrow, or cannot be decoded.
        """
        return draw(PageReference("the image", number, "image", image, None, False, warnings))

    @classmethod
    def undrawn(cls, reference: PageReference) -> PageImage:
        """Make a page without pixels or size, for engines with ``pixels = False``."""
        return cls(reference.number, 0, 0, b"", 0, 0, reference.warnings, reference)


@dataclass(frozen=True, slots=True)
class PageReference:
    """Where to find a page: enough for `draw` in this process or, unless it holds an image, in another.

    Of the whole document, it is what `look_into` needs.
    """

    label: str  # names the page in messages
    number: int  # counted from 1
    kind: Literal["pdf", "image"]  # what the file is
    source: str | bytes | Image.Image = field(repr=False)  # a path, or a single image
    stamp: tuple[int, ...] | None  # identifies the file's state
    # It belongs into a process of its own, as any file: a decoder can crash, takes as much time and memory as the file
    # demands, and holds up all other threads meanwhile. PIL's images are the caller's own.
    in_process: bool
    warnings: tuple[str, ...] = ()  # for the page image
    dpi: int | None = None  # at which the page of a PDF is drawn; ``None``: as it needs
    password: str | None = field(default=None, repr=False)  # of an encrypted PDF


class OpenDocument(contextlib.AbstractContextManager["OpenDocument"]):
    """A document whose pages can be drawn; made by `open_document`. Use it in a ``with`` statement, or `close` it.

    Attributes:
        name: As `describe` gives it.
        page_count: Pages of the whole document; 0 until it has been looked into.
        numbers: The pages that are wanted, in ascending order, counted from 1.
        dpi: At which pages of a PDF are drawn; ``None``: as each of them needs. Set it before they are.
        whole: What `look_into` needs.
    """

    def __init__(self, whole: PageReference, temporary: IO[bytes] | None = None) -> None:
        """Take the reference of the whole document, and over the temporary file that it is in, if it is."""
        self.name = whole.label
        self.page_count = 0
        self.numbers: tuple[int, ...] = ()
        self.dpi: int | None = None
        self.whole = whole
        self._temporary = temporary

    def choose(self, pages: Pages, count: int, warnings: tuple[str, ...]) -> None:
        """Say which pages are wanted. This may write a temporary file, so it blocks.

        Args:
            pages: As for `open_document`.
            count: What `look_into` returned, and so the warnings.
            warnings: Of the whole document.
        """
        self.page_count, self.numbers = count, parse_pages(pages, count, self.name)
        self.whole = replace(self.whole, warnings=warnings)
        if isinstance(self.whole.source, bytes) and count > 1:  # each page is drawn by itself, and gets all of it
            self._temporary = _spool(io.BytesIO(self.whole.source), self.name)
            stamp = _stamp(os.fstat(self._temporary.fileno()))
            self.whole = replace(self.whole, source=self._temporary.name, stamp=stamp)

    def reference(self, number: int) -> PageReference:
        """Return what `draw` needs for any page of the document; `ValueError` if there is none of that number."""
        if not 1 <= number <= self.page_count:
            raise ValueError(f"{self.name} has {self.page_count} pages, and no page {number}")
        label = self.name if self.page_count == 1 else f"page {number} of {self.name}"
        said = self.whole.warnings if number == self.numbers[0] else ()  # they are of the whole document
        return replace(self.whole, label=label, number=number, warnings=said, dpi=self.dpi)

    def close(self) -> None:
        """Remove the temporary file, if there is one; pages cannot be drawn any more."""
        if isinstance(self.whole.source, str):
            forget(self.whole.source)
        if self._temporary is not None:
            self._temporary.close()

    def __exit__(self, *_: object) -> None:
        """Close the document."""
        self.close()


def describe(source: Source) -> str:
    """Name a document for results and messages: its path with unprintable characters escaped, or what it is.

    Raises:
        TypeError: It is nothing of what `Source` allows.
    """
    if isinstance(source, bytes):
        return "<bytes>"
    if isinstance(source, Image.Image):
        return "<image>"
    if _is_data_url(source):
        return "<data URL>"
    if hasattr(source, "read"):
        return "<file>"
    return printable(os.fsdecode(source))


def open_document(source: Source, pages: Pages = None, *, password: str | None = None) -> OpenDocument:
    """Find out what a document is and how many pages it has, without drawing any. This reads files, so it blocks.

    It decodes in this process; `rasterizer` does the same for files of strangers.

    Args:
        source: An image or a PDF. PDFs and TIFFs may have several pages; of an animation the first frame is read, and
            of a MPO (a photograph with previews) the photograph. A file object is read from where it stands to its
            end, into a temporary file, and not closed.
        pages: Which are wanted, such as ``"1-3,7,10-"``, or their numbers; all if ``None``. Counted from 1.
        password: As for `take`.

    Raises:
        InputError: It does not exist, is broken, encrypted, too large, of an unknown kind, or has no such pages.
        TypeError: ``source`` is nothing of what `Source` allows.
    """
    with contextlib.ExitStack() as failed:
        document = failed.enter_context(take(source, password))
        document.choose(pages, *look_into(document.whole))
        failed.pop_all()
    return document


def take(source: Source, password: str | None = None) -> OpenDocument:
    """Find out where a document is, how long, and whether it is a PDF; its pages are not counted. This blocks.

    Args:
        source: As for `open_document`.
        password: Of an encrypted PDF; else that of the environment (`PASSWORD_VARIABLE`). Others need none.

    Raises:
        InputError: It does not exist, is empty, or is too large.
        TypeError: ``source`` is nothing of what `Source` allows.
    """
    name = describe(source)
    password = password or os.environ.get(PASSWORD_VARIABLE)
    if isinstance(source, Image.Image):
        return OpenDocument(PageReference(name, 0, "image", source, None, False))
    data = _decode_data_url(source, name) if _is_data_url(source) else source
    if isinstance(data, bytes):
        _check_bytes(len(data), data[:_HEAD], name)
        if not _is_pdf(data[:_HEAD]):
            return OpenDocument(PageReference(name, 0, "image", data, None, True))
        data = io.BytesIO(data)
    with contextlib.ExitStack() as failed:
        temporary = None if isinstance(data, str | os.PathLike) else failed.enter_context(_spool(data, name))
        path = temporary.name if temporary is not None else os.fsdecode(data)  # type: ignore[arg-type]
        with _open_file(path, name) as file:
            head = file.read(_HEAD)
            status = os.fstat(file.fileno())
            _check_bytes(status.st_size, head, name)
        kind: Literal["pdf", "image"] = "pdf" if _is_pdf(head) else "image"
        place = str(Path(path).absolute())
        failed.pop_all()
    return OpenDocument(PageReference(name, 0, kind, place, _stamp(status), True, password=password), temporary)


def look_into(reference: PageReference) -> tuple[int, tuple[str, ...]]:
    """Count the pages of a document, and return that with warnings about the whole document. This blocks.

    Raises:
        InputError: It is broken, encrypted, of an unknown kind, has too many pages, or has changed.
    """
    if isinstance(reference.source, Image.Image):
        return 1, ()
    if reference.kind == "pdf":
        with _opened_pdf(reference, "opened") as kept, _open_file(str(reference.source), reference.label) as file:
            return len(kept.pdf), (*_damage(file), *_beside_pages(kept.pdf, reference.label))
    with _opened_image(reference, "opened") as image:
        if image.format == "TIFF":
            pages, frames = _tiff_pages(image, reference.label)
            said = "the file has smaller copies or masks of its pages, which are read only if there is nothing else"
            return len(pages) or frames, (f"{said}: {frames - len(pages)}",) * (len(pages) < frames)
        return 1, ("only the first of several frames was read",) if _is_animated(image) else ()


def _damage(file: BinaryIO) -> Iterator[str]:
    """Yield what a PDF may have lost, of which PDFium says nothing."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
    end = file.read()
    if b"%%EOF" not in end.rstrip(b"\0\t\n\f\r ")[-2 * _HEAD :]:
        yield "the file lacks the mark of its end: it may be cut off, and its last pages blank. Fix: copy it again"
    file.seek(int((re.findall(rb"startxref\s+(\d{1,10})", end) or [b"0"])[-1]))
    if re.match(rb"\s*(?:xref|\d+\s+\d+\s+obj)", file.read(_HEAD)):
        return  # where the file says that its table of objects is, as it is not behind another file
    file.seek(0)
    last = b""
    while chunk := file.read(_CHUNK):
        if re.search(rb"%%EOF[\0\s]*%PDF-\d", last + chunk):
            yield "several PDFs were joined end to end: only the last of them was read. Fix: read each by itself"
            return
        last = chunk[-(2**16) :]


def draw(reference: PageReference) -> PageImage:
    """Make the image of a page. This blocks, for seconds in the worst of cases.

    In the process that calls it, the PDF of the last call stays open, for its next page; see `forget`.

    Raises:
        InputError: The page is broken, too large or too narrow, or the file has changed since it was opened.
    """
    if reference.kind == "pdf":
        return _draw_pdf(reference)
    if isinstance(reference.source, Image.Image):
        return _page_of(reference.source, reference)
    with _opened_image(reference, "drawn") as image:
        if image.format == "TIFF":
            try:
                pages, frames = _tiff_pages(image, reference.label, reference.number)
                image.seek(0)  # or else a frame that has been reached would pass, though it is broken
                image.seek((pages or range(frames))[reference.number - 1])
            except Exception as error:  # see _page_of
                raise InputError(f"{reference.label} cannot be decoded: {_reason(error)}") from error
        return _page_of(image, reference)


def forget(path: str | None = None) -> None:
    """Close the PDF, if it is this one, that the last `draw` in this process left open."""
    with _pdfium:
        if _kept is not None and path in (None, _kept.path):
            _close_kept()


def _close_kept() -> None:
    global _kept
    if _kept is not None:
        _kept.pdf.close()
        _kept = None


def parse_pages(pages: Pages, count: int, name: str) -> tuple[int, ...]:
    """Return the numbers of the pages that are wanted, as for `open_document`, of so many, in ascending order.

    Raises:
        InputError: Not understood, no pages at all, one that does not exist, or more than `MAX_PAGES`.
    """
    there_are = f"{name} has {count} page{'s' * (count != 1)}, counted from 1"
    wanted: set[int] = set()
    for part in ("1-",) if pages is None else pages.split(",") if isinstance(pages, str) else map(str, pages):
        match = re.fullmatch(r"\s*(-?[0-9]{1,9})\s*(?:(-)\s*([0-9]{1,9})?\s*)?", part)
        if match is None:
            raise InputError(f"the pages {printable(part)!r} are not understood: write 1-3,7,10-; {there_are}")
        first = int(match[1])
        last = int(match[3]) if match[3] else count if match[2] else first
        if not 1 <= first <= last <= count:
            there_is = "there are no pages" if match[2] else "there is no page"
            raise InputError(f"{there_is} {printable(part.strip())}: {there_are}")
        wanted.update(range(first, last + 1)[: MAX_PAGES + 1])
        if len(wanted) > MAX_PAGES:
            raise InputError(
                f"more than {MAX_PAGES} pages are wanted: {there_are}. "
                f"Fix: name fewer, as in --pages 1-{MAX_PAGES}, or split the file"
            )
    if not wanted:
        raise InputError(f"no pages are wanted: {there_are}")
    return tuple(sorted(wanted))


@dataclass(slots=True)
class _Kept:
    """A PDF that is open."""

    path: str
    key: tuple[object, ...]  # with the password: whoever does not have it gets no page
    pdf: Any  # pypdfium2 has no types
    pages_left: int


_kept: _Kept | None = None


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(text) or type(error).__name__


def _is_data_url(source: Source) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _decode_data_url(url: Source, name: str) -> bytes:
    head, comma, text = str(url).partition(",")
    if not comma:
        raise InputError(f"{name} is without a comma: it has to look like data:image/png;base64,iVBORw0…")
    try:
        data = unquote_to_bytes(text)
        if head.rstrip().lower().endswith(";base64"):
            data = b"".join(data.split())
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise InputError(f"{name} is not valid base64: {_reason(error)}") from error
    return data


def _is_pdf(head: bytes) -> bool:
    return b"%PDF-" in head


def is_document(path: Path) -> bool:
    """Tell from its first bytes whether a file can be read, and is of a kind that is, whatever its name says."""
    with contextlib.suppress(InputError, OSError), _open_file(str(path), "") as file:
        return _MAGIC.match(file.read(_HEAD)) is not None
    return False


def _check_bytes(size: int, head: bytes, name: str) -> None:
    limit = MAX_PDF_BYTES if _is_pdf(head) else MAX_FILE_BYTES
    if size == 0:
        raise InputError(f"{name} is empty")
    if head.startswith(b"PK\3\4"):  # PDFium would find one of the PDFs in it
        raise InputError(f"{name} is a ZIP archive, or of an office program. Fix: unpack it, or save it as a PDF")
    if size > limit:
        raise InputError(f"{name} is larger than {limit // 2**20} MiB: save it smaller, or split it")


def _spool(file: BinaryIO, name: str) -> IO[bytes]:
    """Copy a file into a temporary one, which only its owner can read and which disappears when it is closed."""
    temporary = tempfile.NamedTemporaryFile(prefix="dots-ocr-")  # noqa: SIM115  # closed by the caller
    try:
        head = b""
        size = 0
        while chunk := file.read(_CHUNK):
            if not isinstance(chunk, bytes):
                raise InputError(f'{name} gives text instead of bytes: open it with "rb"')
            head += chunk[: _HEAD - len(head)]
            size += len(chunk)
            _check_bytes(size, head, name)
            temporary.write(chunk)
        temporary.flush()
        _check_bytes(size, head, name)
    except BaseException as error:
        temporary.close()
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise InputError(f"cannot read {name}: {_reason(error)}") from error  # a stranger's object raises anything
    return temporary


def _open_file(path: str, name: str) -> BinaryIO:
    """Open a regular file; anything else could block, or do something when it is opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # Path would not change the meaning of ""
            raise InputError(f"{name} is not a regular file: give the path of an image or a PDF")
        return open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    except (OSError, ValueError) as error:  # ValueError: a NUL, or characters that no file name can have
        raise InputError(f"cannot read {name}: {_reason(error)}{_in_wsl(path)}") from error


def _in_wsl(path: str) -> str:
    """Say what a path of Windows is called inside WSL; nothing about other paths."""
    if not re.match(r"[A-Za-z]:[\\/]", path):
        return ""
    inside = path[2:].replace("\\", "/")
    return printable(f"; a path of Windows is another one inside WSL: /mnt/{path[0].lower()}{inside}")


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_stamp(path: str, stamp: tuple[int, ...] | None, label: str, verb: str) -> None:
    try:
        same = _stamp(Path(path).stat()) == stamp
    except OSError as error:
        raise InputError(f"cannot read {label}: {_reason(error)}") from error
    if not same:
        raise InputError(f"{label} cannot be {verb}: the file has changed since it was opened")


def _is_animated(image: Any) -> bool:
    if image.format == "PPM":
        image.fp.seek(2)  # behind its own mark
        return _NETPBM.search(image.fp.read()) is not None
    if image.format == "MPO":  # a photograph with previews behind it: phones write it under the name of JPEG
        return False
    try:
        return bool(
            getattr(image, "n_frames", 1) > 1 if image.format == "HEIF" else getattr(image, "is_animated", False)
        )
    except Exception:  # there is a second frame, and it is broken
        return True


def _tiff_pages(image: Any, name: str, wanted: int = MAX_TIFF_PAGES + 1) -> tuple[list[int], int]:
    """Find the first so many frames that are pages (TIFF 6.0: tags 254, 255, 262), and count all frames up to there."""
    pages: list[int] = []
    frame = 0
    # It stays where it is at a frame of which not even the place of the next one can be read.
    while len(pages) < wanted and image.tell() == max(0, frame - 1):
        if frame > MAX_TIFF_PAGES:
            raise InputError(f"{name} has more than {MAX_TIFF_PAGES} pages: split it")
        try:
            image.seek(frame)
        except EOFError:
            break
        except Exception:  # see _page_of
            pass
        tags = image.tag_v2
        if not (tags.get(254) in (1, 3, 4, 5, 6, 7) or tags.get(255) == 2 or tags.get(262) == 4):
            pages.append(frame)
        frame += 1
    return pages, frame


@contextlib.contextmanager
def _opened_image(reference: PageReference, verb: str) -> Iterator[Image.Image]:
    source, label = reference.source, reference.label
    assert not isinstance(source, Image.Image)
    if isinstance(source, str):
        _check_stamp(source, reference.stamp, label, verb)
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(source, label) as file:
        head = file.read(_HEAD)
        file.seek(0)
        heic = head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS
        formats = (*FORMATS, "HEIF") if heic and _register_heif() else FORMATS
        try:
            image = Image.open(file, formats=formats)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(f"{label} is too large to be one page: {_reason(error)}") from error
        except UnidentifiedImageError as error:
            if heic:
                raise InputError(f"{label} is a HEIC image: pip install 'dots-ocr-client[heic]'") from error
            if head[:4] in (b"II*\0", b"MM\0*"):  # Pillow finds the others by way of the first
                broken = f"{label} is a TIFF whose first page cannot be decoded, and so is none behind it"
                raise InputError(f"{broken}. Fix: save it anew, or without that page") from error
            kinds = ", ".join(FORMATS)
            raise InputError(f"{label} is neither a PDF nor an image of a known kind ({kinds})") from error
        except Exception as error:  # see _page_of
            raise InputError(f"{label} cannot be opened: {_reason(error)}") from error
        with image:
            yield image


def _register_heif() -> bool:
    for name in ("pi_heif", "pillow_heif"):
        try:
            importlib.import_module(name).register_heif_opener()
        except ImportError:
            continue
        return True
    return False


def _page_of(image: Image.Image, reference: PageReference) -> PageImage:
    label, warnings = reference.label, reference.warnings
    try:
        own = images.upright_size(image)
        images.smart_resize(*own)
        jpeg = _jpeg(image, label)
        if math.prod(image.size) > MAX_PAGE_PIXELS:
            image = _reduced(image, label)
        try:
            rgb = images.to_rgb(image)
        except OSError:
            if not jpeg:
                raise
            rgb = images.to_rgb(_without_end(image, jpeg, label))
            warnings += ("the file is cut off: the last few rows of pixels may be missing, or finer details",)
        return _encode(reference.number, rgb, warnings, own)
    except InputError:
        raise
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise InputError(f"{label} cannot be decoded: {_reason(error)}") from error


def _jpeg(image: Image.Image, label: str) -> bytes:
    """Return the file of a JPEG; nothing of another, or of one that is decoded already and has no file any more.

    Raises:
        InputError: Its scans would take minutes.
    """
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or file is None:
        return b""
    file.seek(0)  # Pillow seeks before it reads
    data: bytes = file.read()
    most = max(1, MAX_SCANNED_PIXELS // math.prod(image.size))
    if data.count(b"\xff\xda") > most and (scans := _count_scans(data)) > most:
        raise InputError(
            f"{label} is a JPEG of {scans} scans, and one of its size may have {most}. Fix: save it anew, not as a "
            "progressive JPEG"
        )
    return data


def _without_end(image: Image.Image, data: bytes, label: str) -> Image.Image:
    """Return a JPEG of which hardly more than the end mark is missing, after Pillow refused it."""
    whole = Image.open(io.BytesIO(data + b"\xff\xd9"), formats=("JPEG",))
    whole.draft(None, image.size)
    if image.info.get("progressive"):  # each scan makes all of it finer
        lost = 0 if _count_scans(data) >= SHARP_SCANS else whole.height
    else:
        image.tile = []  # type: ignore[attr-defined]  # keeps what Pillow has decoded
        differs = ImageChops.difference(whole.convert("L"), image.convert("L")).getbbox()
        lost = whole.height - differs[1] if differs else 0
    if lost > max(MAX_LOST, whole.height // 50):
        raise InputError(f"{label} is cut off: {lost / whole.height:.0%} of it are missing. Fix: copy or scan it anew")
    return whole


def _reduced(image: Image.Image, label: str) -> Image.Image:
    """Return an image that is too large for its full size, large enough for the model."""
    width, height = image.size
    factor = math.isqrt(width * height // images.MAX_PIXELS)
    wide = image.format == "TIFF" and image.mode not in ("1", "L", "P")
    if image.format not in REDUCED or width * height * (4 if wide else 1) > MAX_DECODED_BYTES:
        shrink = math.sqrt(MAX_PAGE_PIXELS / (width * height))
        raise InputError(
            f"{label} has {width} x {height} px, more than {MAX_PAGE_PIXELS} in all. Fix: scan it at a lower "
            f"resolution, or save it at {math.floor(width * shrink)} x {math.floor(height * shrink)} px"
        )
    if image.format == "JPEG2000":
        image.reduce = factor.bit_length() - 1  # type: ignore[method-assign,assignment]
    elif image.format != "TIFF":
        image.draft(None, (width // factor, height // factor))
    else:
        small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        brightest = int(image.getextrema()[1]) if image.mode.startswith("I") else 0  # type: ignore[arg-type]
        for top in range(0, height, 256 * factor):  # a copy of all of it would take as much memory again
            band = image.crop((0, top, width, min(height, top + 256 * factor)))
            small.paste(images.to_rgb(band, brightest).reduce(factor), (0, top // factor))
        image = small
    return image


def _count_scans(data: bytes) -> int:
    """Count the scans of the first picture in the data; what only looks like one, in metadata or behind it, is none."""
    scans, at = 0, 2
    while (found := _JPEG_SEGMENT.search(data, at)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _encode(number: int, rgb: Image.Image, warnings: tuple[str, ...], own: tuple[int, int]) -> PageImage:
    sent = images.fit(rgb, own)
    if sent.size != own:
        old, new = (f"{width} x {height} px" for width, height in (own, sent.size))
        warnings += (f"the image of {old} was sent as {new}, to keep the model's limits",)
    return PageImage(number, *own, images.to_png(sent), *sent.size, warnings)


def _open_pdf(path: str, label: str, password: str | None) -> Any:
    """Open a PDF; the lock must be held."""
    try:
        pypdfium2.raw.FPDF_LoadMemDocument64(b"", 0, None)  # its error stays where a PDF without pages sets none
        pdf = pypdfium2.PdfDocument(Path(path), password and password.encode("utf-8", "replace").decode())
        pdf.init_forms()  # otherwise what was typed into a form is left out
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            if password:
                with contextlib.suppress(InputError):  # of a batch, many encrypted PDFs need none
                    return _open_pdf(path, label, None)
            what = "is encrypted and needs a password" if not password else "does not open with the password given"
            ways = f"--password-file, {PASSWORD_VARIABLE} in the environment, or password="
            raise InputError(f"{label} {what}. Fix: give the right one by {ways}") from error
        if error.err_code == pypdfium2.raw.FPDF_ERR_SECURITY:
            raise InputError(
                f"{label} is locked by a certificate or by digital rights management (DRM), not by a password. Fix: "
                "open it with the program that may, and save or print it to a new PDF"
            ) from error
        raise InputError(f"{label} is a broken PDF, or has no pages: repair it ({_reason(error)})") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot read {label}: {_reason(error)}") from error
    return pdf


def annotations_of(page: Any) -> Iterator[tuple[Any, int]]:
    """Yield those of a `pypdfium2.PdfPage`, each with its kind; for a form field, that is minus the field's kind."""
    for index in range(raw.FPDFPage_GetAnnotCount(page)):
        if annotation := raw.FPDFPage_GetAnnot(page, index):
            kind = raw.FPDFAnnot_GetSubtype(annotation)
            if kind == raw.FPDF_ANNOT_WIDGET and page.formenv is not None:
                kind = -max(0, raw.FPDFAnnot_GetFormFieldType(page.formenv, annotation))
            try:
                yield annotation, kind
            finally:
                raw.FPDFPage_CloseAnnot(annotation)


def beside_text(page: Any) -> tuple[str, ...]:
    """Say what a `pypdfium2.PdfPage` has that is no text, or no text of the page itself. PDFium must be locked."""
    found: Counter[str] = Counter()
    for annotation, kind in annotations_of(page):
        remark = raw.FPDFAnnot_GetStringValue(annotation, b"Contents", None, 0) > 2  # bytes of UTF-16, with a NUL
        if name := MARKS.get(kind, "comments" * (remark and raw.FPDF_ANNOT_LINE <= kind <= raw.FPDF_ANNOT_CARET)):
            found[name] += 1
            if name == "check boxes" and raw.FPDFAnnot_IsChecked(page.formenv, annotation):
                found["ticked of these"] += 1
    listed = ", ".join(f"{name}: {number}" for name, number in found.items())
    return (f"the page has more than text, which may be missing here: {listed}. Fix: look at the page",) * bool(found)


def _beside_pages(pdf: Any, label: str) -> Iterator[str]:
    """Say what a PDF has that is on none of its pages; `InputError` if these are no more than a notice."""
    if count := pdf.count_attachments():
        names: list[str] = []
        with contextlib.suppress(pypdfium2.PdfiumError):  # as much as can be found of a broken list
            names.extend(printable(pdf.get_attachment(index).get_name()[:80]) for index in range(min(count, 5)))
        listed = ", ".join(names)
        yield f"attached files were not read: {count} ({listed}). Fix: save them with a PDF reader, and read them, too"
    if (form := pdf.get_formtype()) in (raw.FORMTYPE_XFA_FULL, raw.FORMTYPE_XFA_FOREGROUND):
        fix = "Fix: open it with Adobe Acrobat, print it into a PDF, and read that"
        if len(pdf) == 1:
            with contextlib.closing(pdf[0]) as page, contextlib.closing(page.get_textpage()) as textpage:
                text = textpage.get_text_bounded()
                filled = any(kind < 0 and kind != -raw.FPDF_FORMFIELD_SIGNATURE for _, kind in annotations_of(page))
            if not filled and len(text) < 1_000 and (form == raw.FORMTYPE_XFA_FULL or _NOTICE.search(text)):
                raise InputError(f"{label} has a notice in place of its page, which is an XFA form. {fix}")
        yield f"this is an XFA form: what it has besides its pages was not read. {fix}"


def _draw_pdf(reference: PageReference) -> PageImage:
    with open_page(reference, "drawn") as (page, drawn):
        # Pillow takes pixels in this order, of four bytes, as they are; `bitmap` owns them, and must stay.
        bitmap = page.render(scale=drawn.scale, prefer_bgrx=True, rev_byteorder=True)
        warnings = reference.warnings + beside_text(page)
    if drawn.dpi < drawn.wanted:
        warnings += (f"the page was drawn at {drawn.dpi} dpi instead of {drawn.wanted}, to keep the model's limits",)
    image = bitmap.to_pil()
    return replace(_encode(reference.number, image, warnings, image.size), origin=reference, dpi=drawn.dpi)


@contextlib.contextmanager
def open_page(reference: PageReference, verb: str) -> Iterator[tuple[Any, pdf_resolution.Resolution]]:
    """Open a page of a PDF, and keep the PDF open for its next page; see `forget`. PDFium is locked meanwhile.

    Yields:
        The page, of type `pypdfium2.PdfPage`, and how large it is drawn.

    Raises:
        InputError: It cannot be ``drawn`` (or what `verb` says), also if PDFium says so inside the ``with`` statement.
    """
    assert reference.stamp is not None
    file_bytes = reference.stamp[2]
    with _opened_pdf(reference, verb) as kept:
        kept.pages_left -= 1
        try:
            page = kept.pdf[reference.number - 1]
            if not all(page.get_size()):  # its CropBox lies outside its MediaBox, and other readers show all of that
                page.set_cropbox(*page.get_mediabox())
                page.close()
                page = kept.pdf[reference.number - 1]
            try:
                yield page, pdf_resolution.choose(page, reference.number, file_bytes, reference.dpi)
            finally:
                page.close()
        except (pypdfium2.PdfiumError, ValueError, MemoryError) as error:
            raise InputError(f"{reference.label} cannot be {verb}: {_reason(error)}") from error


@contextlib.contextmanager
def _opened_pdf(reference: PageReference, verb: str) -> Iterator[_Kept]:
    """Open a PDF unless it is open already. PDFium is locked meanwhile."""
    global _kept
    label, path, key = reference.label, str(reference.source), (reference.stamp, reference.password)
    _check_stamp(path, reference.stamp, label, verb)
    with _pdfium:
        if _kept is None or (_kept.path, _kept.key) != (path, key) or not _kept.pages_left:
            _close_kept()
            pdf = _open_pdf(path, label, reference.password)
            _kept = _Kept(path, key, pdf, max(1, KEPT_BYTES * len(pdf) // Path(path).stat().st_size))
        try:
            yield _kept
        except pypdfium2.PdfiumError as error:
            raise InputError(f"{label} cannot be {verb}: {_reason(error)}") from error
