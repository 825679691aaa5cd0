"""A plugin for OCRmyPDF: searchable PDFs with dots.ocr, or the next engine that can, behind them.

``ocrmypdf --plugin dots_ocr_client.ocrmypdf scan.pdf searchable.pdf``; the server is that of ``DOTS_OCR_BASE_URL``.
OCRmyPDF turns and straightens pages with Tesseract, as without the plugin.
"""

from __future__ import annotations

import logging
import threading
from functools import cache
from pathlib import Path
from typing import Any

from ocrmypdf import hookimpl
from ocrmypdf.builtin_plugins.tesseract_ocr import TesseractOcrEngine
from ocrmypdf.exceptions import ExitCode, ExitCodeException
from PIL import Image

from .client import DotsOCR
from .engines.defaults import make_engines
from .errors import DotsOCRError
from .results import hocr
from .version import __version__

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class PageNotRead(ExitCodeException):  # type: ignore[misc]  # OCRmyPDF is not installed where the types are checked
    """No engine could read a page: no PDF is written that lacks its words."""

    exit_code = ExitCode.child_process_error


class DotsOcrEngine(TesseractOcrEngine):  # type: ignore[misc]
    """Reads pages with the client's chain; what is not reading stays with Tesseract."""

    @staticmethod
    def version() -> str:
        """Return the client's version."""
        return __version__

    @staticmethod
    def creator_tag(options: Any) -> str:
        """Return what the PDF says of its maker."""
        return f"dots-ocr-client {__version__}"

    def __str__(self) -> str:
        """Return the name for messages."""
        return f"dots-ocr-client {__version__}"

    @staticmethod
    def languages(options: Any) -> set[str]:
        """Return the languages that were asked for: the model reads them all, Tesseract says which it lacks."""
        return set(options.languages)

    @staticmethod
    def generate_hocr(input_file: Path, output_hocr: Path, output_text: Path, options: Any) -> None:
        """Read a page, or raise `PageNotRead`."""
        try:
            with _lock:
                client = _client("+".join(options.languages))
            page = client.read_page(input_file)
        except DotsOCRError as error:
            raise PageNotRead(f"{error} (dots-ocr doctor finds out why)") from error
        for note in (*map(str, page.attempts), *page.warnings):
            _log.warning(note)
        with Image.open(input_file) as picture:
            written = hocr.document_hocr(input_file.name, [page], lambda _: picture)
            output_hocr.write_text("".join(written), "utf-8")
        output_text.write_text(page.text, "utf-8")


@cache
def _client(languages: str) -> DotsOCR:
    """One for all pages of a process, which share its connections and what it learns of the server."""
    return DotsOCR(engines=make_engines(languages=languages))


@hookimpl  # type: ignore[untyped-decorator]
def get_ocr_engine(options: Any) -> DotsOcrEngine | None:
    """Return the engine, unless another was asked for."""
    return DotsOcrEngine() if getattr(options, "ocr_engine", "auto") == "auto" else None
