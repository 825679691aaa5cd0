"""The service behind ``dots-ocr serve``: the engines, one after the other, under as much of vLLM's API as OCR needs.

It is for hosts without a GPU, and for programs that can speak to nothing but a server. Needs the extra ``serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .. import errors
from ..chain.fallback import Chain
from ..client import DEFAULT_TIMEOUT
from ..credentials import bare
from ..engines import admission
from ..engines.base import Engine
from ..engines.defaults import ENGINES
from ..engines.server import SERVICE
from ..pages.rasterizer import Rasterizer, memory
from ..results import Attempt, Page
from ..version import __version__
from . import serve_http
from .serve_api import Refused, answer, task_of, understand

# The model's names, as the servers of this project serve them: whoever asks for dots.ocr is to find this service.
SERVED_NAMES: Final = ("dots.ocr", "rednote-hilab/dots.ocr", "dotsocr-model", "model")
KEY_VARIABLE: Final = "DOTS_OCR_SERVE_API_KEY"  # of the environment
DEFAULT_QUEUE: Final = 64  # pages that wait at most (our own choice: some minutes of Tesseract's work on two cores)
# What is said to be the context, in tokens: that of dots.ocr, so that no client refuses a page for its length.
CONTEXT: Final = 131_072
# Of a request. The largest page that the model takes, uncompressed and in base64, has 43 MiB.
MAX_BODY_BYTES: Final = 64 * 2**20
BODY_SECONDS: Final = 60.0  # for a whole request to arrive, so that slow senders do not fill the queue (our own choice)
BODY_SHARE: Final = 0.125  # of all memory that requests may take together while they arrive and wait (our own choice)
# ``/health`` is ill when no worker has finished a picture for so long and all are busy (our own choice).
FULL_SECONDS: Final = 5.0
DEFAULT_SHUTDOWN: Final = 10.0  # for pages that are being read when the service is told to end, in seconds
PROBE_SECONDS: Final = 5.0  # for all engines to say whether they could work
# Of the page for people: a browser loads nothing else, runs nothing and keeps nothing.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# For so many seconds ``/health`` says the same, because anybody may ask it and a probe costs something.
PROBE_AGE: Final = 1.0

# Of attempts that may go well later, as they name their errors.
_PASSING: Final = {"ServerUnavailable", "Overloaded", "CircuitOpen", "DeadlineExceeded", "EngineMissing"}

T = TypeVar("T")


class _Metrics:
    """What ``/metrics`` tells, apart from other services in the same process."""

    def __init__(self, waiting: Callable[[], int], in_flight: Callable[[], int], engines: Iterable[str]) -> None:
        self._engines = frozenset((*ENGINES, *engines))
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        gauge = partial(prometheus_client.Gauge, registry=registry)
        gauge("dots_ocr_pages_waiting", "Pages that wait for an engine").set_function(waiting)
        gauge("dots_ocr_pages_in_flight", "Pages that engines are reading").set_function(in_flight)
        counter = partial(prometheus_client.Counter, registry=registry)
        self.requests = counter("dots_ocr_requests", "Requests for a page, by the status of the answer", ["status"])
        became = "by what became of it: read, failed or skipped; blank ones are by none"
        asked = f"Pages that an engine was asked for, {became}"
        self.engine_pages = counter("dots_ocr_engine_pages", asked, ["engine", "outcome"])
        buckets = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
        seconds = partial(prometheus_client.Histogram, buckets=buckets, registry=registry)
        answered = "Time from the request to the answer, of pages that were read"
        self.request_seconds = seconds("dots_ocr_request_seconds", answered)
        took = "Time that an engine took for a page that it read"
        self.engine_seconds = seconds("dots_ocr_engine_seconds", took, ["engine"])

    def note(self, attempts: Sequence[Attempt], page: Page | None = None) -> None:
        for attempt in attempts:
            self.engine_pages.labels(self._label(attempt.engine), attempt.outcome).inc()
        if page is not None:
            self.engine_pages.labels(self._label(page.engine), "read").inc()
            self.engine_seconds.labels(self._label(page.engine)).observe(page.seconds)

    def _label(self, engine: str) -> str:
        """Take no name from another server that is not known: each would stay in memory."""
        return engine if engine in self._engines else "other" if engine else "none"


class Service:
    """Answers requests with the engines of a chain. It belongs to one event loop."""

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        names: Sequence[str] = SERVED_NAMES,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_queue: int = DEFAULT_QUEUE,
        hosts: Iterable[str] = (),
    ) -> None:
        """Take the engines, in the order in which they are to be asked; they are closed with the service.

        Args:
            engines: At least one.
            names: Of the model, as clients may call it.
            api_key: What clients have to send as a bearer token; ``None`` for no key.
            timeout: For one page and all engines together, in seconds of their work.
            max_queue: Pages that wait at most, 1 or more; further ones are refused with 503.
            hosts: Names of the service with a dot in them, which count only without a key; see `serve_http`.
        """
        if not names or max_queue < 1:
            raise ValueError("the model needs a name, and the queue at least one place")
        self._chain = Chain(engines, timeout, "fallback")
        self._engines = tuple(engines)
        self._names = tuple(names)
        self._api_key = api_key
        self._max_queue = max_queue
        self._started = int(time.time())
        self._admitted = 0
        self._hosts = {name.lower() for name in (socket.gethostname(), *hosts)}
        self._rasterizer = Rasterizer()
        self._understanding = asyncio.Semaphore(self._rasterizer.workers)  # takes several times a request's length
        # Pages that are drawn and wait for an engine take up to 34 MB each.
        self._turns = asyncio.Semaphore(2 * self._rasterizer.workers)
        self._body_bytes, self._most_body_bytes = 0, max(MAX_BODY_BYTES, int(BODY_SHARE * memory()))
        self._metrics = _Metrics(self._waiting, self._in_flight, (engine.name for engine in engines))
        self._probing = asyncio.Lock()
        self._health: tuple[float, dict[str, str]] = float("-inf"), {}

    def app(self) -> Starlette:
        """Return the ASGI application; its shutdown closes the engines."""
        return Starlette(
            routes=[
                Route("/", self._answer_page),
                Route("/health", self._answer_health),
                Route("/metrics", self._answer_metrics),
                Route("/version", self._answer_version),
                Route("/v1/models", self._answer_models),
                Route("/v1/chat/completions", self._answer_completion, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _refuse, 500: _refuse},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(self._rasterizer.close)
            for engine in self._engines:
                await engine.aclose()

    def _check_caller(self, request: Request) -> None:
        """Ask for the key; without one, refuse pages of the web that make a browser ask."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self._api_key is None:
            serve_http.check_sender(request, self._hosts)
        elif scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._api_key.encode()):
            raise Refused(401, "Unauthorized", "send the service's API key: Authorization: Bearer KEY")

    async def _answer_page(self, request: Request) -> Response:
        health = await self._answer_health(request)
        state = "ready · готов" if health.status_code == 200 else "not ready · не готов"
        page = files(__package__).joinpath("serve.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("$state", state), headers=PAGE_HEADERS)

    async def _answer_health(self, _: Request) -> Response:
        async with self._probing:
            asked, found = self._health
            if time.monotonic() - asked >= PROBE_AGE:
                probes = await asyncio.gather(*map(_probe, self._engines))
                found = {engine.name: probe for engine, probe in zip(self._engines, probes, strict=True)}
                self._health = time.monotonic(), found
        drawing = self._rasterizer
        full = drawing.full_for >= FULL_SECONDS
        status = "unavailable" if "ok" not in found.values() else "busy" if full else "ok"
        workers = {"all": drawing.workers, "free": drawing.workers - drawing.busy}
        return JSONResponse({"status": status, "engines": found, "workers": workers}, 200 if status == "ok" else 503)

    async def _answer_metrics(self, _: Request) -> Response:
        text = prometheus_client.generate_latest(self._metrics.registry)
        return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def _answer_version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _answer_models(self, request: Request) -> Response:
        self._check_caller(request)
        card = {
            "object": "model",
            "created": self._started,
            "owned_by": SERVICE,
            "root": ",".join(engine.name for engine in self._engines),
            "parent": None,
            "max_model_len": CONTEXT,
        }
        return JSONResponse({"object": "list", "data": [{"id": name, **card} for name in self._names]})

    async def _answer_completion(self, request: Request) -> Response:
        """Read a page, and count what becomes of the request."""
        begin, status = time.monotonic(), 500
        try:
            response = await self._read(request)
            status = response.status_code
            self._metrics.request_seconds.observe(time.monotonic() - begin)
        except Refused as refused:
            status = refused.status_code
            raise
        finally:
            self._metrics.requests.labels(str(status)).inc()
        return response

    async def _read(self, request: Request) -> Response:
        self._check_caller(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            message = "the request is not of the type application/json. Fix: send Content-Type: application/json"
            raise Refused(415, "UnsupportedMediaTypeError", message)
        self._check_place()
        with contextlib.ExitStack() as held:
            body = await self._body(request, held)
            self._check_place()
            self._admitted += 1
            try:
                return await _while_connected(request, self._respond(body))
            except asyncio.CancelledError:  # nobody but uvicorn cancels
                raise self._full("the service ends") from None
            finally:
                self._admitted -= 1

    async def _respond(self, body: bytearray) -> Response:
        try:
            async with self._understanding:
                question = await asyncio.to_thread(understand, body, self._names)
            body.clear()
            await self._turns.acquire()
            end_turn = admission.turn(self._turns)
            try:
                with await self._rasterizer.open(question.picture) as document:
                    if len(document.numbers) != 1:
                        raise errors.InputError(f"the image has {len(document.numbers)} pages: send them one by one")
                    image = await self._rasterizer.draw(document.reference(1))
                task, doubts = task_of(question, image)
                page = await self._chain.ask(image, task, end_turn)
            finally:
                end_turn()
        except errors.InputError as error:
            raise Refused(400, "BadRequestError", str(error), "messages") from error
        except errors.ConfigurationError as error:
            raise Refused(500, "InternalServerError", f"this service is not set up rightly: {error}") from error
        except errors.AllEnginesFailed as error:
            self._metrics.note(error.attempts)
            more: dict[str, Any] = {"dots_ocr": {"attempts": [asdict(attempt) for attempt in error.attempts]}}
            if any(attempt.error in _PASSING for attempt in error.attempts):
                raise self._full(str(error), **more) from error
            raise Refused(422, "UnprocessableEntityError", str(error), "messages", **more) from error
        self._metrics.note(page.attempts, page)
        return answer(question, task, image, page, doubts)

    async def _body(self, request: Request, held: contextlib.ExitStack) -> bytearray:
        """Receive a request, as far as it may be long and take time; its place in memory is held."""
        body = bytearray()
        held.callback(lambda: self._take_bytes(-taken))
        taken = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    if len(body) + len(part) > MAX_BODY_BYTES:
                        message = f"the request is longer than {MAX_BODY_BYTES} bytes: send a smaller image"
                        raise Refused(413, "RequestEntityTooLargeError", message)
                    self._take_bytes(len(part))
                    taken += len(part)
                    body += part
        except TimeoutError:
            message = f"the request did not arrive within {BODY_SECONDS:g} s"
            raise Refused(408, "RequestTimeoutError", message) from None
        except ClientDisconnect:
            raise _gone() from None
        return body

    def _take_bytes(self, count: int) -> None:
        if count > 0 and self._body_bytes + count > self._most_body_bytes:
            raise self._full("the pages that wait fill the memory")
        self._body_bytes += count

    def _check_place(self) -> None:
        if self._waiting() >= self._max_queue:
            raise self._full(f"{self._max_queue} pages are waiting already")

    def _full(self, why: str, **more: Any) -> Refused:
        """Ask to come back when the fastest engine may have read one more page."""
        seconds = min(engine.expected_seconds / engine.limiter.limit for engine in self._engines)
        message = why if more else f"{why}: come back later"
        refused = Refused(503, "ServiceUnavailableError", message, **more)
        refused.headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
        return refused

    def _in_flight(self) -> int:
        return sum(engine.limiter.in_flight for engine in self._engines)

    def _waiting(self) -> int:
        return max(0, self._admitted - self._in_flight())


def read_key(file: Path | None) -> str | None:
    """Return the key that clients have to send: that in the file, or else of the environment (`KEY_VARIABLE`).

    Raises:
        ConfigurationError: It is empty, or no printable ASCII.
    """
    key = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8", errors="replace")
    if key is not None and (not (key := bare(key)) or not all("!" <= one <= "~" for one in key)):
        message = f"{file or KEY_VARIABLE} holds no key: one line of printable ASCII without spaces"
        raise errors.ConfigurationError(message)
    return key


def listen(host: str, port: int, *, public: bool) -> socket.socket:
    """Open the socket that the service is to listen at; port 0 is any that is free.

    Raises:
        ConfigurationError: Other machines can reach the address, and it is not to be `public`.
        OSError: There is no such address, or the port is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not (public or ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback):
        fix = f"give --api-key-file (or set {KEY_VARIABLE}), listen on 127.0.0.1, or allow it with --no-api-key"
        raise errors.ConfigurationError(f"{host} can be reached by other machines, and there is no API key: {fix}")
    return socket.create_server(address[:2], family=family)


def is_own(base_url: str, listener: socket.socket) -> bool:
    """Tell whether a server that is to be asked is the very one that is asking, which would go on for ever."""
    parts = urlsplit(base_url)
    own, own_port = listener.getsockname()[:2]
    if own_port != (parts.port or {"http": 80, "https": 443}.get(parts.scheme)):
        return False
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(parts.hostname, own_port)}
    except OSError:
        return False
    anywhere = ipaddress.ip_address(own).is_unspecified
    return own in found or (anywhere and any(ipaddress.ip_address(address).is_loopback for address in found))


def make_server(service: Service, shutdown: float = DEFAULT_SHUTDOWN) -> uvicorn.Server:
    """Return the HTTP server; asked to exit, it goes on with the pages that are being read for so many seconds."""
    config = uvicorn.Config(
        service.app(),
        http=serve_http.Connection,
        ws="none",
        lifespan="on",
        server_header=False,
        proxy_headers=False,
        log_config=serve_http.log_config(),
        timeout_graceful_shutdown=math.ceil(shutdown),
    )
    logging.getLogger("uvicorn.access").addFilter(serve_http.is_news)
    return uvicorn.Server(config)


def run(service: Service, listener: socket.socket, shutdown: float = DEFAULT_SHUTDOWN) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has finished
        make_server(service, shutdown).run([listener])


async def _probe(engine: Engine) -> str:
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await engine.probe(PROBE_SECONDS)
    except TimeoutError:
        return f"no answer within {PROBE_SECONDS:g} s"
    except (errors.EngineError, errors.ConfigurationError) as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a client, and give it up when the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, hanging_up = asyncio.create_task(work), asyncio.create_task(hang_up())
    both = (working, hanging_up)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _gone()
        return working.result()
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


def _gone() -> Refused:
    return Refused(499, "ClientClosedRequest", "the client hung up")  # nginx's number; nobody but the log sees it


async def _refuse(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        error = Refused(500, "InternalServerError", "a fault of this service: look at its log")
    elif not isinstance(error, Refused):
        kind, headers = "NotFoundError" if error.status_code == 404 else "HTTPError", error.headers
        error = Refused(error.status_code, kind, error.detail)
        error.headers = headers
    about = {"message": error.detail, "type": error.kind, "param": error.param, "code": error.status_code}
    return JSONResponse({"error": about, **error.more}, error.status_code, headers=error.headers)
