"""What reading a document returns: plain values that do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, get_args

from ..prompts import Category as Category
from ..prompts import Mode
from . import export

_Result = TypeVar("_Result", bound="Document | Page | FailedPage | Cell | Attempt")
# Numbers in results from here on are none (our own choice: no page, side or count of tokens is near it).
LARGEST: Final = 2**31


class Box(NamedTuple):
    """A rectangle in pixels of the page's image, from its upper left corner; the right and lower edges lie outside."""

    left: int
    top: int
    right: int
    bottom: int

    def within(self, width: int, height: int) -> Box:
        """Return the part that lies on a page of that size, in pixels; it may be empty."""
        left, top = min(max(self.left, 0), width), min(max(self.top, 0), height)
        return Box(left, top, min(max(self.right, left), width), min(max(self.bottom, top), height))


@dataclass(frozen=True, slots=True)
class Cell:
    """One element of a page's layout, in reading order.

    Attributes:
        category: One of `Category`.
        box: Where it is; ``None`` if the model gave no usable box.
        text: Markdown; HTML for a Table, LaTeX for a Formula, empty for a Picture and in the mode ``layout_only``.
    """

    category: str
    box: Box | None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One engine that did not deliver the page.

    Attributes:
        engine: The engine's name, such as ``vllm``.
        outcome: ``failed`` if it tried, ``skipped`` if it never started (not installed, or no time left).
        error: Name of the error class, such as ``ServerUnavailable``.
        reason: Why, in words.
        seconds: How long it took to find out.
    """

    engine: str
    outcome: Literal["failed", "skipped"]
    error: str
    reason: str
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.engine} {self.outcome} after {self.seconds:.2f} s: {self.error}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Page:
    """What was read from one page and where it came from.

    Attributes:
        number: Counted from 1.
        width: Of the page's image, in pixels; boxes refer to it.
        height: As `width`.
        mode: How it was read; not the mode that was asked for where that failed, see `warnings`.
        text: Plain text in reading order; empty for a blank page. From a layout, the texts of its cells.
        cells: The layout; empty for a blank page, and in modes and engines that have none.
        engine: Name of the one that read it, also behind a server that tells, such as ``vllm``; empty for a blank page.
        model: The model as the server names it; for Tesseract its languages; empty for a blank page.
        seconds: Time that this engine took, without earlier attempts.
        prompt_tokens: Tokens of the image and the prompt, as the server counted them, if it did.
        completion_tokens: Tokens of the answer, as above.
        finish_reason: Why the model stopped; ``None`` for an engine that has no such thing.
        attempts: The engines that were tried or skipped before this one, those of the server included.
        warnings: What a reader of the text should know: every repair of the answer, a smaller image, another mode.
        dpi: Of a PDF's page: pixels of its image per inch, that is, per 72 points; ``None`` for images.
    """

    number: int
    width: int
    height: int
    mode: Mode
    text: str
    cells: tuple[Cell, ...]
    engine: str
    model: str
    seconds: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    attempts: tuple[Attempt, ...] = ()
    warnings: tuple[str, ...] = ()
    dpi: int | None = None

    def markdown(self, *, headers: bool = True) -> str:
        """Return the page as Markdown, with its headers and footers; a mode without layout leaves these out itself."""
        return export.markdown(self, headers=headers)

    def html(self, *, headers: bool = True) -> str:
        """Return the page as an HTML fragment that is safe to show, whatever the model wrote."""
        return export.html(self, headers=headers)

    def to_dict(self) -> dict[str, Any]:
        """Return the page as JSON-ready values: the fields of this class, boxes as lists of four numbers."""
        values = asdict(self)
        for cell in values["cells"]:
            cell["box"] = None if cell["box"] is None else list(cell["box"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the page that `to_dict` described, or raise `ValueError`, which names the wrong field."""
        page = _read(cls, "the page", values)
        if any(cell.box and cell.box != cell.box.within(page.width, page.height) for cell in page.cells):
            raise ValueError("box of a cell must lie on the page")
        return page


@dataclass(frozen=True, slots=True)
class FailedPage:
    """A page that could not be read; the others of the document were not lost with it.

    Attributes:
        number: Counted from 1.
        error: Name of the error class: ``AllEnginesFailed``, or ``InputError`` for a page that cannot be drawn.
        reason: Why, in words.
        attempts: What each engine was asked, in order, and why it failed.
    """

    number: int
    error: str
    reason: str
    attempts: tuple[Attempt, ...] = ()

    @property
    def text(self) -> str:
        """What stands in the place of its text, in brackets."""
        return f"[page {self.number} could not be read]"

    def markdown(self, *, headers: bool = True) -> str:
        """Return a comment that says why it could not be read; ``headers`` is of no consequence."""
        return export.failed_markdown(self)

    def html(self, *, headers: bool = True) -> str:
        """Return an HTML fragment that says why it could not be read; ``headers`` is of no consequence."""
        return export.failed_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of this class as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the failed page that `to_dict` described, or raise `ValueError`, which names the wrong field."""
        return _read(cls, "the failed page", values)


@dataclass(frozen=True, slots=True)
class Document:
    """What was read.

    Attributes:
        source: The path as it was given, or ``<bytes>``, ``<file>``, ``<image>`` or ``<data URL>``.
        pages: The pages in order.
    """

    source: str
    pages: tuple[Page | FailedPage, ...]

    @property
    def failures(self) -> tuple[FailedPage, ...]:
        """The pages that could not be read."""
        return tuple(page for page in self.pages if isinstance(page, FailedPage))

    @property
    def text(self) -> str:
        """The text of all pages, with an empty line between pages; a page that failed says so in brackets."""
        return "\n\n".join(page.text for page in self.pages)

    def markdown(self, *, headers: bool = True) -> str:
        """Return the document as Markdown, with an empty line between pages; see `Page.markdown`."""
        return "\n\n".join(filter(None, (page.markdown(headers=headers) for page in self.pages)))

    def html(self, *, headers: bool = True) -> str:
        """Return the document as a whole HTML page without pictures, safe to show, whatever the model wrote."""
        return "".join(export.html_document(self.source, (page.html(headers=headers) for page in self.pages)))

    def to_dict(self) -> dict[str, Any]:
        """Return the document as JSON-ready values: ``source``, ``text`` and ``pages``."""
        return {"source": self.source, "text": self.text, "pages": [page.to_dict() for page in self.pages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the document that `to_dict` described, or raise `ValueError`; of other keys nothing is read."""
        if isinstance(values, Mapping):
            values = {name: values[name] for name in ("source", "pages") if name in values}
        return _read(cls, "the document", values)


def page_of(values: Mapping[str, Any]) -> Page | FailedPage:
    """Return the page that ``to_dict`` of either kind described, or raise `ValueError`, which names the field."""
    failed = isinstance(values, Mapping) and "error" in values
    return (FailedPage if failed else Page).from_dict(values)


def attempts_of(values: Iterable[Any]) -> tuple[Attempt, ...]:
    """Return attempts of their fields, or raise `ValueError`, which names the field that is wrong."""
    return tuple(_read(Attempt, "an attempt", one) for one in values)


class _Kind(NamedTuple):
    """What a field may be, in words and for sure, and what is made of it."""

    words: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def _is_number(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < LARGEST


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_box(value: Any) -> bool:
    numbers = _is_list(value) and len(value) == 4 and all(_is_number(edge, 0) for edge in value)
    return numbers and value[0] <= value[2] and value[1] <= value[3]


_TEXT: Final = _Kind("a text", lambda value: isinstance(value, str))
_FROM_ONE: Final = _Kind("a whole number from 1 on", lambda value: _is_number(value, 1))
_COUNT: Final = _Kind("a whole number from 0 on, or null", lambda value: value is None or _is_number(value, 0))
# What the fields of all these classes may be, by their names, which mean the same in each.
_KINDS: Final = {
    **dict.fromkeys(("source", "text", "category", "engine", "model", "error", "reason"), _TEXT),
    **dict.fromkeys(("number", "width", "height"), _FROM_ONE),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), _COUNT),
    "pages": _Kind("a list", _is_list, lambda values: tuple(map(page_of, values))),
    "cells": _Kind("a list", _is_list, lambda values: tuple(_read(Cell, "a cell", one) for one in values)),
    "attempts": _Kind("a list", _is_list, attempts_of),
    "box": _Kind(
        "four whole numbers of a rectangle, or null",
        lambda value: value is None or _is_box(value),
        lambda value: value and Box(*value),
    ),
    "outcome": _Kind("failed or skipped", lambda value: value in ("failed", "skipped")),
    "seconds": _Kind("a number from 0 on", lambda value: type(value) in (int, float) and 0 <= value < LARGEST),
    "mode": _Kind("a mode", lambda value: isinstance(value, str) and value in get_args(Mode)),
    "finish_reason": _Kind("a text, or null", lambda value: value is None or isinstance(value, str)),
    "warnings": _Kind("a list of texts", lambda value: _is_list(value) and all(map(_TEXT.fits, value)), tuple),
    "dpi": _Kind("null or a whole number from 1", lambda value: value is None or _FROM_ONE.fits(value)),
}


def _read(kind: type[_Result], what: str, values: Any) -> _Result:
    """Return one of these classes of its fields, if they are all that there must be, and nothing else.

    The message of the `ValueError` has nothing of their values, which may be anything.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is not an object")
    known = {one.name: one for one in fields(kind)}
    missing = {name for name, one in known.items() if one.default is MISSING} - values.keys()
    if missing:
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if not values.keys() <= known.keys():
        raise ValueError(f"{what} has fields other than {', '.join(known)}")
    for name, value in values.items():
        if not _KINDS[name].fits(value):
            raise ValueError(f"{name} of {what} must be {_KINDS[name].words}")
    return kind(**{name: _KINDS[name].read(value) for name, value in values.items()})
