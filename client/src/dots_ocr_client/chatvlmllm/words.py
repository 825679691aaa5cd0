"""What goes wrong, in the words of chatvlmllm's users."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

from typing import Final

from ..errors import (
    AllEnginesFailed,
    ConfigurationError,
    CutOff,
    DeadlineExceeded,
    DotsOCRError,
    EngineMissing,
    InputError,
    InvalidKey,
    ModelNotServed,
    ModeNotSupported,
    Overloaded,
    Repetition,
    RequestRejected,
    ServerUnavailable,
    Unauthorized,
    UnusableAnswer,
)
from .messages import MessageError
from .settings import FILE

UNAVAILABLE: Final = "vLLM недоступен"
NO_FALLBACK: Final = f"{UNAVAILABLE} и fallback модель не настроена"
NO_SERVICE: Final = "OCR сервис временно недоступен"

_WORDS: Final[tuple[tuple[type[Exception], str], ...]] = (  # the first that fits, so subclasses before their bases
    (MessageError, "неверные сообщения"),
    (InputError, "не удалось прочитать изображение"),
    (ModelNotServed, "сервер запущен с другой моделью: перезапустите его с dots.ocr"),
    (Unauthorized, f"сервер отклонил ключ API: задайте верный в переменной DOTS_OCR_API_KEY или в файле {FILE}"),
    (InvalidKey, f"ключ API записан с ошибкой: задайте верный в переменной DOTS_OCR_API_KEY или в файле {FILE}"),
    (ConfigurationError, "по этому адресу нет сервера vLLM: проверьте адрес"),
    (Overloaded, "сервер перегружен: повторите попытку позже"),
    (ServerUnavailable, f"{UNAVAILABLE}: запустите сервер или подождите, загрузка модели занимает несколько минут"),
    (DeadlineExceeded, "сервер не ответил вовремя: повторите попытку или уменьшите изображение"),
    (ModeNotSupported, "модель не поддерживает этот режим"),
    (RequestRejected, "сервер отклонил запрос"),
    (Repetition, "модель зациклилась: повторите попытку или измените размер изображения"),
    (CutOff, "ответ не поместился: увеличьте max_tokens или --max-model-len сервера"),
    (UnusableAnswer, "ответ модели непригоден: повторите попытку"),
    (EngineMissing, "не установлены нужные программы или данные"),
    (AllEnginesFailed, "не удалось прочитать страницу"),
)


class Explained(DotsOCRError):
    """Says already, in Russian, what went wrong."""


def is_absent(error: Exception) -> bool:
    """Tell whether there is no server that could answer; one that has too much to do is there."""
    return isinstance(error, ServerUnavailable | TimeoutError) and not isinstance(error, Overloaded)


def is_about_the_key(error: Exception) -> bool:
    """Tell whether the settings are wrong in a way that no other engine may cover up: the key is, or can be none."""
    return isinstance(error, InvalidKey | Unauthorized)


def explain(error: Exception) -> str:
    """Say what went wrong and what to do, with the message of this package, in English, behind it."""
    if isinstance(error, Explained):
        return str(error)
    words = next((words for kind, words in _WORDS if isinstance(error, kind)), "непредвиденная ошибка")
    return f"{words} ({error or type(error).__name__})"
