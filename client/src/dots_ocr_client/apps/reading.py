"""What ``dots-ocr read`` does with a single document: pages are written as soon as those before them are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from ..client import AsyncDotsOCR, whole
from ..errors import InputError
from ..pages.documents import Source, parse_pages
from ..pages.rasterizer import draw, open_document
from ..results import Document, FailedPage, Page
from ..results.hocr import document_hocr, drawn
from .progress import Silent

_DIGITS: Final = re.compile(r"\d+")


async def run(
    client: AsyncDotsOCR,
    source: Source,
    progress: Silent,
    write: Callable[[str], None] | None,
    render: Callable[[Document], str],
    *,
    pages: str | None = None,
    password: str | None = None,
    **options: Any,
) -> Document:
    """Read a document, with progress; `options` are those of `AsyncDotsOCR.stream`, and so are the errors.

    `write` is given the pages in their order, as soon as those before them are there, each as `render` makes a text of
    a document of one page.
    """
    results: dict[int, Page | FailedPage] = {}
    begun = good = False  # what failed waits for a page that did not: of nothing at all there is no output
    with await client.open(source, password=password) as opened:
        numbers = opened.numbers if pages is None else parse_pages(pages, opened.page_count, opened.name)
        left = list(numbers)
        progress.documents(1)
        progress.opened(opened.name, len(left))
        async with aclosing(client.stream(opened, pages=numbers, **options)) as stream:
            async for page in stream:
                results[page.number] = page
                progress.page(opened.name, page)
                good = good or isinstance(page, Page)
                while write and good and left and left[0] in results:
                    if text := render(Document("", (results[left.pop(0)],))):
                        with progress.aside():
                            write("\n\n" * begun + text)
                        begun = True
    return whole(source, results.values())


def notes(document: Document) -> Iterator[str]:
    """Yield what is to be known about the pages, a line for all that were read, or failed, in the same way."""
    kinds: dict[tuple[str, ...], list[Page | FailedPage]] = {}
    for page in document.pages:
        if isinstance(page, Page):
            said = [f"{attempt.engine} {attempt.outcome} {attempt.error}" for attempt in page.attempts]
            said += [_DIGITS.sub("#", warning) for warning in page.warnings]
            kinds.setdefault((page.engine, page.model, *said), []).append(page)
        else:
            kinds.setdefault(("", "", page.error, _DIGITS.sub("#", page.reason)), []).append(page)
    for alike in kinds.values():
        first, many = alike[0], len(alike) > 1
        if isinstance(first, FailedPage):
            said = [f"failed: {first.error}: {first.reason}"]
        else:
            seconds = sum(page.seconds for page in alike if isinstance(page, Page)) / len(alike)
            reader = f"{first.engine} ({first.model}) answered" if first.engine else "blank, found"
            said = [f"{reader} in {seconds:.2f} s{' each' * many}", *map(str, first.attempts), *first.warnings]
        yield " ".join(f"page{'s' * many} {_ranges([page.number for page in alike])}: {'; '.join(said)}".split())


def as_hocr(document: Document, file: Path | None, password: str | None, dpi: int | None) -> str:
    """Return a document as hOCR; its words are found in the pages of the file, if there is one."""
    if file is None:
        return "".join(document_hocr(document.source, document.pages, lambda _: None))
    with open_document(file, password=password) as opened:
        opened.dpi = dpi
        image = partial(drawn, lambda number: draw(opened.reference(number)))
        return "".join(document_hocr(document.source, document.pages, image))


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as 1-3, 7."""
    ranges = ([number for _, number in run] for _, run in groupby(enumerate(numbers), lambda one: one[1] - one[0]))
    return ", ".join("-".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in ranges)


def expanded(files: Iterable[Path]) -> Iterator[Path]:
    """Yield files and folders, with what patterns stand for that the shell has left as they are.

    Raises:
        InputError: A pattern stands for nothing, or what is named is an address on the web.
    """
    for file in files:
        name = str(file)
        if re.match(r"https?:/", name, re.IGNORECASE):  # Path has made one slash of two
            url = re.sub(":/+", "://", name, count=1)
            raise InputError(f"{url} is on the web, and nothing is fetched from there. Fix: curl -LO {url}")
        if not re.search(r"[*?\[]", name) or file.exists():
            yield file
            continue
        base = Path(file.anchor or ".")
        try:
            found = sorted(base.glob(str(file.relative_to(file.anchor)) if file.anchor else name))
        except ValueError as error:  # such as **.png
            raise InputError(f"{name!r} is no pattern: {error}") from error
        if not found:
            raise InputError(f"no file is called {name!r}: correct the pattern")
        yield from found
