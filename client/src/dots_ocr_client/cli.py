"""The command ``dots-ocr``."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from .errors import DotsOCRError, InputError
from .progress import count, printable, shown

if TYPE_CHECKING:  # what takes long to import waits until a command needs it
    from .batch import Report
    from .doctor import Check
    from .documents import PageImage
    from .engines.base import Engine
    from .engines.vllm import VLLMEngine
    from .prompts import Mode
    from .results import Box, Document, FailedPage, Page

EXIT_OK, EXIT_UNREAD, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="dots-ocr",
    help="Read documents with dots.ocr on a vLLM server, and with Tesseract when that server cannot.",
    epilog="Environment: DOTS_OCR_BASE_URL, DOTS_OCR_API_KEY. "
    "Exit status: 0 all went well, 1 something could not be read or does not work, 2 wrong usage or bad input, "
    "130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Format(StrEnum):  # typer knows no lists of Literal
    """What a document can be written as."""

    MD = "md"
    TEXT = "text"
    JSON = "json"
    HTML = "html"


class _Ended(Exception):
    """The command ends early, with a message and an exit status."""

    def __init__(self, kind: str, message: str, status: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; default: those of this process.

    Returns:
        The exit status: 0; 1 if something could not be read or does not work; 2 for wrong usage or bad input; 130 if
        it was interrupted (Ctrl-C or SIGTERM).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are no UTF-8, and terminals that are not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _sigterm_interrupts():
            status = app(arguments, prog_name="dots-ocr", standalone_mode=False)
        sys.stdout.flush()
        if status != EXIT_INTERRUPTED:  # which typer makes of a KeyboardInterrupt
            return int(status or EXIT_OK)
        ended = _Ended("Interrupted", "interrupted", EXIT_INTERRUPTED)
    except _Ended as error:
        ended = error
    except typer.TyperException as error:
        message = f"{error.format_message()} (dots-ocr --help explains)"
        ended = _Ended("UsageError", message, EXIT_USAGE)
    except DotsOCRError as error:
        ended = _Ended(type(error).__name__, str(error), EXIT_USAGE if isinstance(error, InputError) else EXIT_UNREAD)
    except BrokenPipeError:  # the reader of our output has gone, as with head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_UNREAD
    except OSError as error:
        ended = _Ended(type(error).__name__, str(error), EXIT_UNREAD)
    if "--json" in arguments:
        _print_json({"error": {"type": ended.kind, "message": str(ended)}})
    else:
        lines = [printable(line) for line in str(ended).split("\n")]
        print("dots-ocr: " + "\n".join(lines), file=sys.stderr)
    return ended.status


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"dots-ocr {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


def _seconds(value: float) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value:g} is not a positive number of seconds")
    return value


def _numbers(text: str | None) -> str | None:
    """Check a box. It stays text, because typer needs types at once, and `Box` takes long to import."""
    if text is not None:
        _box(text)
    return text


def _box(text: str) -> Box:
    from .results import Box

    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not four whole numbers with commas, in pixels of the page") from None
    return Box(left, top, right, bottom)


BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The server's address with /v1; else DOTS_OCR_BASE_URL, else http://127.0.0.1:8000/v1."
    ),
]
Model = Annotated[str, typer.Option(metavar="NAME", help="One of the names that the server serves.")]
Timeout = Annotated[float, typer.Option(metavar="S", callback=_seconds, help="Seconds for one page and all engines.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]


@app.command()
def read(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="PDFs and images; folders with --out.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write one set of files per document here; a second run goes on."),
    ] = None,
    mode: Annotated[
        Literal["layout", "layout-only", "text", "grounding", "web", "scene", "svg", "general"],
        typer.Option(help="What to read; web, scene, svg and general need dots.mocr."),
    ] = "layout",
    pages: Annotated[str | None, typer.Option(metavar="1-3,7", help="Which pages; default: all.")] = None,
    box: Annotated[
        str | None,
        typer.Option(metavar="L,T,R,B", callback=_numbers, help="For --mode grounding: where, in pixels of the page."),
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="For --mode general.")] = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option("--format", help="Default: md, with --out also json. With --out it may be repeated."),
    ] = None,
    headers: Annotated[
        bool, typer.Option("--headers/--no-headers", help="Page headers and footers in md and html.")
    ] = True,
    base_url: BaseUrl = None,
    model: Model = "dots.ocr",
    engine: Annotated[
        Literal["auto", "vllm", "tesseract"],
        typer.Option(help="auto: vllm, and tesseract if that cannot."),
    ] = "auto",
    languages: Annotated[str, typer.Option(metavar="eng+rus", help="Of Tesseract.")] = "eng",
    timeout: Timeout = 120.0,
    max_in_flight: Annotated[int, typer.Option(metavar="N", min=1, help="Pages at the server at once, at most.")] = 32,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="With --out: read pages again that Tesseract read.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="As --format json; with --out print a report. Errors as JSON too.")
    ] = False,
) -> int:
    """Read documents: one to standard output, or any number of them into a folder with --out.

    Which engine read a page, and why others did not, goes to standard error.
    """
    _check_usage(files, out, mode, pages, box, question, formats, upgrade, as_json)
    spoken = cast("Mode", mode.replace("-", "_"))
    engines = _engines(base_url, model, engine, languages, max_in_flight)
    if out is not None:
        chosen = formats or (Format.JSON, Format.MD)
        kinds = frozenset("txt" if form is Format.TEXT else form.value for form in chosen)
        report = _batch(engines, timeout, max_in_flight, files, out, spoken, kinds, headers, upgrade)
        return _summarize(report, out, as_json)

    from .client import DotsOCR
    from .results import FailedPage

    with DotsOCR(engines=engines, timeout=timeout, max_in_flight=max_in_flight) as ocr:
        try:
            document = ocr.read(
                files[0], mode=spoken, pages=pages, box=None if box is None else _box(box), question=question
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    _print_text(_written(document, Format.JSON if as_json else (formats or [Format.MD])[0], headers))
    for page in document.pages:
        print(printable(_failure(page) if isinstance(page, FailedPage) else _provenance(page)), file=sys.stderr)
    return EXIT_UNREAD if document.failures else EXIT_OK


def _check_usage(
    files: list[Path],
    out: Path | None,
    mode: str,
    pages: str | None,
    box: str | None,
    question: str | None,
    formats: Sequence[Format] | None,
    upgrade: bool,
    as_json: bool,
) -> None:
    """Refuse combinations of options that have no meaning.

    Raises:
        typer.BadParameter: There is one.
    """
    wrong = None
    if (mode == "grounding") != (box is not None):
        wrong = "--mode grounding needs --box, and only that mode takes one"
    elif (mode == "general") != bool(question):
        wrong = "--mode general needs --question, and only that mode takes one"
    elif out is not None and (pages, box, question) != (None, None, None):
        wrong = "--pages, --box and --question are for one document, without --out"
    elif out is None and len(files) != 1:
        wrong = "several documents need --out DIR"
    elif out is None and upgrade:
        wrong = "--upgrade needs --out DIR"
    elif out is None and (len(formats or ()) > 1 or (as_json and formats and list(formats) != [Format.JSON])):
        wrong = "several formats need --out DIR"
    if wrong:
        raise typer.BadParameter(wrong)


def _engines(base_url: str | None, model: str, which: str, languages: str, max_in_flight: int) -> list[Engine]:
    from .engines.tesseract import TesseractEngine
    from .engines.vllm import VLLMEngine
    from .limiter import START, Limiter

    chain: list[Engine] = []
    if which != "tesseract":
        limiter = Limiter(min(START, max_in_flight), max_in_flight)
        chain.append(VLLMEngine(base_url, model=model, limiter=limiter))
    if which != "vllm":
        chain.append(TesseractEngine(languages))
    return chain


def _written(document: Document, form: Format, headers: bool) -> str:
    match form:
        case Format.JSON:
            return json.dumps(document.to_dict(), ensure_ascii=False, indent=2)
        case Format.TEXT:
            return document.text
        case Format.HTML:
            return document.html(headers=headers)
        case Format.MD:
            return document.markdown(headers=headers)


def _provenance(page: Page) -> str:
    notes = [f"page {page.number}: {page.engine} ({page.model}) answered in {page.seconds:.2f} s"]
    notes += [str(attempt) for attempt in page.attempts]
    notes += page.warnings
    return " ".join("; ".join(notes).split())


def _failure(page: FailedPage) -> str:
    return " ".join(f"page {page.number}: failed: {page.error}: {page.reason}".split())


def _batch(
    engines: list[Engine],
    timeout: float,
    max_in_flight: int,
    inputs: list[Path],
    out: Path,
    mode: Mode,
    formats: frozenset[str],
    headers: bool,
    upgrade: bool,
) -> Report:
    async def run() -> Report:
        from . import batch
        from .client import AsyncDotsOCR

        # Not an exception out of whatever runs at the moment, so that it ends as cleanly as with Ctrl-C.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with shown() as progress:
            async with AsyncDotsOCR(engines=engines, timeout=timeout, max_in_flight=max_in_flight) as client:
                return await batch.run(
                    client,
                    inputs,
                    out,
                    mode=mode,
                    formats=formats,
                    headers=headers,
                    upgrade=upgrade,
                    progress=progress,
                )

    try:
        return asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        message = "stopped; what is finished is safe: run the same command again to go on"
        raise _Ended("Interrupted", message, EXIT_INTERRUPTED) from None


def _summarize(report: Report, out: Path, as_json: bool) -> int:
    if as_json:
        _print_json(report.to_dict())
    totals = report.totals
    states = ", ".join(
        f"{totals[state]} {state}" for state in ("read", "unchanged", "partial", "failed") if totals[state]
    )
    by = ", ".join(f"{number} by {name}" for name, number in totals["engines"].items())
    documents, pages = count(totals["documents"], "document"), count(totals["pages"], "page")
    said = f"{documents}{': ' * bool(states)}{states}; {pages}{': ' * bool(by)}{by}"
    rate = f"; {totals['pages_read']} now, in {report.seconds:.1f} s ({totals['pages_per_second']:.1f} pages/s)"
    bad = bool(totals["partial"] or totals["failed"])
    why = f"; why: see {out / 'report.json'}" if bad else ""
    print(printable(f"{said}{rate}{why}"), file=sys.stderr)
    return EXIT_UNREAD if bad else EXIT_OK


@app.command()
def doctor(
    base_url: BaseUrl = None, model: Model = "dots.ocr", timeout: Timeout = 120.0, as_json: AsJson = False
) -> int:
    """Check the server, its model, Tesseract and the installation, and say what to do about what does not work."""
    from .engines.vllm import VLLMEngine

    engine = VLLMEngine(base_url, model=model)

    async def run() -> list[Check]:
        from .doctor import examine

        try:
            return await examine(engine, timeout)
        finally:
            await engine.aclose()

    checks = asyncio.run(run())
    works = all(check.status != "failed" for check in checks)
    if as_json:
        listed = [check.to_dict() for check in checks]
        _print_json({"ok": works, "base_url": engine.base_url, "model": engine.model, "checks": listed})
    else:
        for check in checks:
            _print_check(check)
    return EXIT_OK if works else EXIT_UNREAD


def _print_check(check: Check) -> None:
    took = "" if check.seconds is None else f" ({check.seconds:.2f} s)"
    _print_text(f"{check.status:8} {check.name}: {printable(check.detail)}{took}")
    if check.cure and check.status != "skipped":
        _print_text(f"         -> {printable(check.cure)}")


@app.command()
def models(base_url: BaseUrl = None, timeout: Timeout = 10.0, as_json: AsJson = False) -> int:
    """List the models that the server serves."""
    from .engines.vllm import VLLMEngine

    engine = VLLMEngine(base_url)
    cards = asyncio.run(_cards(engine, timeout))
    listed = [
        {"name": card.get("id"), "max_model_len": card.get("max_model_len"), "root": card.get("root")} for card in cards
    ]
    if as_json:
        _print_json({"base_url": engine.base_url, "models": listed})
        return EXIT_OK
    for one in listed:
        length = "unknown" if one["max_model_len"] is None else f"{one['max_model_len']} tokens"
        _print_text(printable(f"{one['name']}: context {length}, root {one['root'] or 'unknown'}"))
    return EXIT_OK


async def _cards(engine: VLLMEngine, seconds: float) -> list[dict[str, Any]]:
    try:
        async with asyncio.timeout(seconds):
            return await engine.models(seconds)
    except TimeoutError:
        message = f"{engine.base_url} did not answer within {seconds:g} s: look at its load, or allow more (--timeout)"
        raise _Ended("DeadlineExceeded", message, EXIT_UNREAD) from None
    finally:
        await engine.aclose()


@app.command()
def view(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="What read wrote with --json or --out.")],
    source: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The document, for its pictures; default: where it was when it was read."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Default: beside RESULT.json, as RESULT.view.html.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write one HTML file that shows pages, boxes and texts side by side, for any browser."""
    from .view import write_view

    document, digest = _result(result)
    file = out or result.with_suffix(".view.html")
    if file.resolve() in {path.resolve() for path in (result, source) if path}:
        raise typer.BadParameter("--out would replace what is shown")
    try:
        pictures = _pictures(document, Path(source or document.source), digest)
    except InputError as error:
        if source is not None:
            raise
        _warn(f"without pictures: {error}; --source tells where the document is")
        pictures = iter(())
    write_view(document, pictures, file)
    if as_json:
        _print_json({"file": str(file)})
    else:
        _print_text(printable(str(file)))
    return EXIT_OK


def _result(file: Path) -> tuple[Document, str | None]:
    """Load a result, and the SHA-256 of the document that it is of, if it tells.

    Raises:
        InputError: It is none.
    """
    from .results import Document

    try:
        values = json.loads(file.read_bytes())
        about = values.get("dots_ocr") or {}
        return Document.from_dict(values), about.get("sha256")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is no result: give a file that dots-ocr read wrote as JSON") from error


def _pictures(document: Document, source: Path, digest: str | None) -> Iterator[PageImage]:
    """Draw the pages that a document has results of, one at a time.

    Raises:
        InputError: The source cannot be opened, or has fewer pages.
    """
    import hashlib

    from .documents import draw, open_document

    opened = open_document(source, [page.number for page in document.pages])
    if digest is not None:
        with source.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                _warn(f"{source} is no longer what was read: boxes may be misplaced")

    def drawn() -> Iterator[PageImage]:
        with opened:
            for number in opened.numbers:
                try:
                    yield draw(opened.reference(number))
                except InputError as error:
                    _warn(f"page {number} is without a picture: {error}")

    return drawn()


def _warn(message: str) -> None:
    print(f"dots-ocr: {printable(message)}", file=sys.stderr)


def _print_text(text: str) -> None:
    if sys.stdout.isatty():  # a page can say what a terminal would obey
        text = "".join(one if one in "\n\t" or not _is_control(one) else " " for one in text)
    print(text)


def _is_control(one: str) -> bool:
    return one < " " or "\x7f" <= one <= "\x9f"


def _print_json(values: Any) -> None:
    _print_text(json.dumps(values, ensure_ascii=False, indent=2))
