"""dots.ocr with something to fall back on, under the names of chatvlmllm's ``models/dots_ocr_vllm_integration.py``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from PIL import Image

from ..chain.fallback import Chain
from ..engines.base import Engine, Task
from ..engines.defaults import Name, make_engines
from ..errors import DotsOCRError, InputError, UnusableAnswer
from ..loop_thread import LoopThread
from ..pages.documents import PageImage
from .client import (
    DEFAULT_PROMPT,
    DEFAULT_URL,
    MODEL,
    VLLMDotsOCRClient,
    completion_of,
    error_completion,
    get_vllm_dots_ocr_client,
    note,
    seconds_since,
)
from .messages import Conversation
from .trained import content_of, task_of
from .words import NO_FALLBACK, NO_SERVICE, UNAVAILABLE, Explained, explain, is_about_the_key, is_absent

# How long the last word on the server's health counts, in seconds (our own choice: longer than the check itself may
# take). A page that does not reach the server ends it at once.
HEALTH_SECONDS: Final = 10.0

LANGUAGES: Final = "rus+eng"  # of Tesseract, if it is asked for by its name: those of the application's users
# For one page by an engine of this package (our own choice: about twice what Qwen2-VL takes on a CPU,
# `engines.qwen.CPU_SECONDS`; the application sets no limit to its own models).
SECONDS: Final = 900.0

_log = logging.getLogger(__package__)


class Fallback:
    """Reads pages; any exception means that it could not.

    A model in this process reads one page at a time: such models are not made for several threads.
    """

    def __init__(self, model: Any) -> None:
        """Take a model of the application, an `Engine`, or the name of one.

        A model has ``process_image(image, prompt)``, ``chat(image, prompt)`` or
        ``chat_completion(messages, max_tokens)``.

        Raises:
            TypeError: It is none of these.
            ValueError: There is no engine of that name.
        """
        if isinstance(model, str):
            model = make_engines((cast(Name, model),), languages=LANGUAGES)[0]
        self._model = model
        self._engine: Engine | None = None
        if all(hasattr(model, name) for name in ("read", "modes", "limiter")):
            self._engine = model
            self._chain = Chain((model,), SECONDS)
            self._loop = LoopThread()
        elif not any(map(self._method, ("process_image", "chat", "chat_completion"))):
            raise TypeError(
                f"{type(model).__name__} cannot stand in for dots.ocr: it has no process_image, chat or chat_completion"
            )
        self._lock = threading.Lock()

    def read(self, page: PageImage, prompt: str) -> str:
        """Read a page."""
        if self._engine is not None:
            task = task_of(prompt)
            if task is None:
                task = Task("general", question=prompt) if "general" in self._engine.modes else Task("text")
            return _checked(content_of(self._loop.run(self._chain.ask(page, task)), prompt))
        with self._lock:
            if ask := self._method("process_image") or self._method("chat"):
                return _checked(ask(page.image, prompt))
            return _checked(_content(self._model.chat_completion(Conversation.about(page, prompt).encoded(), 2048)))

    def chat(
        self, conversation: Conversation, messages: Sequence[Mapping[str, Any]], max_tokens: int
    ) -> dict[str, Any]:
        """Answer messages with a completion."""
        if answer := self._method("chat_completion"):
            with self._lock:
                completion = answer(messages, max_tokens)
            _checked(_content(completion))
            return dict(completion)
        if conversation.page is None:
            raise InputError("в сообщениях нет изображения")
        return completion_of(self.read(conversation.page, conversation.prompt), "fallback")

    def _method(self, name: str) -> Callable[..., Any] | None:
        method = getattr(self._model, name, None)
        return method if callable(method) else None


def _content(completion: Any) -> Any:
    if completion.get("error"):
        raise UnusableAnswer(str(completion["error"]))
    return completion["choices"][0]["message"]["content"]


def _checked(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UnusableAnswer(f"the fallback answered with {'nothing' if not text else type(text).__name__}")
    return text


class DotsOCRVLLMIntegration:
    """Reads pictures with dots.ocr, and with the fallback when that is not there or has no usable answer.

    It may be used by several threads. A picture that cannot be read is an error at once: no model could read it. So is
    an API key that the server refuses: the fallback would hide it on every page.
    """

    def __init__(self, vllm_url: str = DEFAULT_URL, api_key: str | None = None) -> None:
        """Ask the server, for up to 5 s, whether it is there; for the arguments see `VLLMDotsOCRClient`."""
        self.vllm_client = get_vllm_dots_ocr_client(vllm_url, api_key)
        self.vllm_url = self.vllm_client.base_url
        self._fallback_model: Any = None
        self._fallback: Fallback | None = None
        self.is_vllm_available()

    @property
    def is_available(self) -> bool:
        """Whether the server was there when it was last asked."""
        return self.vllm_client.state(float("inf")).fault is None

    def set_fallback_model(self, fallback_model: Any) -> None:
        """Choose what reads when dots.ocr does not: see `Fallback`. What is none is logged, and leaves no fallback."""
        try:
            self._fallback = None
            self._fallback = None if fallback_model is None else Fallback(fallback_model)
            _log.info("the fallback is %s", fallback_model if isinstance(fallback_model, str) else type(fallback_model))
        except Exception as error:
            _log.error("no fallback: %s", error)
        self._fallback_model = self._fallback and fallback_model

    fallback_model = property(lambda self: self._fallback_model, set_fallback_model)

    def is_vllm_available(self) -> bool:
        """Tell whether the server is healthy and serves dots.ocr, as of the last `HEALTH_SECONDS`."""
        return self.vllm_client.state(HEALTH_SECONDS).fault is None

    def process_image_file(
        self, image_path: str, prompt: str = DEFAULT_PROMPT, page: int | None = None
    ) -> dict[str, Any]:
        """Read a picture, or the pages of a PDF or a TIFF; arguments as for `VLLMDotsOCRClient.process_image`.

        Returns:
            ``success``, ``content``, ``model`` and ``processing_time``, or ``success``, ``error`` and ``model``; and
            ``method``, which is ``vllm``, ``none``, or ``fallback`` if that has read any of the pages.
        """
        started = time.monotonic()
        methods = set()

        def read(image: PageImage) -> dict[str, Any]:
            completion, method = self._ask(
                Conversation.about(image, prompt),
                None,
                lambda fallback: completion_of(fallback.read(image, prompt), "fallback"),
            )
            methods.add(method)
            return completion

        try:
            completion = self.vllm_client.for_pages(image_path, page, read)
        except Exception as error:
            return {"success": False, "error": note(error), "model": "none", "method": "none"}
        by_server = methods == {"vllm"}
        return {
            "success": True,
            "content": completion["choices"][0]["message"]["content"],
            "model": MODEL if by_server else "fallback",
            "processing_time": seconds_since(started) if by_server else "N/A",
            "method": "vllm" if by_server else "fallback",
        }

    def process_pil_image(self, image: Image.Image, prompt: str = DEFAULT_PROMPT) -> dict[str, Any]:
        """Read a PIL image; see `process_image_file`."""
        return self.process_image_file(image, prompt)  # type: ignore[arg-type]

    def chat_completion(self, messages: Sequence[Mapping[str, Any]], max_tokens: int = 2048) -> dict[str, Any]:
        """Answer messages in the format of the OpenAI API; see `VLLMDotsOCRClient.chat_completion`.

        Returns:
            A completion with ``method`` in its ``usage``, as in `process_image_file`, and ``server`` if dots.ocr
            answered; ``error`` is in it, too, if nothing did.
        """
        started = time.monotonic()
        try:
            conversation = Conversation.of(messages)
            completion, method = self._ask(
                conversation, max_tokens, lambda fallback: fallback.chat(conversation, messages, max_tokens)
            )
        except Exception as error:
            why = note(error)
            content = NO_SERVICE if isinstance(error, Explained) else why
            return error_completion(why, content, {"method": "none", "error": True})
        usage = {**(completion.get("usage") or {}), "method": method}
        if method == "vllm":
            usage |= {"processing_time": seconds_since(started), "model": MODEL, "server": self.vllm_url}
        return {**completion, "usage": usage}

    def get_status(self) -> dict[str, Any]:
        """Ask the server now and tell who can read; with a server that is there, also what it says about itself."""
        is_available = self.vllm_client.state().fault is None
        status = {
            "vllm_url": self.vllm_url,
            "vllm_available": is_available,
            "fallback_available": self._fallback is not None,
            "recommended_method": "vllm" if is_available else "fallback",
        }
        if is_available:
            status["vllm_info"] = self.vllm_client.get_server_info()
        return status

    def _ask(
        self, conversation: Conversation, max_tokens: int | None, ask: Callable[[Fallback], dict[str, Any]]
    ) -> tuple[dict[str, Any], str]:
        """Ask dots.ocr, or else the fallback; return the completion, and who made it.

        Raises:
            Explained: Neither had an answer. Programs look for just the word `UNAVAILABLE` if there is no server.
        """
        answer = self.vllm_client.attempt(conversation, max_tokens, HEALTH_SECONDS)
        if isinstance(answer, dict):
            return answer, "vllm"
        why = UNAVAILABLE if is_absent(answer) else explain(answer)
        if is_about_the_key(answer):
            raise Explained(why)
        if self._fallback is None:
            raise Explained(NO_FALLBACK if why == UNAVAILABLE else why)
        try:
            return ask(self._fallback), "fallback"
        except Exception as error:  # the application's models raise anything
            _log.error("the fallback failed, too: %s", error, exc_info=not isinstance(error, DotsOCRError))
            raise Explained(f"{why}; fallback модель не справилась: {explain(error)}") from error


def get_dots_ocr_vllm_integration(vllm_url: str = DEFAULT_URL, api_key: str | None = None) -> DotsOCRVLLMIntegration:
    """Return the integration of a server, the same one for every caller; see `VLLMDotsOCRClient`.

    Without an address, it is the one that was last asked for.
    """
    global _current
    with _lock:
        if _current is None or vllm_url is not DEFAULT_URL or api_key is not None:
            client = get_vllm_dots_ocr_client(vllm_url, api_key)
            if client not in _integrations:
                _integrations[client] = DotsOCRVLLMIntegration(vllm_url, api_key)
            _current = _integrations[client]
        return _current


def initialize_dots_ocr_vllm(
    vllm_url: str = DEFAULT_URL, fallback_model: Any = None, api_key: str | None = None
) -> bool:
    """Prepare the integration that `get_dots_ocr_vllm_integration` returns, and tell whether anything can read.

    No fallback leaves that which was chosen.
    """
    integration = get_dots_ocr_vllm_integration(vllm_url, api_key)
    if fallback_model is not None:
        integration.set_fallback_model(fallback_model)
    status = integration.get_status()
    _log.info("dots.ocr: %(vllm_available)s, fallback: %(fallback_available)s", status)
    return bool(status["vllm_available"] or status["fallback_available"])


_lock = threading.Lock()
_integrations: dict[VLLMDotsOCRClient, DotsOCRVLLMIntegration] = {}
_current: DotsOCRVLLMIntegration | None = None
