"""What reading a document returns: plain values that do not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from . import export
from .prompts import Mode

Category = Literal[
    "Caption",
    "Footnote",
    "Formula",
    "List-item",
    "Page-footer",
    "Page-header",
    "Picture",
    "Section-header",
    "Table",
    "Text",
    "Title",
]
"""What dots.ocr tells apart. The mode ``web`` of dots.mocr has others, which stay as the model wrote them."""


class Box(NamedTuple):
    """A rectangle in pixels of the page's image, from its upper left corner; the right and lower edges lie outside."""

    left: int
    top: int
    right: int
    bottom: int


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
        engine: Name of the engine that delivered it, such as ``vllm`` or ``tesseract``.
        model: The model as the server names it; for Tesseract its languages.
        seconds: Time that this engine took, without earlier attempts.
        prompt_tokens: Tokens of the image and the prompt, as the server counted them, if it did.
        completion_tokens: Tokens of the answer, as above.
        finish_reason: Why the model stopped; ``None`` for an engine that has no such thing.
        attempts: The engines that were tried or skipped before this one.
        warnings: What a reader of the text should know: every repair of the answer, a smaller image, another mode.
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

    def markdown(self, *, headers: bool = True) -> str:
        """Return the page as Markdown.

        Args:
            headers: With the headers and footers of the page; a mode without layout leaves them out by itself.
        """
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
        """Return the page that `to_dict` described.

        Raises:
            KeyError, TypeError, ValueError: The values are of no page.
        """
        cells = tuple(
            Cell(cell["category"], None if cell["box"] is None else Box(*map(int, cell["box"])), cell["text"])
            for cell in values["cells"]
        )
        attempts = tuple(Attempt(**attempt) for attempt in values["attempts"])
        return cls(**{**values, "cells": cells, "attempts": attempts, "warnings": tuple(values["warnings"])})


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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of this class as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the failed page that `to_dict` described.

        Raises:
            KeyError, TypeError: The values are of no failed page.
        """
        return cls(**{**values, "attempts": tuple(Attempt(**attempt) for attempt in values["attempts"])})


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
        return "\n\n".join(
            f"[page {page.number} could not be read]" if isinstance(page, FailedPage) else page.text
            for page in self.pages
        )

    def markdown(self, *, headers: bool = True) -> str:
        """Return the document as Markdown, with an empty line between pages.

        Args:
            headers: With the headers and footers of the pages.
        """
        return export.markdown_document(self, headers=headers)

    def html(self, *, headers: bool = True) -> str:
        """Return the document as a whole HTML page without pictures, safe to show, whatever the model wrote.

        Args:
            headers: With the headers and footers of the pages.
        """
        return export.html_document(self, headers=headers)

    def to_dict(self) -> dict[str, Any]:
        """Return the document as JSON-ready values: ``source``, ``text`` and ``pages``."""
        return {"source": self.source, "text": self.text, "pages": [page.to_dict() for page in self.pages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the document that `to_dict` described.

        Raises:
            KeyError, TypeError, ValueError: The values are of no document.
        """
        pages = tuple((FailedPage if "error" in page else Page).from_dict(page) for page in values["pages"])
        return cls(values["source"], pages)
