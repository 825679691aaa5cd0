from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import LINES, FakeServer

import dots_ocr_client


def dots_ocr(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("dots-ocr")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_text_goes_to_stdout_and_its_origin_to_stderr(server: FakeServer, sheet_file: Path) -> None:
    done = dots_ocr("read", sheet_file, "--base-url", server.base_url)
    assert (done.returncode, done.stdout) == (0, "read by the server\n")
    assert done.stderr.startswith("page 1: vllm (dots.ocr) answered in ")
    assert done.stderr.count("\n") == 1


def test_a_fallback_says_why_in_one_line(server: FakeServer, sheet_file: Path) -> None:
    server.fail_with(503, "two\nlines")
    done = dots_ocr("read", sheet_file, "--base-url", server.base_url)
    assert (done.returncode, [line for line in done.stdout.splitlines() if line]) == (0, list(LINES))
    assert done.stderr.startswith("page 1: tesseract (eng) answered in ")
    assert "vllm failed after" in done.stderr
    assert "answered 503" in done.stderr
    assert done.stderr.count("\n") == 1


def test_json_has_everything(server: FakeServer, sheet_file: Path) -> None:
    done = dots_ocr("read", "--json", "--base-url", server.base_url, sheet_file)
    values = json.loads(done.stdout)
    assert (values["text"], values["source"]) == ("read by the server", str(sheet_file))
    assert set(values["pages"][0]) == {
        *("number", "text", "engine", "model", "seconds", "finish_reason", "attempts", "warnings")
    }


def test_tesseract_alone_asks_no_server(server: FakeServer, sheet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url)
    done = dots_ocr("read", sheet_file, "--engine", "tesseract")
    assert (done.returncode, LINES[0] in done.stdout, server.http.log) == (0, True, [])


def test_what_cannot_be_read_ends_with_1(server: FakeServer, sheet_file: Path) -> None:
    server.fail_with(503)
    done = dots_ocr("read", sheet_file, "--base-url", server.base_url, "--engine", "vllm")
    assert (done.returncode, done.stdout) == (1, "")
    assert "vllm failed" in done.stderr
    server.models = {"other": 1}
    done = dots_ocr("read", sheet_file, "--base-url", server.base_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "it serves: 'other'" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["read", "missing.png"],
        ["read"],
        [],
        ["read", "x.png", "--timeout", "0"],
        ["read", "x.png", "--timeout", "soon"],
        ["read", "x.png", "--engine", "other"],
    ],
)
def test_wrong_usage_and_bad_input_end_with_2(arguments: list[str]) -> None:
    done = dots_ocr(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "dots-ocr" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_does_not_wait_for_the_openai_library() -> None:
    code = (
        "import sys; from dots_ocr_client.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', [m for m in ('openai', 'httpx2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "loaded []" in done.stdout


def test_exported_names() -> None:
    names = {name for name in vars(dots_ocr_client) if not name.startswith("_")}
    modules = {name for name in names if type(getattr(dots_ocr_client, name)).__name__ == "module"}
    assert names - modules == set(dots_ocr_client.__all__) - {"__version__"}
    assert dots_ocr_client.__all__ == sorted(dots_ocr_client.__all__)
