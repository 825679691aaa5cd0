"""The promise: the right model answers, and it reads."""

from __future__ import annotations

import json

from testinfra.host import Host

from server import get, ready, setting


def test_health_answers(host: Host) -> None:
    assert get(host, "/health") == ""


def test_every_name_of_the_model_is_served(host: Host) -> None:
    served = [entry["id"] for entry in json.loads(get(host, "/v1/models"))["data"]]
    assert served == setting(host, "dots_ocr_server_model_names")


def test_golden_page_is_read(host: Host) -> None:
    verdict = ready(host, wait=30)
    assert verdict["ready"], verdict
