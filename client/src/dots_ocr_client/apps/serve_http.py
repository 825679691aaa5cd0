"""The connections of the service, and its log: what strangers may hold open, and what they may have written down."""

from __future__ import annotations

import copy
import ipaddress
import logging
from asyncio import BaseTransport, TimerHandle
from collections.abc import Collection
from typing import Any, Final
from urllib.parse import urlsplit

import h11
from starlette.requests import Request
from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import DefaultFormatter
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..texts import printable
from .serve_api import Refused

# Our own choice: far more than pages may wait by default, and far fewer than files that a process may have open.
MAX_CONNECTIONS: Final = 256
# For the head of a request to arrive, from the connection or the answer before on (our own choice).
HEAD_SECONDS: Final = 10.0
STALL_SECONDS: Final = 30.0  # for which a client may take nothing of its answer (our own choice)
LOGGED_CHARACTERS: Final = 200  # of an address in the log

_QUIET: Final = ("/health", "/metrics")


class Connection(H11Protocol):
    """A connection that does not wait for ever, and makes room for others while it waits."""

    # When it began to wait for a request, or for the rest of one; ``None`` while one is answered.
    _since: float | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Close the connection that has waited the longest, if this is one too many; if none waits, this one."""
        self._timers: dict[str, TimerHandle] = {}
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > MAX_CONNECTIONS:
            others = [one for one in self.connections if isinstance(one, Connection) and one._since is not None]
            longest = min(others, key=lambda one: one._since or 0.0, default=self)
            longest.transport.abort()
            self.connections.discard(longest)  # now, because more may come before it is closed
        self._look()

    def data_received(self, data: bytes) -> None:
        """See whether a head is complete."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        for what in tuple(self._timers):
            self._stop(what)

    def pause_writing(self) -> None:
        """Wait for the client to take its answer."""
        super().pause_writing()
        self._start("answer", STALL_SECONDS)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._stop("answer")

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.IDLE:
            self._start("head", HEAD_SECONDS)
        else:
            self._stop("head")
        waits = state in (h11.IDLE, h11.SEND_BODY)
        self._since = (self._since or self.loop.time()) if waits else None

    def _start(self, what: str, seconds: float) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, what: str) -> None:
        if timer := self._timers.pop(what, None):
            timer.cancel()


def check_sender(request: Request, hosts: Collection[str]) -> None:
    """Refuse (403) what a page of the web has a browser send to a service that asks for no key.

    Under its own name such a page can reach any address (DNS rebinding), but not as an address, nor as a name without a
    dot, which nobody can register. `hosts` are other names that the service is called by, in small letters.
    """
    given = request.headers.get("host", "")
    try:
        name = (urlsplit(f"//{given}").hostname or "").rstrip(".")
    except ValueError:  # half a bracket
        name = ""
    why = None
    for origin in request.headers.getlist("origin"):
        if origin not in (f"http://{given}", f"https://{given}"):
            why = f"pages of {origin[:60]!r} may not use this service. Fix: send no Origin, or start it with an API key"
    if not (name and (_is_address(name) or "." not in name or name.endswith(".localhost") or name in hosts)):
        fix = "Fix: call it by its address, start it with --allow-host NAME, or with an API key"
        why = f"this service does not go by the name {given[:60]!r}. {fix}"
    if why:
        raise Refused(403, "PermissionDeniedError", why)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def log_config() -> dict[str, Any]:
    """Return uvicorn's own, for `logging.config`, in lines that no client can forge."""
    config = copy.deepcopy(LOGGING_CONFIG)
    for formatter in config["formatters"].values():
        formatter["use_colors"] = False
    config["formatters"]["default"]["()"] = _Formatter
    return config


def is_news(record: logging.LogRecord) -> bool:
    """Leave out what watchdogs and Prometheus ask for every few seconds, and make the rest printable and short."""
    if any(f" {path} " in record.getMessage() for path in _QUIET):
        return False
    assert isinstance(record.args, tuple)
    record.args = tuple(_short(value) if isinstance(value, str) else value for value in record.args)
    return True


def _short(text: str) -> str:
    return printable(text if len(text) <= LOGGED_CHARACTERS else f"{text[:LOGGED_CHARACTERS]}...")


class _Formatter(DefaultFormatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).splitlines())
