"""Tesseract, as the distribution ships it: the engine that needs neither a server nor a GPU."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from typing import Final

from PIL import Image, ImageOps

from .. import images
from ..documents import PageImage
from ..errors import EngineError, EngineMissing, RequestRejected
from ..limiter import Limiter
from ..prompts import Mode
from ..results import Box
from .base import Answer, Task

PAGE_LAYOUT, ONE_BLOCK = "3", "6"
"""Tesseract's page segmentation modes: find columns and blocks by itself (its default), or take all as one block."""
STRIP_ASPECT: Final = 2.0
"""An image wider than this many times its height is read as one block (our own choice: wider than a slide of 16:9). In
so few lines the search for columns goes wrong: it took a page of 28 x 8 widely spaced letters for vertical text."""
MARGIN: Final = 20
"""White around a box that is read by itself, in pixels: Tesseract loses letters at the edge (our own choice)."""


class TesseractEngine:
    """Reads pages with the ``tesseract`` program found on the PATH."""

    name = "tesseract"
    modes: frozenset[Mode] = frozenset({"text", "layout", "grounding"})

    def __init__(self, languages: str = "eng") -> None:
        """Choose the languages.

        Args:
            languages: Tesseract's names, joined by ``+``, the main one first, such as ``rus+eng``.
        """
        self.languages = languages
        processors = len(os.sched_getaffinity(0))
        self.limiter = Limiter(start=processors, cap=processors)

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page; the program is killed when this call is cancelled.

        A layout comes as text without cells, and a warning says so.

        Raises:
            EngineMissing: The program or the data of a language are not installed.
            RequestRejected: The box lies outside the page.
            EngineError: The program failed.
        """
        program = shutil.which("tesseract")
        if program is None:
            raise EngineMissing(f"there is no tesseract on the PATH: {self._cure()}")
        one_block = task.box is not None or page.sent_width > STRIP_ASPECT * page.sent_height
        png = page.png if task.box is None else await asyncio.to_thread(_cut_out, page, task.box)
        text = await self._run(program, png, ONE_BLOCK if one_block else PAGE_LAYOUT)
        warnings = ["tesseract reads text without layout"] if task.mode == "layout" else []
        if not text and task.box is None and not await asyncio.to_thread(_is_blank, page):
            warnings.append("the page is not blank, but no text was found on it")
        mode: Mode = "text" if task.mode == "layout" else task.mode
        return Answer(mode=mode, text=text, model=self.languages, warnings=tuple(warnings))

    async def aclose(self) -> None:
        """Nothing is kept open between pages."""

    async def _run(self, program: str, png: bytes, segmentation: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(program, "stdin", "stdout", "-l", self.languages, "--psm", segmentation, "-c", "page_separator="),
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
        return output.decode(errors="replace").rstrip()

    def _cure(self) -> str:
        packages = " ".join(f"tesseract-ocr-{name.replace('_', '-')}" for name in self.languages.split("+"))
        return f"apt-get install tesseract-ocr {packages}"


def _cut_out(page: PageImage, box: Box) -> bytes:
    across, down = page.sent_width / page.width, page.sent_height / page.height
    left, top = max(0, math.floor(box.left * across)), max(0, math.floor(box.top * down))
    right = min(page.sent_width, math.ceil(box.right * across))
    bottom = min(page.sent_height, math.ceil(box.bottom * down))
    if left >= right or top >= bottom:
        raise RequestRejected(f"the box {list(box)} lies outside the page of {page.width} x {page.height} px")
    image: Image.Image = ImageOps.expand(page.image.crop((left, top, right, bottom)), MARGIN, "white")
    return images.to_png(image)


def _is_blank(page: PageImage) -> bool:
    return images.is_blank(page.image)
