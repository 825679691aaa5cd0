"""What an engine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from ..errors import RequestRejected
from ..pages.documents import PageImage
from ..prompts import Mode
from ..results import Attempt, Box, Cell, layout
from .admission import Limiter


@dataclass(frozen=True, slots=True)
class Task:
    """What to read from a page.

    Attributes:
        mode: One of `dots_ocr_client.prompts.MODES`.
        box: For the mode ``grounding``: where, in pixels of the page's image.
        question: For the mode ``general``.
    """

    mode: Mode = "layout"
    box: Box | None = None
    question: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine read from one page.

    Attributes:
        mode: How it was read, which may differ from the task's mode.
        text: Empty for a blank page.
        model: What exactly read it: a model's name, or languages.
        cells: The layout, if the engine and the mode have one; boxes in pixels of the page's image.
        prompt_tokens: As the server counted them, if it did.
        completion_tokens: As above.
        finish_reason: Why the model stopped; ``None`` for an engine that has no such thing.
        warnings: What a reader of the text should know.
        engine: Who read it, if that was not the engine itself: a server says that another one did.
        attempts: What that server tried before.
        size: Width and height of the page's image, from an engine that was given no image: boxes refer to them.
        dpi: Pixels of that image per inch.
    """

    mode: Mode
    text: str
    model: str
    cells: tuple[Cell, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    warnings: tuple[str, ...] = ()
    engine: str | None = None
    attempts: tuple[Attempt, ...] = ()
    size: tuple[int, int] | None = None
    dpi: int | None = None


class Engine(Protocol):
    """Something that reads pages. An engine belongs to one client, which closes it."""

    @property
    def name(self) -> str:
        """Short name, which results carry."""

    @property
    def modes(self) -> frozenset[Mode]:
        """What it can be asked for; it is skipped for anything else."""

    @property
    def limiter(self) -> Limiter:
        """How many pages it may be given at once; the caller holds one of its slots while it calls `read`."""

    @property
    def expected_seconds(self) -> float:
        """About how long one page takes; with less time left, an engine that has others behind it is passed over."""

    async def probe(self, seconds: float) -> None:
        """Find out whether the engine could read a page now, at little cost: for a server, its health and its model.

        Args:
            seconds: How long that may take. The caller cancels this call then.

        Raises:
            EngineError: It could not.
            ConfigurationError: It never will with these settings.
        """

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page.

        Args:
            page: The page; for an engine with an attribute ``pixels = False`` it may be `PageImage.undrawn`.
            task: What to read.
            seconds: How long it may take. The caller cancels this call then, so it must clean up when cancelled.

        Raises:
            EngineError: This engine cannot; another one may.
            ConfigurationError: The settings are wrong; no other engine is asked.
        """

    async def aclose(self) -> None:
        """Let go of connections and the like."""


def cut_out(page: PageImage, box: Box) -> Image.Image:
    """Return the part of a page that a box shows; see `place`."""
    return page.image.crop(place(page, box))


def place(page: PageImage, box: Box) -> tuple[int, int, int, int]:
    """Return where on a page as it is sent a box in pixels of its own image is: left, top, right and bottom, in pixels.

    Raises:
        RequestRejected: It shows nothing of the page.
    """
    sent, own = (page.sent_width, page.sent_height), (page.width, page.height)
    left, top, right, bottom = layout.to_page(box, own, sent)
    if left >= right or top >= bottom:
        raise RequestRejected(
            f"the box {list(box)} lies outside the page of {page.width} x {page.height} px. Fix: give it in these "
            "pixels, as results have them"
        )
    return left, top, right, bottom
