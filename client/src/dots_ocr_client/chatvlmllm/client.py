"""The client of one vLLM server, under the names of chatvlmllm's ``vllm_dots_ocr_client.py``."""

# Russian

from __future__ import annotations

import asyncio
import atexit
import base64
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from PIL import Image

from ..chain.loop_thread import LoopThread
from ..credentials import bare, read_key, without_login
from ..engines.base import Answer, Task
from ..engines.server import Completion, Server, is_about_length
from ..engines.vllm import VLLMEngine
from ..errors import (
    ConfigurationError,
    CutOff,
    DeadlineExceeded,
    DotsOCRError,
    RequestRejected,
    ServerUnavailable,
    UnusableAnswer,
)
from ..pages import images
from ..pages.documents import PageImage
from ..pages.rasterizer import draw
from . import settings
from .messages import Conversation, open_pages
from .trained import content_of, task_of
from .words import explain, status_of

T = TypeVar("T")

DEFAULT_PROMPT: Final = "Extract all text from this image"
"""The application's own; dots.ocr is asked with the trained prompt that means the same."""
MODEL: Final = "dots.ocr-vllm"
"""What results call the model."""
CUT_OFF: Final = "\n\n[ответ обрезан: увеличьте max_tokens]"
"""Behind an answer that did not fit."""
TIMEOUT: Final = 120.0
"""For one answer, in seconds, as in the application."""
HEALTH_TIMEOUT, MODELS_TIMEOUT, METRICS_TIMEOUT = 5.0, 10.0, 5.0
"""In seconds, as in the application."""

_log = logging.getLogger(__package__)


class _Default(str):
    """An address that stands for "none was given"."""


DEFAULT_URL: Final[str] = _Default("http://localhost:8000")
"""Without another address, ``DOTS_OCR_BASE_URL`` of the settings goes before this."""


class VLLMDotsOCRClient:
    """Reads pictures with dots.ocr on a vLLM server; it may be used by several threads.

    Prompts that dots.ocr was trained with, and the application's own words for the same wishes, are read in the way of
    `dots_ocr_client.VLLMEngine`: retried, checked, repaired, with boxes in pixels of the upright picture. Any other
    prompt goes to the model as it is.

    Attributes:
        base_url: Of the server, without ``/v1``, user and password.
    """

    def __init__(self, base_url: str = DEFAULT_URL, api_key: str | None = None) -> None:
        """Say where the server is; nothing is sent yet.

        Args:
            base_url: With or without ``/v1``. Default: ``DOTS_OCR_BASE_URL`` of the settings (`settings.value`), or
                ``http://localhost:8000``.
            api_key: The key that the server wants. Default: ``DOTS_OCR_API_KEY`` of the settings, or none.
        """
        self._root = root_of(base_url)
        self.base_url = without_login(self._root)
        self._api_key = api_key or settings.value("DOTS_OCR_API_KEY")
        self._loop = LoopThread()
        self._lock = threading.Lock()
        self._engine: VLLMEngine | None = None
        self._server: Server | None = None
        self._session: Any = None
        self._warned = False
        _open_clients.add(self)

    @property
    def session(self) -> Any:
        """A ``requests.Session`` for programs that use the application's; this client itself does without.

        Raises:
            ImportError: The package ``requests`` is not installed.
            InvalidKey: The key can be none.
        """
        with self._lock:
            if self._session is None:
                import requests  # type: ignore[import-untyped, import-not-found, unused-ignore]

                self._session = requests.Session()
                if key := read_key(self._api_key):
                    self._session.headers["Authorization"] = f"Bearer {key}"
            return self._session

    def health_check(self) -> bool:
        """Ask the server now, for up to 5 s, whether it is healthy and serves dots.ocr and not another model."""
        return self.fault() is None

    def fault(self) -> Exception | None:
        """Return why the server cannot be used; ``None`` if it can. Asks as `health_check` does."""
        try:
            self._run(self._probe())
        except Exception as error:
            _log.warning("%s cannot be used: %s", self.base_url, error)
            return error
        return None

    def get_models(self) -> dict[str, Any]:
        """Return the answer to ``/v1/models``, or a dictionary with ``error``."""
        try:
            return {"object": "list", "data": self._run(self._models())}
        except Exception as error:
            return {"error": _describe(error)}

    def encode_image_to_base64(self, image_path: str) -> str:
        """Return the bytes of a file in base64.

        Raises:
            ValueError: The file cannot be read.
        """
        try:
            return base64.b64encode(Path(image_path).read_bytes()).decode()
        except Exception as error:
            raise ValueError(f"Cannot encode image {image_path}: {error}") from error

    def encode_pil_image_to_base64(self, image: Image.Image) -> str:
        """Return a picture as an upright PNG in base64.

        Raises:
            ValueError: It cannot be encoded.
        """
        try:
            return base64.b64encode(images.to_png(images.to_rgb(image))).decode()
        except Exception as error:
            raise ValueError(f"Cannot encode PIL image: {error}") from error

    def process_image(self, image_path: str, prompt: str = DEFAULT_PROMPT, page: int | None = None) -> dict[str, Any]:
        """Read a picture, or the pages of a PDF or a TIFF.

        Args:
            image_path: Its path; a ``file:`` or ``data:`` URL, base64, bytes or a PIL image will do as well.
            prompt: What to read; see the class.
            page: Of several pages only this one, counted from 1.

        Returns:
            ``success``, ``content``, ``model``, ``processing_time``, ``usage`` and ``raw_response``; or ``success``,
            ``error`` and ``processing_time``. The content is text, or JSON for the prompts that ask for a layout. Of
            several pages, `join_pages` makes one content, which says what went wrong on a page that cannot be read.
        """
        return self._process(image_path, prompt, page)

    def process_pil_image(self, image: Image.Image, prompt: str = DEFAULT_PROMPT) -> dict[str, Any]:
        """Read a PIL image; as `process_image`, but without ``raw_response``."""
        result = self._process(image, prompt, None)
        result.pop("raw_response", None)
        return result

    def chat_completion(self, messages: Sequence[Mapping[str, Any]], max_tokens: int = 2048) -> dict[str, Any]:
        """Answer messages in the format of the OpenAI API.

        Args:
            messages: Pictures may be paths, ``file:`` and ``data:`` URLs, bytes or PIL images.
            max_tokens: Bounds the answers to prompts that dots.ocr was not trained with. A page is read to its end, as
                far as the context allows: half a layout is of no use.

        Returns:
            A completion, with ``processing_time`` and ``model`` in its ``usage``; ``error`` is in it, and the reason
            in the content, if something went wrong.
        """
        started = time.monotonic()
        try:
            completion = self.complete(Conversation.of(messages), max_tokens)
        except Exception as error:
            _note(error)
            unreachable = status_of(error) is None and isinstance(
                error, ServerUnavailable | DeadlineExceeded | ConfigurationError
            )
            prefix = "Connection error" if unreachable else "vLLM Error"
            usage = {"processing_time": _time(error, started), "model": MODEL, "error": True}
            return error_completion(_describe(error), f"{prefix}: {explain(error)}", usage)
        completion["usage"] |= {"processing_time": _seconds(started), "model": MODEL}
        return completion

    def get_server_info(self) -> dict[str, Any]:
        """Return ``healthy``, ``models`` (as `get_models`), ``metrics_available`` and ``base_url``."""
        return {
            "healthy": self.health_check(),
            "models": self.get_models(),
            "metrics_available": self.metrics() is not None,
            "base_url": self.base_url,
        }

    def complete(self, conversation: Conversation, max_tokens: int | None = None) -> dict[str, Any]:
        """Answer a conversation; what `chat_completion` and the others stand on.

        Args:
            conversation: What is asked.
            max_tokens: See `chat_completion`; ``None`` for as many as the context allows.

        Returns:
            A completion as vLLM would send it.

        Raises:
            EngineError: The server cannot be reached, or cannot answer this.
            ConfigurationError: Wrong address, API key or model.
        """
        task = task_of(conversation.prompt) if conversation.one_page else None
        if task is None:
            if not self._warned:
                self._warned = True
                _log.warning("dots.ocr was not trained with this prompt and may ignore it: %.100r", conversation.prompt)
            try:
                completion = self._run(self._send(conversation, max_tokens))
            except CutOff as error:
                if not error.text.strip():
                    raise
                return completion_of(error.text + CUT_OFF, MODEL, finish_reason="length")
            if not completion.text.strip():
                raise UnusableAnswer("the answer is empty")
            return completion_of(
                completion.text, completion.model, completion.prompt_tokens, completion.completion_tokens
            )
        answer = self._run(self._read(conversation, task))
        for warning in answer.warnings:
            _log.warning("%s", warning)
        return completion_of(
            content_of(answer, conversation.prompt), answer.model, answer.prompt_tokens, answer.completion_tokens
        )

    def for_pages(self, document: Any, page: int | None, ask: Callable[[PageImage], dict[str, Any]]) -> dict[str, Any]:
        """Ask for one page after another, and join the completions into one.

        Args:
            document: See `messages.read_picture`; it may have several pages.
            page: Only this one, counted from 1; all if ``None``.
            ask: Returns the completion for a page.

        Raises:
            Exception: What went wrong on the first page, if something went wrong on all of them.
        """
        parts: list[tuple[int, str]] = []
        completions: list[dict[str, Any]] = []
        errors: list[Exception] = []
        with open_pages(document, page) as opened:
            for number in opened.numbers:
                try:
                    completions.append(ask(draw(opened.reference(number))))
                    parts.append((number, completions[-1]["choices"][0]["message"]["content"]))
                except Exception as fault:
                    errors.append(fault)
                    parts.append((number, f"❌ {explain(fault)}"))
        if not completions:
            raise errors[0]
        joined = completions[0]
        if len(parts) > 1:
            for error in errors:
                _note(error)
            joined["choices"][0]["message"]["content"] = join_pages(parts, opened.page_count)
            counts = ("prompt_tokens", "completion_tokens", "total_tokens")
            joined["usage"] |= {name: sum(one["usage"].get(name, 0) for one in completions) for name in counts}
        return joined

    def close(self) -> None:
        """Close the connections; the end of the process does so, too. A second call does nothing."""
        _open_clients.discard(self)
        self._loop.close(self._aclose())

    def _process(self, picture: Any, prompt: str, page: int | None) -> dict[str, Any]:
        started = time.monotonic()
        try:
            completion = self.for_pages(picture, page, lambda one: self.complete(Conversation.about(one, prompt)))
        except Exception as error:
            _note(error)
            return {"success": False, "error": _describe(error), "processing_time": _time(error, started)}
        return {
            "success": True,
            "content": completion["choices"][0]["message"]["content"],
            "model": MODEL,
            "processing_time": _seconds(started),
            "usage": completion["usage"],
            "raw_response": completion,
        }

    def metrics(self) -> str | None:
        """Return what the server tells Prometheus, if it tells anything."""
        try:
            return self._run(self._metrics())
        except (DotsOCRError, TimeoutError):
            return None

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop of this client, where the connections are."""
        return self._loop.run(work)

    def _connect(self) -> tuple[VLLMEngine, Server]:
        """Return the engine, and the server for prompts that the engine does not know; on the loop only."""
        if self._engine is None or self._server is None:
            self._server = Server(f"{self._root}/v1", self._api_key)
            self._engine = VLLMEngine(f"{self._root}/v1", api_key=self._api_key)
        return self._engine, self._server

    async def _probe(self) -> None:
        engine, _ = self._connect()
        async with asyncio.timeout(HEALTH_TIMEOUT):
            await engine.probe(HEALTH_TIMEOUT)

    async def _models(self) -> list[dict[str, Any]]:
        engine, _ = self._connect()
        async with asyncio.timeout(MODELS_TIMEOUT):
            return await engine.models(MODELS_TIMEOUT)

    async def _metrics(self) -> str | None:
        _, server = self._connect()
        async with asyncio.timeout(METRICS_TIMEOUT):
            return await server.metrics(METRICS_TIMEOUT)

    async def _read(self, conversation: Conversation, task: Task) -> Answer:
        assert conversation.page is not None
        engine, _ = self._connect()
        async with engine.limiter:
            try:
                async with asyncio.timeout(TIMEOUT):
                    return await engine.read(conversation.page, task, TIMEOUT)
            except TimeoutError:
                raise _too_late() from None

    async def _send(self, conversation: Conversation, max_tokens: int | None) -> Completion:
        engine, server = self._connect()
        request: dict[str, Any] = {
            "model": engine.model,
            "messages": await asyncio.to_thread(conversation.encoded),
            "temperature": 0.0,
        }
        bounded = request if max_tokens is None else {**request, "max_completion_tokens": max_tokens}
        async with engine.limiter:
            try:
                async with asyncio.timeout(TIMEOUT):
                    try:
                        return await server.complete(bounded, b"", TIMEOUT, stream=False)
                    except RequestRejected as error:
                        if bounded is request or not is_about_length(error):
                            raise
                        return await server.complete(request, b"", TIMEOUT, stream=False)
            except TimeoutError:
                raise _too_late() from None

    async def _aclose(self) -> None:
        if self._engine is not None and self._server is not None:
            await self._engine.aclose()
            await self._server.aclose()


def get_vllm_dots_ocr_client(base_url: str = DEFAULT_URL, api_key: str | None = None) -> VLLMDotsOCRClient:
    """Return the client of a server, the same one for every caller.

    Args:
        base_url: See `VLLMDotsOCRClient`.
        api_key: See `VLLMDotsOCRClient`.
    """
    key = (root_of(base_url), api_key or settings.value("DOTS_OCR_API_KEY"))
    with _lock:
        if key not in _clients:
            _clients[key] = VLLMDotsOCRClient(base_url, api_key)
        return _clients[key]


def root_of(base_url: str) -> str:
    """Return a server's address without ``/v1``; for `DEFAULT_URL` the one of the settings, if there is one.

    It may have a user and a password in it: `credentials.without_login` takes them out.
    """
    if isinstance(base_url, _Default):
        base_url = settings.value("DOTS_OCR_BASE_URL") or str(base_url)
    return bare(str(base_url)).rstrip("/").removesuffix("/v1").rstrip("/")


def is_given(base_url: str) -> bool:
    """Tell whether a caller chose the address."""
    return not isinstance(base_url, _Default)


def join_pages(parts: Sequence[tuple[int, str]], count: int) -> str:
    """Put the contents of pages one after another, each behind a line that says which page it is.

    Args:
        parts: Number and content of each.
        count: Pages of the whole document.
    """
    return "\n\n".join(f"--- Страница {number} из {count} ---\n\n{content}" for number, content in parts)


def completion_of(
    content: str,
    model: str,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    finish_reason: str = "stop",
) -> dict[str, Any]:
    """Make a completion as vLLM would send it.

    Args:
        content: The answer.
        model: As the server names it.
        prompt_tokens: If they were counted; the usage is empty otherwise.
        completion_tokens: As above.
        finish_reason: ``stop``, or ``length`` for an answer that was cut off.
    """
    usage: dict[str, Any] = {}
    if prompt_tokens is not None and completion_tokens is not None:
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    message = {"role": "assistant", "content": content}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": usage,
    }


def error_completion(error: str, content: str, usage: dict[str, Any]) -> dict[str, Any]:
    """Make what the application takes for a completion that failed.

    Args:
        error: For programs.
        content: For people.
        usage: Says who failed.
    """
    message = {"role": "assistant", "content": content}
    return {"error": error, "choices": [{"message": message, "finish_reason": "error"}], "usage": usage}


_lock = threading.Lock()
_clients: dict[tuple[str, str | None], VLLMDotsOCRClient] = {}
_open_clients: weakref.WeakSet[VLLMDotsOCRClient] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in tuple(_open_clients):
        client.close()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer within {TIMEOUT:g} s: look at the server's load")


def _describe(error: Exception) -> str:
    status = status_of(error)
    return explain(error) if status is None else f"HTTP {status}: {explain(error)}"


def _note(error: Exception) -> None:
    # A fault of our own is not for the user to explain.
    _log.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, DotsOCRError))


def _time(error: Exception, started: float) -> str:
    return "N/A" if status_of(error) is None else _seconds(started)


def _seconds(started: float) -> str:
    return f"{time.monotonic() - started:.3f}s"
