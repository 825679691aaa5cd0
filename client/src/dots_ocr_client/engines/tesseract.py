"""Tesseract, as the distribution ships it: the engine that needs neither a server nor a GPU."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from collections.abc import Sequence
from typing import Final

from PIL import ImageOps

from .. import images
from ..documents import PageImage
from ..errors import EngineError, EngineMissing
from ..limiter import Limiter
from ..prompts import Mode
from ..results import Box, Cell
from .base import Answer, Task, cut_out, is_blank

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
    expected_seconds = 3.0
    """Measured: 2 to 4 s for an A4 page of 1,300 to 2,600 characters at 200 dpi, on one core."""

    def __init__(self, languages: str = "eng") -> None:
        """Choose the languages.

        Args:
            languages: Tesseract's names, joined by ``+``, the main one first, such as ``rus+eng``.
        """
        self.languages = languages
        processors = len(os.sched_getaffinity(0))
        self.limiter = Limiter(start=processors, cap=processors)

    async def probe(self, seconds: float) -> None:
        """Find out whether the program is there and has the languages.

        Raises:
            EngineMissing: It is not, or has not.
            EngineError: It does not run.
        """
        listing = await self._run(self._program(), "--list-langs")
        if lacking := set(self.languages.split("+")) - set(listing.split()):
            raise EngineMissing(f"tesseract lacks language data for {'+'.join(sorted(lacking))!r}: {self._fix()}")

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page; the program is killed when this call is cancelled.

        The cells of a layout are Tesseract's paragraphs, all of the category Text.

        Raises:
            EngineMissing: The program or the data of a language are not installed.
            RequestRejected: The box lies outside the page.
            EngineError: The program failed.
        """
        program = self._program()
        one_block = task.box is not None or page.sent_width > STRIP_ASPECT * page.sent_height
        png = page.png if task.box is None else await asyncio.to_thread(_cut_out, page, task.box)
        options = ["-l", self.languages, "--psm", ONE_BLOCK if one_block else PAGE_LAYOUT, "-c", "page_separator="]
        if task.mode == "layout":
            options += ["-c", "tessedit_create_tsv=1", "-c", "tessedit_create_txt=1"]
        output = await self._run(program, "stdin", "stdout", *options, png=png)
        cells = _cells(output, page) if task.mode == "layout" else ()
        text = "\n\n".join(cell.text for cell in cells) if task.mode == "layout" else output.rstrip()
        warnings = []
        if not text and task.box is None and not await asyncio.to_thread(is_blank, page):
            warnings.append("the page is not blank, but no text was found on it")
        return Answer(mode=task.mode, text=text, model=self.languages, cells=cells, warnings=tuple(warnings))

    async def aclose(self) -> None:
        """Nothing is kept open between pages."""

    def _program(self) -> str:
        program = shutil.which("tesseract")
        if program is None:
            raise EngineMissing(f"there is no tesseract on the PATH: {self._fix()}")
        return program

    async def _run(self, *command: str, png: bytes = b"") -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                # Its OpenMP threads wait busily for each other. With two threads each, four pages at once on two cores
                # took 22 to 263 s instead of 5 to 7 s, and a page alone gains next to nothing from a second thread.
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        except OSError as error:
            raise EngineError(f"{command[0]} does not run: {error.strerror or error}") from error
        try:
            output, complaints = await process.communicate(png)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        complaint = complaints.decode(errors="replace").strip()
        # With several languages Tesseract goes on without those that it lacks and still reports success.
        if "Failed loading language" in complaint:
            raise EngineMissing(f"tesseract lacks language data for {self.languages!r}: {self._fix()}")
        if process.returncode != 0:
            last_line = complaint.rpartition("\n")[2] or "no message"
            raise EngineError(f"tesseract ended with status {process.returncode}: {last_line}")
        return output.decode(errors="replace")

    def _fix(self) -> str:
        packages = " ".join(f"tesseract-ocr-{name.replace('_', '-')}" for name in self.languages.split("+"))
        return f"apt-get install tesseract-ocr {packages}"


def _cells(output: str, page: PageImage) -> tuple[Cell, ...]:
    """Turn Tesseract's table of everything it found into one cell for each paragraph with words in it.

    Each row has a level (3: paragraph, 4: line, 5: word), the numbers of the page, the block, the paragraph, the line
    and the word, the box (left, top, width, height in pixels of the image as it was sent), a confidence, and a text.
    The text as a whole follows, and only that tells where there are spaces: between Chinese words, there are none.
    """
    rows: list[list[str]] = []
    spaced: dict[str, str] = {}
    for text in output.split("\n")[1:]:
        if len(fields := text.split("\t", 11)) == 12:
            rows.append(fields)
        else:
            spaced["".join(text.split())] = text.strip()
    cells: list[Cell] = []
    box = Box(0, 0, 0, 0)
    letters: list[str] = []  # of each line, without spaces

    def finish() -> None:
        if lines := [spaced.get(line, line) for line in letters if line]:
            cells.append(Cell("Text", box, "\n".join(lines)))
        letters.clear()

    for row in rows:
        match row[0]:
            case "3":
                finish()
                box = _box(list(map(int, row[6:10])), page)
            case "4":
                letters.append("")
            case "5":  # a picture is a block with one blank word
                letters[-1] += row[11].strip()
    finish()
    return tuple(cells)


def _box(sent: Sequence[int], page: PageImage) -> Box:
    left, top, width, height = sent
    across, down = page.width / page.sent_width, page.height / page.sent_height
    return Box(
        math.floor(left * across),
        math.floor(top * down),
        min(page.width, math.ceil((left + width) * across)),
        min(page.height, math.ceil((top + height) * down)),
    )


def _cut_out(page: PageImage, box: Box) -> bytes:
    return images.to_png(ImageOps.expand(cut_out(page, box), MARGIN, "white"))
