"""The pages that `dots_ocr_client.apps.bench.measure` measures with, and what they say."""

# ruff: noqa: RUF001  (Russian text)

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from ...errors import InputError
from ...pages import images
from ...pages.documents import PageImage
from ...pages.rasterizer import draw, open_document

# The size of a generated page in pixels: A4 at 200 dpi, the resolution at which PDFs are drawn.
A4: Final = (1654, 2339)
MOST_PAGES: Final = 200  # all are held in memory, each as a PNG of up to some MB (our own choice)
GIVEN: Final = "given"  # the language of a user's page, which nobody told

_FONT = "DejaVuSans.ttf"  # Pillow's own font has no Cyrillic
_LETTERS, _LINE, _MARGIN, _COLUMNS = 32, 47, 130, 78  # pixels, pixels, pixels, characters
_PARAGRAPHS, _SENTENCES = 5, 6

_ENGLISH = (
    "The ferry left the harbour at twenty past six, a little late because of the fog.",
    "Three crates of apples were counted twice and entered under number 4071.",
    "Nobody had expected that the old bridge would carry the new tram.",
    "Please send the signed copy back before the 14th of September.",
    "A kettle, two blankets and a box of matches were all that they took along.",
    "The invoice comes to 1,284.50 pounds, which includes the discount of 5 %.",
    "In the afternoon the wind turned and the rain moved on towards the hills.",
    "She wrote every measurement down by hand: 17.2, 17.9 and, at noon, 21.4 degrees.",
    "The library closes at eight; books may be left in the box beside the door.",
    "His grandfather had repaired clocks in a narrow shop behind the market.",
    "Questions are answered by telephone (0113 496 0182) or by letter.",
    "Half of the seeds had been sown in March, the rest only after the frost.",
)
_RUSSIAN = (
    "Паром вышел из гавани в двадцать минут седьмого, немного позже из-за тумана.",
    "Три ящика яблок пересчитали дважды и записали под номером 4071.",
    "Никто не ожидал, что старый мост выдержит новый трамвай.",
    "Просим вернуть подписанный экземпляр до 14 сентября.",
    "Чайник, два одеяла и коробка спичек — вот и всё, что они взяли с собой.",
    "Сумма счёта составляет 1284,50 рубля, включая скидку в размере 5 %.",
    "После полудня ветер переменился, и дождь ушёл в сторону холмов.",
    "Каждое измерение она записывала от руки: 17,2, 17,9 и в полдень 21,4 градуса.",
    "Библиотека закрывается в восемь; книги можно оставить в ящике у двери.",
    "Его дедушка чинил часы в узкой мастерской за рынком.",
    "На вопросы отвечают по телефону (495) 555-01-82 или письмом.",
    "Половину семян посеяли в марте, остальные — лишь после заморозков.",
)
_TEXTS: Final = {"English": _ENGLISH, "Russian": _RUSSIAN}


@dataclass(frozen=True, slots=True)
class BenchmarkPage:
    """A page and what it says."""

    name: str  # for reports
    language: str  # ``English`` or ``Russian`` of a generated page, else `GIVEN`
    image: PageImage  # as engines get it
    truth: str | None  # what an engine should read; ``None`` if nobody knows

    def variant(self, number: int) -> PageImage:
        """Return the page with the last bit of its pixel of that number flipped, so that no cache of images answers."""
        picture = self.image.image
        place = number % picture.width, number // picture.width % picture.height
        red, green, blue = picture.getpixel(place)  # type: ignore[misc]  # three numbers for mode RGB
        picture.putpixel(place, (red ^ 1, green ^ 1, blue ^ 1))  # grey stays grey
        return replace(self.image, png=images.to_png(picture))


def generate_pages(count: int) -> list[BenchmarkPage]:
    """Draw pages of text, English and (with a font that has Cyrillic) Russian by turns; the same ones each time."""
    languages = list(_TEXTS)
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    try:
        font = ImageFont.truetype(_FONT, _LETTERS)  # found where the system keeps its fonts
    except OSError:
        languages, font = ["English"], ImageFont.load_default(_LETTERS)
    return [_generate(number, languages[number % len(languages)], font) for number in range(count)]


def _generate(number: int, language: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> BenchmarkPage:
    chance = random.Random(number)
    paragraphs = [" ".join(chance.sample(_TEXTS[language], _SENTENCES)) for _ in range(_PARAGRAPHS)]
    picture = Image.new("RGB", A4, "white")
    pen = ImageDraw.Draw(picture)
    top = _MARGIN
    for paragraph in paragraphs:
        for line in textwrap.wrap(paragraph, _COLUMNS, break_long_words=False, break_on_hyphens=False):
            pen.text((_MARGIN, top), line, "black", font=font)
            top += _LINE
        top += _LINE
    return BenchmarkPage(f"{language} {number + 1}", language, PageImage.of(number + 1, picture), "\n".join(paragraphs))


def load_pages(files: Sequence[Path]) -> list[BenchmarkPage]:
    """Draw every page of some documents.

    Beside ``NAME.pdf`` (or another ending) there may be ``NAME.txt`` in UTF-8 with what it says, page after page with a
    form feed between them, as pdftotext writes it.

    Raises:
        InputError: A file cannot be read, a text has not as many parts as its document has pages, or there are more
            than `MOST_PAGES` pages.
    """
    pages: list[BenchmarkPage] = []
    for file in files:
        with open_document(file) as document:
            if len(pages) + document.page_count > MOST_PAGES:
                raise InputError(f"a benchmark takes {MOST_PAGES} pages at most: give fewer files, or shorter ones")
            truths = _truths(file, document.page_count)
            for number, truth in zip(document.numbers, truths, strict=True):
                name = document.name if document.page_count == 1 else f"{document.name}, page {number}"
                pages.append(BenchmarkPage(name, GIVEN, draw(document.reference(number)), truth))
    return pages


def _truths(file: Path, count: int) -> list[str] | list[None]:
    source = file.with_suffix(".txt")
    try:
        text = source.read_text("utf-8")
    except FileNotFoundError:
        return [None] * count
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {source}: {error}") from error
    parts = text.removesuffix("\f").split("\f")
    if len(parts) != count:
        problem = f"{source} has {len(parts)} parts with form feeds between them, but {file} has {count} pages"
        raise InputError(f"{problem}: write one part for each page")
    return parts
