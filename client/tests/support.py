"""What several test files share."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pypdfium2
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from dots_ocr_client import DotsOCR

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


class FakeServer:
    """Speaks as much of vLLM's API as the client uses, over a real socket, and remembers what it was asked."""

    def __init__(self, http: HTTPServer) -> None:
        self.http = http
        self.base_url = http.url_for("/v1")
        self.models: dict[str, int | None] = {"dots.ocr": 16_384}
        self.text: str | None = "read by the server"
        self.finish_reason = "stop"
        self.answer: Callable[[], Response] | None = None
        self.models_answer: Callable[[], Response] | None = None
        self.requests: list[Request] = []
        http.expect_request("/v1/models").respond_with_handler(self._models)
        http.expect_request("/v1/chat/completions").respond_with_handler(self._complete)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.data) for request in self.requests]

    def fail_with(self, status: int, message: str = "sorry") -> None:
        self.answer = lambda: reply({"error": {"message": message}}, status)

    def _models(self, request: Request) -> Response:
        if self.models_answer is not None:
            return self.models_answer()
        return reply({"object": "list", "data": [card(name, length) for name, length in self.models.items()]})

    def _complete(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        if self.answer is not None:
            return self.answer()
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return reply({"id": "1", "object": "chat.completion", "created": 1, "model": "dots.ocr", "choices": [choice]})


def card(name: str, length: int | None) -> dict[str, Any]:
    known = {} if length is None else {"max_model_len": length}
    return {"id": name, "object": "model", "created": 1, "owned_by": "vllm", **known}


def reply(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, content_type="application/json")
