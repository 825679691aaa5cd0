from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import FakeServer, card, reply

from dots_ocr_client.apps import doctor
from dots_ocr_client.apps.doctor import ANSWER_TOKENS, QWEN_PACKAGES, SAMPLE, Check, examine
from dots_ocr_client.engines.server import REHEARSAL, REHEARSES, SERVICE
from dots_ocr_client.engines.vllm import VLLMEngine

SERVER = ["server", "version", "model", "key", "context", "page"]
ALL = [*SERVER, "tesseract", "page by tesseract", "qwen", "page by qwen", "packages"]
QWEN = [] if all(map(importlib.util.find_spec, QWEN_PACKAGES)) else ["qwen", "page by qwen"]
"""What is skipped where Qwen is not installed."""


@pytest.fixture
def healthy(server: FakeServer) -> FakeServer:
    server.models = {"dots.ocr": 32_768}
    server.text = SAMPLE
    return server


def checks_of(base_url: str, seconds: float = 20.0, *, ocr: bool = True, languages: str = "eng") -> dict[str, Check]:
    async def run() -> list[Check]:
        engine = VLLMEngine(base_url)
        try:
            return await examine(engine, seconds, ocr=ocr, languages=languages)
        finally:
            await engine.aclose()

    checks = asyncio.run(run())
    assert [check.name for check in checks] == [name for name in ALL if ocr or not name.startswith("page by")]
    assert [check.name for check in checks if (check.status == "ok") == bool(check.fix)] == []
    return {check.name: check for check in checks}


def by_status(checks: dict[str, Check], status: str) -> list[str]:
    return [check.name for check in checks.values() if check.status == status]


def test_a_healthy_server_passes_every_check(healthy: FakeServer) -> None:
    checks = checks_of(healthy.base_url)
    assert by_status(checks, "ok") == [name for name in ALL if name not in QWEN]
    assert by_status(checks, "skipped") == QWEN


@pytest.fixture
def deployed(healthy: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Check]]:
    """Examine a server of this host with these settings, less what is always looked at."""

    def run(content: str) -> list[Check]:
        (tmp_path / "dots-ocr.json").write_text(content)
        engine = VLLMEngine(healthy.base_url)
        monkeypatch.setattr(doctor, "DEPLOYED", tmp_path)
        return [check for check in asyncio.run(examine(engine, 20.0)) if check.name not in ALL]

    return run


@pytest.mark.parametrize("port", [None, 1])
def test_a_server_that_only_starts_with_a_remedy_is_named_with_it(
    healthy: FakeServer, deployed: Callable[..., list[Check]], port: int | None
) -> None:
    entry = {"diagnosis": "x", "reason": "No graphs here.", "remedy": {"arguments": ["--enforce-eager"]}}
    url = healthy.base_url.removesuffix("/v1") if port is None else f"http://127.0.0.1:{port}"
    found = deployed(json.dumps({"url": url, "adaptations": [entry]}))
    assert [check.status for check in found] == (["warning"] if port is None else [])
    assert all("No graphs here. Remedy: " in check.detail and "--enforce-eager" in check.detail for check in found)


@pytest.mark.parametrize(("note", "told"), [("The KV cache holds 9 tokens.", ["measured"]), ("", [])])
def test_a_card_that_left_another_kv_cache_than_planned_is_named(
    healthy: FakeServer, deployed: Callable[..., list[Check]], note: str, told: list[str]
) -> None:
    url = healthy.base_url.removesuffix("/v1")
    found = deployed(json.dumps({"url": url, "adaptations": [], "measured": {"note": note}}))
    assert [check.name for check in found] == told
    assert all((check.status, check.detail) == ("warning", note) for check in found)
    assert deployed(json.dumps({"url": "http://127.0.0.1:1", "measured": {"note": note}})) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"url": 1}',
        '{"url": "http://127.0.0.1:x"}',
        '{"url": "http://127.0.0.1:8000", "adaptations": 1}',
        '{"url": "http://127.0.0.1:8000", "adaptations": [{}]}',
        '{"url": "http://127.0.0.1:8000", "measured": 1}',
        None,
    ],
)
def test_settings_that_cannot_be_read_are_no_matter(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is None:
        (tmp_path / "dots-ocr.json").mkdir()
    else:
        (tmp_path / "dots-ocr.json").write_text(content)
    sound = {"url": "http://127.0.0.1:8000", "measured": {"note": "It holds 9 tokens."}}
    (tmp_path / "other.json").write_text(json.dumps(sound))
    monkeypatch.setattr(doctor, "DEPLOYED", tmp_path)
    assert [check.detail for check in doctor._adapted("http://127.0.0.1:8000/v1")] == ["It holds 9 tokens."]


@pytest.mark.parametrize(
    ("asked", "own", "told"),
    [
        ("http://127.0.0.1:8000/v1", "http://192.0.2.7:8000", True),
        ("http://localhost:8000/v1", "http://0.0.0.0:8000", True),
        ("http://[::1]:8000/v1", "https://192.0.2.7:8000", True),
        ("http://192.0.2.7:8000/v1", "http://192.0.2.7:8000", True),
        ("http://192.0.2.8:8000/v1", "http://192.0.2.7:8000", False),
        ("http://192.0.2.8:8000/v1", "http://127.0.0.1:8000", False),
        ("http://127.0.0.1:8001/v1", "http://127.0.0.1:8000", False),
    ],
)
def test_what_is_said_of_a_server_of_this_host_is_not_said_of_others(
    asked: str, own: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"reason": "No graphs here.", "remedy": {}}
    settings = {"url": own, "adaptations": [entry], "measured": {"note": "It holds 9 tokens."}}
    (tmp_path / "dots-ocr.json").write_text(json.dumps(settings))
    monkeypatch.setattr(doctor, "DEPLOYED", tmp_path)
    assert [check.name for check in doctor._adapted(asked)] == (["adapted", "measured"] if told else [])


def test_without_ocr_nothing_is_read(healthy: FakeServer, fake_tesseract: Callable[[str], Path]) -> None:
    fake_tesseract(
        'case $1 in --version) echo tesseract 5;; --list-langs) echo List; echo eng;; *) touch "$0.ran";; esac'
    )
    checks = checks_of(healthy.base_url, ocr=False)
    assert healthy.requests == []
    assert list(Path(shutil.which("tesseract") or "").parent.glob("*.ran")) == []
    assert (checks["page"].status, checks["tesseract"].status) == ("skipped", "ok")
    assert "--ocr" in checks["page"].detail


def test_the_server_is_timed(healthy: FakeServer) -> None:
    checks = checks_of(healthy.base_url)
    assert 0 < (checks["server"].seconds or 0) < 20
    assert 0 < (checks["page"].seconds or 0) < 20
    assert 0 < (checks["page by tesseract"].seconds or 0) < 20


def test_a_real_page_is_read_as_plain_text(healthy: FakeServer) -> None:
    checks_of(healthy.base_url)
    content = healthy.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[1]["text"].endswith("Extract the text content from this image.")


@pytest.mark.parametrize(
    "text", [SAMPLE.upper(), SAMPLE.replace("fox", "f0x"), f"# {SAMPLE}\n", SAMPLE.replace(" ", "")]
)
def test_small_differences_in_the_text_do_not_matter(healthy: FakeServer, text: str) -> None:
    healthy.text = text
    assert checks_of(healthy.base_url)["page"].status == "ok"


def test_a_page_that_is_read_wrongly_is_a_warning(healthy: FakeServer) -> None:
    healthy.text = "A cat sat on a mat."
    check = checks_of(healthy.base_url)["page"]
    assert check.status == "warning"
    assert "A cat sat" in check.detail


@pytest.mark.parametrize(
    "text", ["The quick brown fox", SAMPLE.replace("1234567890 ", ""), SAMPLE.replace(" lazy dogs", ""), SAMPLE * 2]
)
def test_a_part_of_the_text_or_too_much_of_it_is_not_enough(healthy: FakeServer, text: str) -> None:
    healthy.text = text
    assert checks_of(healthy.base_url)["page"].status == "warning"


def test_a_page_that_is_refused_is_a_failure(healthy: FakeServer) -> None:
    healthy.fail_with(400, "no pictures today")
    check = checks_of(healthy.base_url)["page"]
    assert (check.status, "no pictures today" in check.detail) == ("failed", True)


def test_without_a_server_the_rest_of_the_machine_is_still_checked() -> None:
    checks = checks_of("http://127.0.0.1:9/v1")
    assert by_status(checks, "failed") == ["server"]
    assert by_status(checks, "ok")[:2] == ["tesseract", "page by tesseract"]
    assert by_status(checks, "ok")[-1] == "packages"


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def test_a_server_that_hangs_does_not_hang_the_doctor(silent: str) -> None:
    check = checks_of(silent, seconds=0.3)["server"]
    assert (check.status, "answer" in check.detail) == ("failed", True)


def test_a_wrong_key_is_told_from_a_missing_server(healthy: FakeServer) -> None:
    healthy.models_answer = lambda: reply({"error": "no"}, 401)
    checks = checks_of(healthy.base_url)
    assert by_status(checks, "failed") == ["key"]
    assert checks["server"].status == "ok"
    assert "DOTS_OCR_API_KEY" in checks["key"].fix


def test_a_key_that_only_opens_the_list_of_models_is_found_out(healthy: FakeServer) -> None:
    healthy.fail_with(401)
    assert by_status(checks_of(healthy.base_url), "failed") == ["page"]


def test_rehearsal_is_called_one_instead_of_what_it_lacks(server: FakeServer) -> None:
    server.models = {"dots.ocr": 1024, REHEARSAL: 1024}
    checks = checks_of(server.base_url)
    assert (checks["model"].status, checks["model"].detail) == ("warning", REHEARSES)
    assert {checks[name].status for name in ("context", "page")} == {"skipped"}


def test_a_model_that_is_not_served_is_named_with_those_that_are(healthy: FakeServer) -> None:
    healthy.models = {"other": 1, "another": 2}
    checks = checks_of(healthy.base_url)
    assert by_status(checks, "failed") == ["model"]
    assert "'other', 'another'" in checks["model"].detail


def test_a_context_too_short_for_an_a4_page_names_the_length_that_is_enough(healthy: FakeServer) -> None:
    healthy.models = {"dots.ocr": 8192}
    fix = checks_of(healthy.base_url)["context"].fix
    enough = int("".join(filter(str.isdigit, fix)))
    assert enough > 4_900 + ANSWER_TOKENS  # an A4 page takes 4,956 tokens or a little less
    healthy.models = {"dots.ocr": enough}
    assert checks_of(healthy.base_url)["context"].status == "ok"


def test_a_server_that_does_not_tell_its_context_is_not_blamed(healthy: FakeServer) -> None:
    healthy.models = {"dots.ocr": None}
    assert checks_of(healthy.base_url)["context"].status == "skipped"


@pytest.mark.parametrize(
    ("root", "reader", "amiss"),
    [("tesseract", "tesseract", ["model", "page"]), ("vllm,tesseract", "tesseract", ["page"]), ("vllm", "vllm", [])],
)
def test_it_says_who_reads_behind_a_service(root: str, reader: str, amiss: list[str], healthy: FakeServer) -> None:
    service = {**card("dots.ocr", 131_072, root), "owned_by": SERVICE}
    attempt = {"engine": "vllm", "outcome": "failed", "error": "E", "reason": "it is gone", "seconds": 1.5}
    about = {"engine": reader, "model": "eng", "attempts": [attempt] * (reader != "vllm")}
    choice = {"index": 0, "message": {"role": "assistant", "content": SAMPLE}, "finish_reason": "stop"}
    healthy.models_answer = lambda: reply({"data": [service]})
    healthy.answer = lambda: reply({"id": "1", "model": "dots.ocr", "choices": [choice], "dots_ocr": about})
    checks = checks_of(healthy.base_url)
    assert by_status(checks, "warning") == amiss
    assert checks["version"].detail == "dots-ocr serve 0.25.1"
    assert "model" not in amiss or "read by tesseract, not by dots.ocr" in checks["model"].detail
    if "page" in amiss:
        assert "by tesseract (eng): vllm failed after 1.50 s: E: it is gone" in checks["page"].detail


def test_a_server_that_does_not_tell_its_version_is_not_blamed(healthy: FakeServer) -> None:
    healthy.version = None
    assert by_status(checks_of(healthy.base_url), "skipped") == ["version", *QWEN]


def test_a_missing_tesseract_is_a_warning(healthy: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = checks_of(healthy.base_url)
    assert by_status(checks, "warning") == ["tesseract"]
    assert checks["page by tesseract"].status == "skipped"
    assert "apt-get install" in checks["tesseract"].fix


@pytest.mark.parametrize("script", ["exit 1", "echo tesseract 5", 'echo "List:"; echo osd'])
def test_a_tesseract_that_is_of_no_use_is_a_warning(
    healthy: FakeServer, fake_tesseract: Callable[[str], Path], script: str
) -> None:
    fake_tesseract(script)
    assert checks_of(healthy.base_url)["tesseract"].status == "warning"


def test_the_languages_of_tesseract_are_named(healthy: FakeServer) -> None:
    detail = checks_of(healthy.base_url)["tesseract"].detail
    assert detail.startswith("tesseract ")
    assert "eng" in detail
    assert "osd" not in detail


def test_a_language_that_tesseract_lacks_is_named_with_its_package(healthy: FakeServer) -> None:
    checks = checks_of(healthy.base_url, languages="eng+xx_yy")
    assert (checks["tesseract"].status, checks["page by tesseract"].status) == ("warning", "skipped")
    assert checks["tesseract"].fix == "apt-get install tesseract-ocr-xx-yy"


@pytest.mark.parametrize(("script", "said"), [("echo A cat sat on a mat.", "A cat sat"), ("exit 3", "status 3")])
def test_a_tesseract_that_reads_wrongly_is_a_warning(
    healthy: FakeServer, fake_tesseract: Callable[[str], Path], script: str, said: str
) -> None:
    fake_tesseract(f"case $1 in --version) echo 5;; --list-langs) echo List; echo eng;; *) cat >&-; {script};; esac")
    check = checks_of(healthy.base_url)["page by tesseract"]
    assert (check.status, said in check.detail) == ("warning", True)


def test_the_languages_are_those_that_tesseract_is_asked_to_read(healthy: FakeServer) -> None:
    check = checks_of(healthy.base_url, languages="rus")["page by tesseract"]
    assert (check.status, "eng" in check.fix) == ("warning", True)  # an English page, read as Russian


def test_versions_of_all_that_matters_are_named(healthy: FakeServer) -> None:
    detail = checks_of(healthy.base_url)["packages"].detail
    assert [
        name for name in ("Python 3", "dots-ocr-client", "openai", "pypdfium2", "pillow") if name not in detail
    ] == []
