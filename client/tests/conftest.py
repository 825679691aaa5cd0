from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw, ImageFont
from pytest_httpserver import HTTPServer
from support import LINES, FakeServer, MakeClient

from dots_ocr_client import DotsOCR, Engine, PageImage, TesseractEngine, VLLMEngine
from dots_ocr_client.chain import fallback
from dots_ocr_client.engines import vllm
from dots_ocr_client.pages import rasterizer
from dots_ocr_client.pages.documents import PageReference

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def tesseract_is_installed() -> None:
    if shutil.which("tesseract") is None:
        pytest.exit("these tests need Tesseract: see README.md, Develop", returncode=1)


@pytest.fixture(scope="session")
def no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("no-certificates")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, no_certificates: Path) -> None:
    # Every HTTP client reads the system's certificates, which takes longer than most tests; none here speaks TLS.
    monkeypatch.setenv("SSL_CERT_DIR", str(no_certificates))
    monkeypatch.setattr("httpcore2.default_ssl_context", lambda **_: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    for name in (
        "DOTS_OCR_BASE_URL",
        "DOTS_OCR_API_KEY",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "OMP_THREAD_LIMIT",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def spare_workers() -> Iterator[list[rasterizer._Worker]]:
    spare: list[rasterizer._Worker] = []
    yield spare
    for worker in spare:
        worker.end()


@pytest.fixture(autouse=True)
def workers_are_used_again(
    request: pytest.FixtureRequest, spare_workers: list[rasterizer._Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start few processes, for a start takes longer than most tests; not in those of the processes themselves."""
    if request.module.__name__.rpartition(".")[2] in ("test_rasterizer", "test_textlayer"):
        return
    end, take = rasterizer._end, rasterizer._worker

    def keep(workers: list[rasterizer._Worker], threads: ThreadPoolExecutor) -> None:
        spare_workers.extend(workers)
        workers.clear()
        end(workers, threads)

    def take_spare(idle: list[rasterizer._Worker], reference: PageReference, verb: str) -> rasterizer._Worker:
        if not idle and spare_workers:
            idle.append(spare_workers.pop())
        return take(idle, reference, verb)

    monkeypatch.setattr(rasterizer, "_end", keep)
    monkeypatch.setattr(rasterizer, "_worker", take_spare)


@pytest.fixture
def sheet() -> Image.Image:
    """A printed page of 784 x 224 px: multiples of 28, within the limits."""
    image = Image.new("RGB", (784, 224), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(LINES):
        draw.text((20, 15 + 65 * row), line, "black", font=ImageFont.load_default(36))
    return image


@pytest.fixture
def sheet_file(sheet: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "sheet.png"
    sheet.save(path)
    return path


@pytest.fixture(scope="session")
def make_httpserver() -> Iterator[HTTPServer]:
    """A server that takes several requests at once; the plugin's own takes one after the other."""
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tries of a request, and none for a server that is away."""
    monkeypatch.setattr(vllm, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(fallback, "PATIENCE", 0.0)


@pytest.fixture
def page(sheet: Image.Image) -> PageImage:
    """The sheet, as engines get it."""
    return PageImage.of(1, sheet)


@pytest.fixture
def server(httpserver: HTTPServer) -> Iterator[FakeServer]:
    yield FakeServer(httpserver)
    httpserver.check_assertions()


@pytest.fixture
def client(server: FakeServer) -> Iterator[MakeClient]:
    """Makes clients of the fake server: of vLLM and Tesseract, or of other engines; closes them after the test."""
    made: list[DotsOCR] = []

    def make(engines: Sequence[Engine] | None = None, timeout: float = 30.0, model: str = "dots.ocr") -> DotsOCR:
        if engines is None:
            engines = [VLLMEngine(server.base_url, model=model), TesseractEngine()]
        made.append(DotsOCR(engines=engines, timeout=timeout))
        return made[-1]

    yield make
    for ocr in made:
        ocr.close()


@pytest.fixture
def only_vllm(client: MakeClient, server: FakeServer) -> DotsOCR:
    return client([VLLMEngine(server.base_url)])


@pytest.fixture
def fake_tesseract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script named tesseract on an otherwise unchanged PATH."""

    def install(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "tesseract"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return program

    return install
