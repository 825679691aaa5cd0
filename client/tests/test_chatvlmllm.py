"""The names, arguments and results that the application chatvlmllm relies on."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import base64
import inspect
import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pytest_httpserver import HTTPServer
from support import FakeServer, prompt_of, reply, sent_image
from werkzeug import Response

from dots_ocr_client import PageImage, TesseractEngine
from dots_ocr_client.chatvlmllm import (
    DotsOCRVLLMIntegration,
    VLLMDotsOCRClient,
    client,
    get_dots_ocr_vllm_integration,
    get_vllm_dots_ocr_client,
    initialize_dots_ocr_vllm,
    integration,
    trained,
)
from dots_ocr_client.engines.base import Answer, Task
from dots_ocr_client.engines.qwen import CPU_SECONDS
from dots_ocr_client.prompts import MODES, PLACEHOLDER
from dots_ocr_client.results import Box, Cell

DEFAULT = "http://localhost:8000"
DEFAULT_PROMPT = "Extract all text from this image"
NO_FALLBACK = "vLLM недоступен и fallback модель не настроена"
CYRILLIC = re.compile("[а-яё]")
SECONDS = re.compile(r"\d+\.\d{3}s")

Messages = list[dict[str, Any]]


class Qwen:
    """Like the application's QwenVLModel: it takes a PIL image, and has no chat_completion."""

    def __init__(self, answer: Any = "прочитано Qwen") -> None:
        self.answer = answer
        self.asked: list[tuple[Image.Image, str]] = []

    def process_image(self, image: Image.Image, prompt: str = DEFAULT_PROMPT) -> Any:
        assert isinstance(image, Image.Image)
        self.asked.append((image, prompt))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Chatter:
    """A fallback with nothing but chat_completion."""

    def __init__(self, completion: Any) -> None:
        self.completion = completion
        self.asked: list[tuple[Any, int]] = []

    def chat_completion(self, messages: Any, max_tokens: int = 2048) -> Any:
        self.asked.append((messages, max_tokens))
        return self.completion


@pytest.fixture(autouse=True)
def fresh_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets the clients of the test before, which a process keeps until its end."""
    monkeypatch.setattr(client, "_clients", {})
    monkeypatch.setattr(integration, "_integrations", {})
    monkeypatch.setattr(integration, "_current", None)
    yield
    client._close_all()


@pytest.fixture
def url(server: FakeServer, httpserver: HTTPServer) -> str:
    """The fake server, as the application writes it."""
    httpserver.expect_request("/metrics").respond_with_data("vllm:num_requests_running 0")
    return server.base_url.removesuffix("/v1")


@pytest.fixture
def dead_url() -> str:
    """Where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def two_pages(sheet: Image.Image, tmp_path: Path) -> Path:
    """A document of two pages."""
    document = tmp_path / "two.tiff"
    sheet.save(document, save_all=True, append_images=[sheet])
    return document


def ask(picture: Any, text: str = DEFAULT_PROMPT) -> Messages:
    """A message as the application writes it: the picture first."""
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}],
        }
    ]


def content_of(completion: dict[str, Any]) -> str:
    return str(completion["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (VLLMDotsOCRClient, {"base_url": DEFAULT, "api_key": None}),
        (VLLMDotsOCRClient.health_check, {}),
        (VLLMDotsOCRClient.get_models, {}),
        (VLLMDotsOCRClient.encode_image_to_base64, {"image_path": ...}),
        (VLLMDotsOCRClient.encode_pil_image_to_base64, {"image": ...}),
        (VLLMDotsOCRClient.process_image, {"image_path": ..., "prompt": DEFAULT_PROMPT, "page": None}),
        (VLLMDotsOCRClient.process_pil_image, {"image": ..., "prompt": DEFAULT_PROMPT}),
        (VLLMDotsOCRClient.chat_completion, {"messages": ..., "max_tokens": 2048}),
        (VLLMDotsOCRClient.get_server_info, {}),
        (get_vllm_dots_ocr_client, {"base_url": DEFAULT, "api_key": None}),
        (DotsOCRVLLMIntegration, {"vllm_url": DEFAULT, "api_key": None}),
        (DotsOCRVLLMIntegration.set_fallback_model, {"fallback_model": ...}),
        (DotsOCRVLLMIntegration.is_vllm_available, {}),
        (DotsOCRVLLMIntegration.process_image_file, {"image_path": ..., "prompt": DEFAULT_PROMPT, "page": None}),
        (DotsOCRVLLMIntegration.process_pil_image, {"image": ..., "prompt": DEFAULT_PROMPT}),
        (DotsOCRVLLMIntegration.chat_completion, {"messages": ..., "max_tokens": 2048}),
        (DotsOCRVLLMIntegration.get_status, {}),
        (get_dots_ocr_vllm_integration, {"vllm_url": DEFAULT, "api_key": None}),
        (initialize_dots_ocr_vllm, {"vllm_url": DEFAULT, "fallback_model": None, "api_key": None}),
    ],
)
def test_signatures_are_those_of_the_application(function: Callable[..., Any], parameters: dict[str, Any]) -> None:
    found = {
        name: ... if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }
    assert found == parameters
    assert list(found) == list(parameters)


class TestClient:
    def test_reads_a_file(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        result = VLLMDotsOCRClient(url).process_image(str(sheet_file))
        assert list(result) == ["success", "content", "model", "processing_time", "usage", "raw_response"]
        assert (result["success"], result["content"]) == (True, "read by the server")
        assert result["model"] == "dots.ocr-vllm"
        assert SECONDS.fullmatch(result["processing_time"])
        usage = result["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
        assert content_of(result["raw_response"]) == "read by the server"
        assert server.bodies[0]["model"] == "dots.ocr"

    def test_reads_a_pil_image(self, url: str, sheet: Image.Image) -> None:
        result = VLLMDotsOCRClient(url).process_pil_image(sheet)
        assert list(result) == ["success", "content", "model", "processing_time", "usage"]
        assert result["content"] == "read by the server"

    def test_the_default_prompt_becomes_the_trained_one(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        VLLMDotsOCRClient(url).process_image(str(sheet_file))
        assert prompt_of(server.bodies[0]) == PLACEHOLDER + MODES["text"].prompt

    def test_a_layout_comes_as_the_application_parses_it(
        self, url: str, server: FakeServer, sheet: Image.Image
    ) -> None:
        large = sheet.resize((7840, 2240))  # 17.6 megapixels: the model sees a smaller one
        server.script = [
            ('[{"bbox": [0, 0, 500, 100], "category": "Title", "text": "Счёт"},', "stop"),
        ]
        content = VLLMDotsOCRClient(url).process_pil_image(large, MODES["layout"].prompt)["content"]
        cells = json.loads(content)
        assert content.startswith('[{"bbox": [0, 0, ')
        assert content.endswith("}]")
        assert (cells[0]["category"], cells[0]["text"]) == ("Title", "Счёт")
        assert cells[0]["bbox"][2] > 600, "a box in pixels of the page, not of what the model saw"

    @pytest.mark.parametrize(
        "form",
        [
            lambda path: str(path),
            lambda path: path,
            lambda path: path.as_uri(),
            lambda path: f"file://localhost{path.as_uri().removeprefix('file://')}",
            lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
            lambda path: path.read_bytes(),
            lambda path: Image.open(path),
        ],
        ids=["path", "Path", "file URL", "file URL with host", "data URL", "bytes", "PIL"],
    )
    def test_pictures_in_messages(
        self, url: str, server: FakeServer, sheet: Image.Image, tmp_path: Path, form: Callable[[Path], Any]
    ) -> None:
        path = tmp_path / "счёт 1.png"
        sheet.save(path)
        completion = VLLMDotsOCRClient(url).chat_completion(ask(form(path)))
        assert content_of(completion) == "read by the server"
        assert sent_image(server.bodies[0]).size == sheet.size

    def test_a_completion_is_that_of_the_openai_api(self, url: str, sheet_file: Path) -> None:
        completion = VLLMDotsOCRClient(url).chat_completion(ask(str(sheet_file)), max_tokens=100)
        assert "error" not in completion
        assert completion["object"] == "chat.completion"
        assert completion["choices"][0]["finish_reason"] == "stop"
        assert completion["choices"][0]["message"]["role"] == "assistant"
        assert completion["usage"]["model"] == "dots.ocr-vllm"
        assert SECONDS.fullmatch(completion["usage"]["processing_time"])
        assert completion["usage"]["total_tokens"] > 0

    def test_another_prompt_goes_through_as_it_is(
        self, url: str, server: FakeServer, sheet_file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        ocr = VLLMDotsOCRClient(url)
        for _ in range(2):
            completion = ocr.chat_completion(ask(str(sheet_file), "Что на картинке?"), max_tokens=77)
            assert content_of(completion) == "read by the server"
        body = server.bodies[0]
        assert prompt_of(body) == PLACEHOLDER + "Что на картинке?"
        assert (body["max_completion_tokens"], body["temperature"]) == (77, 0.0)
        assert caplog.text.count("was not trained") == 1

    def test_a_chat_goes_through_with_all_its_messages(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.answer = lambda: reply(
            {"model": "dots.ocr", "choices": [{"message": {"content": "да"}, "finish_reason": "stop"}]}
        )
        messages: Messages = [
            {"role": "system", "content": "Отвечай кратко."},
            *ask(str(sheet_file), "Это счёт?"),
            {"role": "assistant", "content": "Да."},
            {"role": "user", "content": "Точно?"},
        ]
        assert content_of(VLLMDotsOCRClient(url).chat_completion(messages)) == "да"
        sent = server.bodies[0]["messages"]
        assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
        assert sent[1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert sent[3] == {"role": "user", "content": "Точно?"}

    def test_instructions_to_the_model_do_not_hide_a_trained_prompt(
        self, url: str, server: FakeServer, sheet_file: Path
    ) -> None:
        messages: Messages = [*ask(str(sheet_file)), {"role": "system", "content": "Отвечай кратко."}]
        VLLMDotsOCRClient(url).chat_completion(messages)
        assert prompt_of(server.bodies[0]) == PLACEHOLDER + MODES["text"].prompt

    def test_a_trained_prompt_at_the_end_of_a_chat_is_read_as_such(
        self, url: str, server: FakeServer, sheet_file: Path
    ) -> None:
        messages: Messages = [
            *ask(str(sheet_file), "Это счёт?"),
            {"role": "assistant", "content": "Да."},
            {"role": "user", "content": "Извлеки весь текст"},
        ]
        assert content_of(VLLMDotsOCRClient(url).chat_completion(messages)) == "read by the server"
        assert prompt_of(server.bodies[0]) == PLACEHOLDER + MODES["text"].prompt
        assert len(server.bodies[0]["messages"]) == 1

    def test_several_pictures_go_through_together(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.answer = lambda: reply(
            {"model": "dots.ocr", "choices": [{"message": {"content": "да"}, "finish_reason": "stop"}]}
        )
        messages = ask(str(sheet_file))
        messages[0]["content"].insert(0, {"type": "image", "image": str(sheet_file)})
        assert content_of(VLLMDotsOCRClient(url).chat_completion(messages)) == "да"
        parts = server.bodies[0]["messages"][0]["content"]
        assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
        assert parts[2]["text"] == DEFAULT_PROMPT

    def test_no_prompt_asks_for_all_the_text(self, url: str, server: FakeServer, sheet: Image.Image) -> None:
        assert VLLMDotsOCRClient(url).process_pil_image(sheet, None)["success"] is True  # type: ignore[arg-type]
        assert prompt_of(server.bodies[0]) == PLACEHOLDER + MODES["text"].prompt

    def test_a_boundless_answer_to_another_prompt(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.finish_reason = "length"
        completion = VLLMDotsOCRClient(url).chat_completion(ask(str(sheet_file), "Опиши"), 5)
        assert content_of(completion) == "read by the server\n\n[ответ обрезан: увеличьте max_tokens]"
        assert completion["choices"][0]["finish_reason"] == "length"
        assert "error" not in completion

    def test_more_tokens_than_fit_are_asked_for_again_without_a_limit(
        self, url: str, server: FakeServer, sheet_file: Path
    ) -> None:
        server.fail_with(400, "'max_tokens' is too large: 2048. The maximum context length is 1024 tokens", times=1)
        completion = VLLMDotsOCRClient(url).chat_completion(ask(str(sheet_file), "Опиши"))
        assert content_of(completion) == "read by the server"
        assert ["max_completion_tokens" in body for body in server.bodies] == [True, False]

    def test_an_error_of_the_server(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.fail_with(500, "CUDA error")
        ocr = VLLMDotsOCRClient(url)
        result = ocr.process_image(str(sheet_file))
        assert list(result) == ["success", "error", "processing_time"]
        assert result["success"] is False
        assert result["error"].startswith("HTTP 500: ")
        assert "CUDA error" in result["error"]
        assert CYRILLIC.search(result["error"])
        assert SECONDS.fullmatch(result["processing_time"])
        completion = ocr.chat_completion(ask(str(sheet_file)))
        assert completion["error"].startswith("HTTP 500: ")
        assert content_of(completion).startswith("vLLM Error: ")
        assert completion["choices"][0]["message"]["role"] == "assistant"
        assert completion["choices"][0]["finish_reason"] == "error"
        assert completion["usage"].keys() == {"processing_time", "model", "error"}
        assert completion["usage"]["error"] is True

    def test_no_server(self, dead_url: str, sheet_file: Path) -> None:
        ocr = VLLMDotsOCRClient(dead_url)
        assert ocr.health_check() is False
        result = ocr.process_image(str(sheet_file))
        assert result.keys() == {"success", "error", "processing_time"}
        assert result["processing_time"] == "N/A"
        assert result["error"].startswith("vLLM недоступен")
        completion = ocr.chat_completion(ask(str(sheet_file)))
        assert content_of(completion).startswith("Connection error: vLLM недоступен")
        assert completion["usage"]["processing_time"] == "N/A"
        assert ocr.get_models().keys() == {"error"}
        info = ocr.get_server_info()
        assert info == {
            "healthy": False,
            "models": ocr.get_models(),
            "metrics_available": False,
            "base_url": dead_url,
        }

    def test_a_slow_server(
        self, url: str, server: FakeServer, sheet_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "TIMEOUT", 0.3)
        server.seconds = 1.0
        for prompt in (DEFAULT_PROMPT, "Опиши"):
            result = VLLMDotsOCRClient(url).process_image(str(sheet_file), prompt)
            assert result["error"].startswith("сервер не ответил вовремя")

    @pytest.mark.parametrize("path", ["missing.png", "broken.png", "https://example.org/page.png", "", None])
    def test_a_picture_that_cannot_be_read(
        self, url: str, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing else")
        ocr = VLLMDotsOCRClient(url)
        result = ocr.process_image(path)
        assert result["error"].startswith("не удалось прочитать изображение")
        assert content_of(ocr.chat_completion(ask(path))).startswith("vLLM Error: не удалось прочитать изображение")
        assert server.requests == []

    @pytest.mark.parametrize(
        "messages",
        [
            [],
            "Привет",
            None,
            [1],
            [{"role": "user", "content": 5}],
            [{"content": [7]}],
            [{"role": "user", "content": ""}],
            [{"role": "user", "content": [{"type": "text", "text": " "}]}],
        ],
    )
    def test_messages_that_ask_for_nothing(self, url: str, server: FakeServer, messages: Any) -> None:
        completion = VLLMDotsOCRClient(url).chat_completion(messages)
        assert completion["error"].startswith("неверные сообщения (")
        assert server.requests == []

    def test_base64_is_a_picture(self, url: str, server: FakeServer, sheet: Image.Image, sheet_file: Path) -> None:
        ocr = VLLMDotsOCRClient(url)
        picture = ocr.encode_image_to_base64(str(sheet_file))
        assert ocr.process_image(picture)["content"] == "read by the server"
        assert content_of(ocr.chat_completion(ask(picture))) == "read by the server"
        assert [sent_image(body).size for body in server.bodies] == [sheet.size, sheet.size]

    @pytest.mark.parametrize("document", ["A" * 60_000, "документ " * 5_000, "QUJD" * 30])
    def test_a_document_is_never_in_an_error_or_a_log(
        self, url: str, caplog: pytest.LogCaptureFixture, document: str
    ) -> None:
        result = VLLMDotsOCRClient(url).process_image(document)
        assert result["error"].startswith("не удалось прочитать изображение")
        assert len(result["error"]) < 250
        assert document[:60] not in result["error"] + caplog.text

    @pytest.mark.parametrize("path", ["C:\\Users\\Олег\\скан 1.png", "C:/Users/Олег/скан 1.png"])
    def test_a_path_of_windows(self, url: str, path: str) -> None:
        assert "/mnt/c/Users/Олег/скан 1.png" in VLLMDotsOCRClient(url).process_image(path)["error"]

    @pytest.mark.parametrize("suffix", ["pdf", "tiff"])
    def test_pages_of_a_document(
        self, url: str, server: FakeServer, sheet: Image.Image, tmp_path: Path, suffix: str
    ) -> None:
        document = tmp_path / f"two.{suffix}"
        sheet.save(document, save_all=True, append_images=[sheet])
        server.script = [("первая", "stop"), ("вторая", "stop"), ("только вторая", "stop")]
        ocr = VLLMDotsOCRClient(url)
        result = ocr.process_image(str(document))
        assert result["content"] == "--- Страница 1 из 2 ---\n\nпервая\n\n--- Страница 2 из 2 ---\n\nвторая"
        assert result["usage"]["total_tokens"] > 0
        assert ocr.process_image(str(document), page=2)["content"] == "только вторая"
        assert "no page 3" in ocr.process_image(str(document), page=3)["error"]

    def test_a_page_that_cannot_be_read_takes_no_other_along(
        self, url: str, server: FakeServer, two_pages: Path
    ) -> None:
        server.fail_with(400, "no", times=1)
        content = VLLMDotsOCRClient(url).process_image(str(two_pages))["content"]
        assert content.startswith("--- Страница 1 из 2 ---\n\n❌ сервер отклонил запрос")
        assert content.endswith("--- Страница 2 из 2 ---\n\nread by the server")

    @pytest.mark.parametrize("address", ["", "localhost:8000", "ftp://host", "http://[", 7])
    def test_an_address_that_is_none(self, sheet_file: Path, address: Any) -> None:
        ocr = VLLMDotsOCRClient(address)
        assert ocr.health_check() is False
        assert "адрес" in ocr.process_image(str(sheet_file))["error"]
        assert ocr.get_server_info()["metrics_available"] is False

    @pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
    def test_an_address_with_or_without_v1(self, url: str, sheet_file: Path, suffix: str) -> None:
        ocr = VLLMDotsOCRClient(url + suffix)
        assert ocr.base_url == url
        assert ocr.process_image(str(sheet_file))["success"] is True

    def test_the_environment_gives_the_address_that_the_caller_does_not(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert VLLMDotsOCRClient().base_url == DEFAULT
        monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url)
        assert VLLMDotsOCRClient().base_url == server.base_url.removesuffix("/v1")
        assert VLLMDotsOCRClient("http://localhost:8000").base_url == DEFAULT

    @pytest.mark.parametrize("from_environment", [True, False])
    def test_the_key(
        self, url: str, server: FakeServer, sheet_file: Path, monkeypatch: pytest.MonkeyPatch, from_environment: bool
    ) -> None:
        if from_environment:
            monkeypatch.setenv("DOTS_OCR_API_KEY", "sesame")
        ocr = VLLMDotsOCRClient(url, *([] if from_environment else ["sesame"]))
        ocr.process_image(str(sheet_file))
        ocr.process_image(str(sheet_file), "Опиши")
        assert [request.headers["Authorization"] for request in server.requests] == ["Bearer sesame"] * 2

    def test_a_wrong_key(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.models_answer = lambda: Response(status=401)
        ocr = VLLMDotsOCRClient(url)
        assert ocr.health_check() is False
        assert "DOTS_OCR_API_KEY" in ocr.process_image(str(sheet_file))["error"]

    @pytest.mark.parametrize("key", ["open sesame", "ключ-sesame", "open\nsesame"])
    def test_what_can_be_no_key_is_named_and_not_sent(
        self, url: str, server: FakeServer, sheet_file: Path, key: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        ocr = VLLMDotsOCRClient(url, key)
        assert ocr.health_check() is False
        assert ocr.process_image(str(sheet_file))["error"].startswith("ключ API записан с ошибкой: задайте верный")
        assert ocr.get_models()["error"].startswith("ключ API записан с ошибкой")
        assert "sesame" not in caplog.text
        assert server.asked_for("/v1/models") == 0

    def test_the_login_of_an_address_is_sent_and_not_shown(
        self, url: str, server: FakeServer, sheet_file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        ocr = VLLMDotsOCRClient(url.replace("//", "//me:pass-word@"))
        other = DotsOCRVLLMIntegration(url.replace("//", "//me:pass-word@"))
        said = [ocr.process_image(str(sheet_file)), ocr.get_server_info(), ocr.chat_completion(ask(str(sheet_file)))]
        said += [other.get_status(), other.chat_completion(ask(str(sheet_file)))]
        assert server.requests[0].headers["Authorization"] == "Basic bWU6cGFzcy13b3Jk"
        server.fail_with(400, "Basic bWU6cGFzcy13b3Jk of me:pass-word is of no use")
        said.append(ocr.process_image(str(sheet_file)))
        assert (ocr.base_url, other.vllm_url) == (url, url)
        for secret in ("me:", "pass-word", "bWU6cGFzcy13b3Jk"):
            assert secret not in repr(said) + caplog.text

    def test_a_server_with_another_model_is_not_healthy(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        ocr = VLLMDotsOCRClient(url)
        assert ocr.health_check() is True
        server.models = {"facebook/opt-125m": 2048}
        assert ocr.health_check() is False
        assert (
            VLLMDotsOCRClient(url).process_image(str(sheet_file))["error"].startswith("сервер запущен с другой модель")
        )

    def test_what_the_server_says_about_itself(self, url: str) -> None:
        ocr = VLLMDotsOCRClient(url)
        models = ocr.get_models()
        assert models["object"] == "list"
        assert (models["data"][0]["id"], models["data"][0]["max_model_len"]) == ("dots.ocr", 16_384)
        expected = {"healthy": True, "models": models, "metrics_available": True, "base_url": url}
        assert ocr.get_server_info() == expected

    def test_encodes(self, sheet: Image.Image, sheet_file: Path) -> None:
        ocr = VLLMDotsOCRClient()
        assert base64.b64decode(ocr.encode_image_to_base64(str(sheet_file))) == sheet_file.read_bytes()
        png = Image.open(io.BytesIO(base64.b64decode(ocr.encode_pil_image_to_base64(sheet))))
        assert (png.format, png.size) == ("PNG", sheet.size)

    def test_encoding_is_what_may_raise(self, tmp_path: Path) -> None:
        ocr = VLLMDotsOCRClient()
        with pytest.raises(ValueError, match="Cannot encode image"):
            ocr.encode_image_to_base64(str(tmp_path / "missing.png"))
        with pytest.raises(ValueError, match="Cannot encode PIL image"):
            ocr.encode_pil_image_to_base64("no image")  # type: ignore[arg-type]

    def test_the_session_is_for_those_who_have_requests(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "requests", None)
        with pytest.raises(ImportError):
            _ = VLLMDotsOCRClient(url).session

    def test_one_client_for_each_server_and_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = get_vllm_dots_ocr_client("http://a:8000")
        assert get_vllm_dots_ocr_client("http://a:8000/v1") is first
        assert get_vllm_dots_ocr_client("http://b:8000").base_url == "http://b:8000"
        assert get_vllm_dots_ocr_client("http://a:8000", "sesame") is not first
        monkeypatch.setenv("DOTS_OCR_API_KEY", "sesame")
        assert get_vllm_dots_ocr_client("http://a:8000") is get_vllm_dots_ocr_client("http://a:8000", "sesame")

    def test_threads_share_it(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: get_vllm_dots_ocr_client(url).process_image(str(sheet_file)), range(8)))
        assert [result["success"] for result in results] == [True] * 8
        assert len({id(one) for one in client._clients.values()}) == 1

    def test_closing_ends_its_thread(self, url: str, sheet_file: Path) -> None:
        before = threading.active_count()
        ocr = VLLMDotsOCRClient(url)
        ocr.process_image(str(sheet_file))
        assert threading.active_count() > before
        ocr.close()
        ocr.close()
        assert ocr.process_image(str(sheet_file))["success"] is False


class TestIntegration:
    def test_reads_with_the_server(self, url: str, server: FakeServer, sheet_file: Path, sheet: Image.Image) -> None:
        qwen = Qwen()
        ocr = DotsOCRVLLMIntegration(url)
        ocr.set_fallback_model(qwen)
        assert ocr.is_available is True
        assert isinstance(ocr.vllm_client, VLLMDotsOCRClient)
        for result in (ocr.process_image_file(str(sheet_file)), ocr.process_pil_image(sheet)):
            assert list(result) == ["success", "content", "model", "processing_time", "method"]
            assert SECONDS.fullmatch(result.pop("processing_time"))
            assert list(result.values()) == [True, "read by the server", "dots.ocr-vllm", "vllm"]
        completion = ocr.chat_completion(ask(str(sheet_file)))
        assert content_of(completion) == "read by the server"
        assert completion["usage"]["method"] == "vllm"
        assert completion["usage"]["server"] == ocr.vllm_url == url
        assert completion["usage"]["model"] == "dots.ocr-vllm"
        assert qwen.asked == []

    def test_without_server_and_fallback(self, dead_url: str, sheet_file: Path, sheet: Image.Image) -> None:
        ocr = DotsOCRVLLMIntegration(dead_url)
        expected = {"success": False, "error": NO_FALLBACK, "model": "none", "method": "none"}
        assert ocr.process_image_file(str(sheet_file)) == expected
        assert ocr.process_pil_image(sheet) == expected
        completion = ocr.chat_completion(ask(str(sheet_file)))
        assert completion == {
            "error": NO_FALLBACK,
            "choices": [
                {
                    "message": {"role": "assistant", "content": "OCR сервис временно недоступен"},
                    "finish_reason": "error",
                }
            ],
            "usage": {"method": "none", "error": True},
        }
        assert ocr.get_status() == {
            "vllm_url": dead_url,
            "vllm_available": False,
            "fallback_available": False,
            "recommended_method": "fallback",
        }

    def test_a_model_of_the_application_stands_in(self, dead_url: str, sheet: Image.Image, sheet_file: Path) -> None:
        qwen = Qwen()
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(qwen)
        assert ocr.fallback_model is qwen
        expected = {
            "success": True,
            "content": "прочитано Qwen",
            "model": "fallback",
            "processing_time": "N/A",
            "method": "fallback",
        }
        assert ocr.process_image_file(str(sheet_file), "Опиши") == expected
        assert ocr.process_pil_image(sheet) == expected
        completion = ocr.chat_completion(ask(str(sheet_file), "Кто?"))
        assert content_of(completion) == "прочитано Qwen"
        assert completion["usage"] == {"method": "fallback"}
        assert "error" not in completion
        assert [prompt for _, prompt in qwen.asked] == ["Опиши", DEFAULT_PROMPT, "Кто?"]
        assert {image.size for image, _ in qwen.asked} == {sheet.size}
        assert ocr.get_status()["fallback_available"] is True

    def test_a_model_with_only_chat_stands_in(self, dead_url: str, sheet_file: Path) -> None:
        class Talker:
            def chat(self, image: Image.Image, prompt: str, history: Any = None) -> str:
                return f"{image.size} {prompt}"

        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.fallback_model = Talker()
        assert ocr.process_image_file(str(sheet_file), "Кто?")["content"] == "(784, 224) Кто?"
        assert content_of(ocr.chat_completion(ask(str(sheet_file), "Кто?"))) == "(784, 224) Кто?"

    def test_a_model_with_chat_completion_stands_in(self, dead_url: str, sheet_file: Path) -> None:
        chatter = Chatter({"choices": [{"message": {"role": "assistant", "content": "ответ"}}]})
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(chatter)
        messages = ask(str(sheet_file))
        completion = ocr.chat_completion(messages, 99)
        assert completion == {**chatter.completion, "usage": {"method": "fallback"}}
        assert chatter.asked == [(messages, 99)]
        assert ocr.process_image_file(str(sheet_file))["content"] == "ответ"
        assert chatter.asked[1][0][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")

    @pytest.mark.parametrize("fallback", ["tesseract", TesseractEngine()])
    def test_an_engine_of_this_package_stands_in(self, dead_url: str, sheet_file: Path, fallback: Any) -> None:
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(fallback)
        result = ocr.process_image_file(str(sheet_file))
        assert (result["success"], result["method"]) == (True, "fallback")
        assert "1240" in result["content"]
        assert "1240" in content_of(ocr.chat_completion(ask(str(sheet_file), "Сколько платить?")))

    def test_an_engine_that_answers_questions_gets_them_and_the_time_that_it_needs(
        self, dead_url: str, sheet_file: Path
    ) -> None:
        class Answering(TesseractEngine):
            modes = frozenset({"text", "general"})

            async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
                asked.append((task, seconds))
                return Answer(task.mode, "да", "m")

        asked: list[tuple[Task, float]] = []
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(Answering())
        assert ocr.process_image_file(str(sheet_file), "Это счёт?")["content"] == "да"
        ocr.process_image_file(str(sheet_file))
        assert [task for task, _ in asked] == [Task("general", question="Это счёт?"), Task("text")]
        assert min(seconds for _, seconds in asked) > CPU_SECONDS

    @pytest.mark.parametrize("answer", ["", "  \n", None, {"text": "да"}, RuntimeError("Model not loaded")])
    def test_a_fallback_that_has_no_answer(
        self, dead_url: str, sheet_file: Path, caplog: pytest.LogCaptureFixture, answer: Any
    ) -> None:
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(Qwen(answer))
        result = ocr.process_image_file(str(sheet_file))
        assert result.keys() == {"success", "error", "model", "method"}
        assert (result["success"], result["method"]) == (False, "none")
        assert result["error"].startswith("vLLM недоступен; fallback модель не справилась: ")
        completion = ocr.chat_completion(ask(str(sheet_file)))
        assert content_of(completion) == "OCR сервис временно недоступен"
        assert completion["error"] == result["error"]
        assert completion["usage"] == {"method": "none", "error": True}
        assert "the fallback failed, too" in caplog.text

    @pytest.mark.parametrize(
        "completion", [None, {}, {"error": "нет"}, {"choices": []}, {"choices": [{"message": {"content": ""}}]}]
    )
    def test_a_chat_completion_that_is_none(self, dead_url: str, sheet_file: Path, completion: Any) -> None:
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(Chatter(completion))
        assert "не справилась" in ocr.chat_completion(ask(str(sheet_file)))["error"]

    def test_the_fallback_reads_what_the_server_cannot(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.text = ""
        ocr = DotsOCRVLLMIntegration(url)
        result = ocr.process_image_file(str(sheet_file))
        assert (result["success"], result["method"]) == (False, "none")
        assert result["error"].startswith("ответ модели непригоден")
        ocr.set_fallback_model(Qwen())
        assert ocr.process_image_file(str(sheet_file))["method"] == "fallback"
        assert ocr.chat_completion(ask(str(sheet_file)))["usage"]["method"] == "fallback"
        assert ocr.is_vllm_available() is True

    def test_the_fallback_answers_a_question_that_the_server_leaves_open(
        self, url: str, server: FakeServer, sheet_file: Path
    ) -> None:
        server.text = " "
        ocr = DotsOCRVLLMIntegration(url)
        ocr.set_fallback_model(Qwen())
        assert content_of(ocr.chat_completion(ask(str(sheet_file), "Кто?"))) == "прочитано Qwen"

    def test_a_picture_that_cannot_be_read_is_for_no_model(
        self, url: str, server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        qwen = Qwen()
        ocr = DotsOCRVLLMIntegration(url)
        ocr.set_fallback_model(qwen)
        missing = str(tmp_path / "missing.png")
        result = ocr.process_image_file(missing)
        assert result.keys() == {"success", "error", "model", "method"}
        assert result["error"].startswith("не удалось прочитать изображение")
        completion = ocr.chat_completion(ask(missing))
        assert completion["error"] == content_of(completion) == result["error"]
        assert completion["usage"] == {"method": "none", "error": True}
        assert (qwen.asked, server.requests) == ([], [])
        assert "missing.png" in caplog.text

    @pytest.mark.parametrize("model", [object(), "easyocr", 5])
    def test_what_cannot_stand_in(self, dead_url: str, caplog: pytest.LogCaptureFixture, model: Any) -> None:
        ocr = DotsOCRVLLMIntegration(dead_url)
        ocr.set_fallback_model(model)
        assert ocr.fallback_model is None
        assert ocr.get_status()["fallback_available"] is False
        assert "no fallback" in caplog.text

    def test_health_is_not_asked_for_before_every_page(
        self, url: str, server: FakeServer, sheet_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ocr = DotsOCRVLLMIntegration(url)
        for _ in range(3):
            ocr.process_image_file(str(sheet_file))
        assert server.asked_for("/health") == 2  # whether it is well, and whether it has to start for a page
        monkeypatch.setattr(integration, "HEALTH_SECONDS", 0.0)
        ocr.process_image_file(str(sheet_file))
        assert server.asked_for("/health") == 3

    def test_threads_do_not_all_ask_for_health(self, url: str, server: FakeServer, httpserver: HTTPServer) -> None:
        ocr = DotsOCRVLLMIntegration(url)
        ocr.vllm_client._state = client.State()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: ocr.is_vllm_available(), range(8))) == [True] * 8
        assert server.asked_for("/health") == 2

    def test_a_server_that_goes_away_is_left_alone_for_a_while(
        self, url: str, server: FakeServer, sheet_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ocr = DotsOCRVLLMIntegration(url)
        ocr.set_fallback_model(Qwen())
        server.fail_with(500)
        assert ocr.process_image_file(str(sheet_file))["method"] == "fallback"
        asked = len(server.requests)
        assert ocr.process_image_file(str(sheet_file))["method"] == "fallback"
        assert len(server.requests) == asked
        server.answer = None
        monkeypatch.setattr(integration, "HEALTH_SECONDS", 0.0)
        assert ocr.process_image_file(str(sheet_file))["method"] == "vllm"

    def test_a_busy_server_is_not_a_missing_one(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        ocr = DotsOCRVLLMIntegration(url)
        server.fail_with(429)
        assert ocr.process_image_file(str(sheet_file))["error"].startswith("сервер перегружен")
        assert ocr.is_vllm_available() is True

    def test_a_server_with_another_model_is_not_available(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.models = {"facebook/opt-125m": 2048}
        ocr = DotsOCRVLLMIntegration(url)
        assert ocr.is_available is False
        assert ocr.process_image_file(str(sheet_file))["error"].startswith("сервер запущен с другой моделью")
        assert server.requests == []

    def test_a_wrong_key_is_not_a_missing_server(self, url: str, server: FakeServer, sheet_file: Path) -> None:
        server.models_answer = lambda: reply({"error": {"message": "Unauthorized"}}, 401)
        ocr, other = DotsOCRVLLMIntegration(url, "wrong"), Qwen()
        ocr.set_fallback_model(other)
        for answer in (ocr.process_image_file(str(sheet_file)), ocr.chat_completion(ask(str(sheet_file)))):
            assert answer["error"].startswith("сервер отклонил ключ API: задайте верный в переменной DOTS_OCR_API_KEY")
        assert other.asked == [], "the fallback would hide it"

    def test_a_key_that_the_server_refuses_later_is_not_hidden_by_the_fallback(
        self, url: str, server: FakeServer, sheet_file: Path
    ) -> None:
        ocr, other = DotsOCRVLLMIntegration(url, "sesame"), Qwen()
        ocr.set_fallback_model(other)
        server.fail_with(401, "sesame")
        for _ in range(2):
            answer = ocr.process_image_file(str(sheet_file))
            assert answer["error"].startswith("сервер отклонил ключ API")
            assert "sesame" not in repr(answer)
        assert other.asked == []

    def test_pages_of_a_document_fall_back_one_by_one(self, url: str, server: FakeServer, two_pages: Path) -> None:
        server.fail_with(400, "no", times=1)
        ocr = DotsOCRVLLMIntegration(url)
        ocr.set_fallback_model(Qwen())
        result = ocr.process_image_file(str(two_pages))
        assert result["content"] == (
            "--- Страница 1 из 2 ---\n\nпрочитано Qwen\n\n--- Страница 2 из 2 ---\n\nread by the server"
        )
        assert (result["method"], result["model"]) == ("fallback", "fallback")
        assert ocr.process_image_file(str(two_pages), page=2)["method"] == "vllm"

    def test_the_status_is_that_of_now(self, url: str, server: FakeServer) -> None:
        ocr = DotsOCRVLLMIntegration(url)
        status = ocr.get_status()
        assert status.pop("vllm_info").keys() == {"healthy", "models", "metrics_available", "base_url"}
        assert status == {
            "vllm_url": url,
            "vllm_available": True,
            "fallback_available": False,
            "recommended_method": "vllm",
        }
        server.models_answer = lambda: Response(status=500)
        assert ocr.get_status()["vllm_available"] is False

    def test_one_integration_for_each_server(self, url: str, dead_url: str) -> None:
        first = get_dots_ocr_vllm_integration(url)
        assert get_dots_ocr_vllm_integration(url) is first
        assert get_dots_ocr_vllm_integration() is first, "without a URL: the one in use"
        other = get_dots_ocr_vllm_integration(dead_url)
        assert other.vllm_url == dead_url
        assert get_dots_ocr_vllm_integration() is other

    def test_initialize_tells_whether_anything_can_read(self, url: str, dead_url: str) -> None:
        assert initialize_dots_ocr_vllm(dead_url) is False
        assert initialize_dots_ocr_vllm(dead_url, object()) is False
        assert initialize_dots_ocr_vllm(dead_url, Qwen()) is True
        assert initialize_dots_ocr_vllm(vllm_url=url) is True
        assert get_dots_ocr_vllm_integration(dead_url).fallback_model is not None


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "mode"),
        [
            (MODES["layout"].prompt, "layout"),
            (MODES["layout"].prompt.replace("\n\n", "\n").replace("    - ", "   - ").strip(), "layout"),
            (PLACEHOLDER + MODES["layout_only"].prompt, "layout_only"),
            (MODES["text"].prompt, "text"),
            ("", "text"),
            (DEFAULT_PROMPT, "text"),
            ("extract all text from this image. ", "text"),
            ("Extract all text from this passport document, preserving structure and formatting", "text"),
            ("Извлеки весь текст из этого изображения.", "text"),
            (MODES["web"].prompt, "web"),
        ],
    )
    def test_known_ones(self, prompt: str, mode: str) -> None:
        task = trained.task_of(prompt)
        assert task is not None
        assert (task.mode, task.box) == (mode, None)

    def test_grounding_has_its_box(self) -> None:
        task = trained.task_of(MODES["grounding"].prompt.format(box=[10, 20, 300, 40]))
        assert task is not None
        assert (task.mode, task.box) == ("grounding", Box(10, 20, 300, 40))

    @pytest.mark.parametrize(
        "prompt",
        ["Что на картинке?", "Extract", MODES["grounding"].prompt.format(box=[300, 20, 10, 40]), MODES["svg"].prompt],
    )
    def test_others(self, prompt: str) -> None:
        assert trained.task_of(prompt) is None

    def test_pictures_have_no_text_and_lost_boxes_are_not_made_up(self) -> None:
        cells = (
            Cell("Picture", Box(1, 2, 3, 4)),
            Cell("Text", None, "без рамки"),
            Cell("Table", Box(5, 6, 7, 8), "<table></table>"),
        )
        assert json.loads(trained.content_of(Answer("layout", "", "m", cells))) == [
            {"bbox": [1, 2, 3, 4], "category": "Picture"},
            {"category": "Text", "text": "без рамки"},
            {"bbox": [5, 6, 7, 8], "category": "Table", "text": "<table></table>"},
        ]
        assert json.loads(trained.content_of(Answer("layout_only", "", "m", cells[:1] + cells[2:]))) == [
            {"bbox": [1, 2, 3, 4], "category": "Picture"},
            {"bbox": [5, 6, 7, 8], "category": "Table"},
        ]

    @pytest.mark.parametrize(
        ("words", "mode", "category"),
        [("detect all visual elements", "layout_only", "Picture"), ("format all table content", "layout", "Table")],
    )
    def test_buttons_for_one_category(self, words: str, mode: str, category: str) -> None:
        (prompt,) = (known for known in trained._CATEGORIES if words in known)
        task = trained.task_of(prompt)
        assert task is not None
        assert task.mode == mode
        cells = (Cell("Picture", Box(1, 2, 3, 4)), Cell("Text", None, "т"), Cell("Table", Box(5, 6, 7, 8), "<table>"))
        found = json.loads(trained.content_of(Answer("layout", "", "m", cells), prompt))
        assert [cell["category"] for cell in found] == [category]

    def test_a_layout_read_as_text_is_text(self) -> None:
        assert trained.content_of(Answer("text", "строка", "m")) == "строка"


def run_application(path: Path, url: str) -> Any:
    script = Path(__file__).with_name("chatvlmllm_application.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(path), url], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, "closed in order at the end"
    return json.loads(done.stdout)


def test_a_script_of_the_application(url: str, sheet_file: Path) -> None:
    results = run_application(sheet_file, url)
    assert results["imported"] == []
    assert results["ready"] is True
    assert results["status"]["recommended_method"] == "vllm"
    assert results["client"]["content"] == "read by the server"
    assert [results[name]["method"] for name in ("file", "pil")] == ["vllm", "vllm"]
    assert results["chat"]["usage"]["method"] == "vllm"


def test_what_is_slow_to_import_is_no_fault_of_the_server(url: str) -> None:
    script = f"""
import sys, time
from dots_ocr_client.chatvlmllm import VLLMDotsOCRClient, client

class Slow:
    def find_spec(self, name, *rest):
        if name == "openai":
            time.sleep(client.HEALTH_TIMEOUT)

sys.meta_path.insert(0, Slow())
client.HEALTH_TIMEOUT = 2.0
print(repr(VLLMDotsOCRClient({url!r}).fault()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "None\n", done.stderr


def test_a_script_of_the_application_without_a_server(dead_url: str, sheet_file: Path) -> None:
    results = run_application(sheet_file, dead_url)
    assert results["ready"] is True
    assert results["status"]["recommended_method"] == "fallback"
    assert results["client"]["success"] is False
    assert results["file"]["content"] == results["pil"]["content"] == "Qwen прочитал 784 x 224: Extract all text"
    assert content_of(results["chat"]).startswith("Qwen прочитал")
