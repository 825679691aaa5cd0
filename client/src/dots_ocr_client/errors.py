"""Everything that this package raises on purpose; each message says what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .results import Attempt


# Of the models that a server serves, so many are named at most (our own choice: a server can say thousands).
NAMES: Final = 20


class DotsOCRError(Exception):
    """Base class of all errors that this package raises on purpose."""

    status: int | None = None  # the HTTP status that the server answered with, if that is what went wrong


class InputError(DotsOCRError):
    """The document itself cannot be read: missing, broken, too large, of an unknown kind, or of several pages."""


class ConfigurationError(DotsOCRError):
    """The settings are wrong, for example the base URL: no other engine is tried, because that would hide it."""


class ModelNotServed(ConfigurationError):
    """The server does not serve the model that was asked for.

    Attributes:
        model: The name that was asked for.
        served: The names that the server does serve.
    """

    def __init__(self, model: str, served: Iterable[str], base_url: str) -> None:
        """Name the model that was asked for and those that exist."""
        self.model = model
        self.served = tuple(served)
        more = f" and {len(self.served) - NAMES} more" * (len(self.served) > NAMES)
        names = (", ".join(repr(name[:200]) for name in self.served[:NAMES]) or "none") + more
        super().__init__(
            f"{base_url} does not serve the model {model!r}; it serves: {names}. Ask for one of these (model=), "
            f"or start the server with --served-model-name {model}"
        )


class InvalidKey(ConfigurationError):
    """What was set as the API key can be none: it was not sent."""


class Unauthorized(ConfigurationError):
    """The server answered 401 or 403."""


class EngineError(DotsOCRError):
    """One engine could not read one page: the next one is tried."""


class EngineMissing(EngineError):
    """A program or language data that the engine needs are not installed."""


class ModeNotSupported(EngineError):
    """The engine, or the model behind it, cannot read in the mode that was asked for."""


class NotApplicable(EngineError):
    """The page is nothing for the engine: it has no sound text layer, or the engine is too slow for the time left."""


class ServerUnavailable(EngineError):
    """The server cannot be reached, is still starting, or failed inside (5xx)."""

    # Whether it may soon be over; not if the host swallows packets, which takes seconds to find out.
    passing: bool = True


class Overloaded(ServerUnavailable):
    """The server has too much to do (429, 503).

    Attributes:
        retry_after: How long it asked to be left alone, in seconds, if it did.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        """Keep the server's wish beside the message."""
        self.retry_after = retry_after
        super().__init__(message)


class CircuitOpen(ServerUnavailable):
    """The engine was not asked, because it was unavailable several times in a row; it will be tried again."""


class DeadlineExceeded(EngineError):
    """The engine gave no answer within its share of the time for the page."""


class RequestRejected(EngineError):
    """The server refuses the request for this page (400, 413, 422), or certainly would."""


class UnusableAnswer(EngineError):
    """There was an answer, but it is of no use: empty for a page that is not blank, no layout, cut off, a loop."""


class Repetition(UnusableAnswer):
    """The model repeated itself without end, its most frequent fault."""


class CutOff(UnusableAnswer):
    """The answer ran into the end of the context or of its budget.

    Attributes:
        text: What there is of it.
    """

    def __init__(self, message: str, text: str = "") -> None:
        """Keep what was read beside the message."""
        self.text = text
        super().__init__(message)


class AllEnginesFailed(DotsOCRError):
    """No engine could read the page.

    Attributes:
        page: The page's number, counted from 1.
        attempts: What each engine was asked, in order, and why it failed.
    """

    def __init__(self, page: int, attempts: tuple[Attempt, ...]) -> None:
        """List the causes in the order in which the engines were tried."""
        self.page = page
        self.attempts = attempts
        causes = "".join(f"\n  {attempt}" for attempt in attempts)
        super().__init__(f"no engine could read page {page}:{causes}")
