"""The real OCRmyPDF with our plugin, and a server that answers as the model does."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import NamedTuple

from dots_ocr_client.apps.bench.pages import _TEXTS, A4
from dots_ocr_client.pages import images
from PIL import Image, ImageDraw, ImageFont
from support import FakeServer

WORD = re.compile(r'<word xMin="([\d.]+)" yMin="([\d.]+)" xMax="([\d.]+)" yMax="([\d.]+)">(.*?)</word>')
POINT = 200 / 72  # pixels
NEAR = 8  # pixels: a millimetre


class Printed(NamedTuple):
    """A word and the edges of its ink, in pixels of a page at 200 dpi."""

    text: str
    edges: tuple[float, ...]


def printed_page(language: str, size: int, width: int) -> tuple[Image.Image, list[dict[str, object]], list[Printed]]:
    """Return a page, what the model answers about it, and where its words are."""
    chance, font = random.Random(f"{language} {size}"), ImageFont.truetype("DejaVuSans.ttf", size)
    page = Image.new("RGB", A4, "white")
    draw = ImageDraw.Draw(page)
    sent = images.smart_resize(*A4)
    words: list[Printed] = []
    cells: list[dict[str, object]] = []
    top = 120
    for _ in range(3):
        text, left, first = " ".join(chance.sample(_TEXTS[language], 4)), 130.0, len(words)
        for word in text.split():
            if left + draw.textlength(word, font=font) > 130 + width:
                left, top = 130.0, top + round(1.4 * size)
            draw.text((left, top), word, "black", font=font)
            words.append(Printed(word, draw.textbbox((left, top), word, font=font)))
            left += draw.textlength(word + " ", font=font)
        lefts, tops, rights, bottoms = zip(*(word.edges for word in words[first:]), strict=True)
        box = (min(lefts) - 2, min(tops) - 2, max(rights) + 2, max(bottoms) + 2)
        seen = [round(edge * sent[side % 2] / A4[side % 2]) for side, edge in enumerate(box)]
        cells.append({"bbox": seen, "category": "Text", "text": text})
        top += 4 * size
    return page, cells, words


def ocrmypdf(server: FakeServer, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ocrmypdf", "--plugin", "dots_ocr_client.ocrmypdf", *map(str, words)]
    environment = {**os.environ, "DOTS_OCR_BASE_URL": server.base_url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_words_of_a_searchable_pdf_are_where_they_are_printed(server: FakeServer, tmp_path: Path) -> None:
    assert shutil.which("pdftotext"), "install poppler-utils"
    scan, searchable = tmp_path / "scan.pdf", tmp_path / "searchable.pdf"
    pages = [printed_page("English", 28, 1000), printed_page("Russian", 34, 1300)]
    pages[0][0].save(scan, resolution=200, save_all=True, append_images=[pages[1][0]])
    server.script = [(json.dumps(cells, ensure_ascii=False), "stop") for _, cells, _ in pages]
    done = ocrmypdf(server, "--jobs", "1", scan, searchable)
    assert done.returncode == 0, done.stderr
    found = subprocess.run(["pdftotext", "-bbox", searchable, "-"], capture_output=True, text=True, check=True).stdout
    for (_, _, words), text in zip(pages, found.split("</page>"), strict=False):
        read = WORD.findall(text)
        assert [unescape(word[-1]) for word in read] == [word.text for word in words]
        for (*edges, _), word in zip(read, words, strict=True):
            left, top, right, bottom = (POINT * float(edge) for edge in edges)
            assert abs(left - word.edges[0]) < NEAR, word
            assert abs(right - word.edges[2]) < NEAR, word
            assert word.edges[1] < (top + bottom) / 2 < word.edges[3], word


def test_page_that_cannot_be_read_leaves_no_pdf(server: FakeServer, tmp_path: Path) -> None:
    server.fail_with(404, "The model `dots.ocr` does not exist.")
    scan, searchable = tmp_path / "scan.png", tmp_path / "searchable.pdf"
    printed_page("English", 28, 1000)[0].save(scan, dpi=(200, 200))
    done = ocrmypdf(server, scan, searchable)
    assert done.returncode == 7
    assert "dots-ocr doctor" in done.stderr
    assert not searchable.exists()
