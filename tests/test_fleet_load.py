"""The arithmetic of the events of the scenario `fleet`."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from pytest_httpserver import HTTPServer

from tests.fleet.load import Event, Load, Page, percentile


def page(start: float, seconds: float, fault: str = "") -> Page:
    """Return a page that was sent then and took so long."""
    return Page(start, start + seconds, "test-fleet-1", "vllm", fault)


@pytest.mark.parametrize(("values", "expected"), [([], 0.0), ([2.0], 2.0), ([1.0] * 19 + [9.0], 1.4), ([3.0] * 5, 3.0)])
def test_95th_percentile(values: list[float], expected: float) -> None:
    assert percentile(values) == pytest.approx(expected)


def test_event_is_over_with_the_last_page_that_was_lost_or_slow() -> None:
    pages = [page(100, 1), page(101, 4, "502"), page(102, 2.5), page(110, 1)]
    event = Event("x", True, pages, begin=100, usual=1.0)
    assert event.steady == pytest.approx(5.0)  # the lost page, at 105; the slow one ended at 104.5
    assert event.lost == [pages[1]]
    assert event.row().startswith("| x | planned | 4 | 1 | ")


def test_event_without_consequences_is_over_at_once() -> None:
    assert Event("x", False, [page(100, 1)], begin=100, usual=1.0).steady == 0.0


@pytest.mark.parametrize(("status", "retried"), [(503, True), (404, False)])
def test_load_counts_what_is_not_read_and_does_not_send_it_again(status: int, retried: bool) -> None:
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(status)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        load = Load(f"http://127.0.0.1:{server.server_address[1]}", "key", rate=20.0)
        load.wait_for(5)
        load.stop()
    finally:
        server.shutdown()
        server.server_close()
    assert len(received) == len(load.pages) >= 5
    assert all(page.fault.startswith(str(status)) and page.retried == retried for page in load.pages)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("Northwind Paper Supply Ltd. ", ""), ("orthwind Paper Supply Ltd.", "misread"), ("", "misread")],
)
def test_load_compares_the_first_line(httpserver: HTTPServer, text: str, fault: str) -> None:
    answer = {"choices": [{"message": {"content": text}}]}
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer)
    load = Load(httpserver.url_for("/"), "key", rate=20.0)
    load.wait_for(3)
    load.stop()
    assert all(page.fault.split(" ")[0] == fault and page.retried == (not fault) for page in load.pages)


def test_load_whose_gateway_is_gone_counts_pages_as_lost() -> None:
    load = Load("http://127.0.0.1:9", "key", rate=20.0)
    load.wait_for(3)
    load.stop()
    assert all("ConnectError" in page.fault and page.retried for page in load.pages)
