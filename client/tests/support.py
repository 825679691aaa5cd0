"""What several test files share."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pypdfium2
from PIL import Image
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from dots_ocr_client import Answer, DotsOCR, Mode, PageImage, Task, VLLMEngine
from dots_ocr_client.pages import images
from dots_ocr_client.prompts import MODES, PLACEHOLDER

LINES = ("Invoice 1047 of 3 May 2026", "Total to pay: 1240.50 EUR", "Thank you and good bye")

MakeClient = Callable[..., DotsOCR]


def pdf_of(*sizes: tuple[float, float]) -> bytes:
    """A PDF of blank pages of these sizes in points."""
    document = pypdfium2.PdfDocument.new()
    for size in sizes:
        document.new_page(*size)
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    return buffer.getvalue()


def encrypted_pdf(password: str) -> bytes:
    """A PDF of one red page, 72 points square, that opens with this password (RC4 of 40 bits: ISO 32000-1, 7.6.3)."""
    filling = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    padded = (password.encode("latin-1") + filling)[:32]

    def rc4(key: bytes, data: bytes) -> bytes:
        state, j = list(range(256)), 0
        for i in range(256):
            j = (j + state[i] + key[i % len(key)]) % 256
            state[i], state[j] = state[j], state[i]
        i = j = 0
        result = bytearray()
        for byte in data:
            i = (i + 1) % 256
            j = (j + state[i]) % 256
            state[i], state[j] = state[j], state[i]
            result.append(byte ^ state[(state[i] + state[j]) % 256])
        return bytes(result)

    def digest(data: bytes, size: int) -> bytes:
        return hashlib.md5(data, usedforsecurity=False).digest()[:size]

    owner = rc4(digest(padded, 5), padded)
    key = digest(padded + owner + (-4).to_bytes(4, "little", signed=True), 5)
    red = rc4(digest(key + (4).to_bytes(3, "little") + bytes(2), 10), b"1 0 0 rg 0 0 72 72 re f")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] /Contents 4 0 R >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(red), red),
    ]
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, text) for number, text in enumerate(objects, 1))
    strings = (owner.hex().encode(), rc4(key, filling).hex().encode())
    entries = b"/Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s>" % strings
    return b"%%PDF-1.4\n%strailer << /Root 1 0 R /Size 5 /ID [<><>] /Encrypt << %s >> >>\n%%%%EOF" % (body, entries)


def jpeg_of_scans(more: int, side: int = 64) -> bytes:
    """A white progressive JPEG, whose last scan comes so many times more; each takes some 20 bytes."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 255).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * more + data[-2:]


class FakeServer:
    """Speaks as much of vLLM's API as the client uses, over a real socket, and remembers what it was asked.

    Attributes:
        models: Names and context lengths of the models.
        root: Where the models were loaded from.
        version: Of vLLM; ``None`` for a server that has no ``/version``.
        health: The status of ``/health``.
        text, finish_reason: Of every answer; in the modes with cells, the text is wrapped into one cell.
        script: Answers that come before that, each a text as it is sent and a finish reason.
        answer, models_answer: What is sent instead.
        retry_after: Sent with errors.
        max_pixels: Pages are shrunk to this.
        strict: What does not fit into the context of the model is refused, as vLLM does.
        counts: Whether answers say how many tokens they took.
        seconds: How long each answer takes; each chunk of it, if it is streamed.
        cut: A streamed answer breaks off after so many chunks; the connection does so without a word.
        requests: What it was asked, without the questions about itself.
        in_flight, most_in_flight: Pages at once, now and at most.
        hung_up: The client closed the connection in the middle of a streamed answer.
    """

    def __init__(self, http: HTTPServer) -> None:
        self.http = http
        self.base_url = http.url_for("/v1")
        self.models: dict[str, int | None] = {"dots.ocr": 16_384}
        self.root: str | None = None
        self.version: str | None = "0.25.1"
        self.health = 200
        self.state = ""  # of a server on demand
        self.text: str | None = "read by the server"
        self.finish_reason = "stop"
        self.script: list[tuple[str, str]] = []
        self.answer: Callable[[], Response] | None = None
        self.models_answer: Callable[[], Response] | None = None
        self.retry_after: str | None = None
        self.max_pixels = images.MAX_PIXELS
        self.strict = False
        self.counts = True
        self.seconds = 0.0
        self.cut: int | None = None
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self.hung_up = threading.Event()
        self._lock = threading.Lock()
        http.expect_request("/v1/models").respond_with_handler(self._models)
        http.expect_request("/version").respond_with_handler(self._version)
        http.expect_request("/health").respond_with_handler(self._health)
        http.expect_request("/v1/chat/completions").respond_with_handler(self._complete)

    def _health(self, _: Request) -> Response:
        return Response(json.dumps({"status": self.state}) if self.state else "", status=self.health)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.data) for request in self.requests]

    def asked_for(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(request.path == path for request, _ in self.http.log)

    def fail_with(self, status: int, message: str = "sorry", *, times: int | None = None) -> None:
        """Answer with an error from now on, or so many times."""
        left = [times]

        def fail() -> Response:
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    self.answer = None
            response = reply({"error": {"message": message}}, status)
            if self.retry_after is not None:
                response.headers["Retry-After"] = self.retry_after
            return response

        self.answer = fail

    def _models(self, request: Request) -> Response:
        if self.models_answer is not None:
            return self.models_answer()
        cards = [card(name, length, self.root) for name, length in self.models.items()]
        return reply({"object": "list", "data": cards})

    def _version(self, request: Request) -> Response:
        return Response(status=404) if self.version is None else reply({"version": self.version})

    def _complete(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        if self.answer is not None:
            return self.answer()
        body = json.loads(request.data)
        context, prompt = self.models.get(body["model"]), self._usage(body, "")["prompt_tokens"]
        if self.strict and context is not None and prompt + body.get("max_completion_tokens", 1) > context:
            return reply({"error": {"message": f"This model's maximum context length is {context} tokens."}}, 400)
        text, finish_reason = self.script.pop(0) if self.script else (self._wrap(body), self.finish_reason)
        if body.get("stream"):
            return Response(self._stream(body, text or "", finish_reason), content_type="text/event-stream")
        with self._flight():
            time.sleep(self.seconds)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        usage = {"usage": self._usage(body, text or "")} if self.counts else {}
        return reply(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "dots.ocr", "choices": [choice], **usage}
        )

    @contextlib.contextmanager
    def _flight(self) -> Iterator[None]:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def _stream(self, body: dict[str, Any], text: str, finish_reason: str) -> Iterator[str]:
        def event(**fields: Any) -> str:
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "dots.ocr", **fields}
            return f"data: {json.dumps(chunk)}\n\n"

        def piece(delta: dict[str, str], finish_reason: str | None = None) -> str:
            return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

        with self._flight(), self._watch():
            for number, start in enumerate(range(0, len(text), 4)):
                if number == self.cut:
                    raise ConnectionError("cut on purpose")
                time.sleep(self.seconds)
                yield piece({"content": text[start : start + 4]})
            yield piece({}, finish_reason)
            if self.counts and body["stream_options"]["include_usage"]:
                yield event(choices=[], usage=self._usage(body, text))
            yield "data: [DONE]\n\n"

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except GeneratorExit:
            self.hung_up.set()
            raise

    def _wrap(self, body: dict[str, Any]) -> str | None:
        prompt = prompt_of(body)
        answers = {PLACEHOLDER + spec.prompt: spec.answer for spec in MODES.values()}
        if self.text is None or answers.get(prompt, "text") == "text":
            return self.text
        text = {"text": self.text} if answers[prompt] == "cells" else {}
        return json.dumps([{"bbox": [0, 0, 28, 28], "category": "Text", **text}]) if self.text.strip() else self.text

    def _usage(self, body: dict[str, Any], text: str) -> dict[str, int]:
        """As with the real tokenizer, which takes about one token for 5 characters of English."""
        size = images.smart_resize(*sent_image(body).size, max_pixels=self.max_pixels)
        prompt, answer = size[0] * size[1] // 784 + 8 + len(prompt_of(body)) // 5, len(text) // 4
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def prompt_of(body: dict[str, Any]) -> str:
    """The text of a request's user message."""
    return str(body["messages"][-1]["content"][1]["text"])


def sent_image(body: dict[str, Any]) -> Image.Image:
    """The image of a request."""
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def card(name: str, length: int | None, root: str | None = None) -> dict[str, Any]:
    known = {"max_model_len": length, "root": root}
    known = {field: value for field, value in known.items() if value is not None}
    return {"id": name, "object": "model", "created": 1, "owned_by": "vllm", **known}


def reply(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, content_type="application/json")


def children() -> set[int]:
    """The processes that this one has started and that have not ended."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


Answers = Callable[[httpx2.Request], httpx2.Response]


def ask(answers: Answers, page: PageImage, mode: Mode = "text", *, url: str = "http://host/v1", **more: Any) -> Answer:
    """Have an engine read a page with a server that is a mere function, without a socket."""

    async def run() -> Answer:
        engine = VLLMEngine(url, **more)
        engine._server._connect()
        http = engine._server._http
        assert http is not None
        http._transport = httpx2.MockTransport(answers)
        try:
            return await engine.read(page, Task(mode), 20.0)
        finally:
            await engine.aclose()

    return asyncio.run(run())


def answering(body: httpx2.Response | Answers, *, models: httpx2.Response | None = None) -> Answers:
    """A server that is sound but for what it says of a page, or of its models."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/models"):
            return models or httpx2.Response(200, json={"data": [card("dots.ocr", 16_384)]})
        if request.url.path == "/version":
            return httpx2.Response(200, json={"version": "0.32.0"})
        return body if isinstance(body, httpx2.Response) else body(request)

    return answer
