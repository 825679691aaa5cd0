from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image
from support import FakeServer, MakeClient, reply
from werkzeug import Response

from dots_ocr_client import (
    AllEnginesFailed,
    ConfigurationError,
    DotsOCR,
    ModelNotServed,
    Unauthorized,
    VLLMEngine,
    images,
)
from dots_ocr_client.engines import vllm


def parts(body: dict[str, Any]) -> tuple[str, str]:
    """The image's URL and the text of the only message."""
    (message,) = body["messages"]
    image, text = message["content"]
    assert (message["role"], image["type"], text["type"]) == ("user", "image_url", "text")
    return image["image_url"]["url"], text["text"]


def sent_image(body: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(parts(body)[0].removeprefix("data:image/png;base64,"))))


def refused_by(ocr: DotsOCR, document: Image.Image) -> tuple[str, str]:
    """Error class and reason of the only engine."""
    with pytest.raises(AllEnginesFailed) as caught:
        ocr.read(document)
    (attempt,) = caught.value.attempts
    return attempt.error, attempt.reason


def test_the_answer_comes_with_its_origin(only_vllm: DotsOCR, sheet: Image.Image) -> None:
    document = only_vllm.read(sheet)
    (page,) = document.pages
    assert (document.source, document.text) == ("<image>", "read by the server")
    assert (page.number, page.engine, page.model, page.finish_reason) == (1, "vllm", "dots.ocr", "stop")
    assert (page.attempts, page.warnings) == ((), ())
    assert 0 < page.seconds < 30


def test_the_placeholder_stands_exactly_once_in_front_of_the_trained_prompt(
    only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    only_vllm.read(sheet)
    (body,) = server.bodies
    assert parts(body)[1] == "<|img|><|imgpad|><|endofimg|>Extract the text content from this image."


def test_an_image_that_fits_is_sent_bit_exact(only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image) -> None:
    only_vllm.read(sheet)
    image = sent_image(server.bodies[0])
    assert (image.mode, image.size, image.tobytes()) == ("RGB", sheet.size, sheet.tobytes())


def test_an_image_that_does_not_fit_is_resized_and_the_page_says_so(only_vllm: DotsOCR, server: FakeServer) -> None:
    server.text = ""
    (page,) = only_vllm.read(Image.new("RGB", (30, 40), "white")).pages
    assert sent_image(server.bodies[0]).size == images.smart_resize(30, 40)
    assert page.warnings == ("the image of 30 x 40 px was sent as 56 x 84 px, to keep the model's limits",)


def test_upstreams_sampling_and_the_loop_detector_are_sent(
    only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    only_vllm.read(sheet)
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["top_p"]) == ("dots.ocr", 0.1, 0.9)
    assert body["repetition_detection"] == {"max_pattern_size": 32, "min_pattern_size": 1, "min_count": 64}
    assert "stream" not in body


def test_the_answer_may_take_what_the_image_and_the_prompt_leave(
    only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    only_vllm.read(sheet)
    assert server.bodies[0]["max_completion_tokens"] == 16_384 - 28 * 8 - vllm.PROMPT_TOKENS


def test_a_page_that_leaves_no_room_for_an_answer_is_not_sent(
    only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    server.models = {"dots.ocr": 28 * 8 + vllm.PROMPT_TOKENS + vllm.MIN_OUTPUT_TOKENS - 1}
    error, reason = refused_by(only_vllm, sheet)
    assert (error, server.requests) == ("RequestRejected", [])
    assert "--max-model-len" in reason
    server.models = {"dots.ocr": 28 * 8 + vllm.PROMPT_TOKENS + vllm.MIN_OUTPUT_TOKENS}
    assert VLLMEngine(server.base_url)._output_limit(server.models["dots.ocr"], sheet.size) == vllm.MIN_OUTPUT_TOKENS


def test_a_server_that_hides_its_context_sets_the_limit_itself(
    only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    server.models = {"dots.ocr": None}
    assert only_vllm.read(sheet).text == "read by the server"
    assert "max_completion_tokens" not in server.bodies[0]


def test_the_models_are_asked_for_once_and_again_after_a_failure(
    only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    def asked() -> int:
        return sum(request.path == "/v1/models" for request, _ in server.http.log)

    only_vllm.read(sheet)
    only_vllm.read(sheet)
    assert asked() == 1
    server.fail_with(400)
    refused_by(only_vllm, sheet)
    server.answer, server.models = None, {"dots.ocr": 8_192}
    only_vllm.read(sheet)
    assert asked() == 2
    assert server.bodies[-1]["max_completion_tokens"] == 8_192 - 28 * 8 - vllm.PROMPT_TOKENS


def test_a_wrong_model_fails_fast_and_names_those_that_exist(
    client: MakeClient, server: FakeServer, sheet: Image.Image
) -> None:
    server.models = {"facebook/opt-125m": 2048, "other": 1}
    with pytest.raises(ModelNotServed, match="'facebook/opt-125m', 'other'") as caught:
        client().read(sheet)
    assert (caught.value.model, caught.value.served) == ("dots.ocr", ("facebook/opt-125m", "other"))
    assert server.requests == []


def test_a_model_that_vanishes_after_the_first_page_is_named_too(
    client: MakeClient, server: FakeServer, sheet: Image.Image
) -> None:
    ocr = client()
    ocr.read(sheet)
    server.models = {"newer": 1}
    server.fail_with(404)
    with pytest.raises(ModelNotServed, match="'newer'"):
        ocr.read(sheet)


def test_a_base_url_without_an_api_fails_fast(client: MakeClient, server: FakeServer, sheet: Image.Image) -> None:
    server.models_answer = lambda: reply({"detail": "Not Found"}, 404)
    with pytest.raises(ConfigurationError, match="usually ends in /v1"):
        client().read(sheet)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1"]
)
def test_a_malformed_base_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is no base URL"):
        DotsOCR(url)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_fails_fast(status: int, client: MakeClient, server: FakeServer, sheet: Image.Image) -> None:
    server.models_answer = lambda: reply({"error": "no"}, status)
    with pytest.raises(Unauthorized, match="DOTS_OCR_API_KEY"):
        client().read(sheet)


def test_the_key_and_the_address_come_from_our_own_environment_only(
    server: FakeServer, sheet: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url)
    with DotsOCR() as ocr:
        ocr.read(sheet)
    monkeypatch.setenv("DOTS_OCR_API_KEY", "ours")
    with DotsOCR() as ocr:
        ocr.read(sheet)
    keys = [request.headers["Authorization"] for request in server.requests]
    assert keys == ["Bearer none", "Bearer ours"]


def test_a_proxy_is_not_asked_for_this_machine(
    only_vllm: DotsOCR, sheet: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert only_vllm.read(sheet).text == "read by the server"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, "RequestRejected"),
        (413, "RequestRejected"),
        (422, "RequestRejected"),
        (429, "ServerUnavailable"),
        (500, "ServerUnavailable"),
        (502, "ServerUnavailable"),
        (503, "ServerUnavailable"),
        (302, "ServerUnavailable"),
    ],
)
def test_each_status_has_its_error_and_is_asked_once(
    status: int, error: str, only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    server.fail_with(status, "the reason " + "x" * 10_000)
    found, reason = refused_by(only_vllm, sheet)
    assert found == error
    assert str(status) in reason
    assert len(reason) < 500
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("finish_reason", "text", "message"),
    [
        ("length", "cut", "cut off"),
        ("repetition", "no no no", "repeated itself"),
        ("stop", "The same line again.\n" * 200, "repeated itself"),
        ("stop", "", "not blank"),
        ("stop", " \n", "not blank"),
        ("stop", None, "no text"),
        ("abort", "half", "'abort'"),
    ],
)
def test_an_unusable_answer_is_not_returned(
    finish_reason: str, text: str | None, message: str, only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    server.finish_reason, server.text = finish_reason, text
    error, reason = refused_by(only_vllm, sheet)
    assert error == "UnusableAnswer"
    assert message in reason


@pytest.mark.parametrize(
    "answer",
    [
        Response("<html>a proxy</html>", content_type="text/html"),
        Response("{", content_type="application/json"),
        reply({}),
        reply({"choices": []}),
        reply([1]),
        reply(None),
    ],
)
@pytest.mark.parametrize("where", ["models_answer", "answer"])
def test_what_is_no_api_answer_is_not_believed(
    where: str, answer: Response, only_vllm: DotsOCR, server: FakeServer, sheet: Image.Image
) -> None:
    setattr(server, where, lambda: answer)
    error, reason = refused_by(only_vllm, sheet)
    assert error in ("UnusableAnswer", "ServerUnavailable")
    assert "what else listens there" in reason


def test_a_blank_page_with_an_empty_answer_is_read(only_vllm: DotsOCR, server: FakeServer) -> None:
    server.text = ""
    assert only_vllm.read(Image.new("RGB", (280, 280), "white")).text == ""


def test_long_regular_text_is_not_taken_for_a_loop() -> None:
    assert not vllm.is_loop("".join(f"{number:4}  ............ page {number}\n" for number in range(300)))
    assert not vllm.is_loop("." * 500)
    assert vllm.is_loop("A page, and then " + "<td></td>" * 400)


def test_a_host_that_swallows_packets_is_given_up_early(
    client: MakeClient, sheet: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        for _ in range(3):  # more than the queue takes: from then on the kernel drops what comes
            caller = waiting.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        error, reason = refused_by(client([VLLMEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")]), sheet)
    assert (error, "no connection in time" in reason) == ("ServerUnavailable", True)


@dataclass
class Dripper:
    """Sends `start`, and then one byte every 20 ms until the other side closes."""

    start: bytes
    socket: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    closed: threading.Event = field(default_factory=threading.Event)

    def serve(self) -> None:
        connection, _ = self.socket.accept()
        with connection:
            connection.settimeout(0.02)
            connection.sendall(self.start)
            while True:
                try:
                    if not connection.recv(65536):
                        break
                except TimeoutError:
                    pass
                except OSError:
                    break
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
        self.closed.set()


@pytest.fixture(params=["headers", "body"])
def dripper(request: pytest.FixtureRequest) -> Iterator[Dripper]:
    start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\nX: y"
    made = Dripper(start + (b"\r\n\r\n" if request.param == "body" else b""))
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    thread.join(10)
    made.socket.close()


def test_a_server_that_drips_cannot_outlive_the_deadline(
    dripper: Dripper, client: MakeClient, sheet: Image.Image
) -> None:
    ocr = client([VLLMEngine(f"http://127.0.0.1:{dripper.socket.getsockname()[1]}/v1")], timeout=1.0)
    started = time.monotonic()
    error, _ = refused_by(ocr, sheet)
    assert error == "DeadlineExceeded"
    assert 0.9 < time.monotonic() - started < 4.0
    assert dripper.closed.wait(1.0), "the connection was left open"
