"""How a real HAProxy behaves with the role's configuration."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from functools import partial
from pathlib import Path

import httpx2
import openai
import pytest

from tests import programs
from tests.gateway.conftest import ALICE, NARROW, SLOW
from tests.gateway.support import PAGE, SECRET_TEXT, SERVER_KEY, Answer, Backend, Gateway, in_background, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20
Backends = dict[str, Backend]


def test_page_is_read_and_the_answer_says_by_whom(main: Gateway) -> None:
    answer = main.ask(key=ALICE)
    assert answer.status == 200
    assert json.loads(answer.body)["text"] == SECRET_TEXT
    assert answer.headers["x-dots-ocr-engine"] == "vllm"
    assert answer.headers["x-dots-ocr-server"] in ("gpu1", "gpu2")
    assert len(answer.headers["x-request-id"]) == 36


def test_servers_get_their_own_key_and_nothing_of_the_clients(main: Gateway, backends: Backends) -> None:
    more = {"X-Api-Key": ALICE, "Cookie": "a=b", "X-Request-Id": "mine", "Host": "evil.example.org"}
    more |= dict.fromkeys(
        ("X-Forwarded-For", "Forwarded", "X-Real-Ip", "X-Dots-Ocr-Engine", "X-Data-Parallel-Rank"), "9"
    )
    more |= {"Content-Type": "application/json", "Accept": "*/*", "User-Agent": "a test"}
    answer = main.ask(key=ALICE, path=f"{PAGE}?api_key={ALICE}", headers=more)
    assert answer.status == 200
    (page,) = backends["gpu1"].pages + backends["gpu2"].pages
    assert page["authorization"] == f"Bearer {SERVER_KEY}"
    assert page["path"] == PAGE
    assert page["host"] == "dots-ocr"
    assert page["x-request-id"] == answer.headers["x-request-id"]
    assert page["x-forwarded-for"] == "127.0.0.1"
    assert ALICE not in json.dumps(page)
    described = {"accept", "accept-encoding", "content-length", "content-type", "user-agent"}
    assert set(page) == {"path", "authorization", "connection", "host", "x-forwarded-for", "x-request-id", *described}
    assert "x-dots-ocr-more" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("POST", "/v1/completions"),
        ("POST", "//v1/chat/completions"),
        ("POST", "/v1//chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/chat/completions%2f..%2fcompletions"),
        ("POST", "/v1/chat/../chat/completions"),
        ("POST", "/v1/ch%61t/completions"),
        ("POST", "/V1/chat/completions"),
        ("POST", "/v1/chat/completions;x"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/models"),
        ("POST", "/health"),
        ("OPTIONS", "/v1/chat/completions"),
    ],
)
def test_everything_else_is_refused(main: Gateway, backends: Backends, method: str, path: str) -> None:
    answer = main.ask(method, path, ALICE)
    assert answer.status == 404
    assert answer.error["type"] == "NotFoundError"
    assert not [page for backend in backends.values() for page in backend.pages or backend.others]


def test_whole_address_in_the_request_line_opens_nothing(main: Gateway, backends: Backends) -> None:
    head = f"Host: evil.example.org\r\nAuthorization: Bearer {ALICE}\r\nConnection: close\r\n\r\n"
    assert main.raw(f"GET http://evil.example.org/metrics HTTP/1.1\r\n{head}".encode()).startswith(b"HTTP/1.1 404 ")
    assert main.raw(f"GET http://evil.example.org/v1/models HTTP/1.1\r\n{head}".encode()).startswith(b"HTTP/1.1 200 ")
    assert not [path for backend in backends.values() for path in backend.others]


def test_page_for_people_comes_from_the_gateway_and_says_whether_a_server_can_be_used(
    main: Gateway, backends: Backends
) -> None:
    page = main.ask("GET", "/")
    text = page.body.decode()
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert '<strong id="state">ready · готов</strong>' in text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert {"x-content-type-options", "cache-control"} <= set(page.headers)
    source = REPOSITORY / "client/src/dots_ocr_client/apps/serve.html"
    assert text.rstrip() == source.read_text().rstrip().replace("$state", "ready · готов")
    assert main.ask("POST", "/").status == 404
    assert not [path for backend in backends.values() for path in backend.others]


def test_models_are_listed_with_a_key(main: Gateway) -> None:
    answer = main.ask("GET", "/v1/models", ALICE)
    assert answer.status == 200
    assert json.loads(answer.body)["data"][0]["id"] == "dots.ocr"
    assert main.ask("GET", "/v1/models").status == 401


@pytest.mark.parametrize(
    "header",
    [None, f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", "Bearer ", "Bearer -", f"Basic {ALICE}", f"Bearer {SERVER_KEY}"],
)
def test_wrong_key_is_refused(main: Gateway, backends: Backends, header: str | None) -> None:
    answer = main.ask(headers={"Authorization": header} if header is not None else {})
    assert answer.status == 401
    assert answer.error["type"] == "AuthenticationError"
    assert not backends["gpu1"].pages + backends["gpu2"].pages


def test_health_needs_no_key_and_fails_without_servers(main: Gateway) -> None:
    assert main.ask("GET", "/health").status == 200
    wait_until(lambda: main.health() == "ok", "all servers were asked")
    for server in ("gpu1", "gpu2", "cpu1"):
        main.command(f"set server ocr/{server} state maint")
    answer = main.ask("GET", "/health")
    assert answer.status == 503
    assert answer.headers["retry-after"] == "5"
    assert '<strong id="state">not ready · не готов</strong>' in main.ask("GET", "/").body.decode()
    answer = main.ask(key=ALICE)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.error["type"] == "ServiceUnavailableError"


@pytest.mark.parametrize(
    "fault", [{"model": "another"}, {"model": "dots.ocr2"}, {"healthy": False}, {"key": "another"}], ids=str
)
def test_server_is_out_while_it_is_not_right(main: Gateway, backends: Backends, fault: dict[str, object]) -> None:
    for name, value in fault.items():
        setattr(backends["gpu1"], name, value)
    wait_until(lambda: main.status("gpu1") == "DOWN", "gpu1 down")
    assert {main.ask(key=ALICE).headers["x-dots-ocr-server"] for _ in range(6)} == {"gpu2"}
    backends["gpu1"].reset_script()
    wait_until(lambda: main.status("gpu1") == "UP", "gpu1 up")


def test_server_that_is_asleep_is_up_and_woken_by_a_page_alone(
    main: Gateway, backends: Backends, tmp_path: Path
) -> None:
    front, gpu, behind = programs.load("front"), backends["gpu1"], Backend("behind")
    behind.stop()
    behind.gate.set()
    for folder in ("run/dots-ocr", "units/some.wants"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "units/some.wants/dots-ocr.service").touch()
    on_demand = {"idle": 60, "address": "127.0.0.1", "behind": f"http://127.0.0.1:{behind.port}"}
    settings = {**gpu.settings(), "likeness": 0.9, "api_key_file": "", "on_demand": on_demand}
    (tmp_path / "dots-ocr.json").write_text(json.dumps(settings))
    gpu.stop()
    wait_until(lambda: main.status("gpu1") == "DOWN", "gpu1 down")
    for server in ("gpu2", "cpu1"):
        main.command(f"set server ocr/{server} state maint")
    loop = asyncio.new_event_loop()
    server = front.ocr_probe.load_server("dots-ocr", tmp_path)
    serving = loop.create_task(front.Front(server, tmp_path / "run", tmp_path / "units").serve())
    thread = threading.Thread(target=loop.run_until_complete, args=(asyncio.wait([serving]),))
    thread.start()
    try:
        wait_until(lambda: main.status("gpu1") == "UP", "gpu1 up")
        wait_until(lambda: main.health() == "asleep", "the gateway says that it is asleep")
        wake = tmp_path / "run/dots-ocr/wake"
        assert not wake.exists()
        with in_background(partial(main.ask, key=ALICE), count=2) as answers:
            wait_until(wake.exists, "a page wakes it")
            assert main.health() == "asleep"
            behind.start(behind.port)
        assert [answer.status for answer in answers] == [200, 200]
        wait_until(lambda: main.health() == "ok", "the gateway says that it is awake")
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()
        behind.stop()
        gpu.start(gpu.port)


def test_backup_answers_and_says_so_when_all_gpus_are_gone(main: Gateway, backends: Backends) -> None:
    backends["gpu1"].healthy = backends["gpu2"].healthy = False
    wait_until(lambda: main.status("gpu1") == main.status("gpu2") == "DOWN", "both down")
    assert main.ask("GET", "/health").status == 200
    answer = main.ask(key=ALICE)
    assert answer.status == 200
    assert answer.headers["x-dots-ocr-engine"] == "cpu"
    assert answer.headers["x-dots-ocr-server"] == "cpu1"


def test_page_goes_to_another_server_when_one_cannot_be_reached(main: Gateway, backends: Backends) -> None:
    backends["gpu1"].stop()
    try:
        answers = [main.ask(key=ALICE, body=b"x" * (MIB - 1)) for _ in range(8)]
    finally:
        backends["gpu1"].start(backends["gpu1"].port)
    assert {answer.status for answer in answers} == {200}
    assert {answer.headers["x-dots-ocr-server"] for answer in answers} == {"gpu2"}


def test_backup_reads_the_pages_of_the_moment_in_which_all_gpus_die(main: Gateway, backends: Backends) -> None:
    for name in ("gpu1", "gpu2"):
        backends[name].stop()
    try:
        assert all(main.status(name).startswith("UP") for name in ("gpu1", "gpu2")), "a check may have failed already"
        with in_background(partial(main.ask, key=ALICE), count=8) as answers:
            pass
    finally:
        for name in ("gpu1", "gpu2"):
            backends[name].start(backends[name].port)
    assert [answer.status for answer in answers] == [200] * 8
    assert {answer.headers["x-dots-ocr-engine"] for answer in answers} == {"cpu"}


def test_server_that_dies_over_a_page_gives_an_error_that_clients_retry(main: Gateway, backends: Backends) -> None:
    backends["gpu1"].reset = backends["gpu2"].reset = True
    answer = main.ask(key=ALICE, body=b"x" * (MIB // 2))
    assert answer.status == 502
    assert answer.error["type"] == "BadGatewayError"


def test_page_on_a_server_that_hangs_is_waited_for_and_others_avoid_it(main: Gateway, backends: Backends) -> None:
    backend = backends["gpu1"]
    main.command("set server ocr/gpu2 state drain")
    backend.gate.clear()
    with in_background(partial(main.ask, key=ALICE)) as answers:
        wait_until(lambda: backend.in_flight == 1, "the page in flight")
        main.command("set server ocr/gpu2 state ready")
        backend.healthy = False
        wait_until(lambda: main.status("gpu1") == "DOWN", "gpu1 out")
        others = [main.ask(key=ALICE) for _ in range(4)]
        backend.gate.set()
    assert {answer.headers["x-dots-ocr-server"] for answer in others} == {"gpu2"}
    assert answers[0].status == 200
    assert answers[0].headers["x-dots-ocr-server"] == "gpu1"


def test_server_that_refuses_the_gateway_is_not_the_fault_of_the_client(main: Gateway, backends: Backends) -> None:
    for name in ("gpu1", "gpu2"):
        backends[name].key = "changed-since"
    assert main.ask(key=ALICE).status == 502


def test_overload_of_a_server_asks_to_come_back(main: Gateway, backends: Backends) -> None:
    backends["gpu1"].status = backends["gpu2"].status = 503
    answer = main.ask(key=ALICE)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")


def test_drained_server_finishes_its_page_and_gets_no_other(main: Gateway, backends: Backends) -> None:
    drained = backends["gpu1"]
    drained.gate.clear()
    main.command("set server ocr/gpu2 state maint")
    with in_background(partial(main.ask, key=ALICE)) as answers:
        wait_until(lambda: drained.in_flight == 1, "the page in flight")
        main.command("set server ocr/gpu2 state ready")
        wait_until(lambda: main.status("gpu2") == "UP", "gpu2 up")
        main.command("set server ocr/gpu1 state drain")
        assert main.status("gpu1") == "DRAIN"
        assert {main.ask(key=ALICE).headers["x-dots-ocr-server"] for _ in range(4)} == {"gpu2"}
        assert main.sessions("gpu1") == 1
        drained.gate.set()
    assert answers[0].status == 200
    assert answers[0].headers["x-dots-ocr-server"] == "gpu1"
    wait_until(lambda: main.sessions("gpu1") == 0, "no page at gpu1, which is what an upgrade waits for")
    main.command("enable server ocr/gpu1")
    wait_until(lambda: main.status("gpu1") == "UP", "gpu1 up, as community.general.haproxy brings it back")


def test_rate_of_a_client_is_limited_and_what_is_refused_does_not_count(main: Gateway) -> None:
    answers = [main.ask(key=SLOW) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 429, 429]
    assert answers[2].headers["retry-after"] == "30"
    assert answers[2].error["type"] == "RateLimitError"
    assert "gpc0=2" in main.command("show table clients")
    assert main.ask(key=ALICE).status == 200
    assert main.ask("GET", "/v1/models", SLOW).status == 200


def test_pages_in_flight_of_a_client_are_limited(main: Gateway, backends: Backends) -> None:
    connection = main.connect()  # stays open: a connection without a page does not count
    assert main.ask(key=NARROW, connection=connection).status == 200
    gpus = backends["gpu1"], backends["gpu2"]
    for backend in gpus:
        backend.gate.clear()

    def ask_until_admitted() -> Answer:
        # HAProxy may count the page before for a moment after its answer has come.
        while (answer := main.ask(key=NARROW)).status == 429:
            time.sleep(0.05)
        return answer

    with in_background(ask_until_admitted) as answers:
        wait_until(lambda: sum(backend.in_flight for backend in gpus) == 1, "the page in flight")
        refused = main.ask(key=NARROW)
        for backend in gpus:
            backend.gate.set()
    assert refused.status == 429
    assert refused.headers["retry-after"] == "5"
    assert [answer.status for answer in answers] == [200]
    wait_until(lambda: main.ask(key=NARROW, connection=connection).status == 200, "a place for the next page")
    connection.close()


@pytest.mark.parametrize("size", [MIB, MIB + 1])
def test_body_is_limited(main: Gateway, size: int) -> None:
    answer = main.ask(key=ALICE, body=b"x" * size)
    assert answer.status == (200 if size == MIB else 413)
    if size > MIB:
        assert answer.error["type"] == "RequestTooLarge"


def test_body_without_a_length_is_refused(main: Gateway, backends: Backends) -> None:
    head = f"POST {PAGE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nConnection: close\r\n"
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"5\r\nhello\r\n0\r\n\r\n"
    assert main.raw(chunked).startswith(b"HTTP/1.1 411 ")
    both = f"{head}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + b"5\r\nhello\r\n0\r\n\r\n"
    assert main.raw(both).split()[1] in (b"400", b"411")
    other = chunked.replace(f"POST {PAGE}".encode(), b"GET /v1/models")
    assert main.raw(other).startswith(b"HTTP/1.1 411 ")
    assert not backends["gpu1"].pages + backends["gpu2"].pages


def test_client_of_openai_reads_a_refusal_before_its_page_is_sent(main: Gateway) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{main.port}/v1", api_key=ALICE, max_retries=0) as client:
        with pytest.raises(openai.APIStatusError, match="larger than 1 MiB") as caught:
            client.chat.completions.create(model="dots.ocr", messages=[{"role": "user", "content": "x" * 20 * MIB}])
        assert caught.value.status_code == 413


def test_client_of_openai_comes_back_when_there_is_room(small: Gateway, backends: Backends) -> None:
    backend = backends["one"]
    backend.gate.clear()
    statuses: list[int] = []

    def note(response: httpx2.Response) -> None:
        statuses.append(response.status_code)
        backend.gate.set()

    transport = httpx2.Client(event_hooks={"response": [note]})
    with in_background(partial(small.ask, key=ALICE), 3) as answers:
        wait_until(lambda: small.queued() == 2, "two pages that wait")
        address = f"http://127.0.0.1:{small.port}/v1"
        with openai.OpenAI(base_url=address, api_key=ALICE, http_client=transport) as client:
            client.chat.completions.create(model="dots.ocr", messages=[{"role": "user", "content": "page"}])
    assert statuses[0] == 503
    assert statuses[-1] == 200
    assert [answer.status for answer in answers] == [200] * 3


def test_pages_wait_at_the_gateway_up_to_a_limit(small: Gateway, backends: Backends) -> None:
    backend = backends["one"]
    backend.gate.clear()
    with in_background(partial(small.ask, key=ALICE), 3) as answers:
        wait_until(lambda: small.queued() == 2, "two pages that wait")
        wait_until(lambda: backend.in_flight == 1, "the page in flight")
        refused = small.ask(key=ALICE)
        backend.gate.set()
    assert refused.status == 503
    assert refused.headers["retry-after"] == "1"
    assert "waiting" in refused.error["message"]
    assert [answer.status for answer in answers] == [200] * 3


def test_page_that_waits_for_too_long_is_given_back(small: Gateway, backends: Backends) -> None:
    backend = backends["one"]
    backend.gate.clear()
    with in_background(partial(small.ask, key=ALICE)) as first:
        wait_until(lambda: backend.in_flight == 1, "the page in flight")
        answer = small.ask(key=ALICE)  # after dots_ocr_gateway_queue_timeout
        backend.gate.set()
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert first[0].status == 200


def test_who_hangs_up_does_not_keep_a_place(small: Gateway, backends: Backends) -> None:
    backend = backends["one"]
    backend.gate.clear()
    with in_background(partial(small.ask, key=ALICE)):
        wait_until(lambda: backend.in_flight == 1, "the page in flight")
        head = f"POST {PAGE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: 2\r\n\r\n"
        with socket.create_connection(("127.0.0.1", small.port)) as client:
            client.sendall(f"{head}{{}}".encode())
            wait_until(lambda: small.queued() == 1, "a page that waits")
        wait_until(lambda: any("status=" in line for line in small.log), "its line in the log")
        backend.gate.set()
    assert "termination=CQ" in small.log[0], "in the queue, by the client, and not by the queue's timeout"


def test_reload_under_load_loses_nothing_and_keeps_a_server_drained(main: Gateway) -> None:
    main.command("set server ocr/gpu2 state drain")
    stop = threading.Event()
    statuses: list[int] = []
    faults: list[Exception] = []

    def load(keep: bool) -> None:
        connection = main.connect()
        while not stop.is_set():
            try:
                statuses.append(main.ask(key=ALICE, body=b"x" * 65536, connection=connection if keep else None).status)
            except Exception as error:
                faults.append(error)
                connection = main.connect()
            time.sleep(0.005)
        connection.close()

    threads = [threading.Thread(target=load, args=(keep,), daemon=True) for keep in (True, True, False)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            enough = len(statuses) + 5
            wait_until(lambda enough=enough: len(statuses) > enough, "pages")  # type: ignore[misc]
            main.reload()
            assert main.status("gpu2").startswith("DRAIN")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults
    assert set(statuses) == {200}


def test_log_names_client_server_and_times_but_no_key_and_no_content(main: Gateway) -> None:
    main.ask(key=ALICE, path=f"{PAGE}?secret=query")
    main.ask(key="a-wrong-key-that-nobody-may-read")
    main.ask("GET", "/secret-path/a-wrong-key-that-nobody-may-read", key=ALICE)
    wait_until(lambda: len([line for line in main.log if "status=" in line]) >= 3, "three lines")
    lines = [line for line in main.log if "status=" in line]
    # Connections log when they end, in whatever order.
    fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    read, unknown, missing = sorted(fields, key=lambda line: line["status"])
    assert (read["client"], read["status"], read["path"], read["engine"]) == ("alice", "200", PAGE, "vllm")
    assert read["server"] in ("gpu1", "gpu2")
    assert len(read["id"]) == 36
    assert all(int(read[name]) >= 0 for name in ("queue_ms", "server_ms", "total_ms", "queued", "request_bytes"))
    assert (unknown["client"], unknown["status"]) == ("-", "401")
    assert (missing["status"], missing["path"]) == ("404", "other")
    for word in (ALICE, "nobody-may-read", "secret", SERVER_KEY, SECRET_TEXT):
        assert word not in "".join(main.log)


def test_metrics_and_statistics_are_on_their_own_port(main: Gateway) -> None:
    def get(path: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{main.metrics_port}{path}")

    metrics = get("/metrics").text
    assert 'haproxy_server_status{proxy="ocr",server="gpu1",state="UP"} 1' in metrics
    assert 'haproxy_backend_current_queue{proxy="ocr"} 0' in metrics
    assert "gpu1" in get("/stats").text
    assert get("/v1/models").status_code == 404
    assert SERVER_KEY not in metrics + get("/stats").text


def test_tls_on_both_sides(tls: Gateway) -> None:
    answer = tls.ask(key=ALICE)
    assert answer.status == 200
    assert answer.headers["x-dots-ocr-server"] == "secure"
    wait_until(lambda: tls.status("stranger") == "DOWN", "a server whose certificate has another name, down")
