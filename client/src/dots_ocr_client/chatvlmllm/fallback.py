"""What may stand in for dots.ocr: a model of chatvlmllm's own, or an engine of this package."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from ..chain.fallback import Chain
from ..engines.base import Engine, Task
from ..engines.defaults import Name, make_engines
from ..errors import InputError, UnusableAnswer
from ..loop_thread import LoopThread
from ..pages.documents import PageImage
from .client import completion_of
from .messages import Conversation
from .trained import content_of, task_of

LANGUAGES: Final = "rus+eng"  # of Tesseract, if it is asked for by its name: those of the application's users
# For one page by an engine of this package (our own choice: about twice what Qwen2-VL takes on a CPU,
# `engines.qwen.CPU_SECONDS`; the application sets no limit to its own models).
SECONDS: Final = 900.0


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
