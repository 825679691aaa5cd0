"""What the page, the API and the scripts of chatvlmllm call; a browser has it in tests/live_client/test_page.py."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from pytest_httpserver import HTTPServer
from support import FakeServer, prompt_of, reply

from dots_ocr_client import ConfigurationError
from dots_ocr_client.chatvlmllm import (
    ServerModel,
    SingleContainerManager,
    VLLMStreamlitAdapter,
    client,
    names,
    page,
    scripts,
    settings,
)
from dots_ocr_client.prompts import MODES, PLACEHOLDER

TESSERACT = 'cat >/dev/null; case "$*" in *--list-langs*) printf "eng\\nrus\\n" ;; *) echo прочитано;; esac'
TEXT_PROMPT = PLACEHOLDER + MODES["text"].prompt

Systemctl = Callable[[str], None]


@pytest.fixture(autouse=True)
def fresh_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets the clients and their states of the test before."""
    monkeypatch.setattr(client, "_clients", {})
    monkeypatch.setattr(settings, "_folder", None)
    yield
    client._close_all()


@pytest.fixture
def folder(tmp_path: Path, server: FakeServer, httpserver: HTTPServer) -> Path:
    """The application's folder with the settings of the server, which are used."""
    metrics = 'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_waiting{engine="0"} 5.0\n'
    httpserver.expect_request("/metrics").respond_with_data(metrics)
    (tmp_path / ".dots-ocr.env").write_text(f"# ours\nDOTS_OCR_BASE_URL={server.base_url}\nDOTS_OCR_API_KEY='k&e'\n")
    settings.use(tmp_path)
    return tmp_path


@pytest.fixture
def adapter(folder: Path) -> VLLMStreamlitAdapter:
    return VLLMStreamlitAdapter()


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    """Has systemd say of the service what is asked for; no other program is there, Tesseract least of all."""

    def say(state: str) -> None:
        program = tmp_path / "bin/systemctl"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {state}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    return say


def point_to_nobody(folder: Path, host: str = "127.0.0.1") -> None:
    (folder / ".dots-ocr.env").write_text(f"DOTS_OCR_BASE_URL=http://{host}:9/v1\n")


class TestSettings:
    def test_come_from_the_file(self, folder: Path, server: FakeServer) -> None:
        assert settings.value("DOTS_OCR_BASE_URL") == server.base_url
        assert settings.value("DOTS_OCR_API_KEY") == "k&e"
        assert settings.value("DOTS_OCR_OTHER") is None

    def test_the_environment_goes_before_the_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOTS_OCR_API_KEY", "other")
        assert settings.value("DOTS_OCR_API_KEY") == "other"

    def test_a_new_key_needs_no_restart(self, adapter: VLLMStreamlitAdapter, folder: Path, server: FakeServer) -> None:
        keys = []
        for key in ("first", "second"):
            (folder / ".dots-ocr.env").write_text(f"DOTS_OCR_BASE_URL={server.base_url}\nDOTS_OCR_API_KEY={key}\n")
            adapter.process_image(Image.new("RGB", (300, 300)))
            keys.append(server.requests[-1].headers["Authorization"])
        assert keys == ["Bearer first", "Bearer second"]

    @pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff# ours\r\n"])
    @pytest.mark.parametrize("key", ["sesame", '"sesame"', "'sesame' ", "\tsesame"])
    def test_a_file_from_windows_is_read(self, folder: Path, start: str, key: str) -> None:
        (folder / ".dots-ocr.env").write_bytes(f"{start}DOTS_OCR_API_KEY={key}\r\nDOTS_OCR_OTHER=1\r\n".encode())
        assert (settings.value("DOTS_OCR_API_KEY"), settings.value("DOTS_OCR_OTHER")) == ("sesame", "1")

    @pytest.mark.parametrize("content", ["K=sesame".encode("utf-16"), b"K='sesame", b"K=sesame\xff"])
    def test_a_file_that_cannot_be_understood_is_named_and_not_quoted(self, folder: Path, content: bytes) -> None:
        (folder / ".dots-ocr.env").write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"\.dots-ocr\.env is not text in UTF-8.* Fix: ") as caught:
            settings.value("DOTS_OCR_API_KEY")
        assert "sesame" not in "".join(traceback.format_exception(caught.value))

    def test_no_file_is_no_fault(self, tmp_path: Path) -> None:
        settings.use(tmp_path)
        assert settings.value("DOTS_OCR_BASE_URL") is None
        assert client.root_of(client.DEFAULT_URL) == "http://localhost:8000"


class TestManager:
    def test_status_of_a_server(self, folder: Path) -> None:
        manager = SingleContainerManager()
        status = manager.get_system_status()
        assert (status["active_model"], status["active_model_name"]) == ("dots.ocr", "dots.ocr")
        assert manager.models_config["dots.ocr"]["description"].endswith(
            "контекст 16384 токенов; в работе 2, в очереди 5"
        )
        assert manager.get_container_status("dots-ocr.service")["running"] is True
        assert manager.get_container_status("dots-ocr-fixed")["exists"] is False
        assert manager.check_api_health(8000) == (True, "API healthy")
        assert manager.start_single_container("dots.ocr")[0] is True
        assert manager.start_single_container("qwen3-vl-2b")[0] is False
        assert manager.stop_all_containers()[0] == []

    def test_status_is_asked_for_once_in_a_while(self, folder: Path, server: FakeServer) -> None:
        manager, adapter = SingleContainerManager(), VLLMStreamlitAdapter()
        for _ in range(5):
            manager.get_system_status()
            manager.get_active_model()
            adapter.get_model_max_tokens("")
        assert server.asked_for("/health") == 1
        assert adapter.check_all_connections() is True
        assert server.asked_for("/health") == 2

    @pytest.mark.parametrize(
        ("state", "host", "said"),
        [
            ("inactive", "127.0.0.1", "сервер не отвечает. Запустите его: sudo dots-ocr-server start"),
            ("active", "127.0.0.1", "сервер запускается: модель загружается несколько минут, повторите позже"),
            ("active", "127.0.0.1.invalid", "сервер http://127.0.0.1.invalid:9 не отвечает: проверьте адрес и сеть"),
        ],
    )
    def test_a_server_that_is_not_there(
        self, folder: Path, systemctl: Systemctl, state: str, host: str, said: str
    ) -> None:
        systemctl(state)
        point_to_nobody(folder, host)
        manager = SingleContainerManager()
        assert manager.get_system_status()["active_model"] is None
        assert manager.check_api_health(9)[1].startswith(said)
        assert manager.start_single_container("dots.ocr")[1].startswith(said)
        assert said in manager.models_config["dots.ocr"]["description"]

    def test_a_wrong_key_is_named(self, folder: Path, server: FakeServer) -> None:
        server.models_answer = lambda: reply({"error": {"message": "Unauthorized"}}, 401)
        healthy, message = SingleContainerManager().check_api_health(8000)
        assert not healthy
        assert "DOTS_OCR_API_KEY или в файле .dots-ocr.env" in message

    def test_the_last_configuration_is_the_application_s(self, folder: Path) -> None:
        (folder / "config.yaml").write_text("document_templates: {passport: {fields: [surname]}}\nport: 1\n")
        for config in SingleContainerManager().models_config.values():  # noqa: B007  # as the page does
            pass
        assert config["document_templates"] == {"passport": {"fields": ["surname"]}}
        assert config["model_path"] == "rednote-hilab/dots.ocr"
        assert config["port"] != 1

    @pytest.mark.parametrize("content", [None, "[", ""])
    def test_a_configuration_that_cannot_be_read(self, folder: Path, content: str | None) -> None:
        if content is not None:
            (folder / "config.yaml").write_text(content)
        assert SingleContainerManager().models_config["dots.ocr"]["display_name"] == "dots.ocr"


class TestAdapter:
    @pytest.mark.parametrize("prompt", ["Extract all text from this image", "Сколько здесь таблиц?", ""])
    def test_the_text_for_every_other_prompt(
        self, adapter: VLLMStreamlitAdapter, server: FakeServer, sheet: Image.Image, prompt: str
    ) -> None:
        result = adapter.process_image(sheet, prompt, "rednote-hilab/dots.ocr", 1024)
        assert (result["success"], result["text"], result["error"]) == (True, "read by the server", "")
        assert (result["mode"], result["max_tokens_limit"], result["actual_max_tokens"]) == ("vLLM", 16_384, 1024)
        assert result["tokens_used"] > 0
        (body,) = server.bodies
        assert prompt_of(body) == TEXT_PROMPT
        assert body.get("max_completion_tokens", 16_384) > 1024, "a page is read to its end"

    def test_a_layout(self, adapter: VLLMStreamlitAdapter, sheet: Image.Image) -> None:
        assert adapter.process_image(sheet, MODES["layout"].prompt)["text"].startswith('[{"bbox": ')

    def test_all_frames_of_a_tiff(
        self, adapter: VLLMStreamlitAdapter, server: FakeServer, sheet: Image.Image, tmp_path: Path
    ) -> None:
        sheet.save(tmp_path / "two.tiff", save_all=True, append_images=[sheet])
        with Image.open(tmp_path / "two.tiff") as document:
            assert "--- Страница 2 из 2 ---" in adapter.process_image(document)["text"]
            assert adapter.process_image(document, MODES["layout"].prompt)["text"].startswith("[{")
        assert len(server.requests) == 3

    @pytest.mark.parametrize(
        ("status", "message", "said"),
        [
            (422, "no", "сервер отклонил запрос"),
            (429, "too many", "сервер перегружен: повторите попытку позже"),
        ],
    )
    def test_the_fallback_is_named_with_the_reason(
        self,
        adapter: VLLMStreamlitAdapter,
        server: FakeServer,
        sheet: Image.Image,
        fake_tesseract: Callable[[str], Path],
        status: int,
        message: str,
        said: str,
    ) -> None:
        fake_tesseract(TESSERACT)
        server.fail_with(status, message)
        result = adapter.process_image(sheet)
        assert result["success"] is True
        assert result["text"].startswith(f"⚠️ {said}")
        assert result["text"].endswith("Страницу прочитал Tesseract: проверьте текст.\n\nпрочитано")

    @pytest.mark.parametrize("where", ["models_answer", "answer"])
    def test_a_wrong_key_is_named_and_no_page_is_read_without_the_server(
        self,
        adapter: VLLMStreamlitAdapter,
        server: FakeServer,
        sheet: Image.Image,
        fake_tesseract: Callable[[str], Path],
        where: str,
    ) -> None:
        fake_tesseract(TESSERACT)
        setattr(server, where, lambda: reply({"error": {"message": "k&e"}}, 401))
        result = adapter.process_image(sheet)
        assert result["text"].startswith("❌ сервер отклонил ключ API: задайте верный в переменной DOTS_OCR_API_KEY")
        for word in ("прочитано", "Tesseract", "tesseract-ocr", "k&e"):
            assert word not in repr(result)

    def test_without_any_engine_the_reason_is_the_text(
        self, adapter: VLLMStreamlitAdapter, folder: Path, systemctl: Systemctl, sheet: Image.Image
    ) -> None:
        systemctl("inactive")
        point_to_nobody(folder)
        result = adapter.process_image(sheet)
        assert result["text"].startswith("❌ сервер не отвечает. Запустите его: sudo dots-ocr-server start")
        assert result["text"].endswith("sudo apt-get install tesseract-ocr tesseract-ocr-rus")
        assert result["error"] == result["text"]

    def test_a_picture_that_cannot_be_read(self, adapter: VLLMStreamlitAdapter, server: FakeServer) -> None:
        text = adapter.process_image(Image.new("RGB", (1, 900)))["text"]
        assert text.startswith("❌ не удалось прочитать изображение")
        assert "tesseract" not in text
        assert server.requests == []

    def test_the_page_always_gets_to_ask(
        self, adapter: VLLMStreamlitAdapter, folder: Path, systemctl: Systemctl
    ) -> None:
        systemctl("inactive")
        point_to_nobody(folder)
        assert adapter.container_manager.get_active_model() == "dots.ocr"
        assert adapter.container_manager.check_api_health(9)[0] is True
        assert adapter.get_available_models() == adapter.get_recommended_models() == []
        assert adapter.get_server_status()["status"] == "error"
        assert adapter.ensure_model_available("rednote-hilab/dots.ocr") is False


class TestModel:
    def test_has_what_the_api_calls(self, folder: Path, server: FakeServer, sheet: Image.Image) -> None:
        model = ServerModel(config={"model_path": "rednote-hilab/dots.ocr"})
        model.load_model()
        assert model.process_image(sheet) == "read by the server"
        assert model.parse_document(sheet, return_json=False)["raw_text"] == "read by the server"
        assert model.chat(image=sheet, prompt="Что это?", temperature=0.7, max_new_tokens=100) == "read by the server"
        assert [prompt_of(body) for body in server.bodies] == [TEXT_PROMPT] * 3
        model.unload()

    def test_raises_what_went_wrong(self, folder: Path, systemctl: Systemctl, sheet: Image.Image) -> None:
        systemctl("inactive")
        point_to_nobody(folder)
        with pytest.raises(RuntimeError, match=r"сервер не отвечает\. Запустите его"):
            ServerModel(config={}).process_image(sheet)


class TestNames:
    def test_everything_there(self) -> None:
        assert names.missing("class VLLMStreamlitAdapter:\n  def process_image(self): self.model_limits = {}\n") == []

    def test_what_is_missing(self) -> None:
        source = """
            def create_vllm_interface(): ...
            def brand_new(): ...
            def test_vllm_client(): ...
            class SingleContainerManager:
                def __init__(self):
                    self.current_active_model = self.shiny = None
                def _private(self): ...
                def restart_everything(self): ...
        """
        assert names.missing(textwrap.dedent(source)) == [
            "brand_new",
            "SingleContainerManager.restart_everything",
            "SingleContainerManager.shiny",
        ]

    def test_program(self, tmp_path: Path) -> None:
        module = tmp_path / "module.py"
        module.write_text("class VLLMStreamlitAdapter:\n    def brand_new(self): ...\n")
        command = [sys.executable, "-I", "-m", "dots_ocr_client_installed.chatvlmllm.names", str(module)]
        assert subprocess.check_output(command, text=True) == f"{module}: VLLMStreamlitAdapter.brand_new\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [("quick_vllm_test", "doctor --ocr"), ("setup_vllm_dots_ocr", "doctor --ocr"), ("measure_vllm", "bench")],
)
def test_scripts_are_programs_over_the_command(
    folder: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    asked: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        asked.append(arguments)
        return 1

    monkeypatch.setattr(scripts, "main", main)
    monkeypatch.setenv("DOTS_OCR_BASE_URL", "")
    assert getattr(scripts, script)() == 1
    assert " ".join(asked[0]).startswith(words)
    assert os.environ["DOTS_OCR_BASE_URL"] == server.base_url


def test_the_second_name_is_the_same_package() -> None:
    module = importlib.import_module("dots_ocr_client_installed.chatvlmllm.page")
    assert module.__file__ == page.__file__
    assert module.PageImage.__module__ == "dots_ocr_client_installed.pages.documents"


def test_every_module_can_be_imported_by_the_second_name() -> None:
    script = (
        "import importlib, pkgutil, dots_ocr_client_installed as package\n"
        "for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):\n"
        "    if module.name.rpartition('.')[2] not in ('ocrmypdf', 'qwen'):\n"
        "        importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_windows_is_refused_with_what_to_do() -> None:
    command = "import sys; sys.platform = 'win32'; import dots_ocr_client"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: dots-ocr-client runs on Linux: install it inside WSL" in done.stderr


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_an_installation_on_windows_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    hook = runpy.run_path(str(Path(__file__).parents[1] / "hatch_build.py"))["CustomBuildHook"]
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "win32":
        with pytest.raises(RuntimeError, match="runs on Linux: install it inside WSL"):
            hook.initialize(None, "standard", {})
    else:
        hook.initialize(None, "standard", {})
