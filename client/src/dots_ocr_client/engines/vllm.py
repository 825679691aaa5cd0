"""dots.ocr on a vLLM server, over the OpenAI API."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from .. import images
from ..documents import PageImage
from ..errors import (
    ConfigurationError,
    DeadlineExceeded,
    EngineError,
    ModelNotServed,
    RequestRejected,
    ServerUnavailable,
    Unauthorized,
    UnusableAnswer,
)
from ..prompts import PLACEHOLDER, PROMPTS, Mode
from .base import Answer

if TYPE_CHECKING:  # openai takes half a second to import, so it waits until it is needed
    import httpx2
    import openai
    from openai.types.chat import ChatCompletionContentPartImageParam, ChatCompletionContentPartTextParam

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000/v1"
"""Where the server of this project listens."""
CONNECT_SECONDS: Final = 5.0
"""For one connection, in seconds; a server that is there accepts at once, however busy it is."""
TEMPERATURE: Final = 0.1
TOP_P: Final = 0.9
"""Both as in dots.ocr's own client (upstream: dots_ocr/model/inference.py)."""
PROMPT_TOKENS: Final = 64
"""Kept free for all of the prompt but the image. The longest is 46: a tokenizer that spends one token on each letter
of the prompt, and the markers of the chat template. dots.ocr's own needs about 15."""
MIN_OUTPUT_TOKENS: Final = 256
"""A page is not sent if the context leaves less than this for the answer (our own choice: a short paragraph or two)."""
REPETITION: Final = {"max_pattern_size": 32, "min_pattern_size": 1, "min_count": 64}
"""Asks vLLM (from 0.17 on) to stop an answer that ends in 64 equal runs of 1 to 32 tokens. Loops are the model's most
frequent fault. The count is high because dot leaders and ruled lines repeat too, a few tokens at a time."""
LOOP_TAIL: Final = 2_000
LOOP_PERIOD: Final = 200
"""For servers without that: the last 2,000 characters are one piece of at most 200, over and over."""


class VLLMEngine:
    """Reads pages with dots.ocr on a server that speaks the OpenAI API."""

    name = "vllm"

    def __init__(self, base_url: str | None = None, *, api_key: str | None = None, model: str = "dots.ocr") -> None:
        """Say where the server is; nothing is sent yet.

        Args:
            base_url: With scheme and ``/v1``. Default: ``DOTS_OCR_BASE_URL`` of the environment, or `DEFAULT_BASE_URL`.
            api_key: The key that the server wants. Default: ``DOTS_OCR_API_KEY`` of the environment, or none.
            model: One of the names in ``/v1/models``.

        Raises:
            ConfigurationError: The base URL is not an http or https URL.
        """
        base_url = base_url or os.environ.get("DOTS_OCR_BASE_URL") or DEFAULT_BASE_URL
        try:
            parts = urlsplit(base_url)
            scheme, host, _ = parts.scheme, parts.hostname, parts.port  # reading the port checks it
        except ValueError:
            scheme, host = "", None
        if scheme not in ("http", "https") or not host:
            raise ConfigurationError(f"{base_url!r} is no base URL: write it like http://127.0.0.1:8000/v1")
        self._loopback = _is_loopback(host)
        self.base_url = base_url.rstrip("/")
        self.model = model
        self._api_key = api_key or os.environ.get("DOTS_OCR_API_KEY")
        self._client: openai.AsyncOpenAI | None = None
        self._served: dict[str, int | None] | None = None

    async def read(self, page: PageImage, mode: Mode, seconds: float) -> Answer:
        """Read one page with one request; nothing is retried here.

        The caller's deadline is a hard one: it cancels this call, which closes the connection, so that a server that
        sends one byte now and then cannot outlive it, and vLLM stops working on the page.

        Raises:
            ModelNotServed: The server does not know the model.
            Unauthorized: The server wants another API key.
            ConfigurationError: There is no OpenAI API at the base URL.
            ServerUnavailable: No connection, 429, 5xx, or any other unexpected status.
            DeadlineExceeded: A read or write took longer than `seconds`.
            RequestRejected: 400, 413 or 422, or the page does not fit into the server's context.
            UnusableAnswer: Cut off, a loop, or empty for a page that is not blank.
        """
        import openai

        try:
            context = await self._context(seconds)
            image = await asyncio.to_thread(images.fit, page.image)
            limit = self._output_limit(context, image.size)
            url = await asyncio.to_thread(images.to_data_url, image)
            picture: ChatCompletionContentPartImageParam = {"type": "image_url", "image_url": {"url": url}}
            prompt: ChatCompletionContentPartTextParam = {"type": "text", "text": PLACEHOLDER + PROMPTS[mode]}
            completion = await self._connect().chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": [picture, prompt]}],
                temperature=TEMPERATURE,
                top_p=TOP_P,
                max_completion_tokens=limit,
                extra_body={"repetition_detection": REPETITION},
                timeout=_timeout(seconds),
            )
        except (openai.OpenAIError, ValueError) as error:  # ValueError: an answer that is not JSON
            self._served = None  # whatever happened, the server may come back as another one
            raise await self._translate(error, seconds) from error
        answer = _check(completion, self.model)
        if not answer.text.strip() and not await asyncio.to_thread(images.is_blank, page.image):
            raise UnusableAnswer("the answer is empty, but the page is not blank")
        if image is page.image:
            return answer
        note = "the image of {} x {} px was sent as {} x {} px, to keep the model's limits"
        warning = note.format(*page.image.size, *image.size)
        return Answer(answer.text, answer.model, answer.finish_reason, (*answer.warnings, warning))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _connect(self) -> openai.AsyncOpenAI:
        import httpx2
        import openai

        if self._client is None:
            self._client = openai.AsyncOpenAI(
                base_url=self.base_url,
                # Without "none" the SDK would send the environment's OPENAI_API_KEY, which is not for this server.
                api_key=self._api_key or "none",
                max_retries=0,  # the SDK would send the page again, and its timeout would start anew
                # A proxy from the environment cannot reach this machine's own loopback address.
                http_client=httpx2.AsyncClient(trust_env=not self._loopback),
            )
        return self._client

    async def _context(self, seconds: float) -> int | None:
        """Return the server's context length in tokens, if it tells; asked once, then remembered."""
        if self._served is None:
            self._served = await self._list_models(seconds)
        if self.model not in self._served:
            served, self._served = self._served, None
            raise ModelNotServed(self.model, served, self.base_url)
        return self._served[self.model]

    async def _list_models(self, seconds: float) -> dict[str, int | None]:
        # Not through models.list(), which breaks on JSON that is no list of models.
        listing: Any = await self._connect().get("/models", cast_to=object, options={"timeout": _timeout(seconds)})
        try:
            lengths = {str(model["id"]): model.get("max_model_len") for model in listing["data"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("no list of models") from error
        return {name: length if isinstance(length, int) else None for name, length in lengths.items()}

    def _output_limit(self, context: int | None, size: tuple[int, int]) -> int | openai.Omit:
        import openai

        if context is None:  # not vLLM, or a gateway that hides it: the server then fills what is left by itself
            return openai.omit
        needed = images.image_tokens(*size) + PROMPT_TOKENS
        if context - needed < MIN_OUTPUT_TOKENS:
            raise RequestRejected(
                f"a page of {size[0]} x {size[1]} px takes {needed} tokens, too many for a context of {context}: "
                f"start it with --max-model-len {needed + 4096} or more, or give a smaller image"
            )
        return context - needed

    async def _translate(self, error: Exception, seconds: float) -> EngineError | ConfigurationError:
        import httpx2
        import openai

        if isinstance(error.__cause__, httpx2.ConnectTimeout):
            return ServerUnavailable(f"cannot reach {self.base_url} (no connection in time): correct the base URL")
        if isinstance(error, openai.APITimeoutError):
            return DeadlineExceeded(
                f"{self.base_url} did not answer in time: look at its load, or allow more than {seconds:.0f} s"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return ServerUnavailable(
                f"cannot reach {self.base_url} ({cause}): start the server, or correct the base URL"
            )
        if not isinstance(error, openai.APIStatusError):
            return ServerUnavailable(
                f"{self.base_url} does not answer like an OpenAI API: look at what else listens there"
            )
        status, said = error.status_code, " ".join(str(error.message).split())[:300]
        if status in (401, 403):
            return Unauthorized(
                f"{self.base_url} answered {status}: set DOTS_OCR_API_KEY (or api_key=) to the key that the server was "
                "started with"
            )
        if status == 404:
            return await self._explain_not_found(seconds)
        if status in (400, 413, 422):
            return RequestRejected(f"{self.base_url} refused the page with {status}: {said}")
        return ServerUnavailable(f"{self.base_url} answered {status}: {said}")

    async def _explain_not_found(self, seconds: float) -> EngineError | ConfigurationError:
        import openai

        try:
            served = await self._list_models(seconds)
        except (openai.OpenAIError, ValueError):
            served = None
        if served is None or self.model in served:
            return ConfigurationError(f"there is no OpenAI API at {self.base_url} (404): it usually ends in /v1")
        return ModelNotServed(self.model, served, self.base_url)


def _timeout(seconds: float) -> httpx2.Timeout:
    """Bound each connect, read and write, in seconds; the deadline for all of them together is the caller's."""
    import httpx2

    return httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(completion: Any, model: str) -> Answer:
    """Take the answer out, trusting nothing: the SDK hands over whatever JSON, or even text, the server sent."""
    try:
        choice = completion.choices[0]
        text, finish_reason = choice.message.content, choice.finish_reason
        answered_by = str(completion.model or model)
    except (AttributeError, IndexError, TypeError) as error:
        raise UnusableAnswer("the server's answer is no chat completion: look at what else listens there") from error
    if finish_reason == "length":
        raise UnusableAnswer("the answer was cut off at the end of the context: use a larger --max-model-len")
    if finish_reason == "repetition" or (isinstance(text, str) and is_loop(text)):
        raise UnusableAnswer("the model repeated itself without end: try again, or with another resolution")
    if finish_reason != "stop":
        raise UnusableAnswer(f"the model stopped for the reason {finish_reason!r}: look at the server's log")
    if not isinstance(text, str):
        raise UnusableAnswer("the answer has no text: look at the server's log")
    return Answer(text=text, model=answered_by, finish_reason=finish_reason)


def is_loop(text: str) -> bool:
    """Tell whether a text ends in one piece over and over: `LOOP_TAIL` characters of at most `LOOP_PERIOD` each."""
    tail = text.rstrip()[-LOOP_TAIL:]
    if len(tail) < LOOP_TAIL:
        return False
    # Shifted by its own period a periodic text is equal to itself.
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1))
