"""The stand-in of vLLM cannot drift: what it answers is put beside what the real vLLM answers, request by request."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dots_ocr_client.prompts import MODES, PLACEHOLDER

from tests.gateway.support import free_ports, wait_until
from tests.live_client.conftest import OnHost

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "rehearsal/vllm_stand_in/root/usr/local/bin/vllm"
REAL_PROGRAM = REPOSITORY / "rehearsal/vllm/root/usr/local/bin/vllm"
HOST = REPOSITORY / "rehearsal/host/root"
GOLDEN = REPOSITORY / "roles/dots_ocr_server/files/golden"
METRICS = REPOSITORY / "tests/monitoring/metrics.json"
WEIGHTS = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

IMAGE = base64.b64encode((GOLDEN / "page.png").read_bytes()).decode()
CHAT, TEXT = "/v1/chat/completions", MODES["text"].prompt
TASKS = {mode: MODES[mode].prompt for mode in ("text", "layout")}
# What both say must be the same word for word; all else in an answer must be of the same type.
WORDS = {"object", "owned_by", "role", "finish_reason", "stop_reason", "type", "param", "code", "detail", "version"}
COUNTED = WORDS | {"prompt_tokens", "completion_tokens", "total_tokens", "count"}
GOLDEN_WORDS = COUNTED | {"content"}


def page(prompt: str = PLACEHOLDER + TEXT, url: str = f"data:image/png;base64,{IMAGE}", **more: Any) -> dict[str, Any]:
    """Return the body of a request to read a page."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return {"model": "dots.ocr", "messages": messages, "temperature": 0.0, "max_completion_tokens": 1024} | more


@dataclass(frozen=True)
class Case:
    """A request, with or without the API key, and which words of its answer count."""

    name: str
    method: str
    path: str
    body: Any = None
    key: str | None = "right"
    words: set[str] = field(default_factory=lambda: WORDS)


def golden(name: str, **more: Any) -> Case:
    """Return a request whose answer is known word for word."""
    return Case(name, "POST", CHAT, page(**more), words=GOLDEN_WORDS)


CASES = [
    *(Case(f"get {path}", "GET", path) for path in ("/health", "/ping", "/version", "/metrics", "/v1/models")),
    *(Case(f"get {path}", "GET", path) for path in ("/", "/nowhere", "/v1", "/v1/", "/v1/nowhere", "/v1/models?a=b")),
    *(Case(f"open {path}", "GET", path, key=None) for path in ("/health", "/ping", "/version", "/metrics", "/nowhere")),
    *(Case(f"shut {path}", "GET", path, key=None) for path in ("/v1/models", "/v1/nowhere", "/v1x", "/v2/x", CHAT)),
    Case("wrong key", "GET", "/v1/models", key="wrong"),
    Case("page without key", "POST", CHAT, page(), key=None),
    Case("post health", "POST", "/health", {}),
    Case("post ping", "POST", "/ping", {}),
    Case("post models", "POST", "/v1/models", {}),
    Case("get chat", "GET", CHAT),
    Case("head health", "HEAD", "/health"),
    Case("delete models", "DELETE", "/v1/models"),
    Case("options chat", "OPTIONS", CHAT, key=None),
    *(golden(mode, prompt=PLACEHOLDER + prompt) for mode, prompt in TASKS.items()),
    *(golden(f"{mode} without placeholder", prompt=prompt) for mode, prompt in TASKS.items()),
    golden("text before placeholder", prompt="Hello. " + PLACEHOLDER + TEXT),
    golden("first line", stop=["\n"]),
    golden("stop string", stop="Paper"),
    golden("cut off", max_completion_tokens=5),
    golden("cut off the old way", max_completion_tokens=None, max_tokens=5),
    golden("cut off, layout", prompt=PLACEHOLDER + MODES["layout"].prompt, max_completion_tokens=3),
    golden("no limit", max_completion_tokens=None),
    golden("another name", model="model", max_completion_tokens=3),
    golden("no name", model=None, max_completion_tokens=3),
    golden(
        "repetition detection", max_completion_tokens=3, repetition_detection={"max_pattern_size": 8, "min_count": 4}
    ),
    Case("beyond the end", "POST", CHAT, page(ignore_eos=True, max_completion_tokens=300), words=COUNTED),
    golden("stream", stream=True),
    golden("stream with usage", stream=True, stream_options={"include_usage": True}),
    golden("stream of the first line", stream=True, stop=["\n"], stream_options={"include_usage": True}),
    golden("stream that is cut off", stream=True, max_completion_tokens=60),
    Case(
        "text alone",
        "POST",
        CHAT,
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True},
    ),
    Case("not base64", "POST", CHAT, page(url="data:image/png;base64,canary")),
    Case("truncated", "POST", CHAT, page(url=f"data:image/png;base64,{IMAGE[:20000]}")),
    Case("no image", "POST", CHAT, page(url=f"data:image/png;base64,{base64.b64encode(b'hello').decode()}")),
    Case("empty image", "POST", CHAT, page(url="data:image/png;base64,")),
    Case("broken image in a stream", "POST", CHAT, page(url="data:image/png;base64,canary", stream=True)),
    Case("http", "POST", CHAT, page(url="http://127.0.0.1:8000/health")),
    Case("https", "POST", CHAT, page(url="https://example.org/page.png")),
    Case("no url", "POST", CHAT, page(url="page.png")),
    Case(
        "two images", "POST", CHAT, page(messages=[{"role": "user", "content": page()["messages"][0]["content"] * 2}])
    ),
    Case("no messages", "POST", CHAT, {"model": "dots.ocr"}),
    Case("empty messages", "POST", CHAT, page(messages=[])),
    Case("another model", "POST", CHAT, page(model="gpt")),
    Case("another model in a stream", "POST", CHAT, page(model="gpt", stream=True)),
    Case("nothing to write", "POST", CHAT, page(max_completion_tokens=0)),
    Case("too much to write", "POST", CHAT, page(max_completion_tokens=100000)),
    Case("too much to read", "POST", CHAT, page(prompt=PLACEHOLDER + "x" * 9000, max_completion_tokens=None)),
    Case("no JSON", "POST", CHAT, b"{nonsense"),
    Case("no body", "POST", CHAT, b""),
    Case("a list", "POST", CHAT, []),
    *(Case(f"closed {path}", "POST", path, page()) for path in ("/invocations", "/tokenize", "/v1/completions")),
    golden("key of no use", logprobs=True),
    golden("unknown key", nobody=1),
]


class Answer(NamedTuple):
    """What a server says to a request."""

    status: int
    kind: str | None
    text: str


@dataclass(frozen=True)
class Server:
    """A server to ask, and its log if it is ours."""

    url: str
    key: str
    log: Path = Path("/dev/null")

    def ask(self, case: Case) -> Answer:
        """Send a request."""
        headers = {"Content-Type": "application/json"}
        if case.key:
            headers["Authorization"] = f"Bearer {self.key if case.key == 'right' else case.key}"
        body = case.body if isinstance(case.body, bytes | None) else json.dumps(case.body).encode()
        request = urllib.request.Request(self.url + case.path, body, headers, method=case.method)
        try:
            with urllib.request.urlopen(request, timeout=60, context=ssl._create_unverified_context()) as answer:
                return Answer(answer.status, answer.headers["Content-Type"], answer.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers["Content-Type"], error.read().decode())

    def metrics(self) -> dict[str, float]:
        """Return the metrics, those that differ by a label added up."""
        found: dict[str, float] = {}
        for name, value in re.findall(
            r"^(\w[\w:]*)\S*\s+(\S+)$", self.ask(Case("", "GET", "/metrics")).text, re.MULTILINE
        ):
            found[name] = found.get(name, 0.0) + float(value)
        return found


@dataclass(frozen=True)
class StandIn:
    """How to start the program."""

    folder: Path
    arguments: list[str]
    key: str

    def command(self, *more: str) -> list[str]:
        """Return the command line, with a port of its own and more options."""
        (port,) = free_ports(1)
        names = self.arguments.index("--served-model-name")
        options = [word for word in self.arguments[1:names] if not word.startswith(("--host=", "--port="))]
        command = [sys.executable, str(PROGRAM), "serve", str(self.folder / "model"), "--host=127.0.0.1"]
        return [*command, f"--port={port}", *options, *more, *self.arguments[names:]]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment, with more variables."""
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": path,
            "REHEARSAL_GOLDEN": f"{self.folder}/golden",
            "VLLM_API_KEY": self.key,
            "PYTHONPATH": f"{self.folder}/gate",
            **more,
        }

    @contextlib.contextmanager
    def running(self, *more: str, **variables: str) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
        """Have the program run with its log in a file, and kill it if it does not end by itself."""
        command = self.command(*more)
        scheme, port = "https" if "--ssl-keyfile" in str(more) else "http", command[5].partition("=")[2]
        server = Server(f"{scheme}://127.0.0.1:{port}", self.key, self.folder / f"{port}.log")
        with (
            server.log.open("w") as file,
            subprocess.Popen(command, env=self.environment(**variables), stdout=file, stderr=file) as process,
        ):
            try:
                wait_until(lambda: "startup complete" in server.log.read_text(), f"a server: {command}")
                yield server, process
            finally:
                process.kill()

    def refused(self, *more: str, **variables: str) -> tuple[int, str]:
        """Return the status and the complaint of a program that does not start."""
        done = subprocess.run(
            self.command(*more),
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return done.returncode, done.stderr


@pytest.fixture(scope="module")
def program(on_host: OnHost, api_key: str, tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """The stand-in with the real server's arguments, a GPU, and weights that are just whole."""
    folder = tmp_path_factory.mktemp("stand-in")
    for name in ("bin", "model", "golden", "gate"):
        (folder / name).mkdir()
    for name in ("dots_ocr_gate.py", "dots_ocr_gate.settings"):
        (folder / "gate" / name).write_text(on_host("cat", f"/etc/dots-ocr/server/{name}"))
    for file in (*GOLDEN.iterdir(), METRICS):
        (folder / "golden" / file.name).write_bytes(file.read_bytes())
    (folder / "gpu.json").write_bytes((HOST / "etc/stand-in-gpu.json").read_bytes())
    nvidia_smi = (HOST / "usr/bin/nvidia-smi").read_text().replace("/etc/stand-in-gpu.json", f"{folder}/gpu.json")
    (folder / "bin/nvidia-smi").write_text(nvidia_smi)
    (folder / "bin/nvidia-smi").chmod(0o755)
    (folder / "model/config.json").write_text("{}")
    (folder / "model/model.safetensors").write_bytes(struct.pack("<Q", len(WEIGHTS)) + WEIGHTS + bytes(4))
    return StandIn(
        folder, json.loads(on_host("docker", "inspect", "--format={{json .Config.Cmd}}", "dots-ocr")), api_key
    )


@pytest.fixture(scope="module")
def stand_in(program: StandIn) -> Iterator[Server]:
    """The stand-in, running."""
    with program.running() as (server, _):
        yield server


@pytest.fixture(scope="module")
def real(base_url: str, api_key: str) -> Server:
    """The real vLLM."""
    return Server(base_url.removesuffix("/v1"), api_key)


def shape(value: Any, words: set[str], name: str = "") -> Any:
    """Return what has to be alike in two answers: keys, types, and some words."""
    if isinstance(value, dict):
        return {key: shape(value[key], words, key) for key in sorted(value)}
    if isinstance(value, list):
        return collapse([shape(entry, words) for entry in value])
    return value if name in words else type(value).__name__


def collapse(entries: list[Any]) -> list[Any]:
    """Return a list without repetitions."""
    return [entry for at, entry in enumerate(entries) if at == 0 or entries[at - 1] != entry]


def comparable(answer: Answer, words: set[str]) -> Any:
    """Return what has to be alike in two answers."""
    if answer.kind == "application/json" and answer.text:
        return answer.status, answer.kind, shape(json.loads(answer.text), words)
    if (answer.kind or "").startswith("text/event-stream"):
        events = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
        chunks = [json.loads(event) for event in events[:-1]]
        said = "".join(str(choice.get("delta", {}).get("content")) for chunk in chunks for choice in chunk["choices"])
        shapes = collapse([shape(chunk, words - {"content"}) for chunk in chunks])
        return answer.status, answer.kind, said if "content" in words else "", shapes, events[-1]
    return answer.status, answer.kind


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_answer_alike(case: Case, real: Server, stand_in: Server) -> None:
    assert comparable(stand_in.ask(case), case.words) == comparable(real.ask(case), case.words)


def test_metrics_have_the_names_that_prometheus_keeps(real: Server, stand_in: Server) -> None:
    assert {*stand_in.metrics()} == {name for name in real.metrics() if not re.match("python_|http_", name)}


def test_a_full_queue_is_refused_in_the_same_words(real: Server, program: StandIn) -> None:
    def refusals(server: Server) -> set[str]:
        case = Case(
            "", "POST", CHAT, page(messages=[{"role": "user", "content": "hi"}], ignore_eos=True, max_tokens=300)
        )
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(server.ask, [case] * 40))
        assert {answer.status for answer in answers} == {200, 503}
        return {answer.text for answer in answers if answer.status == 503}

    with program.running(REHEARSAL_PAGE_SECONDS="0.5") as (server, _):
        assert refusals(server) == refusals(real)
        assert server.metrics()["vllm:admission_rejections_total"] > 0


def test_a_page_is_counted(stand_in: Server) -> None:
    before = stand_in.metrics()
    stand_in.ask(golden(""))
    after = stand_in.metrics()
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    assert [after[name] - before[name] for name in names] == [231, 225, 1]


def test_as_many_pages_as_told_are_read_at_a_time(program: StandIn) -> None:
    with program.running(REHEARSAL_PAGE_SECONDS="3") as (server, _), ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(server.ask, golden("")) for _ in range(6)]
        seen: dict[str, float] = {}

        def two_wait() -> bool:
            seen.update(server.metrics())  # a second question may come when all have been read
            return seen["vllm:num_requests_waiting"] == 2

        wait_until(two_wait, "two pages that wait")
        assert seen["vllm:num_requests_running"] == 4
        assert [answer.result().status for answer in answers] == [200] * 6


@pytest.mark.parametrize(("seconds", "status"), [("15", 200), ("0", 500)])
def test_pages_in_flight_are_read_when_it_is_told_to_stop(program: StandIn, seconds: str, status: int) -> None:
    with (
        program.running(f"--shutdown-timeout={seconds}", REHEARSAL_PAGE_SECONDS="5") as (server, process),
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(server.ask, golden(""))
        wait_until(lambda: server.metrics()["vllm:num_requests_running"] == 1, "the page in flight")
        process.terminate()
        if seconds != "0":
            time.sleep(0.5)  # it tells nobody that it has heard
            assert server.ask(Case("", "GET", "/health")).status == 200
            refused = server.ask(golden(""))
            assert (refused.status, json.loads(refused.text)["error"]["type"]) == (500, "InternalServerError")
        assert answer.result().status == status
        assert process.wait(5) == 0


@pytest.mark.parametrize("option", ["--max-number-seqs=7", "--max-model-l=4096", "--disable-log-stats"])
def test_option_that_no_profile_or_remedy_has_is_refused(program: StandIn, option: str) -> None:
    status, complaint = program.refused(option)
    assert (status, f"error: unrecognized arguments: {option}" in complaint) == (2, True), complaint


def test_value_of_the_wrong_kind_is_refused(program: StandIn) -> None:
    status, complaint = program.refused("--limit-mm-per-prompt={image:1}")
    assert (status, "argument --limit-mm-per-prompt" in complaint) == (2, True), complaint


@pytest.mark.parametrize("content", [None, b"", bytes(99), b"\1" * 99])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_that_are_not_whole_are_refused(
    program: StandIn, name: str, content: bytes | None, request: pytest.FixtureRequest
) -> None:
    restore(program.folder / "model" / name, request)
    (program.folder / "model" / name).unlink()
    if content is not None:
        (program.folder / "model" / name).write_bytes(content)
    status, complaint = program.refused()
    assert (status, "Error: " in complaint, "Traceback" in complaint) == (1, True, False), complaint


def test_truncated_weights_are_refused(program: StandIn, request: pytest.FixtureRequest) -> None:
    file = program.folder / "model/model.safetensors"
    restore(file, request)
    file.write_bytes(file.read_bytes()[:-1])
    assert "SafetensorError" in program.refused()[1]


def restore(file: Path, request: pytest.FixtureRequest) -> None:
    """Put back what is in a file after a test."""
    content = file.read_bytes()
    request.addfinalizer(lambda: file.write_bytes(content))


def words_of(complaint: str) -> str:
    """Return a complaint without its numbers, or a program's source without those that it puts in."""
    return re.sub(r'[\d.]+|\{.*?\}|"\s+f?"', "", complaint)


def test_gpu_that_is_full_is_refused_in_the_same_words(program: StandIn, request: pytest.FixtureRequest) -> None:
    file = program.folder / "gpu.json"
    restore(file, request)
    file.write_text(file.read_text().replace('"memory.used": 512', '"memory.used": 14000'))
    status, complaint = program.refused()
    assert (status, words_of(complaint).strip() in words_of(REAL_PROGRAM.read_text())) == (1, True), complaint


def test_image_without_kernels_ends_as_it_would(program: StandIn) -> None:
    complaint = "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
    assert program.refused(REHEARSAL_FAULT="no-kernel") == (1, complaint)


def test_wrong_model_is_healthy_and_does_not_read(program: StandIn) -> None:
    with program.running(REHEARSAL_FAULT="wrong-model") as (server, _):
        served = json.loads(server.ask(Case("", "GET", "/v1/models")).text)["data"]
        assert [card["id"] for card in served] == ["facebook/opt-125m"]
        assert server.ask(Case("", "GET", "/health")).status == 200
        assert server.ask(golden("")).status == 404


def test_log_tells_nothing_of_what_was_asked(program: StandIn) -> None:
    with program.running() as (server, process):
        for body in (
            page(prompt="canary"),
            page(url="data:image/png;base64,canary"),
            b"canary",
            {"messages": ["canary"]},
        ):
            server.ask(Case("", "POST", CHAT, body))
        server.ask(Case("", "GET", "/health"))
        process.terminate()
        assert process.wait(5) == 0
    log = server.log.read_text()
    assert log.count(f'"POST {CHAT} HTTP/1.1" ') == 4
    assert "canary" not in log
    assert program.key not in log
    assert "GET /health" not in log


def test_it_speaks_tls_and_a_client_that_does_not_holds_up_nobody(program: StandIn) -> None:
    certificate, key = program.folder / "certificate.pem", program.folder / "key.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = f"--ssl-certfile={certificate}", f"--ssl-keyfile={key}"
    with (
        program.running(*options) as (server, _),
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))),
    ):
        assert server.ask(golden("")).status == 200
