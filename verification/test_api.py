"""The promise: the right model answers, and it reads; without the key there is no answer, and nothing else answers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from testinfra.host import Host

from server import Settings, ask, python, ready, servers, variable

# All that is answered (plugins/filter/api_paths.py), said again here: a list that grows by mistake turns red.
ANSWERED = {
    *(("GET", path) for path in ("/", "/health", "/metrics", "/version", "/v1/models")),
    ("POST", "/v1/chat/completions"),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
# vLLM names each path that it registers when it starts.
ROUTE = re.compile(r"Route: (/\S*), Methods: ")


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


def test_every_other_path_that_vllm_registers_is_closed(host: Host, server: Settings) -> None:
    """With the key and without: what a new version brings, too."""
    with host.sudo():
        invocation = host.check_output("systemctl show --property=InvocationID --value %s", server["unit"])
        journal = host.check_output("journalctl --no-pager --output=cat _SYSTEMD_INVOCATION_ID=%s", invocation)
    registered = {re.sub(r"\{[^}]*\}", "x", path) for path in ROUTE.findall(journal)}
    assert {path for _, path in ANSWERED} - {"/"} <= registered, (
        "the journal no longer has a start of vLLM: restart the unit"
    )
    assert registered - {path for _, path in ANSWERED}
    wanted = [(method, path) for path in sorted(registered | {"/", "/v1"}) for method in METHODS]
    found = python(
        host,
        """
        import http.client, pathlib, ssl, urllib.parse
        address = urllib.parse.urlsplit(server["url"])
        key = pathlib.Path(server["api_key_file"]).read_text().strip()
        answers = []
        for method, path in wanted:
            for headers in ({}, {"Authorization": "Bearer " + key}):
                if address.scheme == "https":
                    options = {"context": ssl._create_unverified_context()}
                    connection = http.client.HTTPSConnection(address.netloc, timeout=60, **options)
                else:
                    connection = http.client.HTTPConnection(address.netloc, timeout=60)
                connection.request(method, path, headers=headers)
                answers.append([method, path, bool(headers), connection.getresponse().status])
                connection.close()
        print(json.dumps(answers))
        """,
        server=server,
        wanted=wanted,
    )
    assert len(found) == 2 * len(wanted)
    assert [answer for answer in found if answer[3] != 404 and (answer[0], answer[1]) not in ANSWERED] == []
    open_ones = {(method, path) for method, path, with_key, status in found if status == 200 and not with_key}
    assert open_ones == {("GET", path) for path in ("/", "/health", "/metrics", "/version")}


def test_page_for_people_says_that_the_server_is_ready(host: Host, server: Settings) -> None:
    status, text = ask(host, server, "/", key=False)
    assert status == 200
    assert '<strong id="state">ready' in text


# What vLLM takes, and some image of it does not survive, or reads no other page meanwhile
# (docs/understand/verification-cases.md).
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", True),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("use_beam_search", True),
        ("n", 100),
        ("structured_outputs", {"regex": "(.{1,1000}){1,1000}"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}),
        ("repetition_detection", {"max_pattern_size": 2**70, "min_count": 2}),
        ("mm_processor_kwargs", {"max_pixels": 10**9}),
        ("stop", ["x" * 5_000]),
        ("temperature", "hot"),
        ("nobody_knows_it", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_request_that_could_stop_the_engine_is_refused(host: Host, server: Settings, name: str, value: Any) -> None:
    body = {"model": server["model"], "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, name: value}
    status, text = ask(host, server, "/v1/chat/completions", body=body)
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, name)
    assert "Fix: " in error["message"]
