"""What stands in front of a server on demand, over real sockets, with a server behind it that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import programs

front = programs.load("front")
ready, watchdog = programs.load("ready"), programs.load("watchdog")
ocr_probe = front.ocr_probe

PAGE = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\npage"
READ = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nread!"


class Host:
    """A front, the server behind it, and what systemd would do with both."""

    def __init__(self, folder: Path, idle: float) -> None:
        self.folder = folder
        self.requests: list[bytes] = []
        self.starts = 0
        self.healths = 0
        self.burst = 0  # connections that have to wait before it starts
        self.server: asyncio.Server | None = None
        self.answers = asyncio.Event()  # without it the server keeps what it was asked
        self.answers.set()
        self.left = asyncio.Event()
        (folder / "units/some.wants").mkdir(parents=True)
        (folder / "units/some.wants/dots-ocr.service").touch()
        (folder / "run/dots-ocr").mkdir(parents=True)
        settings = {
            **{
                "unit": "dots-ocr.service",
                "url": "http://127.0.0.1:1",
                "port": 0,
                "model": "dots.ocr",
                "likeness": 0.9,
            },
            **{"api_key_file": "", "plan": {"max_model_len": 8192}},
            "on_demand": {"idle": idle, "address": "127.0.0.1", "behind": "http://127.0.0.1:1"},
        }
        (folder / "dots-ocr.json").write_text(json.dumps(settings))
        (folder / "dots_ocr_gate.settings").write_text(json.dumps({"page": "<p>$state</p>"}))
        server = ocr_probe.load_server("dots-ocr", folder, keyless=True)
        self.front = front.Front(server, folder / "run", folder / "units")

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a request as vLLM does."""
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /health"):
            self.healths += 1
        else:
            self.requests.append(head + (await reader.readexactly(4) if head.startswith(b"POST") else b""))
            watching = asyncio.ensure_future(self.watch(reader))
            await self.answers.wait()
            watching.cancel()
        writer.write(READ)
        writer.close()

    async def watch(self, reader: asyncio.StreamReader) -> None:
        """Note that a client has left."""
        if not await reader.read():
            self.left.set()

    async def start(self) -> None:
        """Start the server behind."""
        self.starts += 1
        port = self.front.behind.port if self.starts > 1 else 0
        self.server = await asyncio.start_server(self.read, "127.0.0.1", port)
        self.front.behind = front.urllib.parse.urlsplit(f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}")

    async def stop(self) -> None:
        """Stop it."""
        assert self.server
        self.server.close()
        await self.server.wait_closed()
        self.server = None

    async def wake(self) -> None:
        """Do what the path unit does."""
        while True:
            wake = (self.folder / "run/dots-ocr/wake").exists()
            if wake and self.server is None and self.front.active >= self.burst:
                await self.start()
            await asyncio.sleep(0.001)

    async def ask(self, request: bytes) -> bytes:
        """Return the whole answer of the front."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async def may_sleep(self) -> tuple[bytes, asyncio.StreamWriter]:
        """Ask as the watchdog does; the front holds what comes until the connection ends."""
        reader, writer = await asyncio.open_unix_connection(self.folder / "run/dots-ocr/control")
        said = await reader.readexactly(4)  # of stay, or the begin of sleep: it does not close the connection
        return said, writer

    async def run(self, play: Callable[[Host], Awaitable[None]]) -> None:
        """Run the front while the play lasts."""
        listening: list[asyncio.Server] = []
        start = asyncio.start_server

        async def note(*words: Any, **options: Any) -> asyncio.Server:
            listening.append(await start(*words, **options))
            return listening[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(front.asyncio, "start_server", note)
            tasks = [asyncio.ensure_future(self.front.serve()), asyncio.ensure_future(self.wake())]
            while not listening:
                assert not tasks[0].done(), tasks[0]
                await asyncio.sleep(0.001)
        self.port = listening[0].sockets[0].getsockname()[1]
        try:
            await asyncio.wait_for(play(self), 30)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "POLL_SECONDS", 0.001)


def run(folder: Path, play: Callable[[Host], Awaitable[None]], idle: float = 0) -> None:
    async def whole() -> None:
        await Host(folder, idle).run(play)

    asyncio.run(whole())


@pytest.mark.parametrize("path", ["/health", "/", "/metrics", "/v1/models"])
def test_asking_for_its_state_wakes_nobody(tmp_path: Path, path: str) -> None:
    async def play(host: Host) -> None:
        answer = await host.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        told = {
            "/": "<p>asleep: the next page wakes it · спит: первая страница разбудит</p>".encode(),
            "/metrics": b"dots_ocr_asleep 1\n",
            "/v1/models": b'"id": "dots.ocr"',  # as the gateway's check looks for it
        }.get(path, b'{"status": "asleep", "expected_seconds": null}')
        assert told in body
        assert f"Content-Length: {len(body)}\r\n".encode() in head
        assert (b"default-src 'none'" in head) == (path == "/")
        assert await host.ask(f"HEAD {path} HTTP/1.1\r\n\r\n".encode()) == head + b"\r\n\r\n"
        assert not (host.folder / "run/dots-ocr/wake").exists()
        assert host.starts == 0

    run(tmp_path, play)


def test_a_burst_wakes_it_once_and_every_page_is_read(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        host.burst = 200
        answers = await asyncio.gather(*(host.ask(PAGE) for _ in range(200)))
        assert answers == [READ] * 200
        assert host.starts == 1
        assert host.healths < 100  # one asks for all
        assert not (host.folder / "run/dots-ocr/wake").exists()
        # One request for each connection, else nobody would know when none is left.
        assert set(host.requests) == {
            PAGE.replace(b"Connection: keep-alive\r\n", b"").replace(b"4\r\n", b"4\r\nConnection: close\r\n")
        }
        await host.stop()
        assert (
            json.loads((await host.ask(b"GET /health HTTP/1.1\r\n\r\n")).split(b"\r\n\r\n")[1])["expected_seconds"] > 0
        )

    run(tmp_path, play)


def test_awake_it_hands_on_what_it_would_answer_itself(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        await host.start()
        assert await host.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") == READ
        assert host.requests == [b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]

    run(tmp_path, play)


def test_it_may_sleep_when_nobody_reads_and_holds_what_comes_meanwhile(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        await host.start()
        host.answers.clear()
        reading = asyncio.ensure_future(host.ask(PAGE))
        while not host.requests:
            await asyncio.sleep(0.001)
        said, asker = await host.may_sleep()
        assert said == b"stay"
        asker.close()
        host.answers.set()
        await reading

        said, asker = await host.may_sleep()
        assert b"sleep".startswith(said)
        held = asyncio.ensure_future(host.ask(PAGE))
        await host.stop()
        # Not before the server is down, or it would be handed on to one that ends.
        assert b"asleep" in await host.ask(b"GET /health HTTP/1.1\r\n\r\n")
        assert (len(host.requests), host.starts) == (1, 1)
        asker.close()
        assert await held == READ
        assert (len(host.requests), host.starts) == (2, 2)

    run(tmp_path, play)


def test_it_stays_for_as_long_as_it_shall(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        assert (await host.may_sleep())[0] == b"stay"

    run(tmp_path, play, idle=3600)


def test_a_server_that_its_owner_stopped_is_not_woken(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        (host.folder / "units/some.wants/dots-ocr.service").unlink()
        for request in (PAGE, b"GET /health HTTP/1.1\r\n\r\n"):
            answer = await host.ask(request)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"stopped" in answer
        assert b"Fix: 'dots-ocr-server start'" in await host.ask(PAGE)
        assert host.starts == 0

    run(tmp_path, play)


def test_a_stop_while_it_wakes_is_not_undone(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        host.burst = 2  # so that it does not start for one
        page = asyncio.ensure_future(host.ask(PAGE))
        while not host.front.active:
            await asyncio.sleep(0.001)
        (host.folder / "units/some.wants/dots-ocr.service").unlink()
        assert b"stopped the OCR server" in await page
        assert not (host.folder / "run/dots-ocr/wake").exists()

    run(tmp_path, play)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /favicon.ico HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /v1/completions HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /health HTTP/1.1\r\n\r\n", b"404"),
        (PAGE, b"401"),
        (PAGE.replace(b"Host: x", b"Authorization: Bearer another"), b"401"),
        (PAGE.replace(b"Host: x", b"authorization: Bearer secret"), b"200"),
        (PAGE.replace(b"Host: x", b"Authorization: bearer secret"), b"200"),
    ],
)
def test_only_a_page_with_the_key_wakes_it(tmp_path: Path, request_: bytes, status: bytes) -> None:
    async def play(host: Host) -> None:
        (host.folder / "run/dots-ocr/key").write_text(hashlib.sha256(b"secret").hexdigest() + "  -\n")
        assert (await host.ask(request_)).startswith(b"HTTP/1.1 " + status)
        assert host.starts == (status == b"200")

    run(tmp_path, play)


def test_a_client_that_still_sends_a_large_page_reads_the_answer(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        (host.folder / "units/some.wants/dots-ocr.service").unlink()
        large = PAGE.replace(b"Length: 4", b"Length: 8000004") + b"x" * 8_000_000

        def send() -> bytes:
            with socket.create_connection(("127.0.0.1", host.port)) as client:
                client.sendall(large)
                return client.recv(65536)

        assert (await asyncio.to_thread(send)).startswith(b"HTTP/1.1 503")

    run(tmp_path, play)


def test_a_client_that_is_cut_off_ends_its_page(tmp_path: Path) -> None:
    async def play(host: Host) -> None:
        await host.start()
        host.answers.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", host.port)
        writer.write(PAGE)
        while not host.requests:
            await asyncio.sleep(0.001)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await host.left.wait()
        host.answers.set()

    run(tmp_path, play)


def test_a_server_that_does_not_wake_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HELD_SECONDS", 0)

    async def never() -> None:
        await asyncio.Event().wait()

    async def play(host: Host) -> None:
        answer = await host.ask(PAGE)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 60\r\n" in answer
        assert "Fix: " in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        # A gateway takes it out.
        assert (await host.ask(b"GET /health HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 503")

    monkeypatch.setattr(Host, "start", lambda _: never())
    run(tmp_path, play)


@pytest.mark.parametrize("request_", [b"nonsense\r\n\r\n", b"GET /health", b"\xff \xff \xff\r\n\r\n", b"x" * 200_000])
def test_what_is_no_http_gets_no_answer_and_wakes_nobody(tmp_path: Path, request_: bytes) -> None:
    async def play(host: Host) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
        with contextlib.suppress(OSError):
            writer.write(request_)
            writer.write_eof()
            assert await reader.read() == b""
        writer.close()
        assert host.starts == 0

    run(tmp_path, play)


@pytest.mark.parametrize(
    ("unit", "starts"),
    [
        ({"ActiveState": "inactive", "UnitFileState": "enabled"}, ["systemctl start --no-block dots-ocr.service"]),
        ({"ActiveState": "inactive", "UnitFileState": "disabled"}, []),
        ({"ActiveState": "active", "UnitFileState": "enabled"}, []),
        ({"ActiveState": "activating", "UnitFileState": "enabled"}, []),
    ],
)
def test_readiness_wakes_it_and_asks_behind_the_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: dict[str, str], starts: list[str]
) -> None:
    called: list[str] = []
    monkeypatch.setattr(ocr_probe, "unit_properties", lambda *_: unit)
    monkeypatch.setattr(ocr_probe, "run", lambda *command: called.append(" ".join(command)))
    Host(tmp_path, 60)
    settings = json.loads((tmp_path / "dots-ocr.json").read_text())
    settings |= {"url": "http://127.0.0.1:8000"}
    (tmp_path / "dots-ocr.json").write_text(json.dumps(settings))
    server = ocr_probe.load_server("dots-ocr", tmp_path)
    assert server.url == "http://127.0.0.1:1"
    ready.wake(server)
    assert called == starts


def test_the_watchdog_stops_it_only_where_the_front_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[tuple[str, ...]] = []
    monkeypatch.setattr(watchdog.ocr_probe, "systemctl", lambda *words, **_: stopped.append(words))

    async def play(host: Host) -> None:
        for idle, calls in ((3600, []), (0, [("stop", "dots-ocr.service")])):
            host.front.idle = idle
            asking = threading.Thread(target=watchdog.sleep, args=(host.front.server, host.folder / "run"))
            asking.start()
            while asking.is_alive():
                await asyncio.sleep(0.001)
            assert stopped == calls

    run(tmp_path, play)
