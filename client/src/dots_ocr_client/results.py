"""What reading a document returns: plain values that do not change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


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
    """The text of one page and where it came from.

    Attributes:
        number: Counted from 1.
        text: The text as the engine wrote it; empty for a blank page.
        engine: Name of the engine that delivered it, such as ``vllm`` or ``tesseract``.
        model: The model as the server names it; for Tesseract its languages.
        seconds: Time that this engine took, without earlier attempts.
        finish_reason: Why the model stopped; ``None`` for an engine that has no such thing.
        attempts: The engines that were tried or skipped before this one.
        warnings: What a reader of the text should know, such as that the image was made smaller.
    """

    number: int
    text: str
    engine: str
    model: str
    seconds: float
    finish_reason: str | None = None
    attempts: tuple[Attempt, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """What was read.

    Attributes:
        source: The path as it was given, ``<bytes>`` or ``<image>``.
        pages: The pages in order.
    """

    source: str
    pages: tuple[Page, ...]

    @property
    def text(self) -> str:
        """The text of all pages, with an empty line between pages."""
        return "\n\n".join(page.text for page in self.pages)

    def to_dict(self) -> dict[str, Any]:
        """Return the document as JSON-ready values: the fields of this class and of `Page`, and ``text``."""
        return {"text": self.text, **asdict(self)}
