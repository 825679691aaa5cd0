"""What may stand in for dots.ocr: a model of chatvlmllm's own, or an engine of this package."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, cast

from ..chain.fallback import Chain
from ..chain.loop_thread import LoopThread
from ..engines.base import Engine, Task
from ..engines.defaults import Name, make_engines
from ..errors import InputError, UnusableAnswer
from ..pages.documents import PageImage
from .client import completion_of
from .messages import Conversation
from .trained import content_of, task_of

LANGUAGES: Final = "rus+eng"
"""Of Tesseract, if it is asked for by its name: those of the application's users."""
SECONDS: Final = 900.0
"""For one page by an engine of this package (our own choice: about twice what Qwen2-VL takes on a CPU,
`engines.qwen.CPU_SECONDS`; the application sets no limit to its own models)."""

Messages = Sequence[Mapping[str, Any]]


class Fallback(Protocol):
    """Something that reads pages."""

    def read(self, page: PageImage, prompt: str) -> str:
        """Read a page; any exception means that it could not."""
        ...

    def chat(self, conversation: Conversation, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Answer messages with a completion; any exception means that it could not."""
        ...


def adapt(model: Any) -> Fallback:
    """Make a fallback of whatever the application has.

    Args:
        model: A model with ``process_image(image, prompt)``, ``chat(image, prompt)`` or ``chat_completion(messages,
            max_tokens)``; an `Engine`; or the name of one.

    Raises:
        TypeError: It is none of these.
        ValueError: There is no engine of that name.
    """
    if isinstance(model, str):
        return _EngineFallback(make_engines((cast(Name, model),), languages=LANGUAGES)[0])
    if all(hasattr(model, name) for name in ("read", "modes", "limiter")):
        return _EngineFallback(model)
    if any(callable(getattr(model, name, None)) for name in ("process_image", "chat", "chat_completion")):
        return _ModelFallback(model)
    raise TypeError(
        f"{type(model).__name__} cannot stand in for dots.ocr: it has no process_image, chat or chat_completion"
    )


class _ModelFallback:
    """A model in this process. It reads one page at a time: such models are not made for several threads."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()

    def read(self, page: PageImage, prompt: str) -> str:
        with self._lock:
            if callable(getattr(self._model, "process_image", None)):
                return _checked(self._model.process_image(page.image, prompt))
            if callable(getattr(self._model, "chat", None)):
                return _checked(self._model.chat(page.image, prompt))
            messages = Conversation.about(page.image, prompt).encoded()
            return _checked(_content(self._model.chat_completion(messages, 2048)))

    def chat(self, conversation: Conversation, messages: Messages, max_tokens: int) -> dict[str, Any]:
        if callable(getattr(self._model, "chat_completion", None)):
            with self._lock:
                completion = self._model.chat_completion(messages, max_tokens)
            _checked(_content(completion))
            return dict(completion)
        return completion_of(self.read(_page(conversation), conversation.prompt), "fallback")


class _EngineFallback:
    """An engine of this package."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._chain = Chain((engine,), SECONDS)
        self._loop = LoopThread()

    def read(self, page: PageImage, prompt: str) -> str:
        task = task_of(prompt)
        if task is None:
            task = Task("general", question=prompt) if "general" in self._engine.modes else Task("text")
        return _checked(content_of(self._loop.run(self._chain.ask(page, task)), prompt))

    def chat(self, conversation: Conversation, messages: Messages, max_tokens: int) -> dict[str, Any]:
        return completion_of(self.read(_page(conversation), conversation.prompt), "fallback")


def _page(conversation: Conversation) -> PageImage:
    if conversation.page is None:
        raise InputError("в сообщениях нет изображения")
    return conversation.page


def _content(completion: Any) -> Any:
    if completion.get("error"):
        raise UnusableAnswer(str(completion["error"]))
    return completion["choices"][0]["message"]["content"]


def _checked(text: Any) -> str:
    """Return a text that says something.

    Raises:
        UnusableAnswer: It is none.
    """
    if not isinstance(text, str) or not text.strip():
        raise UnusableAnswer(f"the fallback answered with {'nothing' if not text else type(text).__name__}")
    return text
