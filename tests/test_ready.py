"""The readiness check against servers that are ready, starting, or wrong, over real sockets."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

FILES = Path(__file__).resolve().parent.parent / "roles/dots_ocr_server/files"
GOLDEN = (FILES / "golden/page.txt").read_text()
READY, FAILED, NOT_YET = 0, 1, 75


def check(server: HTTPServer | str, *options: str) -> tuple[int, dict[str, Any]]:
    """Run the check; return its exit status and its verdict."""
    url = server if isinstance(server, str) else server.url_for("").rstrip("/")
    command = [sys.executable, str(FILES / "ready"), f"--url={url}", "--model=dots.ocr", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def serve(server: HTTPServer, *, text: str = GOLDEN, model: str = "dots.ocr") -> None:
    """Answer as a server that is up does."""
    server.expect_request("/health").respond_with_data("")
    server.expect_request("/v1/models").respond_with_json({"data": [{"id": model}]})
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    server.expect_request("/v1/chat/completions", method="POST").respond_with_json({"choices": [choice]})


def test_server_that_reads_the_golden_page_is_ready(httpserver: HTTPServer) -> None:
    serve(httpserver)
    status, verdict = check(httpserver)
    assert (status, verdict["ready"]) == (READY, True)
    assert "likeness 1.000" in verdict["summary"]


def test_request_has_the_placeholder_once_and_the_golden_page(httpserver: HTTPServer) -> None:
    serve(httpserver)
    check(httpserver)
    request = json.loads(httpserver.log[-1][0].get_data())
    image, text = request["messages"][0]["content"]
    assert text["text"].count("<|img|><|imgpad|><|endofimg|>") == 1
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_layout_of_the_text_does_not_count(httpserver: HTTPServer) -> None:
    serve(httpserver, text=" ".join(GOLDEN.split()))
    assert check(httpserver, "--likeness=1.0")[0] == READY


def test_healthy_server_with_another_model_is_refused_at_once(httpserver: HTTPServer) -> None:
    serve(httpserver, model="facebook/opt-125m")
    status, verdict = check(httpserver, "--wait=30")
    assert status == FAILED
    assert "is healthy but serves facebook/opt-125m instead of dots.ocr" in verdict["problem"]
    assert verdict["cure"]


def test_server_that_misreads_is_refused(httpserver: HTTPServer) -> None:
    serve(httpserver, text="lorem ipsum dolor sit amet")
    status, verdict = check(httpserver)
    assert status == FAILED
    assert "misreads the golden page" in verdict["problem"]


def test_one_lost_character_is_seen_where_likeness_must_be_whole(httpserver: HTTPServer) -> None:
    serve(httpserver, text=GOLDEN[1:])
    assert check(httpserver, "--likeness=1.0")[0] == FAILED
    assert check(httpserver, "--likeness=0.9")[0] == READY


def test_server_that_is_not_there_yet_is_worth_waiting_for() -> None:
    status, verdict = check("http://127.0.0.1:9")
    assert (status, verdict["ready"]) == (NOT_YET, False)


@pytest.mark.parametrize("status_code", [500, 503])
def test_server_that_is_still_warming_up_is_worth_waiting_for(httpserver: HTTPServer, status_code: int) -> None:
    httpserver.expect_request("/health").respond_with_data("", status=status_code)
    assert check(httpserver)[0] == NOT_YET


def test_refused_request_is_not_worth_waiting_for(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/health").respond_with_data("")
    httpserver.expect_request("/v1/models").respond_with_data("no key", status=401)
    status, verdict = check(httpserver)
    assert status == FAILED
    assert "answers 401" in verdict["problem"]


def test_another_program_at_the_port_is_named_as_such(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/health").respond_with_data("")
    httpserver.expect_request("/v1/models").respond_with_data("<html>")
    status, verdict = check(httpserver)
    assert status == FAILED
    assert "does not answer in JSON" in verdict["problem"]


def test_json_of_another_program_is_refused(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/health").respond_with_data("")
    httpserver.expect_request("/v1/models").respond_with_json({"status": "fine"})
    status, verdict = check(httpserver)
    assert status == FAILED
    assert "not as OpenAI's API does" in verdict["problem"]


def test_listener_that_speaks_no_http_is_not_a_crash() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener, b"SSH-2.0-OpenSSH"))
        thread.start()
        status, verdict = check(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert (status, verdict["ready"]) == (NOT_YET, False)


def answer_once(listener: socket.socket, answer: bytes) -> None:
    """Take one connection, read what comes, and answer with these bytes."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(answer)


def hang(request: Request) -> Response:
    """Answer long after the deadline of the test below."""
    time.sleep(4)
    return Response("")


def test_server_that_hangs_is_given_up_at_the_deadline(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/health").respond_with_data("")
    httpserver.expect_request("/v1/models").respond_with_json({"data": [{"id": "dots.ocr"}]})
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(hang)
    status, verdict = check(httpserver, "--wait=600", f"--deadline={time.time() + 2}")
    assert status == FAILED
    assert "not ready in time" in verdict["problem"]
    assert "dots_ocr_server_ready_timeout" in verdict["cure"]
