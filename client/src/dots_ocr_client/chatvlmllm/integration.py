"""dots.ocr with something to fall back on, under the names of chatvlmllm's ``models/dots_ocr_vllm_integration.py``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from PIL import Image

from ..errors import ConfigurationError, DotsOCRError, Overloaded, ServerUnavailable
from ..pages.documents import PageImage
from . import settings
from .client import (
    DEFAULT_PROMPT,
    DEFAULT_URL,
    MODEL,
    completion_of,
    error_completion,
    get_vllm_dots_ocr_client,
    is_given,
    root_of,
)
from .fallback import Fallback, adapt
from .messages import Conversation
from .words import NO_FALLBACK, NO_SERVICE, UNAVAILABLE, Explained, explain, is_about_the_key

T = TypeVar("T")

HEALTH_SECONDS: Final = 10.0
"""How long the last word on the server's health counts, in seconds (our own choice: longer than the check itself may
take). A page that does not reach the server ends it at once."""

_log = logging.getLogger(__package__)


class DotsOCRVLLMIntegration:
    """Reads pictures with dots.ocr, and with the fallback when that is not there or has no usable answer.

    It may be used by several threads. A picture that cannot be read is an error at once: no model could read it. So is
    an API key that the server refuses: the fallback would hide it on every page.

    Attributes:
        vllm_url: The server's address, without ``/v1``.
        vllm_client: Its client.
    """

    def __init__(self, vllm_url: str = DEFAULT_URL, api_key: str | None = None) -> None:
        """Ask the server, for up to 5 s, whether it is there.

        Args:
            vllm_url: See `VLLMDotsOCRClient`.
            api_key: See `VLLMDotsOCRClient`.
        """
        self.vllm_client = get_vllm_dots_ocr_client(vllm_url, api_key)
        self.vllm_url = self.vllm_client.base_url
        self._fallback_model: Any = None
        self._fallback: Fallback | None = None
        self._checking = threading.Lock()
        self._health = (False, float("-inf"))
        self._why = UNAVAILABLE
        self._key_is_wrong = False
        self.is_vllm_available()

    @property
    def is_available(self) -> bool:
        """Whether the server was there when it was last asked."""
        return self._health[0]

    @property
    def fallback_model(self) -> Any:
        """What `set_fallback_model` was given; ``None`` if nothing, or nothing that can read."""
        return self._fallback_model

    @fallback_model.setter
    def fallback_model(self, model: Any) -> None:
        self.set_fallback_model(model)

    def set_fallback_model(self, fallback_model: Any) -> None:
        """Choose what reads when dots.ocr does not.

        Args:
            fallback_model: A model of the application, which has ``process_image(image, prompt)``, ``chat(image,
                prompt)`` or ``chat_completion(messages, max_tokens)``; ``"qwen"``, ``"tesseract"`` or an engine of
                this package; or ``None`` for nothing. Anything else is logged, and leaves no fallback.
        """
        self._fallback_model = self._fallback = None
        if fallback_model is None:
            return
        try:
            self._fallback = adapt(fallback_model)
        except Exception as error:
            _log.error("no fallback: %s", error)
            return
        self._fallback_model = fallback_model
        _log.info("the fallback is %s", fallback_model if isinstance(fallback_model, str) else type(fallback_model))

    def is_vllm_available(self) -> bool:
        """Tell whether the server is healthy and serves dots.ocr, as of the last `HEALTH_SECONDS`."""
        with self._checking:  # one asks, the others wait for what it finds out
            if time.monotonic() - self._health[1] >= HEALTH_SECONDS:
                self._check()
            return self.is_available

    def process_image_file(
        self, image_path: str, prompt: str = DEFAULT_PROMPT, page: int | None = None
    ) -> dict[str, Any]:
        """Read a picture, or the pages of a PDF or a TIFF.

        Args:
            image_path: As for `VLLMDotsOCRClient.process_image`.
            prompt: As for `VLLMDotsOCRClient.process_image`; the fallback gets it unchanged.
            page: As for `VLLMDotsOCRClient.process_image`.

        Returns:
            ``success``, ``content``, ``model`` and ``processing_time``, or ``success``, ``error`` and ``model``; and
            ``method``, which is ``vllm``, ``none``, or ``fallback`` if that has read any of the pages.
        """
        return self._process(image_path, prompt, page)

    def process_pil_image(self, image: Image.Image, prompt: str = DEFAULT_PROMPT) -> dict[str, Any]:
        """Read a PIL image; see `process_image_file`."""
        return self._process(image, prompt, None)

    def chat_completion(self, messages: Sequence[Mapping[str, Any]], max_tokens: int = 2048) -> dict[str, Any]:
        """Answer messages in the format of the OpenAI API; see `VLLMDotsOCRClient.chat_completion`.

        Returns:
            A completion with ``method`` in its ``usage``, as in `process_image_file`, and ``server`` if dots.ocr
            answered; ``error`` is in it, too, if nothing did.
        """
        started = time.monotonic()
        try:
            conversation = Conversation.of(messages)
        except Exception as error:
            return _no_completion(_unreadable(error))
        completion, why = self._ask(conversation, max_tokens)
        if completion is not None:
            details = {"model": MODEL, "method": "vllm", "server": self.vllm_url}
            completion["usage"] |= {"processing_time": _seconds(started), **details}
            return completion
        answer, why = self._fall_back(why, lambda fallback: fallback.chat(conversation, messages, max_tokens))
        if answer is None:
            return _no_completion(why, NO_SERVICE)
        return {**answer, "usage": {**(answer.get("usage") or {}), "method": "fallback"}}

    def get_status(self) -> dict[str, Any]:
        """Ask the server now and tell who can read.

        Returns:
            ``vllm_url``, ``vllm_available``, ``fallback_available`` and ``recommended_method``; with a server that is
            there also ``vllm_info`` (`VLLMDotsOCRClient.get_server_info`).
        """
        with self._checking:
            self._check()
        status = {
            "vllm_url": self.vllm_url,
            "vllm_available": self.is_available,
            "fallback_available": self._fallback is not None,
            "recommended_method": "vllm" if self.is_available else "fallback",
        }
        if self.is_available:
            status["vllm_info"] = self.vllm_client.get_server_info()
        return status

    def _check(self) -> None:
        fault = self.vllm_client.fault()
        self._why = "" if fault is None else _why(fault)
        self._key_is_wrong = fault is not None and is_about_the_key(fault)
        self._health = (fault is None, time.monotonic())

    def _process(self, picture: Any, prompt: str, page: int | None) -> dict[str, Any]:
        started = time.monotonic()
        methods = set()

        def read(image: PageImage) -> dict[str, Any]:
            conversation = Conversation.about(image, prompt)
            completion, why = self._ask(conversation, None)
            if completion is None:
                text, why = self._fall_back(why, lambda fallback: fallback.read(image, prompt))
                if text is None:
                    raise Explained(why)
                completion = completion_of(text, "fallback")
                methods.add("fallback")
            return completion

        try:
            completion = self.vllm_client.for_pages(picture, page, read)
        except Explained as error:
            return _no_result(str(error))
        except Exception as error:
            return _no_result(_unreadable(error))
        content = completion["choices"][0]["message"]["content"]
        if methods:
            return _result(content, "fallback", "N/A", "fallback")
        return _result(content, MODEL, _seconds(started), "vllm")

    def _ask(self, conversation: Conversation, max_tokens: int | None) -> tuple[dict[str, Any] | None, str]:
        """Ask dots.ocr; return its answer, or why there is none, in Russian."""
        if not self.is_vllm_available():
            return None, self._why
        try:
            return self.vllm_client.complete(conversation, max_tokens), ""
        except Exception as error:
            why = _why(error)
            if why == UNAVAILABLE or isinstance(error, ConfigurationError):
                self._health, self._why = (False, time.monotonic()), why
                self._key_is_wrong = is_about_the_key(error)
            _log.warning("dots.ocr did not answer: %s", error, exc_info=not isinstance(error, DotsOCRError))
            return None, why

    def _fall_back(self, why: str, ask: Callable[[Fallback], T]) -> tuple[T | None, str]:
        """Ask the fallback; return its answer, or why there is none, in Russian.

        Args:
            why: Why dots.ocr did not answer.
            ask: What to ask.
        """
        if self._key_is_wrong:
            return None, why
        if self._fallback is None:
            return None, NO_FALLBACK if why == UNAVAILABLE else why
        try:
            return ask(self._fallback), ""
        except Exception as error:  # the application's models raise anything
            _log.error("the fallback failed, too: %s", error, exc_info=not isinstance(error, DotsOCRError))
            return None, f"{why}; fallback модель не справилась: {explain(error)}"


def get_dots_ocr_vllm_integration(vllm_url: str = DEFAULT_URL, api_key: str | None = None) -> DotsOCRVLLMIntegration:
    """Return the integration of a server, the same one for every caller.

    Args:
        vllm_url: See `VLLMDotsOCRClient`. Without one, the integration that was last asked for is returned.
        api_key: See `VLLMDotsOCRClient`.
    """
    global _current
    with _lock:
        if _current is not None and not is_given(vllm_url) and api_key is None:
            return _current
        key = (root_of(vllm_url), api_key or settings.value("DOTS_OCR_API_KEY"))
        if key not in _integrations:
            _integrations[key] = DotsOCRVLLMIntegration(vllm_url, api_key)
        _current = _integrations[key]
        return _current


def initialize_dots_ocr_vllm(
    vllm_url: str = DEFAULT_URL, fallback_model: Any = None, api_key: str | None = None
) -> bool:
    """Prepare the integration that `get_dots_ocr_vllm_integration` returns, and tell whether anything can read.

    Args:
        vllm_url: See `get_dots_ocr_vllm_integration`.
        fallback_model: See `DotsOCRVLLMIntegration.set_fallback_model`; ``None`` changes nothing.
        api_key: See `VLLMDotsOCRClient`.
    """
    integration = get_dots_ocr_vllm_integration(vllm_url, api_key)
    if fallback_model is not None:
        integration.set_fallback_model(fallback_model)
    status = integration.get_status()
    _log.info("dots.ocr: %(vllm_available)s, fallback: %(fallback_available)s", status)
    return bool(status["vllm_available"] or status["fallback_available"])


_lock = threading.Lock()
_integrations: dict[tuple[str, str | None], DotsOCRVLLMIntegration] = {}
_current: DotsOCRVLLMIntegration | None = None


def _why(error: Exception) -> str:
    """Say why dots.ocr has not read; a server that is not there in just those words, which programs look for."""
    absent = isinstance(error, ServerUnavailable | TimeoutError) and not isinstance(error, Overloaded)
    return UNAVAILABLE if absent else explain(error)


def _result(content: str, model: str, processing_time: str, method: str) -> dict[str, Any]:
    return {
        "success": True,
        "content": content,
        "model": model,
        "processing_time": processing_time,
        "method": method,
    }


def _no_result(error: str) -> dict[str, Any]:
    return {"success": False, "error": error, "model": "none", "method": "none"}


def _no_completion(error: str, content: str | None = None) -> dict[str, Any]:
    return error_completion(error, content or error, {"method": "none", "error": True})


def _unreadable(error: Exception) -> str:
    _log.error("%s", error, exc_info=not isinstance(error, DotsOCRError))
    return explain(error)


def _seconds(started: float) -> str:
    return f"{time.monotonic() - started:.3f}s"
