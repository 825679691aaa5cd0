"""Read many documents into a folder: many at once, each page kept as soon as it is read, and gone on with later."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, TypeVar

from .apps.progress import Silent
from .errors import ConfigurationError, DotsOCRError, InputError
from .pages.documents import OpenDocument, is_document, parse_pages
from .pages.rasterizer import draw
from .prompts import MODES, Mode
from .results import Page
from .results.store import FORMATS, JOURNAL, PART, Folder, Store, Summary, to_json

if TYPE_CHECKING:
    from .client import AsyncDotsOCR

# Of the files that are taken from a folder; upper case counts too. One without a suffix is looked into.
SUFFIXES: Final = frozenset(
    ".pdf .png .jpg .jpeg .tif .tiff .webp .bmp .gif .jp2 .heic .heif .avif .ppm .pgm .pbm .pnm .jfif .jpe .j2k".split()  # noqa: SIM905
)
REPORT: Final = "report.json"
LOCK: Final = ".dots-ocr.lock"
# Seconds between two syncs of a journal. The death of this process loses nothing either way, that of the machine loses
# the pages of this time. Measured: with a sync for each page, 2,000 pages that cost nothing took five times as long.
SYNC_SECONDS: Final = 0.2
# Documents that are open beyond the pages in flight, so that opening and finishing keeps no slot empty.
SPARE: Final = 4

# Bytes of a document's name that leave room for what ours end with: Linux takes names of 255 bytes (NAME_MAX).
LONGEST_NAME: Final = 255 - len(f"{JOURNAL}.tmp")

_OURS: Final = (*(f".{suffix}" for suffix in FORMATS), JOURNAL)
_Stamp = tuple[int, int, int]
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Status = Literal["read", "partial", "failed", "unchanged"]

P = ParamSpec("P")
T = TypeVar("T")


class OutputError(DotsOCRError):
    """The outputs cannot be written, for example because the disk is full."""


@dataclass(frozen=True, slots=True)
class DocumentReport:
    """What became of one document."""

    source: str
    # ``read``, ``partial`` (some pages failed), ``failed`` (all did, or it cannot be opened or written), or
    # ``unchanged`` (nothing was left to do).
    status: Status
    pages: int  # all pages that are in the outputs, those that failed included
    failed_pages: int  # those that could not be read
    engines: dict[str, int]  # pages by the name of the engine that read them; blank ones are nobody's
    pages_read: int  # pages that this run read
    seconds: float  # how long it took
    error: str | None = None  # why it failed, or why the first of its pages did


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a batch."""

    started: str  # date and time in ISO 8601, UTC
    finished: str
    seconds: float  # how long it took
    stopped: str | None = None  # why it ended before all documents were finished, if it did
    # Files and folders in the given folders that were passed over, by the reason: ``hidden``, ``link to a folder``,
    # ``without a suffix`` (and no document that can be read), or a suffix that is not in `SUFFIXES`; and what was
    # given, but lies among the outputs and is ``named as an output``.
    skipped: dict[str, int] = field(default_factory=dict)
    documents: Sequence[DocumentReport]  # the documents that were finished, in the order in which they were given

    @property
    def totals(self) -> dict[str, Any]:
        """Counts over all documents; ``pages_per_second`` counts what this run read."""
        status = Counter(document.status for document in self.documents)
        engines = sum((Counter(document.engines) for document in self.documents), Counter[str]())
        pages, failed, read = (
            sum(getattr(document, name) for document in self.documents)
            for name in ("pages", "failed_pages", "pages_read")
        )
        return {
            "documents": len(self.documents),
            **{name: status[name] for name in ("read", "partial", "failed", "unchanged")},
            "pages": pages,
            "failed_pages": failed,
            "blank_pages": pages - failed - engines.total(),
            "engines": dict(sorted(engines.items())),
            "pages_read": read,
            "pages_per_second": round(read / self.seconds, 3) if self.seconds else 0.0,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the totals as JSON-ready values."""
        return {"totals": self.totals, **asdict(self)}


async def run(
    client: AsyncDotsOCR,
    inputs: Sequence[Path],
    out: Path,
    *,
    mode: Mode = "layout",
    formats: frozenset[str] = frozenset({"json", "md"}),
    headers: bool = True,
    upgrade: bool = False,
    pages: str | None = None,
    dpi: int | None = None,
    password: str | None = None,
    progress: Silent | None = None,
) -> Report:
    """Read documents into a folder, and go on where an earlier run ended.

    A page that an earlier run read is not read again, however that run ended, as long as the document's bytes and the
    mode are the same. ``OUT/report.json`` holds the report, also when the batch is stopped or cancelled.

    Args:
        client: Reads the pages.
        inputs: Files, which are always taken, and folders, which are searched for documents (see `SUFFIXES`) down to
            the last folder; hidden files and folders and links to folders are passed over, and the report counts them.
        out: The folder for the outputs; made if it is not there. That of ``a.pdf`` are ``a.pdf.json`` and so on;
            those of a folder's files have the same place below `out` as they have in the folder. A name of more than
            `LONGEST_NAME` bytes is cut, and gets a digest of the whole name.
        mode: What to read; not ``grounding`` or ``general``, which need a box or a question.
        formats: Outputs, see `store.FORMATS`; the JSON is always made, because later runs go on from it.
        headers: With the headers and footers of the pages, in Markdown and HTML.
        upgrade: Read those pages again that another engine than vLLM read. The old page stays where that fails.
        pages: Of each document, such as ``1-3,7``; default: all. Pages that an earlier run read stay in the outputs.
        dpi: At which pages of PDFs are drawn; see `AsyncDotsOCR.read`. Another one has them all read again.
        password: Of encrypted PDFs; the others need none. It is written nowhere.
        progress: Is told what happens, in the event loop: it must be quick, and must not raise.

    Raises:
        InputError: Nothing was read: an input is missing, two have the same outputs, ``OUT/report.json`` is not ours,
            another run uses the folder, or the like.
        ConfigurationError: The server's settings are wrong. What was read until then is safe.
        OutputError: The disk is full, or the report cannot be written. What was read until then is safe.
        ValueError: There is no such mode or format.
    """
    if mode not in MODES or not formats <= FORMATS:
        raise ValueError(f"there is no mode {mode!r}, or one of the formats {sorted(formats)} is unknown")
    if mode in ("grounding", "general"):
        raise InputError(f"the mode {mode!r} needs a box or a question for each page: read such documents one by one")
    skipped: Counter[str] = Counter()
    found = await _in_thread(_find, inputs, out, skipped)
    with _claimed(out) as root:
        if (old := root.open(REPORT)) is not None:
            with os.fdopen(old, "rb") as file:
                if not file.read(20).startswith((b'{"totals": ', b'{"started": ')):  # how ours began and begin
                    raise InputError(
                        f"{str(out / REPORT)!r} is no report of ours. Fix: move it, or choose another --out"
                    )
        batch = _Batch(client, root, mode, formats, headers, upgrade, pages, dpi, password, progress or Silent())
        return await batch.run(found, dict((+skipped).most_common()))


@dataclass(slots=True)
class _Batch:
    client: AsyncDotsOCR
    root: Folder
    mode: Mode
    formats: frozenset[str]
    headers: bool
    upgrade: bool
    pages: str | None
    dpi: int | None
    password: str | None = field(repr=False)
    progress: Silent

    async def run(self, found: dict[PurePath, Path], skipped: dict[str, int]) -> Report:
        started, clock = datetime.now(UTC), time.monotonic()
        self.progress.documents(len(found))
        reports: dict[int, DocumentReport] = {}
        queue = iter(enumerate(found.items()))

        async def work() -> None:
            for index, (name, path) in queue:
                reports[index] = await self._finish(name, path)

        stopped: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(found), self.client.max_in_flight + SPARE)):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            stopped = _gravest(errors)
        except asyncio.CancelledError as error:
            stopped = error
        report = Report(
            started=started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
            documents=[report for _, report in sorted(reports.items())],
            stopped=None if stopped is None else f"{type(stopped).__name__}: {stopped}".removesuffix(": "),
            skipped=skipped,
        )
        try:
            await _in_thread(self._write, report)
        except OSError as error:
            if stopped is None:
                raise OutputError(f"cannot write {REPORT}: {error.strerror}") from error
        if stopped is not None:
            raise stopped
        return report

    def _write(self, report: Report) -> None:
        with self.root.replacing(REPORT) as file:
            file.write(to_json(report.to_dict()) + b"\n")
        self.root.sync()

    async def _finish(self, name: PurePath, path: Path) -> DocumentReport:
        """Read one document, whatever happens, unless it means that the others cannot be read either."""
        clock = time.monotonic()
        source = str(path)
        count = _Count()
        status: Status | None = None
        summary = Summary(0, 0, {})
        try:
            sha256, stamp = await _in_thread(_digest, path)
            store = Store(self.root, name, source, sha256, self.mode, self.pages, self.dpi)
            try:
                await _in_thread(store.open)
                status = await self._fill(store, path, stamp, count)
            finally:
                summary = store.summary()
                await _in_thread(store.close)
        except ConfigurationError:
            raise
        except DotsOCRError as error:
            status, count.error = "failed", str(error)
        except OSError as error:
            if error.errno in _FULL:
                raise OutputError(
                    f"cannot write the outputs of {source!r}: {error.strerror}; make room, and run the same again"
                ) from error
            status, count.error = "failed", f"cannot write the outputs: {error.strerror or error}"
        self.progress.done(source, status)
        seconds = round(time.monotonic() - clock, 3)
        return DocumentReport(
            source, status, **asdict(summary), pages_read=count.pages_read, seconds=seconds, error=count.error
        )

    async def _fill(self, store: Store, path: Path, stamp: _Stamp, count: _Count) -> Status:
        """Read what is missing, and make the outputs."""
        again = {"retry_failed": True, "upgrade": self.upgrade}
        if store.is_unchanged(self.formats, headers=self.headers, **again):
            return "unchanged"
        await _in_thread(store.refuse_others, self.formats)
        # By the client, once: what a file holds up is a process of the client's, no thread of ours.
        with await self.client.open(path, password=self.password) as opened:
            opened.dpi = self.dpi
            numbers = opened.numbers if self.pages is None else parse_pages(self.pages, opened.page_count, opened.name)
            await _in_thread(store.reopen)
            wanted = [number for number in numbers if store.wants(number, **again)]
            self.progress.opened(str(path), len(wanted))
            if wanted:
                await self._record(store, path, opened, wanted if wanted != list(opened.numbers) else None, count)
            if await _in_thread(_stamp, path) != stamp:
                await _in_thread(store.discard)
                raise InputError(f"{str(path)!r} changed while it was read: run the same again")
            missing = [number for number in numbers if store.wants(number, retry_failed=False, upgrade=False)]
            if missing:
                raise DotsOCRError(f"the client did not deliver {len(missing)} pages, the first of them {missing[0]}")
            await _in_thread(
                store.assemble, self.formats, headers=self.headers, draw=lambda number: draw(opened.reference(number))
            )
        summary = store.summary()
        if summary.failed_pages == 0:
            return "read"
        return "failed" if summary.failed_pages == summary.pages else "partial"

    async def _record(
        self, store: Store, path: Path, opened: OpenDocument, pages: list[int] | None, count: _Count
    ) -> None:
        synced = time.monotonic()
        stream = self.client.stream(opened, mode=self.mode, pages=pages)
        async with contextlib.aclosing(stream) as results:
            async for page in results:
                kept = store.record(page)
                if isinstance(page, Page):
                    count.pages_read += 1
                elif kept and count.error is None:
                    count.error = f"page {page.number}: {page.reason}"
                self.progress.page(str(path), page)
                if time.monotonic() - synced >= SYNC_SECONDS:
                    await _in_thread(store.sync)
                    synced = time.monotonic()


@dataclass(slots=True)
class _Count:
    pages_read: int = 0
    error: str | None = None


def _gravest(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What stopped the batch: our own kinds of error first, because they say what to do."""
    error: BaseException = errors.subgroup(DotsOCRError) or errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do blocking work. When cancelled, end only after it, so that nothing goes on behind our back."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # otherwise asyncio would complain that nobody looked
        raise


def _find(inputs: Iterable[Path], out: Path, skipped: Counter[str]) -> dict[PurePath, Path]:
    """Map where the outputs go, without their suffixes, to the documents, and count what is passed over."""
    found: dict[PurePath, Path] = {}
    for path, name in _candidates(inputs, out, skipped):
        name = name.with_name(_shortened(name.name))
        if name in found:
            raise InputError(
                f"{str(found[name])!r} and {str(path)!r} would have the same outputs: read them into different folders"
            )
        if str(name) == PurePath(REPORT).stem:
            raise InputError(f"the outputs of {str(path)!r} would replace {REPORT}: rename it")
        found[name] = path
    if not found:
        where = ", ".join(repr(str(path)) for path in inputs) or "no folder"
        over = f"; passed over: {dict(+skipped)}" * bool(+skipped)
        raise InputError(f"there are no documents in {where}{over}. Fix: name files to read, or folders with some")
    return found


def _shortened(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) <= LONGEST_NAME:
        return name
    end = f"~{hashlib.sha256(raw).hexdigest()[:16]}{PurePath(name).suffix[:10]}"
    return raw[: LONGEST_NAME - len(os.fsencode(end))].decode(errors="ignore") + end


def _candidates(inputs: Iterable[Path], out: Path, skipped: Counter[str]) -> Iterator[tuple[Path, PurePath]]:
    for path in inputs:
        with _refusing("read", path):
            kind = path.stat().st_mode
            if _is_output(path) and path.resolve().is_relative_to(out.resolve()):  # a pattern names all of a folder
                skipped["named as an output"] += 1
                continue
            names = sorted(_walk(path, out.resolve(), skipped)) if stat.S_ISDIR(kind) else []
        if stat.S_ISREG(kind):
            yield path, PurePath(path.name)
        elif not stat.S_ISDIR(kind):
            raise InputError(f"{str(path)!r} is neither a file nor a folder")
        for name in names:
            yield path / name, name


@contextlib.contextmanager
def _refusing(verb: str, path: Path) -> Iterator[None]:
    """Have what cannot be done with a path refused in words that name it."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot {verb} {str(path)!r}: {reason}") from error


def _walk(folder: Path, out: Path, skipped: Counter[str]) -> Iterator[PurePath]:
    def fail(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename!r}: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=fail):
        skipped["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped["link to a folder"] += sum(Path(place, name).is_symlink() for name in folders)
        inside = Path(place).resolve().is_relative_to(out)
        folders[:] = [name for name in folders if not (inside and _is_output(Path(place, name)))]
        for name in files:
            if (reason := _reason_to_skip(Path(place, name))) is None:
                yield PurePath(place, name).relative_to(folder)
            elif not (inside and _is_output(Path(place, name))):
                skipped[reason] += 1


def _is_output(path: Path) -> bool:
    """Tell whether a file has a name as outputs have, or a folder holds parts of a document that was read."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # such as for names that are too long with another suffix
            return path.suffix in (".csv", ".pictures") and (
                all(PART.fullmatch(part.name) for part in path.iterdir())
                or any(path.with_suffix(end).exists() for end in (".json", JOURNAL))
            )
        return False
    return path.name.endswith((LOCK, *_OURS))


def _reason_to_skip(file: Path) -> str | None:
    kind = file.suffix.lower()
    if file.name.startswith("."):
        return "hidden"
    named = re.fullmatch(r"\.[a-z][a-z0-9_~-]{0,9}", kind)  # others end a name, such as "No. 5" or "scan.001"
    if kind in SUFFIXES or (not named and is_document(file)):
        return None
    return kind if named else "without a suffix"


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Folder]:
    """Make the folder, and keep other runs out of it."""
    with _refusing("write to", out):
        out.mkdir(parents=True, exist_ok=True)
        root = Folder(out)
    with contextlib.closing(root):
        # Whoever can open a file can lock it, and keep us out: nobody else can open this one.
        lock = root.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if lock is None:
            raise InputError(f"cannot write to {str(out)!r}: the file {LOCK} cannot be made, or is another user's")
        with os.fdopen(lock):
            with _refusing("lock", out):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise InputError(f"another run writes to {str(out)!r}: wait until it ends, or end it") from error
            yield root


def _stamp(path: Path) -> _Stamp:
    """Return what changes when a file changes."""
    with _refusing("read", path):
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(path: Path) -> tuple[str, _Stamp]:
    """Return the SHA-256 of a file, and its stamp from before."""
    stamp = _stamp(path)
    if not path.is_file():  # a pipe would block
        raise InputError(f"{str(path)!r} is not a regular file")
    with _refusing("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), stamp
