"""The comparison with a real Prometheus, put to one that is made up."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.monitoring.live import metric_names, problems

Answers = dict[str, Any]

RECORDING = {"name": "dots_ocr:gpu_up", "type": "recording", "query": "up", "health": "ok", "lastError": ""}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('up{job="node"} == 0', {"up"}),
        ("sum by (host, server) (vllm:a or b)", {"vllm:a", "b"}),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[5m])))", {"a_bucket"}),
        ("a * on (host, server) group_left () (b == 1) > 1e6", {"a", "b"}),
        ('x{le="a or b"} unless y offset 5m', {"x", "y"}),
        ("dots_ocr:page_seconds:p95 > 60 and deriv(z[10m]) > 0", {"dots_ocr:page_seconds:p95", "z"}),
    ],
)
def test_names_in_an_expression(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


@pytest.fixture
def prometheus() -> Iterator[Callable[[Answers], str]]:
    """Return what starts a Prometheus with answers of its API and returns its address."""
    servers = []

    def start(answers: Answers) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Keep quiet."""

            def do_GET(self) -> None:
                path = self.path.removeprefix("/api/v1/").split("?")[0]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"status": "success", "data": answers[path]}).encode())

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(rules: list[dict[str, str]], names: list[str], *jobs: str) -> Answers:
    targets = [{"health": "up", "labels": {"job": job}} for job in jobs]
    return {
        "label/__name__/values": names,
        "rules": {"groups": [{"rules": rules}]},
        "targets": {"activeTargets": targets},
    }


def test_what_nobody_tells_is_a_problem(prometheus: Callable[[Answers], str]) -> None:
    found = problems(prometheus(answers([RECORDING], [], "haproxy")))
    assert "haproxy_backend_active_servers is used, and Prometheus has none" in found
    assert not [problem for problem in found if problem.startswith("node_")]  # no such target answers


def test_what_need_not_be_there_is_none(prometheus: Callable[[Answers], str]) -> None:
    url = prometheus(answers([RECORDING], [], "haproxy"))
    name = "haproxy_backend_active_servers"
    assert not [problem for problem in problems(url, [name]) if problem.startswith(f"{name} ")]


def test_rule_that_fails_is_a_problem(prometheus: Callable[[Answers], str]) -> None:
    url = prometheus(answers([RECORDING | {"health": "err", "lastError": "many-to-many"}], []))
    assert "rule dots_ocr:gpu_up: many-to-many" in problems(url)


def test_name_that_is_not_known_is_a_problem(prometheus: Callable[[Answers], str]) -> None:
    url = prometheus(answers([RECORDING | {"query": "vllm:renamed_again"}], []))
    assert "vllm:renamed_again is used, and nothing is known to tell it" in problems(url)


def test_prometheus_without_rules_is_a_problem(prometheus: Callable[[Answers], str]) -> None:
    assert problems(prometheus(answers([], []))) == ["Prometheus has no rules"]
