"""The pages of a document on disk: a journal while it is being read, the outputs afterwards.

For the document ``a.pdf`` the journal is ``a.pdf.pages.jsonl``: a header, then one page a line as it was finished. When
all pages are there, the outputs ``a.pdf.json``, ``a.pdf.md`` and so on are made from it, and it is deleted. The JSON is
made last; its first line says what it was made from, so that a later run knows whether there is anything left to do.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any, AnyStr, Final, NamedTuple
from urllib.parse import quote

from ..errors import InputError
from ..pages import images
from ..pages.documents import PageImage
from ..prompts import Mode
from ..version import __version__
from . import Cell, Document, FailedPage, Page, export, hocr, page_of
from .layout import table_rows, to_page

# What outputs there are, by what their names end with; ``csv`` and ``pictures`` are folders, with a file for each table
# and each picture.
FORMATS: Final = frozenset({"json", "md", "html", "txt", "hocr", "csv", "pictures"})
JOURNAL: Final = ".pages.jsonl"  # what the name of a journal ends with
FIRST_ENGINE: Final = "vllm"  # the engine whose pages are final; those of any other can be read again (``upgrade``)
_FORMAT_VERSION: Final = 1  # of journals and outputs: those of other versions are not gone on with
_FOLDERS: Final = frozenset({"csv", "pictures"})
PART: Final = re.compile(r"page-\d+-\d+\.(csv|png)")
_NUMBER: Final = re.compile(r"[-+]*[€$£₽]?[\d\s.,]*([eE][-+]?\d+)? ?([%€$£₽]|\w{0,3})")
_PAGES: Final = b'"pages": [\n'
_END_OF_PAGES: Final = b"\n],\n"
_HEAD: Final = {"headers": bool, "formats": list, "pages": int, "failed_pages": int, "engines": dict}
_ORIGIN: Final = frozenset({"format", "sha256", "mode", "dpi"})  # what an output was made from, in its first line
# What reading a file raises that is damaged, or not by us.
_UNREADABLE: Final = (KeyError, TypeError, ValueError, RecursionError)
# Bytes of a first line at most: ours stay far below, because the longest path has 4,096 bytes.
_LONGEST_HEAD: Final = 1 << 16


class Folder:
    """A folder that outputs are written to. Links in it are replaced or refused, never followed."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """Open a folder that exists, or take over the descriptor of one that is open."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if descriptor is None else descriptor

    def inner(self, parts: Sequence[str]) -> Folder:
        """Open the folder below by the names on the way to it, and make it if it is not there.

        Raises:
            InputError: One of them is a link or a file.
        """
        path, fd = self.path, os.dup(self._fd)
        for part in parts:
            path /= part
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=fd)
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            except NotADirectoryError:
                raise InputError(f"{str(path)!r} is a link or a file where a folder is needed: move it away") from None
            finally:
                os.close(fd)
            fd = below
        return Folder(path, fd)

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int | None:
        """Return a descriptor of a regular file; ``None`` if there is none. Flags and mode are as for ``os.open``."""
        try:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode, dir_fd=self._fd)
        except OSError:  # not there, a link, a folder, a pipe without a reader, or not ours to read
            return None
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return None

    def create(self, name: str) -> int:
        """Make an empty file, in place of any that is there, and return a descriptor of it."""
        self.remove(name)
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def names(self) -> list[str]:
        """Return the names of all that is in it."""
        return os.listdir(self._fd)  # noqa: PTH208  # Path knows no descriptors

    def exists(self, name: str, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
        """Tell whether there is a regular file of that name, or something of another kind, such as `stat.S_ISDIR`."""
        try:
            return kind(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode)
        except OSError:
            return False

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file that takes its name, on the disk for certain, when it is whole; otherwise nothing is left."""
        unfinished = f"{name}.tmp"
        try:
            with os.fdopen(self.create(unfinished), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(unfinished)
            raise

    def sync(self) -> None:
        """Have the names of its files on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the folder."""
        os.close(self._fd)


def to_json(value: object) -> bytes:
    """Return one line of JSON in UTF-8, without its line break; halves of surrogate pairs (of file names) escaped."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Summary:
    """How many pages a document has, and who read them."""

    pages: int  # all pages, those that failed included
    failed_pages: int  # those that could not be read
    engines: dict[str, int]  # pages by the name of the engine that read them; blank ones are nobody's


class _Entry(NamedTuple):
    offset: int
    length: int
    engine: str | None  # None: the page failed; empty: it is blank


class Store:
    """The pages of one document and its outputs. It belongs to one task; its methods block."""

    def __init__(
        self,
        root: Folder,
        name: PurePath,
        source: str,
        sha256: str,
        mode: Mode,
        selection: str | None = None,
        dpi: int | None = None,
    ) -> None:
        """Name a document; nothing is looked for yet.

        Args:
            root: The folder of all outputs.
            name: The document's path below it, without the outputs' suffixes.
            source: The document's name in results.
            sha256: Of the document's file, in hexadecimal.
            mode: How it is read.
            selection: The pages that are asked for, as they were named; ``None``: all.
            dpi: At which its pages are drawn; ``None``: as each of them needs.
        """
        self.finished: dict[str, Any] | None = None
        self._root = root
        self._place, self._name = name.parent.parts, name.name
        self._source, self._selection = source, selection
        self._origin: dict[str, Any] = {"format": _FORMAT_VERSION, "sha256": sha256, "mode": mode}
        if dpi is not None:
            self._origin["dpi"] = dpi
        self._folder: Folder
        self._open = contextlib.ExitStack()  # what `close` closes
        self._entries: dict[int, _Entry] = {}
        self._journal: int | None = None
        self._end = 0
        self._formats_before: frozenset[str] = frozenset()
        self._pages_changed = False

    def open(self) -> None:
        """Look for what earlier runs left."""
        self._folder = self._open.enter_context(contextlib.closing(self._root.inner(self._place)))
        head = self._read_head()
        self._pages_changed = self._resume()
        self.finished = None if self._pages_changed else head

    def is_unchanged(self, formats: frozenset[str], *, headers: bool, retry_failed: bool, upgrade: bool) -> bool:
        """Tell whether the outputs are there, and nothing that is asked for could make them better."""
        head = self.finished
        if head is None:
            return False
        could_retry = retry_failed and head["failed_pages"] > 0
        could_upgrade = upgrade and any(engine != FIRST_ENGINE for engine in head["engines"])
        written = formats <= set(head["formats"]) and all(
            self._folder.exists(f"{self._name}.{form}", stat.S_ISDIR if form in _FOLDERS else stat.S_ISREG)
            for form in formats
        )
        same = head["headers"] == headers and head.get("selection") == self._selection
        return written and same and not could_retry and not could_upgrade

    def refuse_others(self, formats: frozenset[str]) -> None:
        """Raise `InputError` if an output in one of these formats would replace what no earlier run has left."""
        if self._folder.exists(self._name + JOURNAL):
            return
        for form in sorted((formats | {"json"}) - self._formats_before):
            name, note = f"{self._name}.{form}", f"{self._name}.json"
            if self._folder.exists(name, stat.S_ISDIR if form in _FOLDERS else stat.S_ISREG) and not (
                form == "json" and self._is_document(name)
            ):
                gone = f", or {note}, which an earlier run wrote with it, is gone" * (not self._folder.exists(note))
                raise InputError(
                    f"{str(self._folder.path / name)!r} is there, and not known as an output{gone}. "
                    "Fix: move or delete it, or choose another --out"
                )

    def _is_document(self, name: str) -> bool:
        """Tell whether a file is what ``dots-ocr read`` writes as JSON."""
        with contextlib.suppress(*_UNREADABLE):
            if (fd := self._folder.open(name)) is not None:
                with os.fdopen(fd, "rb") as file:
                    Document.from_dict(json.load(file))
                return True
        return False

    def reopen(self) -> None:
        """Make the pages of the finished output the beginning of a journal."""
        if self.finished is None:
            return
        fd = self._folder.open(f"{self._name}.json")
        if fd is None:
            return
        with os.fdopen(fd, "rb") as file, self._folder.replacing(self._name + JOURNAL) as journal:
            journal.write(self._header())
            file.readline()
            if file.readline() == _PAGES:
                for line in file:
                    journal.write(line.rstrip(b",\n") + b"\n")
                    if not line.endswith(b",\n"):  # the last page
                        break
        self._resume()
        if len(self._entries) != self.finished["pages"]:  # somebody edited the output
            self.discard()

    def wants(self, number: int, *, retry_failed: bool, upgrade: bool) -> bool:
        """Tell whether a page is to be read."""
        entry = self._entries.get(number)
        if entry is None:
            return True
        return retry_failed if entry.engine is None else upgrade and entry.engine not in (FIRST_ENGINE, "")

    def record(self, page: Page | FailedPage) -> bool:
        """Append a page, so that the death of this process does not lose it; return whether it was taken.

        A page that is there already stays, unless the new one is by the first engine or the old one had failed.
        """
        engine = page.engine if isinstance(page, Page) else None
        old = self._entries.get(page.number)
        if old is not None and old.engine is not None and engine != FIRST_ENGINE:
            return False
        if self._journal is None:
            self._journal = self._folder.create(self._name + JOURNAL)
            self._end = 0
            self._append(self._header())
        self._pages_changed = True
        line = to_json(page.to_dict())
        offset = self._end
        self._append(line + b"\n")
        self._entries[page.number] = _Entry(offset, len(line), engine)
        return True

    def sync(self) -> None:
        """Have the journal on the disk, so that the death of the machine does not lose it either."""
        if self._journal is not None:
            os.fsync(self._journal)

    def summary(self) -> Summary:
        """Count the pages that are there."""
        if self.finished is not None and not self._entries:
            return Summary(self.finished["pages"], self.finished["failed_pages"], dict(self.finished["engines"]))
        readers = [entry.engine for entry in self._entries.values()]
        engines = Counter(sorted(filter(None, readers)))
        return Summary(len(readers), readers.count(None), dict(engines))

    def assemble(self, formats: frozenset[str], *, headers: bool, draw: Callable[[int], PageImage]) -> None:
        """Make the outputs, one page in memory at a time, and delete the journal.

        The JSON is always made, because later runs go on from it. If pages have changed, what an earlier run wrote in
        other formats goes: it is of another state of the document. `draw` draws a page, by its number, for its pictures
        and the places of its words; it may raise `InputError`. If the disk says no (`OSError`), there is no unfinished
        output, and the journal remains.
        """
        if "csv" in formats:
            self._write_parts("csv", self._tables())
        if "pictures" in formats:
            self._write_parts("pictures", self._pictures(draw))
        with contextlib.ExitStack() as outputs:  # all are written before the first takes its name, the JSON last
            files = {
                suffix: outputs.enter_context(self._folder.replacing(f"{self._name}.{suffix}"))
                for suffix in ("json", *sorted(formats - {"json"} - _FOLDERS))
            }
            for suffix, file in files.items():
                if suffix == "json":
                    self._write_json(file, formats, headers)
                else:
                    parts = self._render(suffix, formats, headers, draw)
                    file.writelines(part.encode("utf-8", "backslashreplace") for part in parts)
                file.flush()
        for suffix in self._formats_before - formats - {"json"} if self._pages_changed else ():
            if suffix in _FOLDERS:
                self._write_parts(suffix, iter(()))
            else:
                self._folder.remove(f"{self._name}.{suffix}")
        self._folder.sync()
        self._delete_journal()

    def discard(self) -> None:
        """Forget the pages: they are of another document."""
        self._delete_journal()
        self._entries.clear()
        self.finished = None

    def close(self) -> None:
        """Close the files. The journal stays, and is synced as far as the disk allows."""
        with contextlib.suppress(OSError):
            self.sync()
        self._close_journal()
        self._open.close()

    def _delete_journal(self) -> None:
        self._folder.remove(self._name + JOURNAL)
        self._close_journal()

    def _close_journal(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _header(self) -> bytes:
        return to_json({"journal": self._origin, "version": __version__}) + b"\n"

    def _resume(self) -> bool:
        """Take up the journal, if it is of this source and mode; cut off what was being written when a run died."""
        self._journal = self._folder.open(self._name + JOURNAL, os.O_RDWR)
        if self._journal is None:
            return False
        self._entries.clear()
        self._end = 0
        with os.fdopen(os.dup(self._journal), "rb") as file:
            head = file.readline(_LONGEST_HEAD)
            with contextlib.suppress(*_UNREADABLE):
                if head.endswith(b"\n") and json.loads(head)["journal"] == self._origin:
                    self._end = len(head)
            while self._end and (line := file.readline()).endswith(b"\n"):
                try:
                    page = page_of(json.loads(line))
                except _UNREADABLE:
                    break
                engine = page.engine if isinstance(page, Page) else None
                self._entries[page.number] = _Entry(self._end, len(line) - 1, engine)
                self._end += len(line)
        if self._end:
            os.ftruncate(self._journal, self._end)
        else:
            self._close_journal()
        return self._journal is not None

    def _read_head(self) -> dict[str, Any] | None:
        fd = self._folder.open(f"{self._name}.json")
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            line = file.readline(_LONGEST_HEAD)
        try:
            head: dict[str, Any] = json.loads(line.removesuffix(b",\n") + b"}")["dots_ocr"]
            self._formats_before = FORMATS.intersection(head["ours" if "ours" in head else "formats"])
            ours = {key: head[key] for key in _ORIGIN & head.keys()} == self._origin and all(
                isinstance(head[key], kind) for key, kind in _HEAD.items()
            )
        except _UNREADABLE:
            ours = False
        return head if ours else None

    def _append(self, data: bytes) -> None:
        assert self._journal is not None
        view = memoryview(data)
        while view:
            written = os.pwrite(self._journal, view, self._end)
            view = view[written:]
            self._end += written

    def _raw(self) -> Iterator[bytes]:
        """The pages in order, as JSON."""
        for _, entry in sorted(self._entries.items()):
            assert self._journal is not None  # where there are pages, there is a journal
            yield os.pread(self._journal, entry.length, entry.offset)

    def _results(self) -> Iterator[Page | FailedPage]:
        """The pages in order."""
        return (page_of(json.loads(raw)) for raw in self._raw())

    def _write_parts(self, kind: str, parts: Iterator[tuple[str, bytes]]) -> None:
        """Write files into a folder of their own, in place of those of an earlier run."""
        with contextlib.closing(self._folder.inner([f"{self._name}.{kind}"])) as folder:
            names = set()
            for name, data in parts:
                with folder.replacing(name) as file:
                    file.write(data)
                names.add(name)
            for name in folder.names():
                if PART.fullmatch(name) and name not in names:
                    folder.remove(name)

    def _tables(self) -> Iterator[tuple[str, bytes]]:
        for page, index, cell in self._cells("Table"):
            text = io.StringIO(newline="")
            csv.writer(text).writerows([map(_for_spreadsheet, row) for row in table_rows(cell.text)])
            yield _part(page, index, "csv"), text.getvalue().encode("utf-8-sig", "backslashreplace")

    def _pictures(self, draw: Callable[[int], PageImage]) -> Iterator[tuple[str, bytes]]:
        number, image = 0, None
        for page, index, cell in self._cells("Picture"):
            if number != page.number:
                number, image = page.number, hocr.drawn(draw, page.number)
            if image is not None and cell.box is not None:
                box = to_page(cell.box, (page.width, page.height), image.size)
                if box.left < box.right and box.top < box.bottom:
                    yield _part(page, index, "png"), images.to_png(image.crop(box))

    def _cells(self, category: str) -> Iterator[tuple[Page, int, Cell]]:
        """The cells of a kind, with their pages and places."""
        for page in self._results():
            if isinstance(page, Page):
                yield from ((page, index, cell) for index, cell in enumerate(page.cells) if cell.category == category)

    def _markdown(self, page: Page | FailedPage, headers: bool, pictures: set[str]) -> str:
        if isinstance(page, FailedPage):
            return page.markdown()

        def address(index: int, cell: Cell) -> str | None:
            name = _part(page, index, "png")
            return f"{quote(self._name, errors='surrogateescape')}.pictures/{name}" if name in pictures else None

        return export.markdown(page, headers=headers, picture=address)

    def _render(
        self, suffix: str, formats: frozenset[str], headers: bool, draw: Callable[[int], PageImage]
    ) -> Iterator[str]:
        """The parts of an output other than the JSON."""
        if suffix == "html":
            yield from export.html_document(self._source, (page.html(headers=headers) for page in self._results()))
        elif suffix == "hocr":
            yield from hocr.document_hocr(self._source, self._results(), partial(hocr.drawn, draw))
        elif suffix == "txt":
            yield from self._text()
            yield "\n"
        else:
            pictures: set[str] = set()
            if "pictures" in formats:
                with contextlib.closing(self._folder.inner([f"{self._name}.pictures"])) as folder:
                    pictures.update(folder.names())
            blocks = (self._markdown(page, headers, pictures) for page in self._results())
            yield from _joined(filter(None, blocks), "\n\n")  # as in the whole document, nothing of an empty page
            yield "\n"

    def _text(self) -> Iterator[str]:
        return _joined((page.text for page in self._results()), "\n\n")

    def _write_json(self, file: IO[bytes], formats: frozenset[str], headers: bool) -> None:
        """Write ``Document.to_dict()`` with our own note in the first line, and one page a line."""
        note = {
            **self._origin,
            "version": __version__,
            "headers": headers,
            "selection": self._selection,
            "formats": sorted(formats | {"json"}),
            # With those of earlier runs, which may be of other headers.
            "ours": sorted(formats | {"json"} | (frozenset() if self._pages_changed else self._formats_before)),
            **asdict(self.summary()),
        }
        file.write(to_json({"source": self._source, "dots_ocr": note}).removesuffix(b"}") + b",\n" + _PAGES)
        file.writelines(_joined(self._raw(), b",\n"))
        file.write(_END_OF_PAGES + b'"text": "')
        for part in self._text():
            file.write(to_json(part)[1:-1])
        file.write(b'"}\n')


def _joined(parts: Iterable[AnyStr], between: AnyStr) -> Iterator[AnyStr]:
    """Yield the parts with something between them, so that a large document is never in memory."""
    for index, part in enumerate(parts):
        yield between * (index > 0) + part


def _part(page: Page, index: int, suffix: str) -> str:
    return f"page-{page.number}-{index + 1}.{suffix}"


def _for_spreadsheet(text: str) -> str:
    """Keep a cell from being taken for a formula, which a document's author could have written; numbers stay."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(text) else text
