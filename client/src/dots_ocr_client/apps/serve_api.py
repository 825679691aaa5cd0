"""Requests for pages and their answers, as vLLM's API has them; see `serve`."""

from __future__ import annotations

import base64
import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..engines.base import Task
from ..engines.server import ENGINE_HEADER
from ..errors import InputError
from ..pages import images
from ..pages.documents import PageImage
from ..prompts import MODES, PLACEHOLDER, Mode
from ..results import Box, Cell, Page, layout

# Commas and brackets of a request (our own choice: there are some 20, and those of the prompt).
MAX_PARTS: Final = 100_000

_IMAGE_URL: Final = re.compile(r"data:image/[\w.+-]+(?:;[\w.=-]+)*;base64,", re.IGNORECASE)
_NUMBER: Final = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_GROUNDING: Final = re.compile(
    re.escape(MODES["grounding"].prompt.partition("{box}")[0].strip()) + rf"\s*\[{','.join([_NUMBER] * 4)}\]"
)
_SVG: Final = re.compile(re.sub(r"\\\{(?:width|height)\\\}", r"\\d+", re.escape(MODES["svg"].prompt)))
_FIXED: Final[dict[str, Mode]] = {spec.prompt.strip(): mode for mode, spec in MODES.items() if "{" not in spec.prompt}


class Refused(HTTPException):
    """A request is answered with an error."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None, **more: Any) -> None:
        """Take what the answer is to say."""
        super().__init__(status, message)
        self.kind, self.param, self.more = kind, param, more


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks for."""

    model: str  # as the client calls it
    picture: bytes  # an encoded image
    prompt: str  # the last message of the user, without the image's placeholder
    system: str  # the system prompt; empty if there is none
    stream: bool  # the answer is to come as events
    include_usage: bool  # the events are to tell the numbers of tokens


def _bad(message: str) -> Refused:
    return Refused(400, "BadRequestError", message, "messages")


def understand(body: bytes | bytearray, names: Sequence[str]) -> Question:
    """Take what matters out of a request in JSON, and pass over how a model should sample.

    Raises:
        Refused: 404 for a model of none of the names, 400 for anything else that is not right.
    """
    if (parts := sum(map(body.count, (b"[", b"{", b",")))) > MAX_PARTS:  # each would take much more memory than a byte
        message = f"the request has {parts} parts, and may have {MAX_PARTS}: send one image and its prompt"
        raise Refused(400, "BadRequestError", message)
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "BadRequestError", f"the request is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise Refused(400, "BadRequestError", "the request is not a JSON object")
    model = values.get("model", names[0])
    if model not in names:
        known = ", ".join(names)
        message = f"The model {str(model)[:100]!r} does not exist; there are: {known}."
        raise Refused(404, "NotFoundError", message, "model")
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _bad("messages is not a list of messages")
    urls: list[str] = []
    texts = {str(message.get("role")): "\n".join(_texts(message.get("content"), urls)) for message in messages}
    if len(urls) != 1:
        raise _bad(f"there are {len(urls)} images: send exactly one, as a part of the type image_url")
    options = values.get("stream_options")
    return Question(
        model=model,
        picture=_picture(urls[0]),
        prompt=texts.get("user", "").replace(PLACEHOLDER, "").strip(),
        system=texts.get("system", "").strip(),
        stream=values.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _texts(content: Any, urls: list[str]) -> Iterator[str]:
    """Yield the texts of a message, and collect its images."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list) else ():
        match part:
            case {"type": "text", "text": str(text)}:
                yield text
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                urls.append(url)
            case _:
                raise _bad("messages may have parts of the types text and image_url, and nothing else")


def _picture(url: str) -> bytes:
    head = _IMAGE_URL.match(url)
    if head is None:
        fix = "this service fetches nothing; send it as data:image/png;base64,…"
        raise _bad(f"the image {url[:60]!r} is not in the request: {fix}")
    try:
        picture = base64.b64decode(url[head.end() :])
    except ValueError as error:
        raise _bad(f"the image is no base64: {error}") from error
    if b"%PDF-" in picture[:1024]:
        raise _bad("this is a PDF: send its pages as images")
    return picture


def task_of(question: Question, image: PageImage) -> tuple[Task, tuple[str, ...]]:
    """Find the mode whose trained prompt this is; with any other prompt the page is read as text.

    Raises:
        InputError: The box lies outside the image.
    """
    prompt = question.prompt
    if (mode := _FIXED.get(prompt)) is not None:
        return Task(mode), ()
    if found := _GROUNDING.fullmatch(prompt):
        return Task("grounding", _box([float(number) for number in found.groups()], image)), ()
    if _SVG.fullmatch(prompt):
        return Task("svg"), ()
    if prompt and question.system == MODES["general"].system:
        return Task("general", question=prompt), ()
    return Task("text"), (f"the prompt {prompt[:60]!r} is none of those of dots.ocr: the page was read as plain text",)


def _box(numbers: Sequence[float], image: PageImage) -> Box:
    own = (image.width, image.height)
    box = layout.to_page(numbers, images.smart_resize(*own), own)
    if not (box.left < box.right and box.top < box.bottom):
        raise InputError(f"the bounding box {list(numbers)} is empty or lies outside the image")
    return box


def answer(question: Question, task: Task, image: PageImage, page: Page, doubts: tuple[str, ...]) -> Response:
    """Write the answer as dots.ocr on vLLM would, beside it which engine it is from, and the doubts of `task_of`."""
    form = MODES[task.mode].answer
    warnings = (*doubts, *page.warnings)
    if form != "text" and page.text and not page.cells:
        warnings += (f"{page.engine} found no layout: the text of the page is one cell",)
    text = page.text if form == "text" else _cells(page, texts=form == "cells")
    usage = _usage(question, image, page, text)
    about = {
        "engine": page.engine,
        "model": page.model,
        "attempts": [asdict(attempt) for attempt in page.attempts],
        "warnings": list(warnings),
        "seconds": page.seconds,
    }
    common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
    headers = {ENGINE_HEADER: page.engine}
    if question.stream:
        events = _events({**common, "object": "chat.completion.chunk"}, text, about, usage, question.include_usage)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream")
    choices = _choices("stop", message={"role": "assistant", "content": text})
    completion = {**common, "object": "chat.completion", "choices": choices, "usage": usage, "dots_ocr": about}
    return JSONResponse(completion, headers=headers)


def _choices(finish_reason: str | None, **said: dict[str, str]) -> list[dict[str, Any]]:
    return [{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}]


async def _events(
    common: dict[str, Any], text: str, about: dict[str, Any], usage: dict[str, int], include_usage: bool
) -> AsyncIterator[str]:
    def event(**fields: Any) -> str:
        return f"data: {json.dumps({**common, **fields}, ensure_ascii=False)}\n\n"

    yield event(choices=_choices(None, delta={"role": "assistant", "content": text}))
    yield event(choices=_choices("stop", delta={}), dots_ocr=about)
    if include_usage:
        yield event(choices=[], usage=usage)
    yield "data: [DONE]\n\n"


def _cells(page: Page, *, texts: bool) -> str:
    """Write a layout as dots.ocr does: boxes in pixels of the image as the model would see it."""
    own = (page.width, page.height)
    seen = images.smart_resize(*own)
    cells = page.cells or ((Cell("Text", Box(0, 0, *own), page.text),) if page.text else ())
    moved = (replace(cell, box=cell.box and layout.to_seen(cell.box, seen, own)) for cell in cells)
    return layout.as_answer(moved, texts=texts)


def _usage(question: Question, image: PageImage, page: Page, text: str) -> dict[str, int]:
    """Count tokens as the model would, of text about one for four characters: clients tell from it what it saw."""
    prompt = images.image_tokens(image.width, image.height) + math.ceil(len(question.prompt) / 4)
    answer = page.completion_tokens or math.ceil(len(text) / 4)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
