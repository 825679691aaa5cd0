"""What goes wrong, in the words of chatvlmllm's users."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

from typing import Final

from .. import errors
from .messages import MessageError
from .settings import FILE

UNAVAILABLE: Final = "vLLM недоступен"
NO_FALLBACK: Final = f"{UNAVAILABLE} и fallback модель не настроена"
NO_SERVICE: Final = "OCR сервис временно недоступен"

_KEY: Final = f"задайте верный в переменной DOTS_OCR_API_KEY или в файле {FILE}"

_WORDS: Final[tuple[tuple[type[Exception], str], ...]] = (  # the first that fits, so subclasses before their bases
    (MessageError, "неверные сообщения"),
    (errors.InputError, "не удалось прочитать изображение"),
    (errors.ModelNotServed, "сервер запущен с другой моделью: перезапустите его с dots.ocr"),
    (errors.Unauthorized, f"сервер отклонил ключ API: {_KEY}"),
    (errors.InvalidKey, f"ключ API записан с ошибкой: {_KEY}"),
    (errors.ConfigurationError, "по этому адресу нет сервера vLLM: проверьте адрес"),
    (errors.Overloaded, "сервер перегружен: повторите попытку позже"),
    (
        errors.ServerUnavailable,
        f"{UNAVAILABLE}: запустите сервер или подождите, загрузка модели занимает несколько минут",
    ),
    (errors.DeadlineExceeded, "сервер не ответил вовремя: повторите попытку или уменьшите изображение"),
    (errors.ModeNotSupported, "модель не поддерживает этот режим"),
    (errors.RequestRejected, "сервер отклонил запрос"),
    (errors.Repetition, "модель зациклилась: повторите попытку или измените размер изображения"),
    (errors.CutOff, "ответ не поместился: увеличьте max_tokens или --max-model-len сервера"),
    (errors.UnusableAnswer, "ответ модели непригоден: повторите попытку"),
    (errors.EngineMissing, "не установлены нужные программы или данные"),
    (errors.AllEnginesFailed, "не удалось прочитать страницу"),
)


class Explained(errors.DotsOCRError):
    """Says already, in Russian, what went wrong."""


def is_absent(error: Exception) -> bool:
    """Tell whether there is no server that could answer; one that has too much to do is there."""
    return isinstance(error, errors.ServerUnavailable | TimeoutError) and not isinstance(error, errors.Overloaded)


def is_about_the_key(error: Exception) -> bool:
    """Tell whether the settings are wrong in a way that no other engine may cover up: the key is, or can be none."""
    return isinstance(error, errors.InvalidKey | errors.Unauthorized)


def explain(error: Exception) -> str:
    """Say what went wrong and what to do, with the message of this package, in English, behind it."""
    if isinstance(error, Explained):
        return str(error)
    words = next((words for kind, words in _WORDS if isinstance(error, kind)), "непредвиденная ошибка")
    return f"{words} ({error or type(error).__name__})"
