"""The messages of an OpenAI chat, as chatvlmllm writes them: with pictures as paths, URLs, bytes or PIL images."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from ..documents import PageImage, Source, draw, open_document
from ..engines.server import PICTURE
from ..errors import InputError
from ..prompts import PLACEHOLDER


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was asked.

    Attributes:
        messages: As they came, with a `PageImage` in the place of each picture.
        page: The last picture; ``None`` if there is none.
        prompt: The text of the last message, instructions to the model (``system``) aside.
        one_page: There is just one picture, as in all that dots.ocr was trained for.
    """

    messages: tuple[dict[str, Any], ...]
    page: PageImage | None
    prompt: str
    one_page: bool

    @classmethod
    def about(cls, picture: Source, prompt: str | None) -> Conversation:
        """Ask one thing about one picture; without a prompt, for all its text.

        Raises:
            InputError: The picture cannot be read.
        """
        page, prompt = read_picture(picture), prompt or ""
        parts = [_picture_part(page), {"type": "text", "text": prompt}]
        return cls(({"role": "user", "content": parts},), page, prompt, True)

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """Read messages.

        Raises:
            InputError: They are none, or one of the pictures cannot be read.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise InputError("нет ни одного сообщения: передайте список сообщений в формате OpenAI")
        read = tuple(_read_message(message) for message in messages)
        pages = [page for message in read for page in _pages(message)]
        spoken = [message for message in read if message.get("role") != "system"]
        return cls(read, pages[-1] if pages else None, _text(spoken[-1]) if spoken else "", len(pages) == 1)

    def encoded(self) -> list[dict[str, Any]]:
        """Return the messages as vLLM takes them: pictures as data URLs, and the mark where a picture goes.

        Where a message has several pictures, vLLM puts the marks in by itself.
        """
        return [_encode(message) for message in self.messages]


def read_picture(picture: Any) -> PageImage:
    """Draw a picture, or another document of one page.

    Args:
        picture: A path, a ``file:`` or ``data:`` URL, bytes, an open file, or a PIL image.

    Raises:
        InputError: It cannot be read.
    """
    if isinstance(picture, str):
        picture = _local(picture)
    elif not (isinstance(picture, bytes | os.PathLike | Image.Image) or hasattr(picture, "read")):
        raise InputError(f"это не изображение, а {type(picture).__name__}: передайте путь, байты или PIL.Image")
    with open_document(picture) as opened:
        if len(opened.numbers) != 1:
            raise InputError(f"в документе {len(opened.numbers)} стр.: передавайте их по одной")
        return draw(opened.reference(1))


def _local(url: str) -> str:
    if not url:
        raise InputError("путь к изображению пуст")
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise InputError("изображения по http(s) не загружаются: сохраните файл и передайте путь к нему")
    if scheme != "file":
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"файл находится на другом компьютере ({parts.netloc}): скопируйте его на этот")
    return url2pathname(parts.path)


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"сообщение должно быть словарём с role и content, а не {type(message).__name__}")
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return dict(message)
    if not isinstance(content, Sequence):
        raise InputError(f"content должен быть строкой или списком, а не {type(content).__name__}")
    return {**message, "content": [_read_part(part) for part in content]}


def _read_part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"часть сообщения должна быть словарём, а не {type(part).__name__}")
    for field in ("image_url", "image"):  # the second is how Qwen's own messages name it
        if field in part:
            picture = part[field]
            return _picture_part(read_picture(picture.get("url") if isinstance(picture, Mapping) else picture))
    return dict(part)


def _picture_part(page: PageImage) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": page}}


def _page(part: Mapping[str, Any]) -> PageImage | None:
    page = part["image_url"]["url"] if "image_url" in part else None
    return page if isinstance(page, PageImage) else None


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _pages(message: Mapping[str, Any]) -> list[PageImage]:
    return [page for part in _parts(message) if (page := _page(part)) is not None]


def _text(message: Mapping[str, Any]) -> str:
    return "\n".join(str(part["text"]) for part in _parts(message) if "text" in part)


def _encode(message: dict[str, Any]) -> dict[str, Any]:
    pages = _pages(message)
    if not pages:
        return message
    parts: list[dict[str, Any]] = []
    for part in _parts(message):
        page = _page(part)
        if page is not None:
            url = PICTURE + base64.b64encode(page.png).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif len(pages) > 1 or "text" not in part:
            parts.append(part)
    if len(pages) == 1:
        parts.append({"type": "text", "text": PLACEHOLDER + _text(message).replace(PLACEHOLDER, "")})
    return {**message, "content": parts}
