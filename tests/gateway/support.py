"""Scripted servers, a real HAProxy in front of them, and a client that sees every byte."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = "/v1/chat/completions"
SERVER_KEY = "the-key-of-all-servers-0123456789"
SECRET_TEXT = "what stands on the page"
PATIENCE = 30.0
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "haproxy"


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, and fail if it never comes true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Return TCP ports of the loopback that nobody uses, of those that the kernel gives to nobody who does not ask."""
    found: list[int] = []
    for port in random.sample(range(10_000, 32_000), 1_000):
        with contextlib.suppress(OSError), socket.socket() as each:
            each.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def lower(headers: Message) -> dict[str, str]:
    """Return headers by their names in small letters."""
    return {name.lower(): value for name, value in headers.items()}


@dataclass
class Backend:
    """A server that speaks as much of vLLM's API as the gateway and its clients do."""

    name: str
    engine: str = "vllm"
    capacity: int = 2
    tls: ssl.SSLContext | None = None
    model: str = "dots.ocr"
    healthy: bool = True
    status: int = 200
    reset: bool = False
    key: str = SERVER_KEY
    gate: threading.Event = field(default_factory=threading.Event)
    pages: list[dict[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    in_flight: int = 0

    def __post_init__(self) -> None:
        """Start to answer."""
        self.lock = threading.Lock()
        self.start(0)
        self.port: int = self.server.server_address[1]

    def start(self, port: int) -> None:
        """Listen at a port."""
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

            def answer(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content, separators=(",", ":")).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("X-Dots-Ocr-Engine", "what the server says of itself")
                self.send_header("X-Dots-Ocr-More", "what only the gateway may say")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path == "/health":
                    self.answer(200 if backend.healthy else 503, {})
                elif self.path != "/v1/models":
                    backend.others.append(self.path)
                    self.answer(200, {})
                elif self.headers["Authorization"] != f"Bearer {backend.key}":
                    self.answer(401, {"error": "Unauthorized"})
                else:
                    self.answer(200, {"object": "list", "data": [{"id": backend.model, "object": "model"}]})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                backend.pages.append({"path": self.path, **lower(self.headers)})
                with backend.lock:
                    backend.in_flight += 1
                try:
                    backend.gate.wait(PATIENCE)
                finally:
                    with backend.lock:
                        backend.in_flight -= 1
                if backend.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                    self.close_connection = True
                elif self.headers["Authorization"] != f"Bearer {backend.key}":
                    self.answer(401, {"error": "Unauthorized"})
                else:
                    self.answer(backend.status, {"choices": [], "length": len(body), "text": SECRET_TEXT})

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing: clients that hang up are part of the tests."""

        self.server = Server(("127.0.0.1", port), Handler)
        if self.tls:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()

    def reset_script(self) -> None:
        """Answer at once, and rightly."""
        self.model, self.healthy, self.status, self.reset, self.key = "dots.ocr", True, 200, False, SERVER_KEY
        self.gate.set()
        self.pages.clear()
        self.others.clear()

    def settings(self) -> dict[str, Any]:
        """Return what the role dots_ocr_server writes of it on its host."""
        plan = {"plan": {"max_num_seqs": self.capacity, "max_num_queued_reqs": 5 * self.capacity}}
        return {
            "name": "dots-ocr",
            "unit": "dots-ocr.service",
            "port": self.port,
            "url": f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}",
            "model": "dots.ocr",
            "profile": "cpu" if self.engine == "cpu" else "native_v0_32",
            **({} if self.engine == "cpu" else plan),
        }


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Return the error that an OpenAI client reads."""
        assert self.headers["content-type"] == "application/json"
        found: dict[str, Any] = json.loads(self.body)["error"]
        assert found["code"] == self.status
        assert found["message"]
        return found


class Gateway:
    """An HAProxy with the files that the role has written, run as the unit runs it."""

    def __init__(self, folder: Path, port: int, metrics_port: int, tls: ssl.SSLContext | None = None) -> None:
        """Take the folder of the role's files."""
        self.folder, self.port, self.metrics_port, self.tls = folder, port, metrics_port, tls
        self.log: list[str] = []
        self.config = folder / "haproxy.cfg"

    def start(self) -> None:
        """Start HAProxy, and collect its log."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(self.folder / "log.sock"))
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        (self.folder / "state").write_text("1\n")
        with (self.folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [HAPROXY, "-W", "-f", self.config, "-S", self.folder / "master.sock,mode,600"],
                stdout=output,
                stderr=output,
            )
        wait_until(self._answers, f"HAProxy: {(self.folder / 'output').read_text()}")

    def _listen(self, listener: socket.socket) -> None:
        while True:
            self.log.append(listener.recv(65536).decode())

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.command("show info"))
        return False

    def stop(self) -> int:
        """Stop HAProxy as systemd does."""
        self.process.send_signal(signal.SIGUSR1)
        return self.process.wait(PATIENCE)

    def reload(self) -> None:
        """Do what the unit does for `systemctl reload`, and wait until the new worker works."""
        before = self.command("show proc", "master.sock")
        (self.folder / "state").write_text(self.command("show servers state"))
        self.process.send_signal(signal.SIGUSR2)
        fresh = re.compile(r"# workers\n(\d+) +worker +0 ")

        def works() -> bool:
            with contextlib.suppress(OSError):
                found = fresh.search(self.command("show proc", "master.sock"))
                return found is not None and found[0] not in before and self._answers()
            return False

        wait_until(works, "the new worker")

    def command(self, words: str, name: str = "admin.sock") -> str:
        """Ask HAProxy's socket."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self.folder / name))
            client.sendall(words.encode() + b"\n")
            client.shutdown(socket.SHUT_WR)  # the master process would wait for more
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    def status(self, server: str) -> str:
        """Return a server's state, such as UP."""
        return self._statistics(server)["status"]

    def health(self) -> str:
        """Return what the gateway says of itself."""
        return str(json.loads(self.ask("GET", "/health").body).get("status"))

    def sessions(self, server: str) -> int:
        """Return how many pages a server reads, as community.general.haproxy looks for it."""
        return int(self._statistics(server)["scur"])

    def queued(self) -> int:
        """Return how many pages wait."""
        return int(self._statistics("BACKEND")["qcur"])

    def in_flight(self, client: str) -> int:
        """Return how many pages of a client came, come, wait or are read."""
        found = re.search(rf"key={client} .*conn_cur=(\d+)", self.command("show table clients"))
        return int(found[1]) if found else 0

    def connections(self) -> int:
        """Return how many connections clients have."""
        return int(self._statistics("FRONTEND", "api")["scur"])

    def _statistics(self, server: str, proxy: str = "ocr") -> dict[str, str]:
        head, *lines = self.command("show stat").removeprefix("# ").splitlines()
        names = head.split(",")
        rows = (dict(zip(names, line.split(","), strict=False)) for line in lines if line)
        return next(row for row in rows if row["pxname"] == proxy and row["svname"] == server)

    def connect(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """Return a connection of a client at an address."""
        place: dict[str, Any] = {"port": self.port, "timeout": PATIENCE, "source_address": (source, 0)}
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", **place, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", **place)

    def ask(
        self,
        method: str = "POST",
        path: str = PAGE,
        key: str | None = None,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """Send one request."""
        if method == "POST" and body is None:
            body = json.dumps({"model": "dots.ocr", "messages": [SECRET_TEXT]}).encode()
        wanted = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        used = connection or self.connect()
        # Who is refused before the page is sent has to read the answer all the same, as httpx does.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            used.request(method, path, body, wanted)
        response = used.getresponse()
        answer = Answer(response.status, lower(response.headers), response.read())
        if connection is None:
            used.close()
        return answer

    def raw(self, request: bytes) -> bytes:
        """Send bytes, and return all that comes back."""
        with self.dial() as client:
            client.sendall(request)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def dial(self, beginning: bytes = b"") -> socket.socket:
        """Connect, send the beginning of a request, and leave it at that."""
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        if self.tls:
            client = self.tls.wrap_socket(client, server_hostname="127.0.0.1")
        client.sendall(beginning)
        return client


@contextlib.contextmanager
def in_background(action: Callable[[], Answer], count: int = 1) -> Iterator[list[Answer]]:
    """Do something several times at once; the answers are complete at the end."""
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(action()), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        for thread in threads:
            thread.join(PATIENCE)
