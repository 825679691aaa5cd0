"""Tesseract, as the distribution ships it: the engine that needs neither a server nor a GPU."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import Final

from .. import images
from ..documents import PageImage
from ..errors import EngineError, EngineMissing
from ..prompts import Mode
from .base import Answer

PAGE_LAYOUT, ONE_BLOCK = "3", "6"
"""Tesseract's page segmentation modes: find columns and blocks by itself (its default), or take all as one block."""
STRIP_ASPECT: Final = 2.0
"""An image wider than this many times its height is read as one block (our own choice: wider than a slide of 16:9). In
so few lines the search for columns goes wrong: it took a page of 28 x 8 widely spaced letters for vertical text."""


class TesseractEngine:
    """Reads pages with the ``tesseract`` program found on the PATH."""

    name = "tesseract"

    def __init__(self, languages: str = "eng") -> None:
        """Choose the languages.

        Args:
            languages: Tesseract's names, joined by ``+``, the main one first, such as ``rus+eng``.
        """
        self.languages = languages

    async def read(self, page: PageImage, mode: Mode, seconds: float) -> Answer:
        """Read one page; the program is killed when this call is cancelled.

        Raises:
            EngineMissing: The program or the data of a language are not installed.
            EngineError: The program failed.
        """
        program = shutil.which("tesseract")
        if program is None:
            raise EngineMissing(f"there is no tesseract on the PATH: {self._cure()}")
        layout = ONE_BLOCK if page.image.width > STRIP_ASPECT * page.image.height else PAGE_LAYOUT
        png = await asyncio.to_thread(images.to_png, page.image)
        process = await asyncio.create_subprocess_exec(
            *(program, "stdin", "stdout", "-l", self.languages, "--psm", layout, "-c", "page_separator="),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Its OpenMP threads wait busily for each other. With two threads each, four pages at once on two cores
            # took 22 to 263 s instead of 5 to 7 s, and a page alone gains next to nothing from a second thread.
            env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        )
        try:
            output, complaints = await process.communicate(png)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        complaint = complaints.decode(errors="replace").strip()
        # With several languages Tesseract goes on without those that it lacks and still reports success.
        if "Failed loading language" in complaint:
            raise EngineMissing(f"tesseract lacks language data for {self.languages!r}: {self._cure()}")
        if process.returncode != 0:
            last_line = complaint.rpartition("\n")[2] or "no message"
            raise EngineError(f"tesseract ended with status {process.returncode}: {last_line}")
        text = output.decode(errors="replace").rstrip()
        empty = not text and not await asyncio.to_thread(images.is_blank, page.image)
        warnings = ("the page is not blank, but no text was found on it",) if empty else ()
        return Answer(text=text, model=self.languages, warnings=warnings)

    async def aclose(self) -> None:
        """Nothing is kept open between pages."""

    def _cure(self) -> str:
        packages = " ".join(f"tesseract-ocr-{name.replace('_', '-')}" for name in self.languages.split("+"))
        return f"apt-get install tesseract-ocr {packages}"
