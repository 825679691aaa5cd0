"""Requests to a server that speaks the OpenAI API as vLLM does; whatever goes wrong becomes one of our own errors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import math
import re
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from email.utils import mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Any, Final

from .. import errors
from ..credentials import Address, Secrets, read_key
from ..results import Attempt, attempts_of
from ..texts import encodable
from .base import Answer

if TYPE_CHECKING:  # openai takes half a second to import, so it waits until it is needed
    import httpx2
    import openai

# For one connection, in seconds; a server that is there accepts at once, however busy it is.
CONNECT_SECONDS: Final = 5.0
# Until a streamed answer begins, in seconds: a place in the queue and the largest image (our own choice).
FIRST_TOKEN_SECONDS: Final = 60.0
# Between two pieces of a streamed answer, in seconds: a busy server sends several in one (our own choice).
IDLE_SECONDS: Final = 30.0
# Longest stream that is read. The longest answer that a context of 131,072 tokens allows is below 40 MiB.
MAX_BODY_BYTES: Final = 64 * 2**20
# Longest body that is read in one piece. The longest answer is well below 1 MiB; JSON takes up to 30 times its length
# in memory.
MAX_ANSWER_BYTES: Final = 8 * 2**20
# Longest event of a stream that is read (our own choice: vLLM's have one token, or the few of a busy moment).
MAX_EVENT_BYTES: Final = 2**20
MAX_COUNT: Final = 2**31  # numbers of tokens from here on are none (our own choice: no context is near it)
WARNINGS: Final = 100  # of ``dots-ocr serve``, about one page, at most (our own choice)
LOOP_TAIL: Final = 2_000
LOOP_PERIOD: Final = 200  # a loop: the last 2,000 characters are one piece of at most 200, over and over
LOOP_CHUNKS: Final = 64  # pieces of a streamed answer between two looks for a loop; one look takes about 0.1 ms

# A name that the server of a rehearsal (``make rehearse``) serves beside the others.
REHEARSAL: Final = "rehearsal-model"
REHEARSES: Final = "this is the server of a rehearsal: its model reads only its own pages"
# What ``dots-ocr serve`` says that its models are owned by; it never loops, so its answers need not be streamed.
SERVICE: Final = "dots-ocr-client"
# Names the engine that read the page, in every answer of ``dots-ocr serve`` and of this project's gateway.
ENGINE_HEADER: Final = "X-Dots-OCR-Engine"
PICTURE: Final = "data:image/png;base64,"  # the URL of the picture in a request, which is put in behind it

_ENGINE = re.compile(r"[a-z][\w.:/+ -]{0,63}", re.ASCII | re.IGNORECASE)
# Of the answer that this task got last: the SDK hands over no headers beside what it makes of an answer.
_engine: ContextVar[str | None] = ContextVar("engine", default=None)
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LENGTH = re.compile(r"context length|max(imum)?[ _-]model[ _-]len|max_(completion_)?tokens", re.IGNORECASE)


class Server:
    """One server; connections are opened when first needed. Nothing is retried here."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        """Say where the server is: a URL with scheme and ``/v1``. A ``user:password@`` in it goes in the key's place.

        Raises:
            ConfigurationError: The base URL is not an http or https URL.
            InvalidKey: The key can be none.
        """
        address = Address.of(base_url)
        self.base_url = address.url
        self._login = address.login
        self._loopback = is_loopback(address.host)
        self._api_key = read_key(api_key)
        # Whatever a server says goes through these before anybody sees it: many a proxy repeats what it was sent.
        self._secrets = Secrets((*address.secrets, *filter(None, (self._api_key,))))
        self._client: openai.AsyncOpenAI | None = None
        self._http: httpx2.AsyncClient | None = None

    async def models(self, seconds: float) -> list[dict[str, Any]]:
        """Return the model cards of ``/v1/models``; each has an ``id``."""
        fault: errors.DotsOCRError
        try:
            # Not through models.list(), which breaks on JSON that is not a list of models.
            listing: Any = await self._connect().get("/models", cast_to=object, options={"timeout": _timeout(seconds)})
            cards = [dict(self._secrets.hide_all(card)) for card in listing["data"]]
            if not all(isinstance(card["id"], str) for card in cards):
                raise self._not_an_api()
            return cards
        except Exception as error:
            fault = await self._translate(error, seconds, None)
        raise fault

    async def health(self, seconds: float) -> None:
        """Ask for ``/health``; without it a server or gateway counts as healthy, else it is `ServerUnavailable`."""
        address = self.base_url.removesuffix("/v1") + "/health"
        fault: errors.DotsOCRError
        try:
            status = (await self._get("/health", seconds)).status_code
            if status in (200, 401, 403, 404):
                return
            fault = errors.ServerUnavailable(f"{address} answered {status}")
        except errors.DotsOCRError as error:
            fault = error
        except Exception as error:
            fault = errors.ServerUnavailable(f"cannot reach {address} ({self._quote(error) or type(error).__name__})")
        raise fault

    async def state(self, seconds: float) -> str | None:
        """Return what a server on demand says of itself at ``/health``, such as ``asleep``; ``None`` for any other."""
        try:
            said = (await self._get("/health", seconds)).json()["status"]
        except Exception:
            return None
        return said if isinstance(said, str) else None

    async def metrics(self, seconds: float) -> str | None:
        """Return what the server tells Prometheus at ``/metrics``, or ``None`` if it tells nothing."""
        try:
            answer = await self._get("/metrics", seconds)
            return self._secrets.hide_in_page(answer.text) if answer.status_code == 200 else None
        except Exception:
            return None

    async def version(self, seconds: float) -> str | None:
        """Return vLLM's version, such as ``0.11.0``, or ``None`` if the server does not tell."""
        try:
            version = (await self._get("/version", seconds)).raise_for_status().json()["version"]
        except Exception:
            return None
        return self._quote(version) if isinstance(version, str) else None

    async def complete(
        self, request: dict[str, Any], png: bytes, seconds: float, *, stream: bool, limit: int | None = None
    ) -> Answer:
        """Send one request and wait for the whole answer, which has no cells; its mode is the caller's to set.

        Cancelling this closes the connection, upon which vLLM stops working on the page. That is the only limit in
        time for certain: a server that sends one byte now and then outlives every other.

        Args:
            request: Body of the request, with `PICTURE` as the URL of the picture.
            png: The picture.
            seconds: For each connect, read and write.
            stream: Ask for the answer piece by piece. Then a loop is noticed while it lasts, and the connection closed,
                and there are limits on the first and on every further piece.
            limit: Tokens of the answer at most. If the server says that they do not fit into its context, it is asked
                again without: it fills what is left by itself.

        Raises:
            EngineError, ConfigurationError: As `VLLMEngine.read` has them, all but ModeNotSupported.
        """
        bounded = request if limit is None else {**request, "max_completion_tokens": limit}
        fault: errors.DotsOCRError
        try:
            if stream:
                return await self._collect(bounded, png, seconds)
            # Trusting nothing: the SDK hands over whatever JSON, or even text, the server sent.
            completion = await self._post(bounded, png, seconds)
            choice, model = completion.choices[0], completion.model or request["model"]
            about = getattr(completion, "dots_ocr", None)
            return self._judge(choice.message.content, choice.finish_reason, model, completion.usage, about)
        except Exception as error:
            fault = await self._translate(error, seconds, request["model"])
        if limit is not None and isinstance(fault, errors.RequestRejected) and _LENGTH.search(str(fault)):
            return await self.complete(request, png, seconds, stream=stream)
        raise fault

    async def count_prompt(self, request: dict[str, Any], png: bytes, seconds: float) -> int | None:
        """Send a request as for `complete`, for the sake of the prompt's tokens; return these, if the server tells."""
        try:
            return _count((await self._post(request, png, seconds)).usage, "prompt_tokens")
        except Exception:
            return None

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            client, self._client, self._http = self._client, None, None
            await client.close()

    def _connect(self) -> openai.AsyncOpenAI:
        import httpx2
        import openai

        if self._client is None:
            self._http = httpx2.AsyncClient(
                # A proxy from the environment cannot reach this machine's own loopback address.
                trust_env=not self._loopback,
                # A small compressed body can unpack to gigabytes.
                headers={"Accept-Encoding": "identity"},
                event_hooks={"response": [_bound]},
                auth=self._login,
            )
            try:
                self._client = openai.AsyncOpenAI(
                    base_url=self.base_url,
                    # Without "none" the SDK would send the environment's OPENAI_API_KEY, which is not for this server.
                    api_key=self._api_key or "none",
                    max_retries=0,  # the SDK would send the page again, and its timeout would start anew
                    http_client=self._http,
                )
            except httpx2.InvalidURL:
                raise errors.ConfigurationError(
                    f"{self.base_url!r} is not a base URL: write it like http://127.0.0.1:8000/v1"
                ) from None
        return self._client

    async def _get(self, path: str, seconds: float) -> httpx2.Response:
        """Ask for what stands beside ``/v1``."""
        self._connect()
        assert self._http is not None
        return await self._http.get(self.base_url.removesuffix("/v1") + path, timeout=_timeout(seconds))

    async def _post(self, request: dict[str, Any], png: bytes, seconds: float, **streaming: Any) -> Any:
        """Send a request with a body of our own making: the SDK would go through megabytes of picture several times."""
        from openai.types.chat import ChatCompletion

        picture = await asyncio.to_thread(base64.b64encode, png)
        before, prefix, after = json.dumps(request).encode().partition(PICTURE.encode())
        return await self._connect().post(
            "/chat/completions",
            cast_to=ChatCompletion,
            content=b"".join((before, prefix, picture, after)),
            options={"timeout": _timeout(seconds)},
            **streaming,
        )

    async def _collect(self, request: dict[str, Any], png: bytes, seconds: float) -> Answer:
        import openai
        from openai.types.chat import ChatCompletionChunk

        request = {**request, "stream": True, "stream_options": {"include_usage": True}}
        streaming = {"stream": True, "stream_cls": openai.AsyncStream[ChatCompletionChunk]}
        pieces: list[str] = []
        finish_reason, model, usage, about = None, request["model"], None, None
        loop = asyncio.get_running_loop()
        chunks = 0
        try:
            async with asyncio.timeout(FIRST_TOKEN_SECONDS) as limit:
                async with await self._post(request, png, seconds, **streaming) as stream:
                    async for chunk in stream:
                        limit.reschedule(loop.time() + IDLE_SECONDS)
                        chunks += 1
                        model, usage = chunk.model or model, chunk.usage or usage
                        about = getattr(chunk, "dots_ocr", about)
                        for choice in chunk.choices:
                            pieces.append(choice.delta.content or "")
                            finish_reason = choice.finish_reason or finish_reason
                        if chunks % LOOP_CHUNKS == 0 and is_loop("".join(pieces[-LOOP_TAIL:])):
                            finish_reason = "repetition"
                            break
        except TimeoutError as error:
            if pieces:
                message = f"{self.base_url} stopped in the middle of its answer for {IDLE_SECONDS:g} s"
            else:
                message = f"{self.base_url} did not begin to answer within {FIRST_TOKEN_SECONDS:g} s"
            raise errors.DeadlineExceeded(f"{message}: look at its load and its log") from error
        if chunks == 0:
            raise self._not_an_api()
        if finish_reason is None:
            raise errors.ServerUnavailable(f"{self.base_url} broke its answer off: look at its log")
        return self._judge("".join(pieces), finish_reason, model, usage, about)

    def _judge(self, text: Any, finish_reason: Any, model: Any, usage: Any, about: Any) -> Answer:
        said = encodable(text) if isinstance(text, str) else ""
        read = self._secrets.hide_in_page(said)
        if finish_reason == "length":
            raise errors.CutOff("the answer was cut off at the end of the context: use a larger --max-model-len", read)
        if finish_reason == "repetition" or is_loop(read):
            raise errors.Repetition("the model repeated itself without end: try again, or with another resolution")
        if finish_reason in ("abort", "error"):  # vLLM's own words (vllm/v1/engine); the status is 200 all the same
            raise errors.ServerUnavailable("the server gave the page up in the middle of its answer: look at its log")
        if finish_reason != "stop":
            reason = self._quote(finish_reason)
            raise errors.UnusableAnswer(f"the model stopped for the reason {reason!r}: look at the server's log")
        if not isinstance(text, str):
            raise errors.UnusableAnswer("the answer has no text: look at the server's log")
        # dots-ocr serve says beside its answer who read the page, a gateway in a header, and other servers not at all.
        about = about if isinstance(about, dict) else {}
        engine = self._quote(about.get("engine", _engine.get()) or "")
        model = self._quote(about.get("model") or model)
        warnings = about.get("warnings")
        notes = [self._quote(one, 2_000) for one in (warnings[:WARNINGS] if isinstance(warnings, list) else ())]
        attempts: tuple[Attempt, ...] = ()
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
            attempts = attempts_of(
                {name: self._quote(value, 2_000) if isinstance(value, str) else value for name, value in one.items()}
                for one in about["attempts"][:WARNINGS]
            )
        told = _ENGINE.fullmatch(engine)
        if told and engine != "vllm":
            notes.insert(0, f"the server had {engine} ({model}) read the page")
        if read != said:
            notes.insert(0, "the server repeated the key that it was sent: *** stands in its place")
        return Answer(
            mode="text",
            text=read,
            model=model,
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            finish_reason="stop",
            warnings=tuple(notes),
            engine=engine if told else None,
            attempts=attempts,
        )

    def _quote(self, said: object, length: int = 300) -> str:
        """Return what a server said in one line, without the secrets, and cut off only then."""
        return " ".join(encodable(self._secrets.hide(str(self._secrets.hide_all(said)))).split())[:length]

    async def _translate(self, error: Exception, seconds: float, model: str | None) -> errors.DotsOCRError:
        """Make one of our errors of anything that went wrong; it does not carry the other, which holds the key."""
        try:
            fault = await self._explain(error, seconds, model)
        except Exception as another:  # what the server said of its fault is a fault itself
            fault = self._not_an_api(another)
        fault.status = getattr(error, "status_code", fault.status)
        return fault

    async def _explain(self, error: Exception, seconds: float, model: str | None) -> errors.DotsOCRError:
        import httpx2
        import openai

        if isinstance(error, errors.DotsOCRError):
            return error
        cause = error.__cause__ or error
        if isinstance(cause, httpx2.ConnectTimeout):
            absent = errors.ServerUnavailable(
                f"cannot reach {self.base_url} (no connection in time): correct the base URL"
            )
            absent.passing = False
            return absent
        if isinstance(error, openai.APITimeoutError):
            return errors.DeadlineExceeded(
                f"{self.base_url} did not answer in time: look at its load, or allow more than {seconds:.0f} s"
            )
        if isinstance(cause, httpx2.ConnectError):
            return errors.ServerUnavailable(
                f"cannot reach {self.base_url} ({self._quote(cause)}): start the server, or wait: it takes minutes to "
                "start; or correct the base URL"
            )
        if isinstance(error, openai.APIConnectionError):
            return errors.ServerUnavailable(
                f"{self.base_url} closed the connection ({self._quote(cause)}): wait if it is just starting, which "
                "takes minutes; otherwise look at its log"
            )
        if isinstance(error, openai.APIStatusError):
            return await self._translate_status(error, seconds, model)
        if isinstance(error, openai.APIError) and not isinstance(error, openai.APIResponseValidationError):
            said = self._quote(error.message)
            return errors.ServerUnavailable(f"{self.base_url} failed in the middle of its answer: {said}")
        return self._not_an_api(error)

    async def _translate_status(
        self, error: openai.APIStatusError, seconds: float, model: str | None
    ) -> errors.EngineError | errors.ConfigurationError:
        status, said = error.status_code, self._quote(error.message)
        # A firewall between here and there says 403 to a page, too.
        if status == 401 or (status == 403 and (model is None or not await self._takes_the_key(seconds))):
            sent = "no key" if self._api_key is None else "the key"
            if self._login is not None:
                sent = "the user and password of the base URL"
            return errors.Unauthorized(
                f"{self.base_url} answered {status} to {sent}: set DOTS_OCR_API_KEY (or api_key=) to the key that the "
                "server was started with"
            )
        if status == 404:
            return await self._explain_not_found(seconds, model)
        if status in (400, 403, 413, 422):
            fix = ": start it with a larger --max-model-len, or give a smaller image"
            more = fix if status == 400 and _LENGTH.search(error.message) else ""
            return errors.RequestRejected(f"{self.base_url} refused the page with {status}: {said}{more}")
        message = f"{self.base_url} answered {status}: {said}"
        if status in (429, 503):
            return errors.Overloaded(message, _retry_after(error.response.headers.get("retry-after")))
        return errors.ServerUnavailable(message)

    async def _takes_the_key(self, seconds: float) -> bool:
        try:
            await self.models(seconds)
        except errors.DotsOCRError as error:
            return not isinstance(error, errors.ConfigurationError)  # any other fault does not say
        return True

    async def _explain_not_found(
        self, seconds: float, model: str | None
    ) -> errors.EngineError | errors.ConfigurationError:
        if model is not None:
            try:
                served = [card["id"] for card in await self.models(seconds)]
            except (errors.EngineError, errors.ConfigurationError) as error:
                if isinstance(error, errors.ServerUnavailable) and error.status is None:
                    return error  # it went away meanwhile, which no setting mends
                served = []
            if served and model not in served:
                return errors.ModelNotServed(model, served, self.base_url)
        return errors.ConfigurationError(f"there is no OpenAI API at {self.base_url} (404): it usually ends in /v1")

    def _not_an_api(self, error: Exception | None = None) -> errors.ServerUnavailable:
        kind = "" if error is None else f" ({type(error).__name__})"  # not its words: these quote the server's
        return errors.ServerUnavailable(
            f"{self.base_url} does not answer like an OpenAI API{kind}: look at what else listens there, or correct "
            "the base URL"
        )


def is_loop(text: str) -> bool:
    """Tell whether a text ends in one piece over and over: `LOOP_TAIL` characters of at most `LOOP_PERIOD` each."""
    tail = text[-LOOP_TAIL:]
    if len(tail) < LOOP_TAIL:
        return False
    # Shifted by its own period a periodic text is equal to itself.
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1))


def _count(usage: Any, name: str) -> int | None:
    count = getattr(usage, name, None)
    return count if type(count) is int and 0 <= count < MAX_COUNT else None


def _timeout(seconds: float) -> httpx2.Timeout:
    """Bound each connect, read and write, in seconds; the deadline for all of them together is the caller's."""
    import httpx2

    return httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))


async def _bound(response: httpx2.Response) -> None:
    """Bound the length of a response that is about to be read."""
    import httpx2

    _engine.set(response.headers.get(ENGINE_HEADER))
    streamed = response.headers.get("content-type", "").partition(";")[0].strip() == "text/event-stream"
    longest = MAX_BODY_BYTES if streamed else min(MAX_ANSWER_BYTES, MAX_BODY_BYTES)

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, inner: httpx2.AsyncByteStream) -> None:
            self.inner = inner

        async def __aiter__(self) -> AsyncIterator[bytes]:
            length = event = 0
            last = b""
            async for chunk in self.inner:
                length += len(chunk)
                ends = list(_EVENT_END.finditer(last + chunk))
                event = len(last + chunk) - ends[-1].end() if ends else event + len(chunk)
                last = chunk[-3:]
                if length > longest or (streamed and event > MAX_EVENT_BYTES):
                    limit = longest if length > longest else MAX_EVENT_BYTES
                    raise errors.EngineError(f"the server's answer is longer than {limit} bytes: look at its log")
                yield chunk

        async def aclose(self) -> None:
            await self.inner.aclose()

    if response.headers.get("content-encoding", "identity") != "identity":
        raise errors.EngineError(
            "the server compresses its answers, though it was asked not to: look at what else is there"
        )
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = Bounded(response.stream)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    try:
        date = parsedate_tz(value)
        seconds = mktime_tz(date) - time.time() if date else float(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
