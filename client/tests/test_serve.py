from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pypdfium2
import pytest
import starlette.requests
from PIL import Image
from support import LINES, FakeServer, jpeg_of_scans, pdf_of

from dots_ocr_client import (
    Answer,
    Box,
    Cell,
    DotsOCR,
    Engine,
    Limiter,
    Mode,
    PageImage,
    Task,
    TesseractEngine,
    VLLMEngine,
)
from dots_ocr_client.apps import serve, serve_http
from dots_ocr_client.apps.serve_api import Refused
from dots_ocr_client.cli import main
from dots_ocr_client.errors import ConfigurationError, EngineError, RequestRejected, ServerUnavailable, UnusableAnswer
from dots_ocr_client.pages import documents, images, rasterizer
from dots_ocr_client.prompts import MODES, PLACEHOLDER

PROGRAM = Path(sys.executable).with_name("dots-ocr")
TEXT = MODES["text"].prompt
LAYOUT = MODES["layout"].prompt


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOTS_OCR_SERVE_API_KEY", raising=False)


class ScriptedEngine:
    """Does as it is told, and remembers what it was asked.

    Attributes:
        error: What reading and probing raise.
        text, cells: What is read.
        tasks: What it was asked.
        busy: Reading has begun.
        go_on: Reading waits for this.
        cancelled, closed: That happened to it.
    """

    modes: frozenset[Mode] = frozenset(MODES)
    expected_seconds = 7.5

    def __init__(self, name: str = "scripted") -> None:
        self.name = name
        self.limiter = Limiter(1, 1)
        self.error: EngineError | ConfigurationError | None = None
        self.text = "read"
        self.cells: tuple[Cell, ...] = ()
        self.tasks: list[Task] = []
        self.busy, self.go_on = threading.Event(), threading.Event()
        self.cancelled, self.closed = threading.Event(), threading.Event()
        self.go_on.set()

    async def probe(self, seconds: float) -> None:
        if self.error is not None:
            raise self.error

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        self.tasks.append(task)
        self.busy.set()
        try:
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        return Answer(task.mode, self.text, "script", self.cells, warnings=("as told",))

    async def aclose(self) -> None:
        self.closed.set()


Serve = Callable[..., str]


@pytest.fixture
def start() -> Iterator[Serve]:
    """Serves engines on a free port of this machine, and returns the address without ``/v1``."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(*engines: Engine, **options: Any) -> str:
        listener = serve.listen("127.0.0.1", 0, public=False)
        server = serve.make_server(serve.Service(engines, **options), 10)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def url(start: Serve, engine: ScriptedEngine) -> str:
    return start(engine)


def data_url(image: Image.Image | bytes, kind: str = "png") -> str:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        image = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


SHEET = data_url(Image.new("RGB", (1000, 333), "white"))


def picture(url: str = SHEET) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(*parts: dict[str, Any] | str, system: str | None = None, **fields: Any) -> dict[str, Any]:
    """A request; texts become parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return {"model": "dots.ocr", "messages": [*messages, {"role": "user", "content": content}], **fields}


def post(url: str, body: Any, headers: dict[str, Any] | None = None) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    return httpx2.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=30, trust_env=False)


def connect(url: str, *lines: str, body: bytes = b"") -> socket.socket:
    """Open a connection and send the beginning of a request: lines of its head, which ends if there is a body."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    connection.sendall("".join(f"{line}\r\n" for line in lines).encode() + (b"\r\n" + body if body else b""))
    return connection


def page_head(length: int) -> tuple[str, ...]:
    """The head of a request for a page."""
    where = "POST /v1/chat/completions HTTP/1.1"
    return where, "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"


def get(url: str, **options: Any) -> httpx2.Response:
    return httpx2.get(url, timeout=30, trust_env=False, **options)


def metric(url: str, name: str) -> float:
    """A metric with its labels, as it stands in the text."""
    lines = dict(line.rsplit(" ", 1) for line in get(f"{url}/metrics").text.splitlines() if not line.startswith("#"))
    return float(lines.get(name, 0))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# Reading, with the clients that people have


def test_the_openai_sdk_gets_what_tesseract_reads(start: Serve, sheet: Image.Image) -> None:
    url = start(TesseractEngine())
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        answer = sdk.chat.completions.with_raw_response.create(**ask(TEXT, picture(data_url(sheet))))
    completion = answer.parse()
    assert [line for line in str(completion.choices[0].message.content).splitlines() if line] == list(LINES)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "dots.ocr"
    assert answer.headers["X-Dots-OCR-Engine"] == "tesseract"
    about = (completion.model_extra or {})["dots_ocr"]
    assert (about["engine"], about["model"], about["attempts"], about["warnings"]) == ("tesseract", "eng", [], [])
    assert about["seconds"] > 0


def test_this_projects_own_client_reads_text_and_layout(start: Serve, sheet: Image.Image) -> None:
    with DotsOCR(engines=[VLLMEngine(f"{start(TesseractEngine())}/v1")]) as ocr:
        for mode in ("text", "layout"):
            page = ocr.read_page(sheet, mode=mode)
            assert page.mode == mode
            assert [line for line in page.text.splitlines() if line] == list(LINES)
            assert page.warnings == ("the server had tesseract (eng) read the page",)
            assert (page.engine, page.model, page.attempts) == ("tesseract", "eng", ())
    assert page.cells


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_that_read_the_page_is_known_behind_two_services(
    stream: bool, start: Serve, engine: ScriptedEngine
) -> None:
    engine.name, engine.error = "qwen", UnusableAnswer("nonsense")
    inner = start(engine, ScriptedEngine("tesseract"))
    outer = start(VLLMEngine(f"{inner}/v1", stream=stream))
    with DotsOCR(engines=[VLLMEngine(f"{outer}/v1", stream=stream)]) as ocr:
        page = ocr.read_page(Image.new("RGB", (1000, 333), "black"), mode="text")
    assert (page.engine, page.model, page.text) == ("tesseract", "script", "read")
    assert [(attempt.engine, attempt.error) for attempt in page.attempts] == [("qwen", "UnusableAnswer")]
    assert metric(outer, 'dots_ocr_engine_pages_total{engine="tesseract",outcome="read"}') == 1


def test_names_of_engines_that_are_not_known_do_not_fill_the_metrics(start: Serve, engine: ScriptedEngine) -> None:
    engine.name = "made-up"
    outer = start(VLLMEngine(f"{start(engine)}/v1"))
    assert post(outer, ask(picture(), TEXT)).headers["X-Dots-OCR-Engine"] == "made-up"
    assert metric(outer, 'dots_ocr_engine_pages_total{engine="other",outcome="read"}') == 1


@pytest.mark.parametrize("size", [(1000, 333), (20, 90), (4000, 3500)])
def test_boxes_and_tokens_are_those_of_the_image_as_the_model_would_see_it(
    size: tuple[int, int], url: str, engine: ScriptedEngine
) -> None:
    half = Box(0, 0, size[0] // 2, size[1])
    engine.cells = (Cell("Text", half, "words"), Cell("Picture", half), Cell("Title", None, "no box"))
    body = post(url, ask(picture(data_url(Image.new("RGB", size, "white"))), LAYOUT)).json()
    seen = images.smart_resize(*size)
    first, second, third = json.loads(body["choices"][0]["message"]["content"])
    assert first == {"bbox": [0, 0, pytest.approx(seen[0] / 2, abs=1), seen[1]], "category": "Text", "text": "words"}
    assert second == {"bbox": first["bbox"], "category": "Picture"}
    assert third == {"category": "Title", "text": "no box"}
    tokens = body["usage"]["prompt_tokens"] - images.image_tokens(*size)
    assert len(LAYOUT) / 6 < tokens < len(LAYOUT) / 3
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_boxes_come_back_to_our_client_and_reach_the_engine_where_they_were(url: str, engine: ScriptedEngine) -> None:
    box = Box(101, 57, 512, 203)
    engine.cells = (Cell("Table", box, "<table><tr><td>1</td></tr></table>"),)
    sheet = Image.new("RGB", (1000, 333), "white")
    with DotsOCR(engines=[VLLMEngine(f"{url}/v1")]) as ocr:
        (cell,) = ocr.read_page(sheet).cells
        ocr.read_page(sheet, mode="grounding", box=box)
    for found in (cell.box, engine.tasks[1].box):
        assert found == pytest.approx(box, abs=2)
    assert (cell.category, cell.text) == ("Table", "<table><tr><td>1</td></tr></table>")
    assert [task.mode for task in engine.tasks] == ["layout", "grounding"]


def test_a_page_without_cells_is_one_cell_and_says_so(url: str, engine: ScriptedEngine) -> None:
    body = post(url, ask(picture(), LAYOUT)).json()
    width, height = images.smart_resize(1000, 333)
    assert json.loads(body["choices"][0]["message"]["content"]) == [
        {"bbox": [0, 0, width, height], "category": "Text", "text": "read"}
    ]
    assert body["dots_ocr"]["warnings"] == ["as told", "scripted found no layout: the text of the page is one cell"]


def test_a_blank_page_has_an_empty_layout(url: str, engine: ScriptedEngine) -> None:
    engine.text = ""
    with DotsOCR(engines=[VLLMEngine(f"{url}/v1")]) as ocr:
        page = ocr.read_page(Image.new("RGB", (560, 560), "white"))
    assert (page.mode, page.text, page.cells) == ("layout", "", ())
    assert (page.engine, page.model, page.warnings) == ("", "", ("as told",))
    assert metric(url, 'dots_ocr_engine_pages_total{engine="none",outcome="read"}') == 1


# What is asked for


@pytest.mark.parametrize("prefix", ["", PLACEHOLDER, PLACEHOLDER + "\n"])
@pytest.mark.parametrize("mode", ["layout", "layout_only", "text", "web", "scene"])
def test_the_trained_prompts_choose_the_mode(mode: Mode, prefix: str, url: str, engine: ScriptedEngine) -> None:
    body = post(url, ask(picture(), prefix + MODES[mode].prompt)).json()
    assert engine.tasks == [Task(mode)]
    assert not any("prompt" in warning for warning in body["dots_ocr"]["warnings"])


def test_prompts_with_something_filled_in_choose_their_mode(url: str, engine: ScriptedEngine) -> None:
    post(url, ask(MODES["grounding"].prompt.format(box=[0, 0, 504, 336]), picture()))
    post(url, ask(picture(), MODES["svg"].prompt.format(width=1000, height=333)))
    post(url, ask(picture(), "Who pays?", system=MODES["general"].system))
    assert engine.tasks == [
        Task("grounding", Box(0, 0, 500, 333)),
        Task("svg"),
        Task("general", question="Who pays?"),
    ]


def test_other_prompts_are_read_as_text_with_a_warning(url: str, engine: ScriptedEngine) -> None:
    body = post(url, ask(picture(), "Extract all text from this image")).json()
    assert engine.tasks == [Task("text")]
    assert body["choices"][0]["message"]["content"] == "read"
    assert "'Extract all text from this image' is none of those" in body["dots_ocr"]["warnings"][0]


def test_settings_of_a_model_are_passed_over(url: str) -> None:
    extras: dict[str, Any] = {
        "temperature": 0.1,
        "top_p": 0.9,
        "max_completion_tokens": 9,
        "repetition_detection": {"min_count": 64},
    }
    assert post(url, ask(picture(), TEXT, n=1, seed=1, **extras)).status_code == 200


@pytest.mark.parametrize("include_usage", [True, False])
def test_an_answer_can_come_as_events(include_usage: bool, url: str) -> None:
    request = ask(picture(), TEXT, stream=True, stream_options={"include_usage": include_usage})
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk,
        sdk.chat.completions.create(**request) as stream,
    ):
        assert stream.response.headers["X-Dots-OCR-Engine"] == "scripted"
        chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "read"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, "stop"]
    assert [chunk.usage is not None for chunk in chunks] == [False, False] + [True] * include_usage
    assert (chunks[1].model_extra or {})["dots_ocr"]["engine"] == "scripted"
    assert post(url, request).text.endswith("data: [DONE]\n\n")


# What is refused


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([picture("https://example.com/page.png")], "fetches nothing"),
        ([picture("file:///etc/passwd")], "fetches nothing"),
        ([picture("data:application/pdf;base64,JVBERi0x")], "fetches nothing"),
        ([picture(data_url(pdf_of((100, 100))))], "send its pages as images"),
        ([picture("data:image/png;base64,aaaaa")], "no base64"),
        ([picture(data_url(b"no image"))], "neither a PDF nor an image"),
        ([picture(), picture()], "2 images"),
        ([{"type": "text", "text": TEXT}], "0 images"),
        (TEXT, "0 images"),
        ([picture(), {"type": "input_audio", "input_audio": {}}], "image_url, and nothing else"),
        ([picture(), {"type": "text", "text": MODES["grounding"].prompt.format(box=[9000, 0, 9100, 9])}], "outside"),
        (7, "0 images"),
    ],
)
def test_requests_that_cannot_be_read_are_refused_with_what_to_do(
    content: Any, reason: str, url: str, engine: ScriptedEngine
) -> None:
    answer = post(url, {"model": "model", "messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert reason in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "messages", 400)
    assert engine.tasks == []


def test_several_pages_in_one_image_are_refused(url: str) -> None:
    buffer = io.BytesIO()
    sheet = Image.new("RGB", (100, 100), "white")
    sheet.save(buffer, "TIFF", save_all=True, append_images=[sheet])
    assert "2 pages" in post(url, ask(picture(data_url(buffer.getvalue(), "tiff")), TEXT)).json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"[" * 100_000, b"{}", b'{"messages": [1]}'])
def test_rubbish_is_refused(body: bytes, url: str) -> None:
    answer = post(url, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == 400


def test_only_the_models_that_are_named_are_served(start: Serve, engine: ScriptedEngine) -> None:
    url = start(engine, names=["scan", "page"])
    cards = get(f"{url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["scan", "page"]
    assert {(card["owned_by"], card["root"], card["max_model_len"]) for card in cards} == {
        ("dots-ocr-client", "scripted", 131_072)
    }
    answer = post(url, ask(picture(), TEXT))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk, pytest.raises(openai.NotFoundError, match="scan"):
        sdk.chat.completions.create(**ask(picture(), TEXT))


def test_the_default_names_are_those_of_this_projects_servers(url: str) -> None:
    names = [card["id"] for card in get(f"{url}/v1/models").json()["data"]]
    assert names == ["dots.ocr", "rednote-hilab/dots.ocr", "dotsocr-model", "model"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", get(f"{url}/version").json()["version"])


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic secret", "secret", "Bearer sécret"])
def test_without_the_key_only_health_and_metrics_answer(
    header: str | None, start: Serve, engine: ScriptedEngine
) -> None:
    url = start(engine, api_key="secret")
    headers = {} if header is None else {"Authorization": header.encode()}
    assert post(url, ask(picture(), TEXT), headers=headers).status_code == 401
    assert get(f"{url}/v1/models", headers=headers).status_code == 401
    assert {get(f"{url}/{path}").status_code for path in ("", "health", "metrics", "version")} == {200}
    assert engine.tasks == []
    assert post(url, ask(picture(), TEXT), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_request_that_is_too_long_is_refused(url: str) -> None:
    answer = post(url, b" " * (2 * serve.MAX_BODY_BYTES))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)


def test_a_request_that_does_not_arrive_gives_its_place_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    with connect(url, *page_head(1000), body=b"{") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    assert metric(url, "dots_ocr_pages_waiting") == 0


@pytest.mark.attack("JSON of very many parts", "refused before it is parsed")
def test_a_request_of_very_many_parts_is_refused_before_it_fills_the_memory(url: str) -> None:
    answer = post(url, b"[" + b"[]," * 200_000 + b"1]")
    assert (answer.status_code, "400001 parts" in answer.text) == (400, True)


def test_requests_that_arrive_share_a_part_of_the_memory(
    start: Serve, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 100_000)
    monkeypatch.setattr(serve, "memory", lambda: 0)
    url = start(engine)
    page = json.dumps(ask(picture(data_url(jpeg_of_scans(0), "jpeg")), TEXT)).encode()
    with connect(url, *page_head(99_000), body=b" " * 98_000):
        until(lambda: post(url, b" " * 5000).status_code == 503)
        assert post(url, b" " * 5000).status_code == 503  # what was refused took nothing, and gave nothing back
        assert post(url, page).status_code == 200
    until(lambda: post(url, b" " * 5000).status_code == 400)
    engine.busy.clear()
    engine.go_on.clear()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, url, page.ljust(98_000))
        assert engine.busy.wait(20)
        beside = post(url, b" " * 5000).status_code
        engine.go_on.set()
        assert (answer.result().status_code, beside) == (200, 503)  # it is held until the answer


@pytest.mark.parametrize(("gib", "bytes_of_requests"), [(0.1, serve.MAX_BODY_BYTES), (16, 2 * 2**30)])
def test_requests_may_take_an_eighth_of_the_memory_or_at_least_one_fits(
    gib: float, bytes_of_requests: int, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "memory", lambda: int(gib * 2**30))
    assert serve.Service([engine])._most_body_bytes == bytes_of_requests


@pytest.mark.attack("other content types, as forms of a web page send them", "415")
def test_only_json_is_taken(url: str, engine: ScriptedEngine) -> None:
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"):
        answer = post(url, ask(picture(), TEXT), headers={"Content-Type": kind})
        assert (answer.status_code, "Fix: send Content-Type" in answer.text) == (415, True)
    body = json.dumps(ask(picture(), TEXT)).encode()
    assert httpx2.post(f"{url}/v1/chat/completions", content=body, trust_env=False).status_code == 415
    assert engine.tasks == []
    assert post(url, body, headers={"Content-Type": "Application/JSON; charset=utf-8"}).is_success


# Pages of the web, and strangers' connections


FOREIGN: list[dict[str, Any]] = [
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost.evil.example"},
    {"Host": ""},
    {"Host": "[evil.example"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.attack("pages of the web, by Host or Origin, at a service without a key", "403")
def test_without_a_key_no_page_of_the_web_reaches_it(
    headers: dict[str, str], url: str, start: Serve, engine: ScriptedEngine
) -> None:
    for answer in (post(url, ask(picture(), TEXT), headers=headers), get(f"{url}/v1/models", headers=headers)):
        assert (answer.status_code, "Fix: " in answer.text) == (403, True)
    assert engine.tasks == []
    assert get(f"{url}/health", headers=headers).status_code == 200
    with_key = start(engine, api_key="secret")
    assert get(f"{with_key}/v1/models", headers={"Authorization": "Bearer secret", **headers}).status_code == 200


def test_it_goes_by_addresses_and_by_names_that_nobody_can_take(
    start: Serve, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Host.example")
    url = start(engine, hosts=["OCR.example"])
    addresses = ("[::1]:8000", "[fe80::1%eth0]", "192.0.2.7")
    for host in (*addresses, "localhost", "LOCALHOST:80", "ocr.localhost", "dots-ocr", "ocr.example.", "host.example"):
        for scheme in ("http", "https"):
            headers = {"Host": host, "Origin": f"{scheme}://{host}"}
            assert get(f"{url}/v1/models", headers=headers).status_code == 200, headers


@pytest.mark.parametrize(
    "headers",
    [
        [("host", "127.0.0.1%.evil.example")],
        [("host", "localhost"), ("origin", "http://localhost"), ("origin", "https://evil.example")],
    ],
)
def test_a_page_of_the_web_does_not_pass_behind_what_is_allowed(headers: list[tuple[str, str]]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    with pytest.raises(Refused):
        serve_http.check_sender(starlette.requests.Request({"type": "http", "headers": raw}), ())


def closed(connection: socket.socket) -> bool:
    """Read what is on its way; returns whether the other side closes (otherwise the socket's time is up)."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.attack("heads that do not arrive", "the connection is closed")
def test_a_head_that_does_not_arrive_closes_its_connection(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "HEAD_SECONDS", 0.2)
    whole = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(url) as silent, connect(url, "GET / HTTP/1.1", "X: y") as slow, connect(url) as second:
        second.sendall(whole)
        assert second.recv(1000).startswith(b"HTTP/1.1 200")
        second.sendall(b"GET /ver")
        assert [closed(one) for one in (silent, slow, second)] == [True] * 3


def test_a_page_that_is_read_for_long_keeps_its_connection(
    url: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_http, "HEAD_SECONDS", 0.2)
    engine.go_on.clear()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, url, ask(picture(), TEXT))
        assert engine.busy.wait(20)
        time.sleep(0.5)
        engine.go_on.set()
        assert answer.result().status_code == 200


@pytest.mark.attack("more connections than the limit", "those that wait longest make room")
def test_connections_that_wait_make_room_for_others(
    url: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_http, "MAX_CONNECTIONS", 5)
    engine.go_on.clear()
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, url, ask(picture(), TEXT))
        assert engine.busy.wait(20)
        waiting = [opened.enter_context(connect(url, *page_head(1000), body=b"{")) for _ in range(4)]
        assert get(f"{url}/version").status_code == 200  # those before may not have begun to send
        flood = [opened.enter_context(connect(url, "GET / HTTP/1.1")) for _ in range(20)]
        assert [closed(one) for one in (*waiting, *flood[:15])] == [True] * 19
        assert get(f"{url}/version").status_code == 200
        engine.go_on.set()
        assert answer.result().status_code == 200


@pytest.mark.attack("a client that does not take its answer", "the connection is closed")
def test_a_client_that_does_not_take_its_answer_is_closed(
    url: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_http, "STALL_SECONDS", 0.2)
    engine.text = "x" * 20_000_000
    body = json.dumps(ask(picture(), TEXT)).encode()
    with connect(url, *page_head(len(body)), body=body) as connection:
        assert engine.busy.wait(20)
        time.sleep(1)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                received += len(part)
    assert received < len(engine.text)


# Hostile pictures

SLOW = data_url(jpeg_of_scans(300, 3000), "jpeg")
"""It takes seconds."""


@pytest.mark.attack("a JPEG of thousands of scans", "400 before it is decoded")
def test_a_picture_of_thousands_of_scans_is_refused(
    url: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = jpeg_of_scans(3000, 3000)
    answer = post(url, ask(picture(data_url(bomb, "jpeg")), TEXT))
    assert (answer.status_code, "a JPEG of 3006 scans" in answer.json()["error"]["message"]) == (400, True)
    assert engine.tasks == []


def test_no_picture_is_decoded_in_the_process_of_the_service(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((documents, "look_into"), (documents, "draw"), (Image, "open"), (pypdfium2, "PdfDocument")):
        monkeypatch.setattr(owner, name, None)
    assert post(url, ask(picture(), TEXT)).status_code == 200


def test_health_tells_that_no_worker_is_free_and_hanging_up_frees_it(
    start: Serve, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rasterizer, "MAX_WORKERS", 1)
    monkeypatch.setattr(serve, "FULL_SECONDS", 0.3)
    url = start(engine)
    body = json.dumps(ask(picture(SLOW), TEXT)).encode()
    assert get(f"{url}/health").json()["workers"] == {"all": 1, "free": 1}
    with connect(url, *page_head(len(body)), body=body):
        until(lambda: get(f"{url}/health").status_code == 503)
        told = get(f"{url}/health").json()
        assert (told["status"], told["workers"]) == ("busy", {"all": 1, "free": 0})
        begin = time.monotonic()
        assert get(f"{url}/v1/models").status_code == 200
    until(lambda: get(f"{url}/health").json()["workers"]["free"] == 1)
    assert engine.tasks == []
    assert post(url, ask(picture(), TEXT)).status_code == 200
    assert time.monotonic() - begin < 10


def test_an_image_that_needs_too_long_fails_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasterizer, "IMAGE_SECONDS", 0.3)
    answer = post(url, ask(picture(SLOW), TEXT))
    assert (answer.status_code, "longer than 0.3 s" in answer.text) == (400, True)
    assert post(url, ask(picture(), TEXT)).status_code == 200


def test_unknown_addresses_answer_in_json(url: str) -> None:
    answer = get(f"{url}/v1/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)
    assert get(f"{url}/v1/chat/completions").status_code == 405


def test_the_page_for_people_says_whether_the_service_reads(start: Serve, engine: ScriptedEngine) -> None:
    page = get(start(engine))
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert '<strong id="state">ready · готов</strong>' in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    engine.error = ServerUnavailable("gone")
    assert '<strong id="state">not ready · не готов</strong>' in get(start(engine)).text
    assert engine.tasks == []


# Load, and engines that fail


def test_the_next_engine_answers_and_says_why(start: Serve, engine: ScriptedEngine) -> None:
    engine.error = ServerUnavailable("still starting")
    answer = post(url := start(engine, ScriptedEngine("second")), ask(picture(), TEXT))
    assert answer.headers["X-Dots-OCR-Engine"] == "second"
    (attempt,) = answer.json()["dots_ocr"]["attempts"]
    assert (attempt["engine"], attempt["outcome"], attempt["reason"]) == ("scripted", "failed", "still starting")
    assert metric(url, 'dots_ocr_engine_pages_total{engine="scripted",outcome="failed"}') == 1
    assert metric(url, 'dots_ocr_engine_pages_total{engine="second",outcome="read"}') == 1
    assert metric(url, 'dots_ocr_engine_seconds_count{engine="second"}') == 1
    assert metric(url, 'dots_ocr_requests_total{status="200"}') == metric(url, "dots_ocr_request_seconds_count") == 1


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (ServerUnavailable("it is down"), 503, "8"),
        (RequestRejected("not this page"), 422, None),
        (ConfigurationError("a wrong key"), 500, None),
    ],
)
def test_a_page_that_nobody_can_read_is_an_error_with_the_cause(
    error: EngineError, status: int, retry_after: str | None, url: str, engine: ScriptedEngine
) -> None:
    engine.error = error
    answer = post(url, ask(picture(), TEXT))
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert str(error) in answer.json()["error"]["message"]
    assert metric(url, f'dots_ocr_requests_total{{status="{status}"}}') == 1
    if status != 500:
        (attempt,) = answer.json()["dots_ocr"]["attempts"]
        assert (attempt["engine"], attempt["error"]) == ("scripted", type(error).__name__)


def test_health_is_that_of_the_best_engine(
    start: Serve, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "PROBE_AGE", 0.0)
    second = ScriptedEngine("second")
    url = start(engine, second)
    engine.error = ServerUnavailable("it is down")
    answer = get(f"{url}/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert answer.json()["engines"] == {"scripted": "ServerUnavailable: it is down", "second": "ok"}
    second.error = ConfigurationError("a wrong key")
    answer = get(f"{url}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert answer.json()["engines"]["second"] == "ConfigurationError: a wrong key"


def test_tesseract_that_is_not_installed_is_ill(start: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    url = start(TesseractEngine())
    answer = get(f"{url}/health")
    assert answer.status_code == 503
    assert "apt-get install tesseract-ocr" in answer.json()["engines"]["tesseract"]
    answer = post(url, ask(picture(), TEXT))
    assert answer.status_code == 503
    assert "apt-get install tesseract-ocr" in answer.json()["error"]["message"]


def test_a_full_queue_is_said_at_once(start: Serve, engine: ScriptedEngine) -> None:
    url = start(engine, max_queue=2)
    engine.go_on.clear()
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(post, url, ask(picture(), TEXT))]
        until(lambda: metric(url, "dots_ocr_pages_in_flight") == 1)
        answers += [threads.submit(post, url, ask(picture(), TEXT)) for _ in range(2)]
        until(lambda: metric(url, "dots_ocr_pages_waiting") == 2)
        refused = post(url, ask(picture(), TEXT))
        engine.go_on.set()
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "8")
    assert len(engine.tasks) == 3
    assert metric(url, "dots_ocr_pages_waiting") == metric(url, "dots_ocr_pages_in_flight") == 0


def test_a_client_that_hangs_up_ends_the_work(url: str, engine: ScriptedEngine) -> None:
    engine.go_on.clear()
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(
            f"{url}/v1/chat/completions",
            json=ask(picture(), TEXT),
            timeout=httpx2.Timeout(30, read=0.3),
            trust_env=False,
        )
    assert engine.busy.is_set()
    assert engine.cancelled.wait(20)
    until(lambda: metric(url, 'dots_ocr_requests_total{status="499"}') == 1)
    engine.go_on.set()
    assert post(url, ask(picture(), TEXT)).status_code == 200


def test_the_engines_are_closed_in_the_end(engine: ScriptedEngine) -> None:
    server = serve.make_server(serve.Service([engine]), 10)
    server.should_exit = True
    with serve.listen("127.0.0.1", 0, public=False) as listener:
        server.run([listener])
    assert engine.closed.is_set()


# The command


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port, and yield its process and address."""
    command = [str(PROGRAM), "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            assert found is not None
            until(lambda: _answers(found[0]))
            yield process, found[0]
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return get(f"{url}/version").status_code == 200
    except httpx2.TransportError:  # nobody listens, or somebody who ends just now
        return False


def test_the_log_has_the_requests_and_not_what_watchdogs_ask() -> None:
    with serving("--engine", "tesseract") as (process, url):
        for path in ("/health", "/v1/models", "/metrics"):
            assert get(url + path).status_code == 200
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=20)
    assert "GET /v1/models HTTP" in log
    assert "/health" not in log
    assert "/metrics" not in log


@pytest.mark.attack("control characters and forged headers", "no line of the log is a client's")
def test_the_log_has_no_line_that_a_client_wrote() -> None:
    with serving("--engine", "tesseract") as (process, url):
        forged = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https"}
        assert get(f"{url}/v1/models?{'x' * 5000}", headers=forged).status_code == 200
        get(f"{url}/%0aINFO:%1b[31m%e2%80%ae")
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=20)
    assert "6.6.6.6" not in log
    assert "x" * 100 in log
    assert max(map(len, log.splitlines())) < 400
    assert all(line.isprintable() for line in log.splitlines())


def test_errors_are_logged_with_control_characters_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    config = serve_http.log_config()["formatters"]["default"]
    formatter = config["()"](config["fmt"], use_colors=config["use_colors"])
    try:
        raise ValueError("one\x1b[2J\nINFO: forged")
    except ValueError:
        said = {"msg": "two\r\nINFO: %s", "args": ("\x9b",), "levelno": logging.ERROR, "levelname": "ERROR"}
        record = logging.makeLogRecord({**said, "exc_info": sys.exc_info()})
    lines = formatter.format(record).split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("INFO: forged") for line in lines)
    assert lines[0].endswith("two\\r\\nINFO: \\x9b")
    assert "\\x1b" not in lines[0]  # a colour of its own


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.attack(
    "SIGTERM or Ctrl-C beside a slow picture or an engine without end", "ends after `--shutdown-timeout`"
)
def test_it_ends_in_seconds_whatever_runs(ending: signal.Signals, fake_tesseract: Callable[[str], Path]) -> None:
    fake_tesseract("exec sleep 600")
    with (
        serving("--engine", "tesseract", "--shutdown-timeout", "0.5") as (process, url),
        ThreadPoolExecutor(2) as threads,
    ):
        first = threads.submit(post, url, ask(picture(), TEXT))
        threads.submit(post, url, ask(picture(SLOW), TEXT))
        until(lambda: metric(url, "dots_ocr_pages_in_flight") == 1)
        process.send_signal(ending)
        output, _ = process.communicate(timeout=20)
        assert (first.result().status_code, "the service ends" in first.result().text) == (503, True)
    assert "Traceback" not in output


def test_sigterm_finishes_the_page_in_flight(fake_tesseract: Callable[[str], Path]) -> None:
    waiting = 'for _ in $(seq 600); do [ ! -e "$0.end" ] || break; sleep 0.05; done'
    program = fake_tesseract(f"cat >/dev/null; {waiting}; echo slow but sure")
    with serving("--engine", "tesseract") as (process, url), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post, url, ask(picture(), TEXT))
        until(lambda: metric(url, "dots_ocr_pages_in_flight") == 1)
        process.send_signal(signal.SIGTERM)
        until(lambda: not _answers(url))
        program.with_suffix(".end").touch()
        assert answer.result().json()["choices"][0]["message"]["content"] == "slow but sure"
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0
    assert "slow" not in output
    assert "Traceback" not in output


def test_the_command_serves_a_chain_with_a_key_from_a_file(
    server: FakeServer, sheet: Image.Image, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    chain = ("--engine", "vllm", "--engine", "tesseract", "--base-url", server.base_url)
    headers = {"Authorization": "Bearer secret"}
    with serving(*chain, "--api-key-file", str(key), "--served-model-name", "scan") as (_, url):
        body = {**ask(picture(data_url(sheet)), TEXT), "model": "scan"}
        assert post(url, body).status_code == 401
        first = post(url, body, headers=headers)
        server.fail_with(400)
        second = post(url, body, headers=headers)
    assert [answer.headers["X-Dots-OCR-Engine"] for answer in (first, second)] == ["vllm", "tesseract"]
    assert first.json()["choices"][0]["message"]["content"] == "read by the server"
    assert second.json()["dots_ocr"]["attempts"][0]["engine"] == "vllm"


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--host", "0.0.0.0"], 1, "give --api-key-file"),
        (["--engine", "vllm"], 2, "needs --base-url"),
        (["--engine", "textlayer"], 2, "clients send images"),
        (["--api-key-file", os.devnull], 1, "holds no key"),
        (["--api-key-file", "/nowhere/key"], 1, "/nowhere/key"),
        (["--api-key-file", os.devnull, "--no-api-key"], 2, "exclude each other"),
    ],
)
def test_the_command_refuses_what_would_not_be_safe_or_work(
    arguments: list[str], status: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *arguments]) == status
    assert reason in capsys.readouterr().err


def test_the_command_refuses_to_ask_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    base_url = f"http://localhost:{port}/v1"
    assert main(["serve", "--port", port, "--engine", "vllm", "--base-url", base_url]) == 2
    assert "is this service itself" in capsys.readouterr().err


def test_the_command_names_a_port_that_is_taken(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", url.rpartition(":")[2]]) == 1
    assert "Address already in use" in capsys.readouterr().err


def test_the_command_says_how_to_install_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "dots_ocr_client.apps.serve")
    monkeypatch.delattr(importlib.import_module("dots_ocr_client.apps"), "serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "pip install 'dots-ocr-client[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("listening_at", ["127.0.0.1", "0.0.0.0"])
def test_a_service_is_not_asked_by_itself(host: str, listening_at: str) -> None:
    with serve.listen(listening_at, 0, public=True) as listener:
        port = listener.getsockname()[1]
        assert serve.is_own(f"http://{host}:{port}/v1", listener)
        assert not serve.is_own(f"http://{host}:{port - 1}/v1", listener)


def test_the_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve.read_key(None) is None
    monkeypatch.setenv("DOTS_OCR_SERVE_API_KEY", "secret")
    assert serve.read_key(None) == "secret"
    monkeypatch.setenv("DOTS_OCR_SERVE_API_KEY", '\ufeff"secret"\r')
    assert serve.read_key(None) == "secret"
    for nothing in ("", '""', "\ufeff\r\n"):
        monkeypatch.setenv("DOTS_OCR_SERVE_API_KEY", nothing)
        with pytest.raises(ConfigurationError, match="DOTS_OCR_SERVE_API_KEY"):
            serve.read_key(None)
