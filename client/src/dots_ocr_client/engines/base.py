"""What an engine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..documents import PageImage
from ..prompts import Mode


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine read from one page.

    Attributes:
        text: Empty for a blank page.
        model: What exactly read it: a model's name, or languages.
        finish_reason: Why the model stopped; ``None`` for an engine that has no such thing.
        warnings: What a reader of the text should know.
    """

    text: str
    model: str
    finish_reason: str | None = None
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """Something that reads pages. An engine belongs to one client, which closes it."""

    @property
    def name(self) -> str:
        """Short name, which results carry."""
        ...

    async def read(self, page: PageImage, mode: Mode, seconds: float) -> Answer:
        """Read one page.

        Args:
            page: The page.
            mode: What to read.
            seconds: How long it may take. The caller cancels this call then, so it must clean up when cancelled.

        Raises:
            EngineError: This engine cannot; another one may.
            ConfigurationError: The settings are wrong; no other engine is asked.
        """
        ...

    async def aclose(self) -> None:
        """Let go of connections and the like."""
        ...
