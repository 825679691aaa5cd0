"""One HTML file that shows a document's pages, what was found on them and where."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

from PIL import Image

from ..pages.documents import PageImage
from ..results import Box, Cell, Document, FailedPage, Page
from ..results.store import FIRST_ENGINE
from ..texts import count, printable, write

LONGEST_SIDE: Final = 1600  # of a picture, in pixels: print of a full page is still easy to read (our own choice)
# What pages can be searched for beside their text: how the file calls it, and in words.
STATES: Final = {"fallback": "read by a fallback", "noted": "with warnings", "failed": "not read"}
QUALITY: Final = 75  # of the pictures, as Pillow counts for WebP (our own choice)


def write_view(document: Document, pages: Iterable[PageImage], file: Path) -> None:
    """Write a document as one HTML file, with each page's picture and boxes beside its text.

    The file needs no network and no other file. Nothing that the model, the server or the document's author wrote can
    run in it: all of it is escaped, and the file's own policy allows no script but ours. One picture at a time is held
    in memory; they come in the order of the pages, and one that is missing leaves an empty sheet.
    """
    write(file, _parts(document, pages))


def _parts(document: Document, pages: Iterable[PageImage]) -> Iterator[str]:
    yield _head(document)
    drawn = iter(pages)
    picture = next(drawn, None)
    for page in document.pages:
        while picture is not None and picture.number < page.number:
            picture = next(drawn, None)
        yield _page(page, picture if picture is not None and picture.number == page.number else None)
    yield f"</main>\n</div>\n<script>{_asset('view.js')}</script>\n</html>\n"


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _head(document: Document) -> str:
    script = base64.b64encode(hashlib.sha256(_asset("view.js").encode()).digest()).decode()
    name = printable(document.source)
    read = [page for page in document.pages if isinstance(page, Page)]
    categories = Counter(cell.category for page in read for cell in page.cells)
    choices = "".join(
        f'<label><input type="checkbox" checked data-category="{escape(category)}">'
        f'<i data-category="{escape(category)}"></i>{escape(printable(category))} ({count})</label>\n'
        for category, count in sorted(categories.items())
    )
    kinds = f"<details>\n<summary>Kinds</summary>\n<fieldset>\n{choices}</fieldset>\n</details>\n" if choices else ""
    states = Counter(state for page in document.pages for state in _states(page))
    only = "".join(f'<option value="{state}">{STATES[state]} ({states[state]})</option>' for state in STATES)
    links = "".join(_link(page) for page in document.pages)
    failed = f", {len(document.failures)} of them could not be read" if document.failures else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(name)}</title>\n<style>\n{_asset('view.css')}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(name)}</h1>\n<p class="v_facts">{count(len(document.pages), "page")}{failed}</p>\n'
        '</header>\n<div class="v_bar">\n<label>Search <input type="search" id="v_search"></label>\n'
        f'<label>Show <select id="v_only"><option value="">all pages</option>{only}</select></label>\n'
        '<label><input type="checkbox" id="v_boxes" checked>Boxes</label>\n'
        f'{kinds}<output id="v_count"></output>\n</div>\n'
        f'<div class="v_columns">\n<nav aria-label="Pages">\n{links}</nav>\n<main>\n'
    )


def _states(page: Page | FailedPage) -> list[str]:
    if isinstance(page, FailedPage):
        return ["failed"]
    return ["fallback"] * (page.engine not in (FIRST_ENGINE, "")) + ["noted"] * bool(page.warnings)


def _link(page: Page | FailedPage) -> str:
    states, number = _states(page), escape(str(page.number))
    said = f' title="{escape(", ".join(STATES[state] for state in states))}"' if states else ""
    return f'<a href="#page-{number}" data-states="{" ".join(states)}"{said}>{number}</a>\n'


def _page(page: Page | FailedPage, picture: PageImage | None) -> str:
    if isinstance(page, FailedPage):
        facts = f"{page.error}: {page.reason}"
        notes = [str(attempt) for attempt in page.attempts]
        sheet = _sheet(picture.width, picture.height, picture, "") if picture else ""
        text = "<p>This page could not be read.</p>\n"
    else:
        reader = f"{page.engine} ({page.model})" if page.engine else "blank"
        facts = f"{reader}, mode {page.mode}, {page.seconds:.1f} s"
        notes = [*(str(attempt) for attempt in page.attempts), *page.warnings]
        if picture and abs(picture.width * page.height - picture.height * page.width) > page.width + page.height:
            notes.append("the picture has other proportions than the page that was read, so boxes may be misplaced")
        sheet = _sheet(page.width, page.height, picture, _boxes(page))
        text = _text(page)
    number = escape(str(page.number))
    listed = "".join(f"<li>{escape(printable(note))}</li>" for note in notes)
    return (
        f'<section class="v_page" data-states="{" ".join(_states(page))}" id="page-{number}">\n'
        f'<h2>Page {number}</h2>\n<p class="v_facts">{escape(printable(facts))}</p>\n'
        + (f'<ul class="v_notes">{listed}</ul>\n' if listed else "")
        + f'<div class="v_sides">\n{sheet}<div class="v_text">\n{text}</div>\n</div>\n</section>\n'
    )


def _sheet(width: int, height: int, picture: PageImage | None, boxes: str) -> str:
    image = f'<img alt="Picture of page {picture.number}" src="{_data_url(picture.image)}">\n' if picture else ""
    return f'<div class="v_sheet" style="aspect-ratio:{escape(f"{width}/{height}")}">\n{image}{boxes}</div>\n'


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _boxes(page: Page) -> str:
    boxed = [(index, cell, cell.box) for index, cell in enumerate(page.cells) if cell.box is not None]
    # The smaller one is on top, so that the pointer can reach a caption inside a picture. The order of the elements
    # stays that of reading, for the keyboard.
    areas = sorted({_area(box) for _, _, box in boxed}, reverse=True)
    layers = {area: layer for layer, area in enumerate(areas, 1)}
    number = escape(str(page.number))
    return "".join(
        f'<a class="v_box" id="box-{number}-{index}" href="#text-{number}-{index}" data-cell="{index}" '
        f'{_category(cell)} aria-label="{escape(printable(_name(cell)))}" '
        f'style="left:{_percent(box.left, page.width)};top:{_percent(box.top, page.height)};'
        f"width:{_percent(box.right - box.left, page.width)};height:{_percent(box.bottom - box.top, page.height)};"
        f'z-index:{layers[_area(box)]}"></a>\n'
        for index, cell, box in boxed
    )


def _text(page: Page) -> str:
    if not page.cells:
        return page.html() if page.text.strip() else "<p>This page is blank.</p>\n"
    number = escape(str(page.number))
    return "".join(
        f'<div class="v_cell" id="text-{number}-{index}" data-cell="{index}" {_category(cell)}>\n'
        + _label(page, index, cell)
        # By itself, because this tells for certain which part of the page's HTML is of this cell.
        + replace(page, cells=(cell,), text=cell.text).html()
        + "</div>\n"
        for index, cell in enumerate(page.cells)
    )


def _label(page: Page, index: int, cell: Cell) -> str:
    category = escape(printable(cell.category))
    if cell.box is None:
        return f'<span class="v_label">{category}, without a box</span>\n'
    return f'<a class="v_label" href="#box-{escape(str(page.number))}-{index}">{category}</a>\n'


def _category(cell: Cell) -> str:
    return f'data-category="{escape(cell.category)}"'


def _name(cell: Cell) -> str:
    return f"{cell.category}: {cell.text[:80]}" if cell.text else cell.category


def _area(box: Box) -> int:
    return (box.right - box.left) * (box.bottom - box.top)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.4f}%"
