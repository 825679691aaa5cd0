from __future__ import annotations

import contextlib
import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import LINES, FakeServer, encrypted_pdf, pdf_of, reply, sent_image
from werkzeug import Response

import dots_ocr_client
from dots_ocr_client.apps.doctor import SAMPLE
from dots_ocr_client.cli import main, read
from dots_ocr_client.client import DEFAULT_TIMEOUT
from dots_ocr_client.engines.admission import CAP
from dots_ocr_client.engines.vllm import DEFAULT_BASE_URL

PROGRAM = Path(sys.executable).with_name("dots-ocr")
LAYOUT = json.dumps(
    [
        {"bbox": [0, 0, 784, 20], "category": "Page-header", "text": "Page 1"},
        {"bbox": [20, 20, 700, 60], "category": "Title", "text": "Invoice 1047"},
    ]
)


def dots_ocr(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False)


def on_a_terminal(stream: str, *arguments: str | Path) -> tuple[int, str]:
    """Run the command with one of its streams on a terminal; return the status and what was seen there."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    streams: dict[str, int] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs}
    with subprocess.Popen([PROGRAM, *arguments], env=environment, **streams) as process:  # type: ignore[call-overload]
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # with which Linux reports that the other end is closed
            while some := os.read(ours, 65_536):
                seen += some
    os.close(ours)
    return process.returncode, seen.decode()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, which is faster, with the fake server; returns status, output and messages."""
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def blank_pages(tmp_path: Path) -> Path:
    path = tmp_path / "three.pdf"
    path.write_bytes(pdf_of((100, 100), (100, 100), (100, 100)))
    return path


# read, to standard output


def test_text_goes_to_stdout_and_its_origin_to_stderr(server: FakeServer, sheet_file: Path) -> None:
    done = dots_ocr("read", sheet_file, "--mode", "text", "--format", "text", "--base-url", server.base_url)
    assert (done.returncode, done.stdout) == (0, "read by the server\n")
    assert done.stderr.startswith("page 1: vllm (dots.ocr) answered in ")
    assert done.stderr.count("\n") == 1


def test_a_fallback_says_why_in_one_line(server: FakeServer, sheet_file: Path, run: Run) -> None:
    server.fail_with(400, "two\nlines")
    status, output, messages = run("read", sheet_file, "--format", "text")
    assert (status, [line for line in output.splitlines() if line]) == (3, list(LINES))
    assert messages.startswith("page 1: tesseract (eng) answered in ")
    assert "vllm failed after" in messages
    assert "400" in messages
    assert messages.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "Page 1\n\n# Invoice 1047\n"),
        (["--no-headers"], "# Invoice 1047\n"),
        (["--format", "md"], "Page 1\n\n# Invoice 1047\n"),
        (["--format", "text"], "Page 1\n\nInvoice 1047\n"),
    ],
)
def test_a_layout_is_printed_as_markdown_or_as_asked(
    server: FakeServer, sheet_file: Path, run: Run, options: list[str], expected: str
) -> None:
    server.script = [(LAYOUT, "stop")]
    assert run("read", sheet_file, *options)[:2] == (0, expected)


def test_html_is_a_whole_page(server: FakeServer, sheet_file: Path, run: Run) -> None:
    server.script = [(LAYOUT, "stop")]
    output = run("read", sheet_file, "--format", "html")[1]
    assert output.lower().startswith("<!doctype html>")
    assert "Invoice 1047" in output


@pytest.mark.parametrize("options", [["--json"], ["--format", "json"]])
def test_json_has_everything(server: FakeServer, sheet_file: Path, run: Run, options: list[str]) -> None:
    server.script = [(LAYOUT, "stop")]
    values = json.loads(run("read", sheet_file, *options)[1])
    assert (values["text"], values["source"]) == ("Page 1\n\nInvoice 1047", str(sheet_file))
    assert json.loads(json.dumps(dots_ocr_client.Document.from_dict(values).to_dict())) == values


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (["--mode", "layout-only"], "Do not output the corresponding text"),
        (["--mode", "grounding", "--box", "28,28,56,84"], "[28, 28, 56, 84]"),
        (["--mode", "general", "--question", "Who pays?"], "Who pays?"),
    ],
)
def test_modes_ask_for_what_they_say(
    server: FakeServer, sheet_file: Path, run: Run, options: list[str], prompt: str
) -> None:
    server.script = [(LAYOUT, "stop")]
    assert run("read", sheet_file, *options)[0] == 0
    assert prompt in json.dumps(server.bodies[0]["messages"])


def test_only_the_pages_that_were_asked_for_are_read(blank_pages: Path, server: FakeServer, run: Run) -> None:
    values = json.loads(run("read", blank_pages, "--pages", "1,3", "--json")[1])
    assert [page["number"] for page in values["pages"]] == [1, 3]


def test_tesseract_alone_asks_no_server(server: FakeServer, sheet_file: Path, run: Run) -> None:
    status, output, _ = run("read", sheet_file, "--engine", "tesseract", "--mode", "text")
    assert (status, LINES[0] in output, server.http.log) == (0, True, [])


def test_languages_go_to_tesseract(sheet_file: Path, run: Run) -> None:
    status, _, messages = run("read", sheet_file, "--engine", "tesseract", "--languages", "eng+osd")
    assert (status, "tesseract (eng+osd)" in messages) == (0, True)


def test_what_cannot_be_read_ends_with_1(server: FakeServer, sheet_file: Path, run: Run) -> None:
    server.fail_with(400)
    status, output, messages = run("read", sheet_file, "--engine", "vllm")
    assert (status, output) == (1, "")
    assert "vllm failed" in messages
    server.models = {"other": 1}
    status, output, messages = run("read", sheet_file)
    assert (status, output) == (1, "")
    assert "it serves: 'other'" in messages


def test_a_failed_page_does_not_hide_the_others_and_ends_with_1(
    blank_pages: Path, server: FakeServer, run: Run
) -> None:
    answers = iter([200, 400, 200])
    good: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 1, "model": "dots.ocr"}
    good["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "good"}, "finish_reason": "stop"}]
    server.answer = lambda: reply(good) if next(answers) == 200 else reply({"error": {"message": "no"}}, 400)
    status, output, messages = run(
        "read", blank_pages, "--engine", "vllm", "--mode", "text", "--format", "text", "--max-in-flight", "1"
    )
    assert (status, output.count("good"), output.count("could not be read")) == (1, 2, 1)
    assert re.search(r"^pages \d[-,] ?\d: vllm \(dots.ocr\) answered in ", messages, re.MULTILINE)
    assert re.search(r"^page \d: failed: AllEnginesFailed", messages, re.MULTILINE)
    assert messages.count("\n") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["read", "missing.png"],
        ["read", "*.png"],
        ["read", "**.png"],
        ["read", "https://example.com/a.pdf"],
        ["read", "."],
        ["read", "x.png", "--format", "csv"],
        ["read", "x.png", "--pictures"],
        ["read", "x.png", "-o", "."],
        ["read", "x.png", "-o", "a.md", "--out", "results"],
        ["read", "-", "--out", "results"],
        ["other"],
        ["read", "x.png", "--timeout", "0"],
        ["read", "x.png", "--timeout", "nan"],
        ["read", "x.png", "--timeout", "soon"],
        ["read", "x.png", "--engine", "other"],
        ["read", "x.png", "--mode", "layout_only"],
        ["read", "x.png", "--max-in-flight", "0"],
        ["read", "x.png", "y.png"],
        ["read", "x.png", "--format", "md", "--format", "html"],
        ["read", "x.png", "--upgrade"],
        ["read", "x.png", "--box", "1,2,3,4"],
        ["read", "x.png", "--mode", "grounding"],
        ["read", "x.png", "--mode", "grounding", "--box", "1,2,3"],
        ["read", "x.png", "--mode", "grounding", "--box", ""],
        ["read", "x.png", "--mode", "grounding", "--box", "1,2,1,2"],
        ["read", "x.png", "--mode", "general"],
        ["read", "x.png", "--question", "Why?"],
        ["read", "x.png", "--out", "results", "--box", "1,2,3,4"],
        ["read", "x.png", "--out", "results"],
        ["view", "missing.json"],
    ],
)
def test_wrong_usage_and_bad_input_end_with_2_also_in_json(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, messages = run(*arguments)
    assert (status, output) == (2, "")
    assert messages.startswith("dots-ocr: ")
    status, output, _ = run(*arguments, "--json")
    error = json.loads(output)["error"]
    assert (status, error["type"] in ("UsageError", "InputError"), bool(error["message"])) == (2, True, True)


@pytest.mark.parametrize("arguments", [[], ["read"], ["view"], ["--help"]])
def test_bare_commands_explain_themselves(arguments: list[str], run: Run) -> None:
    status, output, messages = run(*arguments)
    assert (status, messages, "Usage: dots-ocr" in output) == (0, "", True)


@pytest.mark.parametrize("command", ["read", "doctor", "bench", "models", "view", "serve"])
def test_every_help_has_examples_that_are_commands(command: str, run: Run) -> None:
    output = run(command, "--help")[1]
    examples = output.partition("Examples:")[2].partition("\u256d")[0].strip().splitlines()
    assert examples
    assert all(f"dots-ocr {command}" in example for example in examples)


def test_address_on_the_web_is_refused_with_the_way_to_do_it(run: Run) -> None:
    status, _, messages = run("read", "https://example.com/a%20b.pdf")
    assert (status, "Fix: curl -LO https://example.com/a%20b.pdf" in messages) == (2, True)


def test_document_from_standard_input_into_a_file(server: FakeServer, sheet_file: Path, tmp_path: Path) -> None:
    server.script = [(LAYOUT, "stop")]
    target = tmp_path / "out.html"
    with sheet_file.open("rb") as file:
        command = [str(PROGRAM), "read", "-", "-o", str(target), "--base-url", server.base_url]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert target.read_text("utf-8").lower().startswith("<!doctype html>")
    assert "Invoice 1047" in target.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "begins"), [("a.md", "Page 1"), ("a.txt", "Page 1"), ("a.json", "{"), ("a.hocr", "<?xml"), ("a", "Page 1")]
)
def test_format_of_a_file_is_that_of_its_name(
    name: str, begins: str, server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run
) -> None:
    server.script = [(LAYOUT, "stop")]
    assert run("read", sheet_file, "-o", tmp_path / name)[:2] == (0, "")
    assert (tmp_path / name).read_text("utf-8").startswith(begins)


def test_output_that_cannot_be_written_is_a_message(server: FakeServer, sheet_file: Path, run: Run) -> None:
    status, _, messages = run("read", sheet_file, "-o", sheet_file.parent / "missing" / "a.md", "--mode", "text")
    assert (status, "cannot be written" in messages, server.requests) == (2, True, [])


def test_output_goes_through_a_link_and_into_a_pipe(server: FakeServer, sheet_file: Path, tmp_path: Path) -> None:
    (tmp_path / "link.md").symlink_to("target.md")
    os.mkfifo(tmp_path / "pipe.md")
    for name in ("link.md", "pipe.md"):
        command = [str(PROGRAM), "read", str(sheet_file), "--mode=text", f"--base-url={server.base_url}"]
        with subprocess.Popen([*command, "-o", str(tmp_path / name)]) as process:
            text = (tmp_path / name).read_text() if name == "pipe.md" else "read by the server\n"
        assert (process.returncode, text) == (0, "read by the server\n")
    assert (tmp_path / "link.md").is_symlink()
    assert (tmp_path / "target.md").read_text() == "read by the server\n"
    assert (tmp_path / "pipe.md").is_fifo()


def test_output_does_not_replace_what_is_read(server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "link.md").symlink_to(sheet_file)
    before = sheet_file.read_bytes()
    for output in (sheet_file, tmp_path / "link.md"):
        status, _, messages = run("read", sheet_file, "-o", output, "--mode", "text")
        assert (status, f"{output} is what is read. Fix: " in messages, server.requests) == (2, True, [])
    assert sheet_file.read_bytes() == before


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_crash(closed: str, server: FakeServer, sheet_file: Path) -> None:
    command = f"{PROGRAM} read {sheet_file} --mode=text --base-url={server.base_url} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_patterns_that_the_shell_left_are_files(server: FakeServer, tmp_path: Path, run: Run) -> None:
    for name in ("a.png", "b.png", "[c].png"):
        Image.new("RGB", (56, 56), "white").save(tmp_path / name)
    assert "2 documents" in run("read", tmp_path / "?.png", "--out", tmp_path / "one")[2]
    assert "1 document:" in run("read", tmp_path / "[c].png", "--out", tmp_path / "two")[2]


def test_pages_are_printed_in_order_while_others_are_read(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, last = tmp_path / "three.pdf", threading.Event()
    document.write_bytes(pdf_of((72, 72), (72, 36), (72, 18)))

    def text(body: dict[str, Any]) -> str:
        said = {200: "first", 100: "second"}.get(sent_image(body).height, "third")
        if said == "third":
            last.wait(20)
        return said

    monkeypatch.setattr(server, "_wrap", text)
    command = [str(PROGRAM), "read", str(document), "--mode", "text", "--base-url", server.base_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read(len("first\n\nsecond"))
        assert process.poll() is None
        last.set()
        said += process.stdout.read()
    assert (process.returncode, said) == (0, "first\n\nsecond\n\nthird\n")


def test_one_document_shows_a_bar_on_a_terminal_which_goes(server: FakeServer, sheet_file: Path) -> None:
    status, seen = on_a_terminal("stderr", "read", sheet_file, "--mode", "text", "--base-url", server.base_url)
    assert status == 0
    assert "0 of 1 documents" in seen
    assert seen.rstrip().splitlines()[-1].endswith(" s")  # what read the page is the last to be seen


@pytest.mark.parametrize(
    ("options", "status"),
    [([], 3), (["--on-unavailable", "fallback"], 0), (["--engine", "tesseract"], 0), (["--on-unavailable", "fail"], 1)],
)
def test_fallback_that_nobody_asked_for_ends_with_3(
    options: list[str], status: int, sheet_file: Path, tmp_path: Path, run: Run
) -> None:
    mistyped = ("--base-url", "http://127.0.0.1:9/v1", *options)
    assert run("read", sheet_file, *mistyped)[0] == status
    assert run("read", sheet_file, "--out", tmp_path / "out", *mistyped)[0] == status


def test_a_line_is_said_for_each_kind_of_fallback(blank_pages: Path, run: Run) -> None:
    status, _, messages = run("read", blank_pages, "--base-url", "http://127.0.0.1:9/v1", "--mode", "text")
    assert status == 0  # blank pages are nobody's
    assert messages.startswith("pages 1-3: blank, found in ")
    assert messages.count("\n") == 1


@pytest.mark.parametrize("content", [b"sesame", b"sesame\n", b"\xef\xbb\xbfsesame\r\n"])
def test_a_password_comes_out_of_a_file_and_goes_nowhere(
    server: FakeServer, tmp_path: Path, run: Run, content: bytes
) -> None:
    (tmp_path / "a.pdf").write_bytes(encrypted_pdf("sesame"))
    (tmp_path / "key").write_bytes(content)
    out, options = tmp_path / "out", ["--password-file", tmp_path / "key"]
    server.script = [(LAYOUT, "stop")] * 2
    printed = run("read", tmp_path / "a.pdf", *options)
    batch = run("read", tmp_path / "a.pdf", "--out", out, *options)
    viewed = run("view", out / "a.pdf.json", "--source", tmp_path / "a.pdf", *options)
    assert [printed[0], batch[0], viewed[0], "# Invoice 1047" in printed[1]] == [0, 0, 0, True]
    written = [file.read_text() for file in out.iterdir()]
    sent = [request.data.decode() for request in server.requests]
    assert (len(written), len(sent)) == (5, 2)
    assert not [text for text in map(str, (*printed, *batch, *viewed, *written, *sent)) if "sesame" in text]


@pytest.mark.parametrize("content", [None, b"", b"sesame\nsesame"])
def test_a_password_file_that_is_none_is_wrong_usage(
    tmp_path: Path, run: Run, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("sesame").write_bytes(content)
    status, _, messages = run("read", "x.pdf", "--password-file", "sesame")
    assert (status, "Fix: " in messages, "sesame" in messages) == (2, True, False)
    assert run("read", "x.pdf", "--password", "sesame")[0] == 2, "it would be in the list of processes"


def test_json_and_another_format_exclude_each_other(run: Run) -> None:
    assert run("read", "x.png", "--format", "md", "--json")[0] == 2


def test_errors_of_engines_are_json_too(server: FakeServer, sheet_file: Path, run: Run) -> None:
    server.models = {"other": 1}
    status, output, _ = run("read", sheet_file, "--json")
    assert (status, json.loads(output)["error"]["type"]) == (1, "ModelNotServed")


@pytest.mark.parametrize("name", [b"a\xff.png", b"a\nb.png", b"-x.png", b"\x1b[31m.png"])
def test_odd_file_names_work_and_are_printed_safely(
    name: bytes, sheet_file: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(sheet_file.parent)
    file = Path(os.fsdecode(name))
    sheet_file.rename(file)
    server.script = [(LAYOUT, "stop")]
    status, output, _ = run("read", "--format", "text", "--", file)
    assert (status, output) == (0, "Page 1\n\nInvoice 1047\n")
    file.unlink()
    status, _, messages = run("read", "--", file)
    assert (status, messages.removesuffix("\n").isprintable()) == (2, True)


def test_names_that_are_no_utf_8_can_be_printed_as_json(server: FakeServer, sheet_file: Path, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"a\xff.png")
    sheet_file.rename(file)
    done = dots_ocr("read", "--json", "--base-url", server.base_url, file)
    assert (done.returncode, json.loads(done.stdout)["text"]) == (0, "read by the server")


def test_what_a_terminal_would_obey_is_not_printed_there(server: FakeServer, sheet_file: Path) -> None:
    server.text = "before \x1b]0;title\x07 after"
    options = ["--mode", "text", "--format", "text", "--base-url", server.base_url]
    status, output = on_a_terminal("stdout", "read", sheet_file, *options)
    assert (status, "before" in output, "\x1b" in output) == (0, True, False)


def test_a_reader_that_goes_away_is_no_crash(server: FakeServer, sheet_file: Path) -> None:
    server.text = "word " * 100_000
    command: list[str | Path] = [PROGRAM, "read", sheet_file, "--mode", "text", "--base-url", server.base_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


# read, into a folder


def test_a_folder_of_documents_becomes_a_folder_of_results(
    server: FakeServer, sheet_file: Path, blank_pages: Path, tmp_path: Path, run: Run
) -> None:
    server.script = [(LAYOUT, "stop")]
    out = tmp_path / "out"
    status, output, messages = run("read", sheet_file, "--out", out, "--format", "md", "--format", "text")
    assert (status, output) == (0, "")
    assert "# Invoice 1047" in (out / "sheet.png.md").read_text()
    assert "Invoice 1047" in (out / "sheet.png.txt").read_text()
    assert f"read: {sheet_file}\n" in messages
    assert messages.splitlines()[-1].startswith("1 document: 1 read; 1 page: 1 by vllm; 1 now, in ")


def test_what_is_passed_over_in_a_folder_is_said(
    server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run
) -> None:
    server.script = [(LAYOUT, "stop")]
    (sheet_file.parent / "talk.mp3").write_bytes(b"ID3")
    status, output, messages = run("read", sheet_file.parent, "--out", tmp_path / "out", "--json")
    assert (status, json.loads(output)["skipped"]) == (0, {".mp3": 1})
    assert messages.splitlines()[-1].endswith("; passed over: 1 x .mp3")


def test_a_blank_page_is_reported_as_such(server: FakeServer, blank_pages: Path, tmp_path: Path, run: Run) -> None:
    server.text = ""
    status, _, messages = run("read", blank_pages, "--out", tmp_path / "out")
    assert (status, "3 pages: 3 blank; 3 now, in " in messages) == (0, True)
    status, _, messages = run("read", blank_pages, "--pages", "2")
    assert (status, messages.startswith("page 2: blank, found in ")) == (0, True)
    assert run("view", tmp_path / "out" / "three.pdf.json")[0] == 0
    assert "blank, mode layout, " in (tmp_path / "out" / "three.pdf.view.html").read_text()


def test_an_upgrade_reads_again_what_another_engine_read_behind_the_server(
    server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run
) -> None:
    def answer() -> Response:
        message = {"role": "assistant", "content": LAYOUT}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return reply({"id": "1", "model": "dots.ocr", "choices": [choice], "dots_ocr": {"engine": "tesseract"}})

    server.answer = answer
    out = tmp_path / "out"
    assert "1 page: 1 by tesseract; 1 now" in run("read", sheet_file, "--out", out)[2]
    server.answer, server.script = None, [(LAYOUT, "stop")]
    assert "1 page: 1 by vllm; 1 now" in run("read", sheet_file, "--out", out, "--upgrade")[2]
    assert "1 unchanged" in run("read", sheet_file, "--out", out, "--upgrade")[2]


@pytest.mark.parametrize(("root", "status"), [("tesseract", 0), ("vllm,tesseract", 3), (None, 3)])
def test_the_engine_that_a_service_is_for_is_no_fallback(
    server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run, root: str | None, status: int
) -> None:
    about = {"id": "dots.ocr", "owned_by": "vllm" if root is None else "dots-ocr-client", "root": root}
    server.models_answer = lambda: reply({"object": "list", "data": [about]})
    choice = {"index": 0, "message": {"role": "assistant", "content": LAYOUT}, "finish_reason": "stop"}
    answer = {"id": "1", "model": "dots.ocr", "choices": [choice], "dots_ocr": {"engine": "tesseract"}}
    server.answer = lambda: reply(answer)
    assert run("read", sheet_file)[0] == status
    assert run("read", sheet_file, "--out", tmp_path / "out")[0] == status
    assert run("read", sheet_file, "--out", tmp_path / "out")[0] == status


def test_the_second_run_has_nothing_to_do(server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run) -> None:
    server.script = [(LAYOUT, "stop")]
    run("read", sheet_file, "--out", tmp_path / "out")
    asked = len(server.requests)
    status, output, _ = run("read", sheet_file, "--out", tmp_path / "out", "--json")
    assert (status, json.loads(output)["totals"]["unchanged"], len(server.requests)) == (0, 1, asked)


@pytest.mark.parametrize("key", ["sesame-open", "sesame open"])
def test_a_wrong_key_is_said_once_and_ends_a_batch(
    run: Run, server: FakeServer, sheet: Image.Image, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOTS_OCR_API_KEY", key)
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url.replace("//", "//reader:pass-word@"))
    server.models_answer = lambda: reply({"error": {"message": "Bearer sesame-open of reader:pass-word"}}, 401)
    for name in ("a.png", "b.png", "c.png"):
        sheet.save(tmp_path / name)
    status, output, messages = run("read", *sorted(tmp_path.glob("*.png")), "--out", tmp_path / "out", "--json")
    assert status == 1
    assert json.loads(output)["error"]["type"] == ("Unauthorized" if "-" in key else "InvalidKey")
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*") if file.is_file())
    assert "tesseract" not in written, "the mistake would be hidden"
    for secret in (key, "pass-word"):
        assert secret not in output + messages + written
    assert "sesame" not in messages
    assert server.requests == []


def test_a_document_that_fails_ends_with_1_and_leaves_the_others(
    server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run
) -> None:
    server.script = [(LAYOUT, "stop")]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"broken")
    status, _, messages = run("read", sheet_file, broken, "--out", tmp_path / "out")
    assert (status, (tmp_path / "out/sheet.png.md").exists()) == (1, True)
    assert f"failed: {broken}\n" in messages
    assert str(tmp_path / "out/report.json") in messages.splitlines()[-1]


def test_a_batch_shows_a_bar_on_a_terminal(server: FakeServer, sheet_file: Path, tmp_path: Path) -> None:
    options: list[str | Path] = ["--out", tmp_path / "out", "--base-url", server.base_url]
    status, output = on_a_terminal("stderr", "read", sheet_file, *options)
    plain = re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", output)  # without colours and the like
    assert (status, "1 of 1 documents" in plain, "1/1 pages" in plain) == (0, True, True)


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "one"])
def test_an_interruption_ends_with_130_and_says_how_to_go_on(
    server: FakeServer, sheet_file: Path, tmp_path: Path, way: signal.Signals, batch: bool
) -> None:
    def slow() -> Any:
        time.sleep(1)
        return reply({})

    server.answer = slow
    options: list[str | Path] = ["--out", tmp_path / "out"] if batch else []
    # Whoever runs the tests in the background has them ignore SIGINT, and what they start, too.
    command: list[str | Path] = ["env", "--default-signal=INT", PROGRAM, "read", sheet_file, *options]
    command += ["--base-url", server.base_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(way)
        output, messages = process.communicate(timeout=20)
    assert (process.returncode, output, "Traceback" in messages) == (130, "", False)
    assert ("run the same command again to go on" if batch else "interrupted") in messages


def test_another_resolution_reads_everything_again(
    server: FakeServer, blank_pages: Path, tmp_path: Path, run: Run
) -> None:
    out, seen = tmp_path / "out", []
    for options in (["--dpi", "100"], ["--dpi", "100"], [], ["--dpi", "144"]):
        assert run("read", blank_pages, "--out", out, "--mode", "text", *options)[0] == 0
        pages = json.loads((out / "three.pdf.json").read_bytes())["pages"]
        seen.append((len(server.requests), {(page["width"], page["dpi"]) for page in pages}))
    assert seen == [(3, {(139, 100)}), (3, {(139, 100)}), (6, {(278, 200)}), (9, {(200, 144)})]
    status, output, _ = run("read", blank_pages, "--pages", "1", "--dpi", "50", "--json")
    assert (status, json.loads(output)["pages"][0]["width"]) == (0, 70)


# doctor, models, view


def test_the_doctor_is_satisfied_with_a_server_that_works(server: FakeServer, run: Run) -> None:
    server.models, server.text = {"dots.ocr": 32_768}, SAMPLE
    status, output, messages = run("doctor", "--ocr")
    assert (status, messages, "ok       page: " in output) == (0, "", True)


def test_the_doctor_ends_with_1_and_names_the_fix(server: FakeServer, run: Run) -> None:
    server.models = {"other": 32_768}
    status, output, _ = run("doctor")
    assert (status, "failed   model: " in output, "--served-model-name" in output) == (1, True, True)
    status, output, _ = run("doctor", "--json")
    values = json.loads(output)
    assert (status, values["ok"], values["base_url"]) == (1, False, server.base_url)
    assert {check["name"]: check["status"] for check in values["checks"]}["model"] == "failed"


def test_models_are_listed_with_their_context(server: FakeServer, run: Run) -> None:
    server.models = {"dots.ocr": 32_768, "other": None}
    assert run("models")[:2] == (
        0,
        "dots.ocr: context 32768 tokens, root unknown\nother: context unknown, root unknown\n",
    )
    values = json.loads(run("models", "--json")[1])
    assert values["models"][0] == {"name": "dots.ocr", "max_model_len": 32_768, "root": None}


def test_models_of_a_missing_server_end_with_1(run: Run) -> None:
    status, output, _ = run("models", "--base-url", "http://127.0.0.1:9/v1", "--json")
    assert (status, json.loads(output)["error"]["type"]) == (1, "ServerUnavailable")


@pytest.fixture
def result(server: FakeServer, sheet_file: Path, tmp_path: Path, run: Run) -> Path:
    server.script = [(LAYOUT, "stop")]
    assert run("read", sheet_file, "--out", tmp_path / "out")[0] == 0
    return tmp_path / "out/sheet.png.json"


def test_view_writes_pictures_boxes_and_texts_beside_the_result(result: Path, run: Run) -> None:
    status, output, messages = run("view", result)
    file = result.with_name("sheet.png.view.html")
    assert (status, output, messages) == (0, f"{file}\n", "")
    assert [part in file.read_text() for part in ("data:image/webp", "Invoice 1047", 'class="v_box"')] == [True] * 3


def test_view_shows_what_was_printed_too(server: FakeServer, blank_pages: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "result.json").write_text(run("read", blank_pages, "--pages", "2-", "--json")[1])
    status, output, _ = run("view", tmp_path / "result.json", "--out", tmp_path / "x.html", "--json")
    assert (status, json.loads(output)) == (0, {"file": str(tmp_path / "x.html")})
    assert (tmp_path / "x.html").read_text().count("data:image/webp") == 2


def test_view_draws_pages_as_they_were_read(server: FakeServer, tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf_of((100, 61)))
    run("read", tmp_path / "a.pdf", "--dpi", "10", "--out", tmp_path / "out")
    assert run("view", tmp_path / "out/a.pdf.json")[0] == 0
    assert "other proportions" not in (tmp_path / "out/a.pdf.view.html").read_text()


def test_view_does_not_replace_what_it_shows(result: Path, sheet_file: Path, run: Run) -> None:
    before = sheet_file.read_bytes()
    assert run("view", result, "--out", result)[0] == 2
    assert run("view", result, "--source", sheet_file, "--out", sheet_file)[0] == 2
    status, _, messages = run("view", result, "--out", sheet_file)
    assert (status, "would replace what is shown. Fix: " in messages) == (2, True)
    assert sheet_file.read_bytes() == before


def test_view_goes_without_pictures_where_the_document_is_gone(result: Path, sheet_file: Path, run: Run) -> None:
    sheet_file.unlink()
    status, _, messages = run("view", result)
    assert (status, "without pictures" in messages) == (0, True)
    assert run("view", result, "--source", sheet_file)[0] == 2


def test_view_warns_of_a_document_that_changed(result: Path, sheet_file: Path, run: Run) -> None:
    Image.new("RGB", (784, 224), "white").save(sheet_file)
    assert "no longer what was read" in run("view", result)[2]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": 1, "pages": [{}]}', "[" * 100_000, "\udcff"])
def test_view_refuses_what_is_no_result(tmp_path: Path, run: Run, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    status, _, messages = run("view", tmp_path / "x.json")
    assert (status, "is not a result" in messages) == (2, True)


# the command itself


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"dots-ocr {dots_ocr_client.__version__}\n")


@pytest.mark.parametrize("command", ["read", "doctor", "bench", "models", "view"])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    status, output, _ = run(command, "--help")
    assert (status, "--json" in output) == (0, True)


def test_defaults_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    options = inspect.signature(read).parameters
    assert (options["timeout"].default, options["max_in_flight"].default) == (DEFAULT_TIMEOUT, CAP)
    monkeypatch.setenv("COLUMNS", "200")
    assert DEFAULT_BASE_URL in run("read", "--help")[1]


def test_help_does_not_wait_for_the_openai_library() -> None:
    code = (
        "import sys; from dots_ocr_client.cli import main\n"
        "main(['--help']); print('loaded', [m for m in ('openai', 'httpx2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "loaded []" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_modes(shell: str) -> None:
    def complete(line: str) -> str:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_TYPER_COMPLETE_ARGS": line}
        environment = {**os.environ, **words, "_DOTS_OCR_COMPLETE": f"complete_{shell}"}
        environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
        return subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, timeout=60).stdout

    assert "doctor" in complete("dots-ocr doc")
    assert "layout-only" in complete("dots-ocr read --mode lay")


def test_completion_scripts_are_shown() -> None:
    environment = {**os.environ, "_DOTS_OCR_COMPLETE": "source_bash"}
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "complete" in done.stdout
    assert "--show-completion" in dots_ocr("--help").stdout


def test_exported_names() -> None:
    names = {name for name in vars(dots_ocr_client) if not name.startswith("_")}
    modules = {name for name in names if type(getattr(dots_ocr_client, name)).__name__ == "module"}
    assert names - modules == set(dots_ocr_client.__all__) - {"__version__"}
    assert dots_ocr_client.__all__ == sorted(dots_ocr_client.__all__)
