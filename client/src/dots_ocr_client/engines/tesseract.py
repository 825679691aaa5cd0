"""Tesseract, as the distribution ships it: the engine that needs neither a server nor a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shutil
import time
from asyncio.subprocess import Process, SubprocessStreamProtocol
from collections.abc import Iterable, Sequence
from typing import Final

from PIL import Image, ImageOps

from ..errors import EngineError, EngineMissing, UnusableAnswer
from ..pages import images
from ..pages.documents import PageImage
from ..prompts import Mode
from ..results import Box, Cell, layout
from .admission import Limiter
from .base import Answer, Task, cut_out

# Tesseract's page segmentation modes: find columns and blocks by itself (its default), or take all as one block.
PAGE_LAYOUT, ONE_BLOCK = "3", "6"
# An image wider than this many times its height is read as one block (our own choice: wider than a slide of 16:9). In
# so few lines the search for columns goes wrong: it took a page of 28 x 8 widely spaced letters for vertical text.
STRIP_ASPECT: Final = 2.0
# White around a box that is read by itself, in pixels: Tesseract loses letters at the edge (our own choice).
MARGIN: Final = 20
# Confidence, of 100, from which on it is sure of a word, and a page, by letters, counts as read. Measured: 77 to 96 on
# clean and noisy pages in the right languages, 7 to 58 in those of another script.
SURE: Final = 60.0
# Part of the letters that may be in other words without a warning (measured: below 0.01 on clean pages).
MAX_UNSURE: Final = 0.02

_LANGUAGES: Final = """
Latin Fraktur Vietnamese: eng/english deu/german fra/french spa/spanish ita/italian por/portuguese nld/dutch pol/polish
ces/czech slk/slovak ron/romanian hun/hungarian fin/finnish swe/swedish dan/danish nor/norwegian tur/turkish lat/latin
vie/vietnamese slv/slovenian hrv/croatian est/estonian lav/latvian lit/lithuanian; Cyrillic: rus/russian ukr/ukrainian
bel/belarusian bul/bulgarian srp/serbian mkd/macedonian kaz/kazakh; Han HanS HanT Japanese Hiragana Katakana:
chi_sim/chinese chi_tra jpn/japanese; Korean Hangul: kor/korean; Arabic: ara/arabic fas/persian urd/urdu; Devanagari:
hin/hindi mar/marathi nep/nepali; Bengali: ben/bengali; Greek: ell/greek; Hebrew: heb/hebrew yid/yiddish; Armenian:
hye/armenian; Georgian: kat/georgian; Thai: tha/thai; Tamil: tam/tamil; Telugu: tel/telugu; Kannada: kan/kannada;
Malayalam: mal/malayalam; Gujarati: guj/gujarati; Gurmukhi: pan/punjabi; Sinhala: sin/sinhala; Khmer: khm/khmer; Lao:
lao; Myanmar: mya/burmese; Ethiopic: amh/amharic; Tibetan: bod/tibetan
"""  # scripts as Tesseract calls them, and some of its languages, the usual one first
_SCRIPTS: Final = {
    script: [pair.split("/") for pair in languages.split()]
    for scripts, _, languages in (line.partition(":") for line in _LANGUAGES.split(";"))
    for script in scripts.split()
}
_CODES: Final = {name: pair[0] for pairs in _SCRIPTS.values() for pair in pairs for name in pair}


class TesseractEngine:
    """Reads pages with the ``tesseract`` program found on the PATH."""

    name = "tesseract"
    modes: frozenset[Mode] = frozenset({"text", "layout", "grounding"})
    expected_seconds = 3.0
    """Measured: 2 to 4 s for an A4 page of 1,300 to 2,600 characters at 200 dpi, on one core."""

    def __init__(self, languages: str = "eng") -> None:
        """Choose the languages.

        Args:
            languages: Tesseract's names, joined by ``+``, the main one first, such as ``rus+eng``, or English ones.
        """
        names = re.split(r"[\s,+]+", languages.strip())
        self.languages = "+".join(_CODES.get(name.lower().replace("-", "_"), name) for name in names)
        processors = len(os.sched_getaffinity(0))
        self.limiter = Limiter(start=processors, cap=processors)

    async def probe(self, seconds: float) -> None:
        """Find out whether the program is there and has the languages."""
        _, installed = await self.installed()
        if lacking := sorted(set(self.languages.split("+")) - set(installed)):
            raise self._lacking(lacking)

    async def installed(self) -> tuple[str, list[str]]:
        """Return the program's version, such as ``tesseract 5.3.0``, and its languages; errors are those of `probe`."""
        listed = (await self._run("--list-langs")).splitlines()[1:]  # the first line is a heading
        return (await self._run("--version")).partition("\n")[0], sorted({*listed} - {"", "osd"})

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page; the program is killed when this call is cancelled.

        The cells of a layout are Tesseract's paragraphs, all of the category Text.

        Raises:
            EngineMissing: The program or the data of a language are not installed.
            RequestRejected: The box lies outside the page.
            UnusableAnswer: It is not sure of what it read, as with the wrong languages.
            EngineError: The program failed.
        """
        begin = time.monotonic()
        one_block = task.box is not None or page.sent_width > STRIP_ASPECT * page.sent_height
        png = page.png if task.box is None else await asyncio.to_thread(_cut_out, page, task.box)
        options = ["-l", self.languages, "--psm", ONE_BLOCK if one_block else PAGE_LAYOUT, "-c", "page_separator="]
        options += ["-c", "tessedit_create_tsv=1", "-c", "tessedit_create_txt=1"]
        output = await self._run("stdin", "stdout", *options, png=png)
        lines = output.split("\n")
        rows = [row for line in lines if len(row := line.split("\t", 11)) == 12]
        said = [line for line in lines if line.count("\t") < 11]
        cells = _cells(rows, said, page) if task.mode == "layout" else ()
        text = "\n\n".join(cell.text for cell in cells) if task.mode == "layout" else "\n".join(said).rstrip()
        warnings = []
        if not text and task.box is None and not await asyncio.to_thread(page.is_blank):
            warnings.append("the page is not blank, but no text was found on it")
        words = [(len(row[11]), float(row[10]), row) for row in rows if row[0] == "5" and row[11].strip()]
        letters, unsure = (sum(length for length, sure, _ in words if sure < most) for most in (101, SURE))
        if unsure > MAX_UNSURE * letters:
            rest = await asyncio.to_thread(_without, png, [row for _, sure, row in words if sure >= SURE])
            why = await self._why(rest, (seconds - time.monotonic() + begin) / 2)
            warnings.append(f"tesseract is not sure of {unsure} of {letters} letters{why}")
            if sum(length * sure for length, sure, _ in words) < SURE * letters:
                raise UnusableAnswer(warnings[-1])
        return Answer(mode=task.mode, text=text, model=self.languages, cells=cells, warnings=tuple(warnings))

    async def _why(self, png: bytes, seconds: float) -> str:
        """Say what may be the matter with these words, their script or their direction, and what to do."""
        found: dict[str, str] = {}
        installed: list[str] = []
        with contextlib.suppress(EngineError, TimeoutError):  # as with too few letters
            async with asyncio.timeout(seconds):
                options = ("-l", "osd", "--psm", "0", "-c", "min_characters_to_try=10")
                found = dict(re.findall("(.+): (.+)", await self._run("stdin", "stdout", *options, png=png)))
                _, installed = await self.installed()
        script = found.get("Script", "").removesuffix("_vert")
        wanted = [pair[0] for pair in _SCRIPTS.get(script, ())]
        own = {language.removesuffix("_vert") for language in self.languages.split("+")}
        if wanted and own <= _CODES.keys() and not own & {*wanted}:
            first = next((language for language in wanted if language in installed), None)
            others = f" (or {', '.join(wanted[1:4])})" if wanted[1:] else ""
            fix = "" if first else f"apt-get install {_package(wanted[0])}{others}, and "
            more = f"--languages {self.languages}+{first or wanted[0]}"
            return f", which seem to be {script}. Fix: {fix}read with {more} (languages=)"
        if (turn := found.get("Rotate", "0")) != "0":
            return f": the page may lie on its side or head. Fix: turn it by {turn} degrees clockwise"
        return ". Fix: name the page's languages (--languages, languages=), or scan it with 300 dpi"

    async def aclose(self) -> None:
        """Nothing is kept open between pages."""

    async def _run(self, *options: str, png: bytes = b"") -> str:
        program = shutil.which("tesseract")
        if program is None:
            packages = " ".join(map(_package, self.languages.split("+")))
            raise EngineMissing(f"there is no tesseract on the PATH. Fix: apt-get install tesseract-ocr {packages}")
        loop = asyncio.get_running_loop()
        try:
            transport, protocol = await loop.subprocess_exec(
                lambda: SubprocessStreamProtocol(2**16, loop),
                program,
                *options,
                # Its OpenMP threads wait busily for each other. With two threads each, four pages at once on two cores
                # took 22 to 263 s instead of 5 to 7 s, and a page alone gains next to nothing from a second thread.
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        except OSError as error:
            raise EngineError(f"{program} does not run: {error.strerror or error}") from error
        process = Process(transport, protocol, loop)
        try:
            output, complaints = await process.communicate(png)
        finally:
            transport.close()  # kills it, if need be; the loop may end before anything else is done about its pipes
            await process.wait()
        complaint = complaints.decode(errors="replace").strip()
        # With several languages Tesseract goes on without those that it lacks and still reports success.
        if "Failed loading language" in complaint:
            raise self._lacking(re.findall("Failed loading language '(.+)'", complaint))
        if process.returncode != 0:
            last_line = complaint.rpartition("\n")[2] or "no message"
            raise EngineError(f"tesseract ended with status {process.returncode}: {last_line}")
        return output.decode(errors="replace")

    def _lacking(self, languages: Sequence[str]) -> EngineMissing:
        import difflib

        fixes = []
        for one in languages:
            close = [] if one in _CODES else difflib.get_close_matches(one, _CODES, 1, 0.8)
            fixes.append(f"write {_CODES[close[0]]} for {one}" if close else f"apt-get install {_package(one)}")
        return EngineMissing(f"tesseract lacks language data for {'+'.join(languages)!r}. Fix: {'; '.join(fixes)}")


def _package(language: str) -> str:
    return f"tesseract-ocr-{language.replace('_', '-')}"


def _cells(rows: Sequence[Sequence[str]], said: Iterable[str], page: PageImage) -> tuple[Cell, ...]:
    """Turn Tesseract's table of everything it found into one cell for each paragraph with words in it.

    Each row has a level (3: paragraph, 4: line, 5: word), the numbers of the page, the block, the paragraph, the line
    and the word, the box (left, top, width, height in pixels of the image as it was sent), a confidence, and a text.
    Only the text as a whole tells where there are spaces: between Chinese words, there are none.
    """
    spaced = {"".join(line.split()): line.strip() for line in said}
    paragraphs: list[tuple[Box, list[str]]] = []  # each with the letters of its lines, without spaces
    for row in rows:
        match row[0]:
            case "3":
                sent, own = (page.sent_width, page.sent_height), (page.width, page.height)
                paragraphs.append((layout.to_page(_area(row), sent, own), []))
            case "4":
                paragraphs[-1][1].append("")
            case "5":  # a picture is a block with one blank word
                paragraphs[-1][1][-1] += row[11].strip()
    texts = ((box, "\n".join(spaced.get(line, line) for line in lines if line)) for box, lines in paragraphs)
    return tuple(Cell("Text", box, text) for box, text in texts if text)


def _area(row: Sequence[str]) -> tuple[int, int, int, int]:
    left, top, width, height = map(int, row[6:10])
    return left, top, left + width, top + height


def _without(png: bytes, rows: Iterable[Sequence[str]]) -> bytes:
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")
    for row in rows:
        image.paste("white", _area(row))
    return images.to_png(image)


def _cut_out(page: PageImage, box: Box) -> bytes:
    return images.to_png(ImageOps.expand(cut_out(page, box), MARGIN, "white"))
