"""The client of one vLLM server, under the names of chatvlmllm's ``vllm_dots_ocr_client.py``."""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import functools
import logging
import re
import threading
import time
import uuid
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from PIL import Image

from .. import errors
from ..credentials import bare, read_key, without_login
from ..engines.base import Answer
from ..engines.server import MAX_COUNT, Server
from ..engines.vllm import VLLMEngine
from ..loop_thread import LoopThread
from ..pages import images
from ..pages.documents import PageImage
from ..pages.rasterizer import draw
from . import settings
from .messages import Conversation, open_pages
from .trained import content_of, task_of
from .words import explain, is_absent

T = TypeVar("T")

# The application's own; dots.ocr is asked with the trained prompt that means the same.
DEFAULT_PROMPT: Final = "Extract all text from this image"
MODEL: Final = "dots.ocr-vllm"  # what results call the model
CUT_OFF: Final = "\n\n[ответ обрезан: увеличьте max_tokens]"  # behind an answer that did not fit
NO_TIME: Final = "N/A"  # of what did not come from a server
TIMEOUT: Final = 120.0  # for one answer, in seconds, as in the application
HEALTH_TIMEOUT, MODELS_TIMEOUT, METRICS_TIMEOUT = 5.0, 10.0, 5.0  # in seconds, as in the application

_log = logging.getLogger(__package__)
_METRIC = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? (\d{1,9})(?:\.0*)?$", re.MULTILINE)


class _Default(str):
    """An address that stands for "none was given"."""


# Without another address, ``DOTS_OCR_BASE_URL`` of the settings goes before this.
DEFAULT_URL: Final[str] = _Default("http://localhost:8000")


@dataclass(frozen=True, slots=True)
class State:
    """What was last known of the server."""

    fault: Exception | None = None  # why it cannot be used; ``None`` if it can
    context: int = 8192  # longest prompt and answer together, in tokens; before the server says it, a usual number
    queue: tuple[int, int] | None = None  # requests that it works on and that wait, if it tells
    asked: float = float("-inf")  # when, on the monotonic clock, in seconds


class VLLMDotsOCRClient:
    """Reads pictures with dots.ocr on a vLLM server; it may be used by several threads.

    Prompts that dots.ocr was trained with, and the application's own words for the same wishes, are read in the way of
    `dots_ocr_client.VLLMEngine`: retried, checked, repaired, with boxes in pixels of the upright picture. Any other
    prompt goes to the model as it is.
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
        self._asking = threading.Lock()
        self._state = State()
        self._warned = False
        _open_clients.add(self)

    @functools.cached_property
    def session(self) -> Any:
        """A ``requests.Session`` for programs that use the application's, if there is that package; we do without."""
        import requests  # type: ignore[import-untyped, import-not-found, unused-ignore]

        session = requests.Session()
        if key := read_key(self._api_key):
            session.headers["Authorization"] = f"Bearer {key}"
        return session

    def health_check(self) -> bool:
        """Ask the server now, for up to 5 s, whether it is healthy and serves dots.ocr and not another model."""
        return self.fault() is None

    def fault(self) -> Exception | None:
        """Return why the server cannot be used; ``None`` if it can. Asks as `health_check` does."""
        try:
            self._ask(HEALTH_TIMEOUT, lambda engine, _: engine.probe(HEALTH_TIMEOUT))
        except Exception as error:
            _log.warning("%s cannot be used: %s", self.base_url, error)
            return error
        return None

    def state(self, seconds: float = 0.0) -> State:
        """Return the server's state, as of the last so many seconds. It is asked by one thread, the others wait."""
        with self._asking:
            if time.monotonic() - self._state.asked < seconds:
                return self._state
            context, queue, fault = self._state.context, None, self.fault()
            if fault is None:
                for card in self.get_models().get("data", ()):
                    length = card.get("max_model_len")
                    context = length if type(length) is int and 0 < length < MAX_COUNT else context
                counts = dict(_METRIC.findall(self.metrics() or ""))
                queue = (int(counts["running"]), int(counts["waiting"])) if len(counts) == 2 else None
            self._state = State(fault, context, queue, time.monotonic())
            return self._state

    def get_models(self) -> dict[str, Any]:
        """Return the answer to ``/v1/models``, or a dictionary with ``error``."""
        try:
            cards = self._ask(MODELS_TIMEOUT, lambda engine, _: engine.models(MODELS_TIMEOUT))
            return {"object": "list", "data": cards}
        except Exception as error:
            return {"error": _failed(error)[0]}

    def encode_image_to_base64(self, image_path: str) -> str:
        """Return the bytes of a file in base64, or raise `ValueError`."""
        try:
            return base64.b64encode(Path(image_path).read_bytes()).decode()
        except Exception as error:
            raise ValueError(f"Cannot encode image {image_path}: {error}") from error

    def encode_pil_image_to_base64(self, image: Image.Image) -> str:
        """Return a picture as an upright PNG in base64, or raise `ValueError`."""
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
            several pages, the content says what went wrong on one that cannot be read.
        """
        started = time.monotonic()
        try:
            completion = self.for_pages(image_path, page, lambda one: self.complete(Conversation.about(one, prompt)))
        except Exception as error:
            said, lasted = _failed(error, started)
            return {"success": False, "error": said, "processing_time": lasted}
        return {
            "success": True,
            "content": completion["choices"][0]["message"]["content"],
            "model": MODEL,
            "processing_time": seconds_since(started),
            "usage": completion["usage"],
            "raw_response": completion,
        }

    def process_pil_image(self, image: Image.Image, prompt: str = DEFAULT_PROMPT) -> dict[str, Any]:
        """Read a PIL image; as `process_image`, but without ``raw_response``."""
        result = self.process_image(image, prompt)  # type: ignore[arg-type]
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
            said, lasted = _failed(error, started)
            unreachable = isinstance(
                error, errors.ServerUnavailable | errors.DeadlineExceeded | errors.ConfigurationError
            )
            prefix = "Connection error" if unreachable and lasted == NO_TIME else "vLLM Error"
            usage = {"processing_time": lasted, "model": MODEL, "error": True}
            return error_completion(said, f"{prefix}: {explain(error)}", usage)
        completion["usage"] |= {"processing_time": seconds_since(started), "model": MODEL}
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
        """Return the answer to a conversation as a completion of vLLM; `None` tokens: as many as the context allows."""
        return self._loop.run(self._complete(conversation, max_tokens))

    def attempt(self, conversation: Conversation, max_tokens: int | None, seconds: float) -> dict[str, Any] | Exception:
        """Answer a conversation as `complete` does, or return why the server does not; only an `InputError` is raised.

        Its `state` counts for so many seconds; that it is not there, or its settings are wrong, belongs to that.
        """
        fault = self.state(seconds).fault
        if fault is not None:
            return fault
        try:
            return self.complete(conversation, max_tokens)
        except errors.InputError:
            raise
        except Exception as error:
            _log.warning("dots.ocr did not answer: %s", error, exc_info=not isinstance(error, errors.DotsOCRError))
            if is_absent(error) or isinstance(error, errors.ConfigurationError):
                self._state = replace(self._state, fault=error, asked=time.monotonic())
            return error

    def for_pages(self, document: Any, page: int | None, ask: Callable[[PageImage], dict[str, Any]]) -> dict[str, Any]:
        """Have the pages of a document asked for, all or one counted from 1, and join the completions into one.

        What went wrong on the first page is raised if something went wrong on all of them.
        """
        contents: list[str] = []
        completions: list[dict[str, Any]] = []
        faults: list[Exception] = []
        with open_pages(document, page) as opened:
            for number in opened.numbers:
                try:
                    completions.append(ask(draw(opened.reference(number))))
                    content = completions[-1]["choices"][0]["message"]["content"]
                except Exception as error:
                    faults.append(error)
                    content = f"❌ {explain(error)}"
                contents.append(f"--- Страница {number} из {opened.page_count} ---\n\n{content}")
        if not completions:
            raise faults[0]
        joined = completions[0]
        if len(contents) > 1:
            for fault in faults:
                note(fault)
            joined["choices"][0]["message"]["content"] = "\n\n".join(contents)
            counts = ("prompt_tokens", "completion_tokens", "total_tokens")
            joined["usage"] |= {name: sum(one["usage"].get(name, 0) for one in completions) for name in counts}
        return joined

    def close(self) -> None:
        """Close the connections; the end of the process does so, too. A second call does nothing."""
        _open_clients.discard(self)
        self._loop.close(self._aclose())

    def metrics(self) -> str | None:
        """Return what the server tells Prometheus, if it tells anything."""
        try:
            return self._ask(METRICS_TIMEOUT, lambda _, server: server.metrics(METRICS_TIMEOUT))
        except (errors.DotsOCRError, TimeoutError):
            return None

    # Both are made on the loop, where their connections are.
    @functools.cached_property
    def _engine(self) -> VLLMEngine:
        return VLLMEngine(f"{self._root}/v1", api_key=self._api_key)

    @functools.cached_property
    def _server(self) -> Server:
        return Server(f"{self._root}/v1", self._api_key)

    def _ask(self, seconds: float, what: Callable[[VLLMEngine, Server], Awaitable[T]]) -> T:
        async def ask() -> T:
            import openai  # noqa: F401  # seconds on a busy machine, which are not the server's

            async with asyncio.timeout(seconds):
                return await what(self._engine, self._server)

        return self._loop.run(ask())

    async def _complete(self, conversation: Conversation, max_tokens: int | None) -> dict[str, Any]:
        async with self._engine.limiter:
            seconds = TIMEOUT + await self._engine.more_seconds()
            try:
                async with asyncio.timeout(seconds):
                    return await self._answer(conversation, max_tokens, seconds)
            except TimeoutError:
                raise errors.DeadlineExceeded(f"no answer within {seconds:g} s: look at the server's load") from None

    async def _answer(self, conversation: Conversation, max_tokens: int | None, seconds: float) -> dict[str, Any]:
        page, task = conversation.page, task_of(conversation.prompt) if conversation.one_page else None
        if page is not None and task is not None:
            answer = await self._engine.read(page, task, seconds)
            for warning in answer.warnings:
                _log.warning("%s", warning)
            return completion_of(content_of(answer, conversation.prompt), answer.model, answer)
        if not self._warned:
            self._warned = True
            _log.warning("dots.ocr was not trained with this prompt and may ignore it: %.100r", conversation.prompt)
        messages = await asyncio.to_thread(conversation.encoded)
        request: dict[str, Any] = {"model": self._engine.model, "messages": messages, "temperature": 0.0}
        try:
            answer = await self._server.complete(request, b"", seconds, stream=False, limit=max_tokens)
        except errors.CutOff as error:
            if not error.text.strip():
                raise
            return completion_of(error.text + CUT_OFF, MODEL, finish_reason="length")
        if not answer.text.strip():
            raise errors.UnusableAnswer("the answer is empty")
        return completion_of(answer.text, answer.model, answer)

    async def _aclose(self) -> None:
        with contextlib.suppress(errors.DotsOCRError):  # the address or the key is none
            await self._engine.aclose()
            await self._server.aclose()


def get_vllm_dots_ocr_client(base_url: str = DEFAULT_URL, api_key: str | None = None) -> VLLMDotsOCRClient:
    """Return the client of a server and key, the same one for every caller; see `VLLMDotsOCRClient`."""
    key = (root_of(base_url), api_key or settings.value("DOTS_OCR_API_KEY"))
    with _lock:
        if key not in _clients:
            _clients[key] = VLLMDotsOCRClient(base_url, api_key)
        return _clients[key]


def root_of(base_url: str) -> str:
    """Return a server's address without ``/v1``; for `DEFAULT_URL` the one of the settings, if there is one.

    It may have a user and a password in it: `credentials.without_login` takes them out.
    """
    if base_url is DEFAULT_URL:
        base_url = settings.value("DOTS_OCR_BASE_URL") or str(base_url)
    return bare(str(base_url)).rstrip("/").removesuffix("/v1").rstrip("/")


def completion_of(
    content: str, model: str, counted: Answer | None = None, finish_reason: str = "stop"
) -> dict[str, Any]:
    """Make a completion as vLLM would send it; its usage is empty unless both numbers of tokens are known."""
    usage: dict[str, Any] = {}
    if counted is not None and counted.prompt_tokens is not None and counted.completion_tokens is not None:
        usage = {"prompt_tokens": counted.prompt_tokens, "completion_tokens": counted.completion_tokens}
        usage["total_tokens"] = sum(usage.values())
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
    """Make what the application takes for a completion that failed: the error for programs, the content for people."""
    message = {"role": "assistant", "content": content}
    return {"error": error, "choices": [{"message": message, "finish_reason": "error"}], "usage": usage}


_lock = threading.Lock()
_clients: dict[tuple[str, str | None], VLLMDotsOCRClient] = {}
_open_clients: weakref.WeakSet[VLLMDotsOCRClient] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in tuple(_open_clients):
        client.close()


def note(error: Exception) -> str:
    """Log an error, and return it explained."""
    # A fault of our own is not for the user to explain.
    _log.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, errors.DotsOCRError))
    return explain(error)


def seconds_since(started: float) -> str:
    """Write the time since a moment of the monotonic clock as results do."""
    return f"{time.monotonic() - started:.3f}s"


def _failed(error: Exception, started: float = 0.0) -> tuple[str, str]:
    """Log an error; return its words, and the time that it took if the server answered at all."""
    words, status = note(error), getattr(error, "status", None)
    return (words, NO_TIME) if status is None else (f"HTTP {status}: {words}", seconds_since(started))
