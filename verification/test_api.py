"""The promise: the right model answers, and it reads; nobody without the key gets an answer."""

from __future__ import annotations

import json

from testinfra.host import Host

from server import Settings, ask, ready, servers, variable


def test_every_server_is_healthy_and_reads(host: Host) -> None:
    for server in servers(host):
        assert ask(host, server, "/health", key=False) == (200, "")
        verdict = ready(host, server["name"], wait=30)
        assert verdict["ready"], verdict


def test_every_name_of_the_model_is_served(host: Host, server: Settings) -> None:
    _, text = ask(host, server, "/v1/models")
    assert [entry["id"] for entry in json.loads(text)["data"]] == variable(host, "dots_ocr_server_model_names")


def test_request_without_the_key_is_refused(host: Host, server: Settings) -> None:
    assert server["api_key_file"]
    body = {"model": server["model"], "messages": [{"role": "user", "content": "read"}]}
    for path, payload in (("/v1/models", None), ("/v1/chat/completions", body)):
        assert ask(host, server, path, body=payload, key=False)[0] == 401


def test_server_fetches_no_image_address(host: Host, server: Settings) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:8000/health"}},
        {"type": "text", "text": "x"},
    ]
    body = {"model": server["model"], "messages": [{"role": "user", "content": content}]}
    status, text = ask(host, server, "/v1/chat/completions", body=body)
    assert status == 400
    assert "domain" in text
