"""The command ``dots-ocr``."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer
from typer import Argument, Option

from .apps.progress import Lines, Silent, shown
from .errors import DotsOCRError, InputError
from .texts import count, printable
from .texts import write as write_file

if TYPE_CHECKING:  # what takes long to import waits until a command needs it
    from .apps.bench.measure import Measurement
    from .apps.doctor import Check
    from .batch import Report
    from .client import AsyncDotsOCR
    from .engines.base import Engine
    from .engines.defaults import Name
    from .pages.documents import PageImage
    from .prompts import Mode
    from .results import Document

T = TypeVar("T")

SERVICE_SECONDS = 5.0  # for a server to say what it is, when other engines than the first read pages
EXIT_OK, EXIT_UNREAD, EXIT_USAGE, EXIT_FALLBACK, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="dots-ocr",
    help="Read documents with dots.ocr on a vLLM server, or with the next engine that can.",
    epilog="Environment: DOTS_OCR_BASE_URL, DOTS_OCR_API_KEY, DOTS_OCR_PASSWORD. "
    "Exit status: 0 all went well, 1 something could not be read or does not work, 2 wrong usage or bad input, "
    "3 all was read, but some of it by a fallback that was not asked for, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


# What a document can be written as, and which engine to ask: typer knows no lists of Literal.
Format = StrEnum("Format", "MD TEXT JSON HTML HOCR CSV")
EngineName = StrEnum("EngineName", "VLLM QWEN TEXTLAYER TESSERACT")


class _Ended(Exception):
    """The command ends early, with a message and an exit status."""

    def __init__(self, kind: str, message: str, status: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default this process's; return the exit status that --help names."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in ([], ["read"], ["view"]):  # which do nothing by themselves
        arguments.append("--help")
    for name in ("stdin", "stdout", "stderr"):  # one that is closed is none
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115, PTH123
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
        ended = _Ended("UsageError", f"{error.format_message()} (dots-ocr --help explains)", EXIT_USAGE)
    except BrokenPipeError:  # the reader of our output has gone, as with head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_UNREAD
    except (DotsOCRError, OSError) as error:
        ended = _Ended(type(error).__name__, str(error), EXIT_USAGE if isinstance(error, InputError) else EXIT_UNREAD)
    if "--json" in arguments:
        _print({"error": {"type": ended.kind, "message": str(ended)}}, as_json=True)
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
        from .version import __version__

        print(f"dots-ocr {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


def _seconds(value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value:g} is not a positive number of seconds")
    return value


def _password(file: str | None) -> str | None:
    """Return the only line of a file. Messages say nothing of it, nor of a password in the place of a file."""
    if file is None:
        return None
    try:
        (password,) = Path(file).read_text("utf-8-sig", "replace").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not one line"
        raise typer.BadParameter(f"{reason}. Fix: name a file that holds the password, and nothing else") from error
    return password


def _numbers(text: str, option: str, wanted: str, fits: Callable[[list[int]], bool]) -> list[int]:
    with suppress(ValueError):
        numbers = [int(one) for one in text.split(",")]
        if fits(numbers):
            return numbers
    raise typer.BadParameter(f"{text!r} is not {wanted}", param_hint=option)


BaseUrl = Annotated[
    str | None,
    Option(metavar="URL", help="The server's address with /v1; else DOTS_OCR_BASE_URL, else http://127.0.0.1:8000/v1."),
]
Model = Annotated[str, Option(metavar="NAME", help="One of the names that the server serves.")]
Engines = Annotated[
    list[EngineName] | None,
    Option("--engine", help="Which to ask; may be repeated, in their order. Default: all; of serve: tesseract."),
]
Password = Annotated[
    str | None,
    Option("--password-file", metavar="FILE", callback=_password, help="With the password of encrypted PDFs."),
]
Timeout = Annotated[float, Option(metavar="S", callback=_seconds, help="Seconds for one page and all engines.")]
Languages = Annotated[str, Option(metavar="eng+rus", help="Of Tesseract.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON, errors too.")]


@app.command()
def read(
    files: Annotated[
        list[Path], Argument(metavar="FILE...", help="PDFs and images, - for standard input; with --out also folders.")
    ],
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Write one set of files per document here; a second run continues.")
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "--output", "-o", metavar="FILE", help="Write the document here, in the format that the name ends with."
        ),
    ] = None,
    mode: Annotated[
        Literal["layout", "layout-only", "text", "grounding", "web", "scene", "svg", "general"],
        Option(help="What to read; web, scene, svg and general need dots.mocr."),
    ] = "layout",
    pages: Annotated[str | None, Option(metavar="1-3,7", help="Which pages; default: all.")] = None,
    password: Password = None,
    box: Annotated[
        str | None, Option(metavar="L,T,R,B", help="For --mode grounding: where, in pixels of the page.")
    ] = None,
    question: Annotated[str | None, Option(metavar="TEXT", help="For --mode general.")] = None,
    dpi: Annotated[
        int | None, Option(metavar="N", min=1, help="Draw pages of PDFs at N; default: 200, or more if needed.")
    ] = None,
    formats: Annotated[
        list[Format] | None,
        Option("--format", help="Default: md, with --out also json. With --out it may be repeated."),
    ] = None,
    pictures: Annotated[
        bool, Option("--pictures", help="With --out: cut pictures out as files, linked from the md.")
    ] = False,
    headers: Annotated[bool, Option("--headers/--no-headers", help="Page headers and footers in md and html.")] = True,
    base_url: BaseUrl = None,
    model: Model = "dots.ocr",
    engine: Engines = None,
    on_unavailable: Annotated[
        Literal["fallback", "wait", "fail"] | None,
        Option(
            help="If an engine is not there: ask the next one, wait for it, or give the page up. "
            "Default: fallback, and exit status 3 if it was needed."
        ),
    ] = None,
    max_wait: Annotated[
        float | None,
        Option(metavar="S", callback=_seconds, help="Seconds to wait for an engine. Default: 10; wait: 1800."),
    ] = None,
    languages: Languages = "eng",
    timeout: Timeout = 120.0,
    max_in_flight: Annotated[int, Option(metavar="N", min=1, help="Pages at the server at once, at most.")] = 32,
    upgrade: Annotated[
        bool, Option("--upgrade", help="With --out: read pages again that another engine than vllm read.")
    ] = False,
    as_json: Annotated[
        bool, Option("--json", help="As --format json; with --out print a report. Errors as JSON too.")
    ] = False,
) -> int:
    """Read documents: one to standard output, or any number of them into a folder with --out.

    Which engine read which pages, and why others did not, goes to standard error.

    \b
    Examples:
      dots-ocr read invoice.pdf                      Markdown, on the screen
      dots-ocr read scan.png -o scan.html            one document, into a file
      curl -s URL | dots-ocr read - --format text    from standard input
      dots-ocr read 'in/*.pdf' more/ --out read/     a later run continues
      dots-ocr read a.pdf --out read/ --pictures --format md --format csv
    """  # noqa: D301  # typer keeps the lines of a paragraph that begins with this character
    from . import batch
    from .apps.reading import expanded, notes
    from .client import AsyncDotsOCR
    from .engines.defaults import ENGINES, make_engines
    from .results import Page

    files = list(expanded(files))
    if output is not None and not formats:
        suffix = output.suffix.lower().lstrip(".").replace("txt", "text")
        formats = [Format(suffix)] if suffix in set(Format) else None
    wrong = None
    if (mode == "grounding") != (box is not None):
        wrong = "--mode grounding needs --box, and only that mode takes one"
    elif (mode == "general") != bool(question):
        wrong = "--mode general needs --question, and only that mode takes one"
    elif out is not None and (box, question, output) != (None, None, None):
        wrong = "--box, --question and --output are for one document, without --out"
    elif out is not None and Path("-") in files:
        wrong = "standard input is one document, for --output or standard output: give --out files"
    elif files == [Path("-")] and sys.stdin.isatty():
        wrong = "- is for a document that comes from a pipe or a file: dots-ocr read - < FILE"
    elif output is not None and output.is_dir():
        wrong = f"{output} is a folder: use --out {output}, or name a file"
    elif output is not None and any(_is_same(output, file) for file in files):
        wrong = f"{output} is what is read. Fix: name another file"
    elif output is not None and not _may_be_written(output):
        wrong = f"{output} cannot be written. Fix: make its folder, or name one that you may write to"
    elif out is None and (pictures or Format.CSV in (formats or ())):
        wrong = "--pictures and --format csv make several files: they need --out DIR"
    elif out is None and len(files) == 1 and files[0].is_dir():
        wrong = f"{files[0]} is a folder: add --out DIR"
    elif out is None and len(files) != 1:
        wrong = "several documents need --out DIR"
    elif out is None and upgrade:
        wrong = "--upgrade needs --out DIR"
    elif out is None and (len(formats or ()) > 1 or (as_json and formats and list(formats) != [Format.JSON])):
        wrong = "several formats need --out DIR"
    if wrong:
        raise typer.BadParameter(wrong)
    spoken = cast("Mode", mode.replace("-", "_"))
    names = cast("Sequence[Name]", engine or ENGINES)
    client = AsyncDotsOCR(
        engines=make_engines(names, base_url=base_url, model=model, max_in_flight=max_in_flight, languages=languages),
        timeout=timeout,
        max_in_flight=max_in_flight,
        on_unavailable=on_unavailable or "fallback",
        max_wait=max_wait,
    )
    fallback = partial(_fallback, None if on_unavailable == "fallback" else names[0], base_url, model)
    if out is not None:
        chosen = formats or (Format.JSON, Format.MD)
        kinds = frozenset("txt" if form is Format.TEXT else form.value for form in chosen)
        kinds |= frozenset({"pictures"} if pictures else ())
        wanted: dict[str, Any] = {"formats": kinds, "headers": headers, "upgrade": upgrade, "pages": pages, "dpi": dpi}
        progress = shown(Lines)
        work = batch.run(client, files, out, mode=spoken, password=password, progress=progress, **wanted)
        stopped = "stopped; what is finished is safe: run the same command again to go on"
        return _summarize(_finish(client, progress, work, stopped), out, as_json, fallback)
    form = Format.JSON if as_json else (formats or [Format.MD])[0]
    four = "four whole numbers with commas, in pixels of the page"
    place = None if box is None else _numbers(box, "--box", four, lambda numbers: len(numbers) == 4)
    asked = {"box": place, "question": question, "pages": pages, "dpi": dpi}
    document = _one(client, files[0], form, headers, output, mode=spoken, password=password, **asked)
    for note in notes(document):
        print(printable(note), file=sys.stderr)
    if document.failures:
        return EXIT_UNREAD
    return fallback({page.engine for page in document.pages if isinstance(page, Page)})


def _fallback(first: str | None, base_url: str | None, model: str, readers: set[str]) -> int:
    """Return the exit status of pages that were all read: by the engine that was asked first, or by others."""
    from .engines.server import SERVICE
    from .engines.vllm import VLLMEngine

    async def run() -> str | None:
        """Return the engine that ``dots-ocr serve`` is for, if that was asked."""
        async with aclosing(VLLMEngine(base_url, model=model)) as engine:
            with suppress(DotsOCRError, TimeoutError):
                async with asyncio.timeout(SERVICE_SECONDS):
                    cards = {card["id"]: card for card in await engine.models(SERVICE_SECONDS)}
                if (card := cards.get(model, {})).get("owned_by") == SERVICE:
                    return str(card.get("root")).partition(",")[0]
        return None

    others = readers - {"", first}
    if first == "vllm" and others:
        others.discard(asyncio.run(run()) or "")
    return EXIT_FALLBACK if first and others else EXIT_OK


def _is_same(one: Path, other: Path) -> bool:
    """Tell whether both are the same file, whatever it is called; one that is not there is none."""
    with suppress(OSError, ValueError):
        return one.samefile(other)
    return False


def _may_be_written(file: Path) -> bool:
    """Tell whether a file can take its place; a pipe or a device keeps its own."""
    if file.exists() and not file.is_file():
        return os.access(file, os.W_OK)
    return os.access(file.resolve().parent, os.W_OK | os.X_OK)


def _finish(client: AsyncDotsOCR, progress: Silent, work: Coroutine[Any, Any, T], message: str) -> T:
    """Do a client's work that Ctrl-C and SIGTERM end in order, after which the message is said."""

    async def run() -> T:
        # Not an exception out of whatever runs at the moment, so that it ends as cleanly as with Ctrl-C.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with progress:
            async with client:
                return await work

    try:
        return asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise _Ended("Interrupted", message, EXIT_INTERRUPTED) from None


def _one(
    client: AsyncDotsOCR, file: Path, form: Format, headers: bool, output: Path | None, **options: Any
) -> Document:
    """Read one document, and print it, or write it into a file."""
    from .apps import reading

    source: Any = file
    if file == Path("-"):  # here, where a signal ends the wait
        source = TemporaryFile()  # noqa: SIM115  # it goes with the process
        shutil.copyfileobj(sys.stdin.buffer, source)
        source.seek(0)
    write = _print_part if output is None and form in (Format.MD, Format.TEXT) else None

    def render(document: Document) -> str:
        match form:
            case Format.JSON:
                return json.dumps(document.to_dict(), ensure_ascii=False, indent=2)
            case Format.TEXT:
                return document.text
            case Format.HTML:
                return document.html(headers=headers)
            case Format.HOCR:  # which needs the pictures of the pages
                pictured = None if file == Path("-") else file
                return reading.as_hocr(document, pictured, options["password"], options["dpi"])
            case Format.MD | Format.CSV:
                return document.markdown(headers=headers)

    progress = shown(Silent)
    try:
        work = reading.run(client, source, progress, write, render, **options)
        document = _finish(client, progress, work, "interrupted")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if write:
        write("\n")
    elif output is None:
        _print_part(render(document) + "\n")
    else:
        try:
            write_file(output, (render(document), "\n"))
        except OSError as error:
            raise _Ended("OutputError", f"cannot write {output}: {error.strerror or error}", EXIT_UNREAD) from error
    return document


def _summarize(report: Report, out: Path, as_json: bool, fallback: Callable[[set[str]], int]) -> int:
    _print(report.to_dict(), as_json)
    totals = report.totals
    seen = [state for state in ("read", "unchanged", "partial", "failed") if totals[state]]
    states = ", ".join(f"{totals[state]} {state}" for state in seen)
    by = ", ".join(f"{number} by {name}" for name, number in totals["engines"].items())
    by += f"{', ' * bool(by)}{totals['blank_pages']} blank" * bool(totals["blank_pages"])
    documents, pages = count(totals["documents"], "document"), count(totals["pages"], "page")
    said = f"{documents}{': ' * bool(states)}{states}; {pages}{': ' * bool(by)}{by}"
    rate = f"; {totals['pages_read']} now, in {report.seconds:.1f} s ({totals['pages_per_second']:.1f} pages/s)"
    over = ", ".join(f"{number} x {reason}" for reason, number in report.skipped.items())
    bad = bool(totals["partial"] or totals["failed"])
    why = f"; why: see {out / 'report.json'}" if bad else ""
    print(printable(f"{said}{rate}{'; passed over: ' * bool(over)}{over}{why}"), file=sys.stderr)
    if bad:
        return EXIT_UNREAD
    return fallback({*totals["engines"]})


@app.command()
def doctor(
    base_url: BaseUrl = None,
    model: Model = "dots.ocr",
    ocr: Annotated[bool, Option("--ocr", help="Have every engine read a page, and check the text.")] = False,
    languages: Languages = "eng",
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> int:
    """Check the server, its model, the other engines and the installation, and say how to fix what is wrong.

    \b
    Examples:
      dots-ocr doctor
      dots-ocr doctor --ocr --languages eng+rus     every engine reads a page
    """  # noqa: D301
    from .engines.vllm import VLLMEngine

    engine = VLLMEngine(base_url, model=model)

    async def run() -> list[Check]:
        from .apps.doctor import examine

        async with aclosing(engine):
            return await examine(engine, timeout, ocr=ocr, languages=languages)

    checks, lines = asyncio.run(run()), []
    for check in checks:
        took = "" if check.seconds is None else f" ({check.seconds:.2f} s)"
        lines.append(f"{check.status:8} {check.name}: {printable(check.detail)}{took}")
        if check.fix and check.status != "skipped":
            lines.append(f"         -> {printable(check.fix)}")
    works = all(check.status != "failed" for check in checks)
    listed = [asdict(check) for check in checks]
    about = {"ok": works, "base_url": engine.base_url, "model": engine.model, "checks": listed}
    _print(about, as_json, *lines)
    return EXIT_OK if works else EXIT_UNREAD


@app.command()
def bench(
    files: Annotated[
        list[Path] | None,
        Argument(metavar="[FILE]...", help="PDFs and images, with NAME.txt beside each; else pages of our own."),
    ] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="Write bench.json and bench.md here.")] = None,
    mode: Annotated[Literal["text", "layout"], Option(help="What to read.")] = "text",
    pages: Annotated[int, Option(metavar="N", min=1, max=200, help="How many pages of our own, without FILE.")] = 8,
    concurrency: Annotated[
        str, Option(metavar="N,N", help="Pages at once, as far as an engine takes so many.")
    ] = "1,2,4,8",
    engine: Engines = None,
    base_url: BaseUrl = None,
    model: Model = "dots.ocr",
    languages: Languages = "eng+rus",
    timeout: Annotated[float, Option(metavar="S", callback=_seconds, help="Seconds for one page.")] = 120.0,
    as_json: AsJson = False,
) -> int:
    """Measure engines side by side on the same pages: time, pages per second, characters that are wrong, memory.

    \b
    Examples:
      dots-ocr bench --engine vllm --engine tesseract
      dots-ocr bench scans/*.png --out measured/     with NAME.txt beside each
    """  # noqa: D301
    from .apps.bench.measure import measure
    from .apps.bench.pages import generate_pages, load_pages
    from .apps.bench.report import EXTRA, BenchmarkReport, describe_machine
    from .engines.admission import Limiter
    from .engines.defaults import ENGINES, make_engines
    from .engines.vllm import VLLMEngine

    wanted = "a list of whole numbers from 1 on, with commas"
    levels = _numbers(concurrency, "--concurrency", wanted, lambda numbers: min(numbers) >= 1)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before all the work
    engines: list[Engine] = [
        VLLMEngine(base_url, model=model, limiter=Limiter(max(levels), max(levels)))
        if name == "vllm"
        else make_engines([name], languages=languages)[0]
        for name in cast("Sequence[Name]", engine or ENGINES)
    ]

    sheets = load_pages(files) if files else generate_pages(pages)
    machine = describe_machine()
    measured: list[Measurement] = []

    async def run() -> None:
        for one in engines:
            async with aclosing(one):
                measured.append(await measure(one, sheets, levels, mode=mode, seconds=timeout, say=_warn))

    asyncio.run(run())
    report = BenchmarkReport(measured, sheets, mode, machine)
    if any(one.loads and not one.compared for one in report.measurements) and find_spec("rapidfuzz") is None:
        _warn(f"without character errors: rapidfuzz is not installed: {EXTRA}")
    if out is not None:
        (out / "bench.json").write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", "utf-8")
        (out / "bench.md").write_text(report.markdown() + "\n", "utf-8")
    _print(report.to_dict(), as_json, report.markdown())
    good = any(one.loads for one in report.measurements) and not any(one.failed for one in report.measurements)
    return EXIT_OK if good else EXIT_UNREAD


@app.command()
def models(base_url: BaseUrl = None, timeout: Timeout = 10.0, as_json: AsJson = False) -> int:
    """List the models that the server serves.

    \b
    Examples:
      dots-ocr models --base-url http://192.168.1.5:8000/v1
    """  # noqa: D301
    from .engines.vllm import VLLMEngine

    engine = VLLMEngine(base_url)

    async def run() -> list[dict[str, Any]]:
        async with aclosing(engine), asyncio.timeout(timeout):
            return await engine.models(timeout)

    try:
        cards = asyncio.run(run())
    except TimeoutError:
        late = f"{engine.base_url} did not answer within {timeout:g} s: look at its load, or allow more (--timeout)"
        raise _Ended("DeadlineExceeded", late, EXIT_UNREAD) from None
    listed, lines = [], []
    for card in cards:
        name, length, root = card.get("id"), card.get("max_model_len"), card.get("root")
        listed.append({"name": name, "max_model_len": length, "root": root})
        context = "unknown" if length is None else f"{length} tokens"
        lines.append(printable(f"{name}: context {context}, root {root or 'unknown'}"))
    _print({"base_url": engine.base_url, "models": listed}, as_json, *lines)
    return EXIT_OK


@app.command()
def view(
    result: Annotated[Path, Argument(metavar="RESULT.json", help="What read wrote with --json or --out.")],
    source: Annotated[
        Path | None,
        Option(metavar="FILE", help="The document, for its pictures; default: where it was when it was read."),
    ] = None,
    password: Password = None,
    out: Annotated[
        Path | None, Option(metavar="FILE.html", help="Default: beside RESULT.json, as RESULT.view.html.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write one HTML file that shows pages, boxes and texts side by side, for any browser.

    \b
    Examples:
      dots-ocr view read/thesis.pdf.json
      dots-ocr view thesis.json --source thesis.pdf --out thesis.html
    """  # noqa: D301
    from .apps.view import write_view

    document, digest = _result(result)
    file = out or result.with_suffix(".view.html")
    origin = Path(source or document.source)
    if _is_same(file, result) or _is_same(file, origin):
        raise typer.BadParameter("--out would replace what is shown. Fix: name another file")
    try:
        pictures = _pictures(document, origin, digest, password)
    except InputError as error:
        if source is not None:
            raise
        _warn(f"without pictures: {error}; --source tells where the document is")
        pictures = iter(())
    write_view(document, pictures, file)
    _print({"file": str(file)}, as_json, printable(str(file)))
    return EXIT_OK


@app.command()
def serve(
    host: Annotated[str, Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, Option(metavar="N", min=0, max=65_535, help="0: any that is free.")] = 8000,
    engine: Engines = None,
    languages: Languages = "eng",
    base_url: Annotated[
        str | None, Option(metavar="URL", help="Of the server behind --engine vllm, with /v1; else DOTS_OCR_BASE_URL.")
    ] = None,
    model: Model = "dots.ocr",
    served_model_name: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="What clients may call the model; may be repeated. "
            "Default: dots.ocr, rednote-hilab/dots.ocr, dotsocr-model, model.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, Option(metavar="FILE", help="Holds the key that clients must send; else DOTS_OCR_SERVE_API_KEY.")
    ] = None,
    no_api_key: Annotated[
        bool, Option("--no-api-key", help="Ask for no key, even if other machines can reach the service.")
    ] = False,
    timeout: Timeout = 120.0,
    max_queue: Annotated[int, Option(metavar="N", min=1, help="Pages that wait, at most.")] = 64,
    allow_host: Annotated[
        list[str] | None, Option(metavar="NAME", help="Without a key: a name that clients call it by; repeatable.")
    ] = None,
    shutdown_timeout: Annotated[
        float, Option(metavar="SECONDS", min=0, help="For pages in flight when it is told to end.")
    ] = 10.0,
) -> int:
    """Serve the OpenAI API as vLLM does, with Tesseract or any chain of engines behind it, until SIGTERM or Ctrl-C.

    \b
    Examples:
      dots-ocr serve --languages eng+rus
      dots-ocr serve --engine vllm --base-url http://gpu:8000/v1 --port 8001
    """  # noqa: D301
    try:
        from .apps import serve as service
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        message = f"{error.name} is not installed: pip install 'dots-ocr-client[serve]'"
        raise _Ended("ModuleNotFoundError", message, EXIT_UNREAD) from error
    from .credentials import without_login
    from .engines.defaults import make_engines

    names = cast("Sequence[Name]", engine or (EngineName.TESSERACT,))
    if "textlayer" in names:
        raise typer.BadParameter("clients send images, which have no text layer: leave --engine textlayer out")
    base_url = base_url or os.environ.get("DOTS_OCR_BASE_URL")
    if "vllm" in names and not base_url:
        raise typer.BadParameter("--engine vllm needs --base-url")
    if no_api_key and api_key_file:
        raise typer.BadParameter("--no-api-key and --api-key-file exclude each other")
    api_key = None if no_api_key else service.read_key(api_key_file)
    application = service.Service(
        make_engines(names, base_url=base_url, model=model, languages=languages),
        names=served_model_name or service.SERVED_NAMES,
        api_key=api_key,
        timeout=timeout,
        max_queue=max_queue,
        hosts=allow_host or (),
    )
    with service.listen(host, port, public=no_api_key or api_key is not None) as listener:
        if "vllm" in names and base_url and service.is_own(base_url, listener):
            own = f"--base-url {without_login(base_url)} is this service itself"
            raise typer.BadParameter(f"{own}: give it another --port")
        address = "[{}]:{}" if ":" in listener.getsockname()[0] else "{}:{}"
        where = address.format(*listener.getsockname()[:2])
        _warn(f"http://{where}/v1 reads with {', '.join(names)}, {'with' if api_key else 'without'} an API key")
        service.run(application, listener, shutdown_timeout)
    return EXIT_OK


def _result(file: Path) -> tuple[Document, str | None]:
    """Load a result, and the SHA-256 of the document that it is of, if it tells."""
    from .results import Document

    try:
        values = json.loads(file.read_bytes())
        about = values.get("dots_ocr") or {}
        return Document.from_dict(values), about.get("sha256")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is not a result ({error}): give a file that dots-ocr read wrote as JSON") from error


def _pictures(document: Document, source: Path, digest: str | None, password: str | None) -> Iterator[PageImage]:
    """Draw the pages that a document has results of, one at a time."""
    import hashlib

    from .pages.rasterizer import draw, open_document

    opened = open_document(source, [page.number for page in document.pages], password=password)
    if digest is not None:
        with source.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                _warn(f"{source} is no longer what was read: boxes may be misplaced")

    resolutions = {page.number: getattr(page, "dpi", None) for page in document.pages}

    def drawn() -> Iterator[PageImage]:
        with opened:
            for number in opened.numbers:
                opened.dpi = resolutions[number]
                try:
                    yield draw(opened.reference(number))
                except InputError as error:
                    _warn(f"page {number} is without a picture: {error}")

    return drawn()


def _warn(message: str) -> None:
    print(f"dots-ocr: {printable(message)}", file=sys.stderr)


def _print_part(text: str) -> None:
    if sys.stdout.isatty():  # a page can say what a terminal would obey
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", text)
    print(text, end="", flush=True)


def _print(values: Any, as_json: bool, *lines: str) -> None:
    """Print values as JSON, or what says the same to people."""
    for text in (json.dumps(values, ensure_ascii=False, indent=2),) if as_json else lines:
        _print_part(text + "\n")
