"""The command ``dots-ocr``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import __version__
from .client import DEFAULT_TIMEOUT, DotsOCR
from .engines.base import Engine
from .engines.tesseract import TesseractEngine
from .engines.vllm import DEFAULT_BASE_URL, VLLMEngine
from .errors import DotsOCRError, InputError
from .results import Page

EXIT_OK, EXIT_UNREAD, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; default: those of this process.

    Returns:
        The exit status: 0, or 1 if the document could not be read, or 2 for wrong usage or bad input.
    """
    options = _parser().parse_args(arguments)
    try:
        with DotsOCR(options.base_url, engines=_engines(options), timeout=options.timeout) as ocr:
            document = ocr.read(options.file)
    except DotsOCRError as error:
        print(f"dots-ocr: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, InputError) else EXIT_UNREAD
    print(json.dumps(document.to_dict(), ensure_ascii=False, indent=2) if options.json else document.text)
    for page in document.pages:
        print(_provenance(page), file=sys.stderr)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dots-ocr", description=sys.modules[__package__].__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    read = commands.add_parser(
        "read",
        help="print the text of one image or one-page PDF",
        description="Print the text of one image or one-page PDF; say on standard error which engine read it.",
        epilog="Environment: DOTS_OCR_BASE_URL, DOTS_OCR_API_KEY. "
        "Exit status: 0 read, 1 could not be read, 2 wrong usage or bad input.",
    )
    read.add_argument("file", metavar="FILE", help="an image or a one-page PDF")
    read.add_argument("--base-url", metavar="URL", help=f"the server's address (default: {DEFAULT_BASE_URL})")
    read.add_argument(
        "--engine",
        choices=("auto", "vllm", "tesseract"),
        default="auto",
        help="auto: vllm, and tesseract if that cannot (default)",
    )
    read.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=DEFAULT_TIMEOUT,
        help="seconds for all engines together (default: %(default)g)",
    )
    read.add_argument("--json", action="store_true", help="print everything known about the result as JSON")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _engines(options: argparse.Namespace) -> list[Engine] | None:
    if options.engine == "vllm":
        return [VLLMEngine(options.base_url)]
    return [TesseractEngine()] if options.engine == "tesseract" else None


def _provenance(page: Page) -> str:
    notes = [f"page {page.number}: {page.engine} ({page.model}) answered in {page.seconds:.2f} s"]
    notes += [str(attempt) for attempt in page.attempts]
    notes += page.warnings
    return " ".join("; ".join(notes).split())
