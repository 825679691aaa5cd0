"""The messages of an OpenAI chat, as chatvlmllm writes them: with pictures as paths, URLs, bytes or PIL images."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from ..engines.server import PICTURE
from ..errors import InputError
from ..pages.documents import OpenDocument, PageImage, Source
from ..pages.rasterizer import draw, open_document
from ..prompts import PLACEHOLDER

LONGEST_PATH: Final = 4096  # in bytes; Linux's PATH_MAX (linux/limits.h)

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


class MessageError(InputError):
    """The messages ask for nothing, or are none; no picture is to blame."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was asked."""

    messages: tuple[dict[str, Any], ...]  # as they came, with a `PageImage` in the place of each picture
    page: PageImage | None  # the last picture; ``None`` if there is none
    prompt: str  # the text of the last message, instructions to the model (``system``) aside
    one_page: bool  # there is just one picture, as in all that dots.ocr was trained for

    @classmethod
    def about(cls, picture: Source | PageImage, prompt: str | None) -> Conversation:
        """Ask one thing about one picture; without a prompt, for all its text."""
        page, prompt = picture if isinstance(picture, PageImage) else read_picture(picture), prompt or ""
        return cls(({"role": "user", "content": [page, {"type": "text", "text": prompt}]},), page, prompt, True)

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """Read messages."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise MessageError("нет ни одного сообщения: передайте список сообщений в формате OpenAI")
        read = tuple(map(_read_message, messages))
        pages = [page for message in read for page in _pages(message)]
        if not pages and not any(_text(message).strip() for message in read):
            raise MessageError("в сообщениях нет ни текста, ни изображения: передайте хотя бы одно из них")
        spoken = [message for message in read if message.get("role") != "system"]
        return cls(read, pages[-1] if pages else None, _text(spoken[-1]) if spoken else "", len(pages) == 1)

    def encoded(self) -> list[dict[str, Any]]:
        """Return the messages as vLLM takes them: pictures as data URLs, and the mark where a picture goes.

        Where a message has several pictures, vLLM puts the marks in by itself.
        """
        return list(map(_encode, self.messages))


def read_picture(picture: Any) -> PageImage:
    """Draw a document of one page: a path, a ``file:`` or ``data:`` URL, base64, bytes, an open file or a PIL image."""
    with open_pages(picture, None) as opened:
        if len(opened.numbers) != 1:
            raise InputError(
                f"в документе {len(opened.numbers)} стр.: прочитайте их через process_image_file или по одной"
            )
        return draw(opened.reference(1))


def open_pages(document: Any, page: int | None) -> OpenDocument:
    """Open a document as `read_picture` takes it, of several pages or of one of them, for a ``with`` statement."""
    return open_document(_source(document), None if page is None else (page,))


def _source(picture: Any) -> Source:
    if isinstance(picture, str):
        return _local(picture)
    if isinstance(picture, bytes | os.PathLike | Image.Image) or hasattr(picture, "read"):
        return picture  # type: ignore[no-any-return]
    raise InputError(f"это не изображение, а {type(picture).__name__}: передайте путь, байты или PIL.Image")


def _local(url: str) -> str | bytes:
    if not url:
        raise InputError("путь к изображению пуст")
    if url[:5].lower() == "data:":
        return url
    if _BASE64.fullmatch(url) and not os.path.exists(url):  # noqa: PTH110  # Path's fails for long names
        try:
            return base64.b64decode(url + "=" * (-len("".join(url.split())) % 4))
        except binascii.Error:
            pass
    if len(os.fsencode(url)) > LONGEST_PATH:  # never the document itself in an error or a log
        raise InputError(f"строка из {len(url)} знаков — не путь и не base64: передайте путь, data: URL или байты")
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
        raise MessageError(f"сообщение должно быть словарём с role и content, а не {type(message).__name__}")
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return dict(message)
    if not isinstance(content, Sequence):
        raise MessageError(f"content должен быть строкой или списком, а не {type(content).__name__}")
    return {**message, "content": [_read_part(part) for part in content]}


def _read_part(part: Any) -> dict[str, Any] | PageImage:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise MessageError(f"часть сообщения должна быть словарём, а не {type(part).__name__}")
    for field in ("image_url", "image"):  # the second is how Qwen's own messages name it
        if field in part:
            picture = part[field]
            return read_picture(picture.get("url") if isinstance(picture, Mapping) else picture)
    return dict(part)


def _pages(message: Mapping[str, Any]) -> list[PageImage]:
    return [part for part in message.get("content") or () if isinstance(part, PageImage)]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)


def _encode(message: dict[str, Any]) -> dict[str, Any]:
    pages = _pages(message)
    if not pages:
        return message
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        if isinstance(part, PageImage):
            url = PICTURE + base64.b64encode(part.png).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif len(pages) > 1 or "text" not in part:
            parts.append(part)
    if len(pages) == 1:
        parts.append({"type": "text", "text": PLACEHOLDER + _text(message).replace(PLACEHOLDER, "")})
    return {**message, "content": parts}
