"""What chatvlmllm's page calls in its mode "vLLM": the names of its adapter and of its manager of containers.

The server is a service of systemd, so nothing here starts or stops a container. The page forgets error boxes when it
runs again and shows one general sentence for a failure, so what a person has to know is put where it stays: in OCR mode
into the text, in a chat into a message of its own.
"""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import subprocess
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from PIL import Image

from ..engines.server import is_loopback
from ..errors import InputError
from ..pages.documents import PageImage
from ..prompts import MODES
from . import settings
from .client import DEFAULT_PROMPT, DEFAULT_URL, State, VLLMDotsOCRClient, completion_of, get_vllm_dots_ocr_client
from .integration import Fallback
from .messages import Conversation
from .trained import task_of
from .words import Explained, explain, is_about_the_key, is_absent

KEY, MODEL_PATH, UNIT = "dots.ocr", "rednote-hilab/dots.ocr", "dots-ocr.service"
# How long the server's state counts, in seconds (our own choice): the page asks for it several times in each run.
STATE_SECONDS: Final = 5.0
# What the page shows: the weights in bfloat16 as the model's memory, and how long a start takes.
WEIGHTS_GB, START_SECONDS = 6, 300
NO_TESSERACT: Final = "Чтобы страницы читались и без сервера: sudo apt-get install tesseract-ocr tesseract-ocr-rus"

_log = logging.getLogger(__package__)


@functools.lru_cache(4)  # the page asks for the state's words several times in each run, and systemd is slow
def words_for(error: Exception, client: VLLMDotsOCRClient) -> str:
    """Say what went wrong and what to do about it, to somebody in front of the page."""
    if not is_absent(error):
        return explain(error)
    host = urlsplit(client.base_url).hostname or ""
    if not is_loopback(host):
        return f"сервер {client.base_url} не отвечает: проверьте адрес и сеть, на сервере — systemctl status {UNIT}"
    if _is_active():
        return f"сервер запускается: модель загружается несколько минут, повторите позже (ход: journalctl -fu {UNIT})"
    return f"сервер не отвечает. Запустите его: sudo dots-ocr-server start (журнал: journalctl -u {UNIT} -n 50)"


class SingleContainerManager:
    """The server in the place of the containers: one model, which systemd starts."""

    client: None = None
    compose_file = ""

    def __init__(self, base_url: str = DEFAULT_URL) -> None:
        """Choose the server; see `VLLMDotsOCRClient`."""
        self._base_url = base_url
        self.current_active_model: str | None = None

    @property
    def vllm(self) -> VLLMDotsOCRClient:
        """The client, by the settings of now."""
        return get_vllm_dots_ocr_client(self._base_url)

    @property
    def state(self) -> State:
        """What is known of the server."""
        return self.vllm.state(STATE_SECONDS)

    @property
    def fault(self) -> str:
        """Why the server cannot be used and what to do, in Russian; empty if it can."""
        error = self.state.fault
        return "" if error is None else words_for(error, self.vllm)

    @property
    def summary(self) -> str:
        """Context and queue, or the fault."""
        state = self.state
        queue = "" if state.queue is None else f"; в работе {state.queue[0]}, в очереди {state.queue[1]}"
        return self.fault or f"контекст {state.context} токенов{queue}"

    @property
    def models_config(self) -> dict[str, dict[str, Any]]:
        """The one model. The application's own config.yaml is in it, too.

        The page's loop over this leaves the last value in its variable ``config``, where it looks for the document
        types and the file formats afterwards.
        """
        url = self.vllm.base_url
        model = {
            "container_name": UNIT,
            "compose_service": "",
            "port": urlsplit(url).port or 80,
            "model_path": MODEL_PATH,
            "display_name": KEY,
            "memory_gb": WEIGHTS_GB,
            "startup_time": START_SECONDS,
            "description": f"Сервер {url}: {self.summary}",
        }
        return {KEY: {**_application_config(), **model}}

    def get_container_status(self, container_name: str) -> dict[str, Any]:
        """Tell of the server in Docker's words."""
        fault = self.fault
        known = container_name == UNIT
        return {
            "exists": known,
            "running": known and not fault,
            "status": "not_found" if not known else "exited" if fault else "running",
            "health": "unhealthy" if fault else "healthy",
            "error": fault,
        }

    def check_api_health(self, port: int, timeout: int = 5) -> tuple[bool, str]:
        """Tell whether the server can be used, and why not."""
        fault = self.fault
        return not fault, fault or "API healthy"

    def get_active_model(self) -> str | None:
        """Return the model's key if the server can be used."""
        self.current_active_model = None if self.state.fault else KEY
        return self.current_active_model

    def stop_all_containers(self) -> tuple[list[str], list[str]]:
        """Stop nothing, and say how to."""
        return [], [f"сервер останавливает systemd: sudo systemctl stop {UNIT}"]

    def start_single_container(self, model_key: str) -> tuple[bool, str]:
        """Start nothing; tell whether the server is there, and how it is started."""
        if model_key != KEY:
            return False, f"этот сервер читает только {KEY}"
        self.vllm.state()
        return not self.fault, self.fault or f"{KEY} уже работает: {self.vllm.base_url}"

    def _build_docker_command(self, model_key: str, config: dict[str, Any]) -> list[str]:
        return []  # the page asks whether this is there

    def get_system_status(self) -> dict[str, Any]:
        """Return what the page's sidebar shows, and show there what it has no place for."""
        fault, active = self.fault, self.get_active_model()
        config = self.models_config[KEY]
        if (streamlit := _streamlit()) is not None:
            if fault:
                streamlit.warning(f"⚠️ {fault}")
            else:
                streamlit.caption(f"📏 {self.summary}")
        status = {
            "config": config,
            "container_status": self.get_container_status(UNIT),
            "api_healthy": not fault,
            "api_message": fault or "API healthy",
            "is_active": active == KEY,
        }
        return {
            "active_model": active,
            "active_model_name": config["display_name"] if active else None,
            "total_memory_usage": WEIGHTS_GB if active else 0,
            "models": {KEY: status},
            "principle": "single_container_only",
        }

    def create_model_selector_ui(self) -> str:
        """Show the model."""
        self.get_system_status()
        import streamlit

        streamlit.info(f"🎯 {KEY}, {MODEL_PATH}")
        return KEY

    def create_status_dashboard(self) -> None:
        """Show the server's state."""
        import streamlit

        streamlit.json({**self.get_system_status(), "models": list(self.models_config)})


class _Ready(SingleContainerManager):
    """For the adapter, which the page must always ask: it knows what to do without a server."""

    def check_api_health(self, port: int, timeout: int = 5) -> tuple[bool, str]:
        return True, "API healthy"

    def get_active_model(self) -> str:
        self.current_active_model = KEY
        return KEY


class VLLMStreamlitAdapter:
    """Reads the page's pictures with the server, and with Tesseract while that cannot, unless the API key is wrong."""

    def __init__(self, base_url: str = DEFAULT_URL) -> None:
        """Choose the server; nothing is sent yet; see `VLLMDotsOCRClient`."""
        self.container_manager = _Ready(base_url)
        self.model_priorities = {MODEL_PATH: 1}
        self._fallback: Fallback | None = None

    @property
    def base_url(self) -> str:
        """The server's address, without ``/v1``."""
        return self.container_manager.vllm.base_url

    @property
    def model_endpoints(self) -> dict[str, str]:
        """Where each model is served."""
        return {MODEL_PATH: self.base_url}

    @property
    def healthy_endpoints(self) -> dict[str, str]:
        """`model_endpoints`, as far as they can be used."""
        return {} if self.container_manager.state.fault else self.model_endpoints

    @property
    def available_models(self) -> list[str]:
        """The models that can be used."""
        return list(self.healthy_endpoints)

    @property
    def model_limits(self) -> dict[str, int]:
        """The context of each model, in tokens."""
        return dict.fromkeys(self.healthy_endpoints, self.container_manager.state.context)

    def check_all_connections(self) -> bool:
        """Ask the server now whether it can be used."""
        return self.container_manager.vllm.state().fault is None

    check_connection = check_all_connections

    def get_available_models(self) -> list[str]:
        """Return the models that can be used."""
        return self.available_models

    get_recommended_models = get_available_models

    def get_endpoint_for_model(self, model_name: str) -> str:
        """Return where a model is served."""
        return self.base_url

    def ensure_model_available(self, model_name: str) -> bool:
        """Tell whether a model can be used; nothing is started for it."""
        return model_name in self.healthy_endpoints

    def get_model_max_tokens(self, model_id: str) -> int:
        """Return the context, in tokens."""
        return self.container_manager.state.context

    def get_server_status(self) -> dict[str, Any]:
        """Return what `create_vllm_interface` of the application shows."""
        return {
            "status": "healthy" if self.healthy_endpoints else "error",
            "healthy_endpoints": len(self.healthy_endpoints),
            "total_endpoints": 1,
            "available_models": self.available_models,
            "model_limits": self.model_limits,
            "endpoints": self.healthy_endpoints,
        }

    def process_image(
        self, image: Any, prompt: str = DEFAULT_PROMPT, model: str = MODEL_PATH, max_tokens: int = 4096
    ) -> dict[str, Any]:
        """Read a picture: a PIL image, or whatever `VLLMDotsOCRClient.process_image` takes.

        Any prompt but those that dots.ocr was trained with, or that mean the same, is answered with the text. A page is
        read to its end, whatever `max_tokens` says. In OCR mode a failure is a success with the reason as its text,
        since the page drops everything else.
        """
        started = time.monotonic()
        with _progress():
            text, note, tokens = self._read(image, prompt)
        if text == "[]":
            text += "\n\nНа странице таких элементов нет."
        chat = bool(note) and _tell_chat(prompt, note)
        if note and not chat:
            # Behind a layout, because the page looks for the JSON at the beginning.
            text = f"{text}\n\n{note}" if text.startswith("[") else f"{note}\n\n{text}".rstrip()
        return {
            "success": bool(text),
            "text": text,
            "error": note,
            "processing_time": time.monotonic() - started,
            "model": model,
            "model_display_name": KEY,
            "endpoint": self.base_url,
            "mode": "vLLM",
            "tokens_used": tokens,
            "max_tokens_limit": self.container_manager.state.context,
            "actual_max_tokens": max_tokens,
        }

    def chat_with_image(self, image: Any, prompt: str, model: str = MODEL_PATH) -> dict[str, Any]:
        """Read a picture; see `process_image`."""
        return self.process_image(image, prompt, model)

    def _read(self, image: Any, prompt: str) -> tuple[str, str, int]:
        """Return the text, what a person has to know of how it came about, and the tokens."""
        client = self.container_manager.vllm
        task = task_of(prompt)
        prompt = prompt if task else DEFAULT_PROMPT
        notes: list[str] = []

        def read(page: PageImage) -> dict[str, Any]:
            answer = client.attempt(Conversation.about(page, prompt), None, STATE_SECONDS)
            if isinstance(answer, dict):
                return answer
            notes[:] = [words_for(answer, client)]
            if is_about_the_key(answer):
                raise Explained(notes[0])
            self._fallback = self._fallback or Fallback("tesseract")  # whose layouts always have texts
            layout = task is not None and task.mode == "layout_only"
            text = self._fallback.read(page, MODES["layout"].prompt if layout else prompt)
            notes.append("Страницу прочитал Tesseract: проверьте текст.")
            return completion_of(text, "tesseract")

        try:
            completion = client.for_pages(_frames(image, prompt), None, read)
        except Exception as error:
            without = "" if isinstance(error, InputError | Explained) else NO_TESSERACT
            return "", "\n\n".join(filter(None, (f"❌ {notes[0] if notes else explain(error)}", without))), 0
        note = "⚠️ " + "\n\n".join(notes) if notes else ""
        return completion["choices"][0]["message"]["content"], note, completion["usage"].get("total_tokens", 0)


def create_vllm_interface() -> None:
    """Show a page that reads documents, PDFs among them, which the application's own page refuses."""
    import streamlit as st

    st.header("🚀 dots.ocr")
    adapter = VLLMStreamlitAdapter()
    st.caption(f"{adapter.base_url}: {adapter.container_manager.summary}")
    document = st.file_uploader("Документ", type=["pdf", "png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp"])
    prompt = st.text_input("Промпт", DEFAULT_PROMPT)
    if document is not None and st.button("🚀 Извлечь текст", type="primary"):
        result = adapter.process_image(document.getvalue(), prompt)
        st.code(result["text"], language="text")


def create_single_container_ui() -> None:
    """Show the server's state."""
    import streamlit as st

    st.title("🎯 dots.ocr")
    SingleContainerManager().create_status_dashboard()


def _is_active() -> bool:
    """Tell whether systemd has the service running; not if there is no systemd, as in a container."""
    try:
        done = subprocess.run(["systemctl", "is-active", UNIT], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("active", "activating")


def _application_config() -> dict[str, Any]:
    """Return the application's config.yaml; an empty one if it cannot be read, of which the page itself complains."""
    path = settings.folder() / "config.yaml"
    try:
        return _parsed(path, path.stat().st_mtime)
    except Exception as error:
        _log.warning("%s: %s", path, error)
        return {}


@functools.lru_cache(1)
def _parsed(path: Path, changed: float) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _frames(image: Any, prompt: str) -> Any:
    """Return a document with all frames of a TIFF, unless its boxes are to be drawn on the one that the page shows."""
    task = task_of(prompt)
    if not isinstance(image, Image.Image) or getattr(image, "n_frames", 1) == 1 or image.format != "TIFF":
        return image
    if task is None or MODES[task.mode].answer != "text":
        return image
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", save_all=True)
    return buffer.getvalue()


def _streamlit() -> Any:
    """Return the module if this runs in a page of it."""
    try:
        import streamlit
        from streamlit.runtime.scriptrunner import get_script_run_ctx
    except ImportError:
        return None
    return streamlit if get_script_run_ctx(suppress_warning=True) is not None else None


def _tell_chat(prompt: str, note: str) -> bool:
    """Add a message to the page's chat, if that is where the prompt comes from.

    The page makes its answer to some questions of the text by counting words and numbers, and would count in a note.
    """
    st = _streamlit()
    messages = None if st is None else st.session_state.get("messages")
    if not messages or messages[-1] != {"role": "user", "content": prompt}:
        return False
    messages.append({"role": "assistant", "content": note})
    return True


def _progress() -> contextlib.AbstractContextManager[object]:
    """Show that a page is being read and for how long, if this runs in a page of Streamlit."""
    st = _streamlit()
    if st is None:
        return contextlib.nullcontext()
    clock = {"show_time": True} if "show_time" in inspect.signature(st.spinner).parameters else {}
    return st.spinner("🔄 dots.ocr читает страницу…", **clock)  # type: ignore[no-any-return]
