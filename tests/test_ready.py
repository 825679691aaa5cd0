"""The readiness check against servers that are ready, starting, or wrong, over real sockets."""

from __future__ import annotations

import datetime
import io
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests import programs

GOLDEN = (programs.FILES / "golden/page.txt").read_text()
READY, FAILED, NOT_YET, WRONG_USAGE = 0, 1, 75, 2
KEY = "sk-0123456789abcdef"
INVOCATION = "5e2f"

DIAGNOSES = json.loads((programs.FILES / "diagnoses.json").read_text())
NEEDED = ("name", "pattern", "example", "cause", "meaning", "advice", "source")

ready = programs.load("ready")
ocr_probe = ready.ocr_probe


class Host:
    """A host with one server's settings and a stub of systemd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.call: programs.Call = programs.call
        self.settings_folder = folder / "server"
        self.settings_folder.mkdir()
        self.key_file = folder / "api-key"
        self.command("systemctl", "InvocationID=" + INVOCATION)
        self.command("journalctl", "")

    def command(self, name: str, output: str) -> None:
        """Install a program that prints this."""
        (self.folder / f"{name}.output").write_text(output + "\n")
        program = self.folder / name
        program.write_text(f"#!/bin/sh\ncat {self.folder}/{name}.output\n")
        program.chmod(0o755)

    def configure(self, url: str, /, **changes: Any) -> None:
        """Write the settings of the server."""
        settings = {
            "unit": "dots-ocr.service",
            "url": url,
            "model": "dots.ocr",
            "likeness": 0.9,
            "api_key_file": str(self.key_file) if self.key_file.exists() else "",
            "more": "is ignored",
            **changes,
        }
        (self.settings_folder / "dots-ocr.json").write_text(json.dumps(settings))

    def require_key(self, text: str = KEY + "\n") -> None:
        """Give the host an API key."""
        self.key_file.write_text(text)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the check."""
        folders = [f"--settings-folder={self.settings_folder}", f"--state-folder={self.folder}"]
        # A proxy that leads nowhere, and no exception from it.
        proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
        return self.call(ready, *folders, *options, PATH=f"{self.folder}:{os.environ['PATH']}", **proxy)

    def contain(self, *files: str) -> Path:
        """Return the home folder of a container with these files; what is executed in it is executed here."""
        program = self.folder / "docker"
        program.write_text('#!/bin/sh\n[ "$1 $2" = "exec dots-ocr" ] && shift 2 && exec "$@"\n')
        program.chmod(0o755)
        home = self.folder / "home"
        for name in files:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(name)
        return home

    def check(self, server: HTTPServer | str, *options: str, **changes: Any) -> tuple[int, dict[str, Any]]:
        """Run the check on a server; return its exit status and its verdict."""
        self.configure(server if isinstance(server, str) else server.url_for("").rstrip("/"), **changes)
        done = self.run("dots-ocr", *options)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def serve(server: HTTPServer, *, text: str = GOLDEN, model: str = "dots.ocr") -> None:
    """Answer as a server that is up does."""
    server.expect_request("/health").respond_with_data("")
    server.expect_request("/v1/models").respond_with_json({"data": [{"id": model}]})
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    server.expect_request("/v1/chat/completions", method="POST").respond_with_json({"choices": [choice]})


def test_server_that_reads_the_golden_page_is_ready(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    host.call = programs.run
    status, verdict = host.check(httpserver)
    assert (status, verdict["ready"]) == (READY, True)
    assert "likeness 1.000" in verdict["summary"]


def test_request_has_the_placeholder_once_and_the_golden_page(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    host.check(httpserver)
    request = json.loads(httpserver.log[-1][0].get_data())
    image, text = request["messages"][0]["content"]
    assert request["temperature"] == 0
    assert text["text"].count("<|img|><|imgpad|><|endofimg|>") == 1
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_layout_of_the_text_does_not_count(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver, text=" ".join(GOLDEN.split()))
    assert host.check(httpserver, "--likeness=1.0")[0] == READY


def test_healthy_server_with_another_model_is_refused_at_once(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver, model="facebook/opt-125m")
    status, verdict = host.check(httpserver, "--wait=30")
    assert status == FAILED
    assert "is healthy but serves facebook/opt-125m instead of dots.ocr" in verdict["problem"]
    assert verdict["fix"]


def test_server_that_misreads_is_refused(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver, text="lorem ipsum dolor sit amet")
    status, verdict = host.check(httpserver)
    assert status == FAILED
    assert "misreads the golden page" in verdict["problem"]


@pytest.mark.parametrize(("setting", "options", "status"), [
    (1.0, [], FAILED),
    (0.9, [], READY),
    (0.9, ["--likeness=1.0"], FAILED),
    (1.0, ["--likeness=0.9"], READY),
])  # fmt: skip
def test_one_lost_character_is_seen_where_likeness_must_be_whole(
    httpserver: HTTPServer, host: Host, setting: float, options: list[str], status: int
) -> None:
    serve(httpserver, text=GOLDEN[1:])
    assert host.check(httpserver, *options, likeness=setting)[0] == status


def test_server_that_is_not_there_yet_is_worth_waiting_for(host: Host) -> None:
    host.call = programs.run
    status, verdict = host.check("http://127.0.0.1:9")
    assert (status, verdict["ready"]) == (NOT_YET, False)


def test_wait_says_how_far_the_start_is_and_how_long_it_may_take(host: Host) -> None:
    host.command("journalctl", runs("Loading model", last="shards:  50%\rshards: 100%"))
    verdict = host.check("http://127.0.0.1:9", f"--deadline={time.time() + 600:.0f}")[1]
    assert verdict["journal"] == "shards: 100%"
    assert 500 < verdict["left"] <= 600
    host.command("journalctl", "")
    assert host.check("http://127.0.0.1:9")[1]["journal"] == ""


@pytest.mark.parametrize("status_code", [500, 503])
def test_server_that_is_still_warming_up_is_worth_waiting_for(
    httpserver: HTTPServer, host: Host, status_code: int
) -> None:
    httpserver.expect_request("/health").respond_with_data("", status=status_code)
    assert host.check(httpserver)[0] == NOT_YET


@pytest.mark.parametrize("status_code", [429, 503])
def test_server_whose_queue_is_full_is_worth_waiting_for(httpserver: HTTPServer, host: Host, status_code: int) -> None:
    httpserver.expect_request("/v1/chat/completions").respond_with_data("queue is full", status=status_code)
    serve(httpserver)
    assert host.check(httpserver)[0] == NOT_YET


def test_refused_request_is_not_worth_waiting_for(httpserver: HTTPServer, host: Host) -> None:
    httpserver.expect_request("/v1/chat/completions").respond_with_data("too long", status=400)
    serve(httpserver)
    status, verdict = host.check(httpserver)
    assert status == FAILED
    assert "answers 400: too long" in verdict["problem"]


def test_another_program_at_the_port_is_named_as_such(httpserver: HTTPServer, host: Host) -> None:
    httpserver.expect_request("/health").respond_with_data("")
    httpserver.expect_request("/v1/models").respond_with_data("<html>")
    status, verdict = host.check(httpserver)
    assert status == FAILED
    assert "does not answer in JSON" in verdict["problem"]


@pytest.mark.parametrize("answer", [{"status": "fine"}, [], {"data": None}, {"data": ["dots.ocr"]}])
def test_json_of_another_program_is_refused(httpserver: HTTPServer, host: Host, answer: Any) -> None:
    httpserver.expect_request("/health").respond_with_data("")
    httpserver.expect_request("/v1/models").respond_with_json(answer)
    status, verdict = host.check(httpserver)
    assert status == FAILED
    assert "not as OpenAI's API does" in verdict["problem"]


@pytest.fixture
def listen() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Let a function talk to the first client that connects; returns the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = []

        def start(talk: Callable[[socket.socket], None]) -> str:
            def accept() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    talk(connection)

            threads.append(threading.Thread(target=accept))
            threads[-1].start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start
        for thread in threads:
            thread.join()


def test_listener_that_speaks_no_http_is_not_a_crash(
    listen: Callable[[Callable[[socket.socket], None]], str], host: Host
) -> None:
    status, verdict = host.check(listen(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH")))
    assert (status, verdict["ready"]) == (NOT_YET, False)


def test_listener_that_sends_a_byte_now_and_then_does_not_outlive_the_deadline(
    listen: Callable[[Callable[[socket.socket], None]], str], host: Host
) -> None:
    def drip(connection: socket.socket) -> None:
        try:
            for _ in range(40):
                connection.sendall(b"H")
                time.sleep(0.25)
        except OSError:
            pass  # the check has gone

    start = time.monotonic()
    status, verdict = host.check(listen(drip), "--wait=600", f"--deadline={time.time() + 2}")
    assert status == FAILED
    assert "not ready in time" in verdict["problem"]
    assert time.monotonic() - start < 8


def test_a_request_leaves_the_limit_of_who_asks(host: Host) -> None:
    """Of a test, for instance: there is one such timer in a process."""
    before = signal.setitimer(signal.ITIMER_REAL, 300)
    host.check("http://127.0.0.1:9")
    with ocr_probe.time_limit(1, "nothing"):
        pass
    left, _ = signal.setitimer(signal.ITIMER_REAL, *before)
    assert 200 < left < 300


def test_server_that_hangs_is_given_up_at_the_deadline(host: Host) -> None:
    closing = threading.Event()

    def hang(request: Request) -> Response:
        closing.wait(30)
        return Response("")

    with HTTPServer() as server:  # its own: the request that hangs ends only with the server
        server.expect_request("/v1/chat/completions").respond_with_handler(hang)
        serve(server)
        status, verdict = host.check(server, "--wait=600", f"--deadline={time.time() + 2}")
        closing.set()
    assert status == FAILED
    assert "not ready in time" in verdict["problem"]
    assert "dots_ocr_server_ready_timeout" in verdict["fix"]


def runs(*texts: str, last: str | None = None) -> str:
    """Return the journal, in JSON, of runs that said this and were restarted, and of one that continues."""
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        # Docker's client said the first, systemd the second.
        lines.append({"MESSAGE": text, "_SYSTEMD_INVOCATION_ID": f"run{number}"})
        restart = {"MESSAGE": "Scheduled restart job, restart counter is at 1.", "MESSAGE_ID": ready.RESTART_SCHEDULED}
        lines.append({**restart, "INVOCATION_ID": f"run{number}"})
    if last is not None:
        lines.append({"MESSAGE": last, "_SYSTEMD_INVOCATION_ID": "now"})
    return "\n".join(json.dumps(line) for line in lines)


def test_unit_that_fails_again_and_again_is_not_worth_waiting_for(host: Host) -> None:
    host.command("systemctl", "NRestarts=5")
    host.command("journalctl", runs("CUDA error", "CUDA error", "CUDA error"))
    status, verdict = host.check("http://127.0.0.1:9", "--wait=30")
    assert status == FAILED
    assert "dots-ocr.service starts and fails again and again" in verdict["problem"]
    assert "CUDA error" in verdict["problem"]


def test_only_the_run_that_failed_last_is_quoted(host: Host) -> None:
    host.command("systemctl", "NRestarts=3")
    host.command("journalctl", runs("first", "second", "third", last="Loading weights"))
    problem = host.check("http://127.0.0.1:9")[1]["problem"]
    assert "third" in problem
    assert "second" not in problem
    assert "Loading weights" not in problem


@pytest.mark.parametrize(("since", "failed"), [(0, []), (1, ["Killed"])])
def test_restarts_before_the_start_that_is_judged_do_not_count(host: Host, since: int, failed: list[str]) -> None:
    """A deployment resets systemd's counter, the journal keeps the lines."""
    host.command("systemctl", f"NRestarts={since}")
    host.command("journalctl", runs(*["No such image"] * 9, *failed, last="Loading weights"))
    status, verdict = host.check("http://127.0.0.1:9")
    assert status == NOT_YET
    assert "No such image" not in verdict["problem"]
    assert diagnosed(host, "--deadline=1") == (FAILED, None)


def test_journal_that_is_no_plain_text_is_read(host: Host) -> None:
    host.command("systemctl", "NRestarts=3")
    bar = {"MESSAGE": list(b"\xe2\x96\x88\r 23%"), "_SYSTEMD_INVOCATION_ID": "run2"}
    odd = [bar, {"MESSAGE": None, "_SYSTEMD_INVOCATION_ID": "run2"}, {"MESSAGE": "said late"}, []]
    host.command("journalctl", "\n".join([runs("a", "b", "c"), *map(json.dumps, odd), "{"]))
    problem = host.check("http://127.0.0.1:9")[1]["problem"]
    assert "\u2588\r 23%\n\nsaid late" in problem


def test_restarts_of_long_ago_are_forgiven(host: Host) -> None:
    host.command("systemctl", "NRestarts=5")
    host.command("journalctl", runs("CUDA error"))
    assert host.check("http://127.0.0.1:9")[0] == NOT_YET


# Diagnoses


def diagnosed(host: Host, *options: str) -> tuple[int, str | None]:
    """Return the status of the check, and the name of its diagnosis."""
    status, verdict = host.check("http://127.0.0.1:9", *options)
    return status, verdict.get("diagnosis", {}).get("name")


@pytest.mark.parametrize("known", DIAGNOSES, ids=lambda known: str(known["name"]))
def test_example_of_a_diagnosis_is_diagnosed_as_that(host: Host, known: dict[str, Any]) -> None:
    """Each is found by its own pattern before a more general one is, at the first failure unless it may pass."""
    host.command("systemctl", "NRestarts=1")
    host.command("journalctl", runs(known["example"]))
    soon = not known.get("may_pass") and not known.get("late")
    assert diagnosed(host) == ((FAILED, known["name"]) if soon else (NOT_YET, None))
    host.command("systemctl", "NRestarts=3")
    host.command("journalctl", runs(*[known["example"]] * 3))
    assert diagnosed(host) == (FAILED, None if known.get("late") else known["name"])
    host.command("systemctl", "NRestarts=0")
    host.command("journalctl", runs(last=known["example"]))
    assert diagnosed(host, "--deadline=1") == (FAILED, known["name"])


@pytest.mark.parametrize("known", DIAGNOSES, ids=lambda known: str(known["name"]))
def test_diagnosis_has_what_people_and_the_role_need(known: dict[str, Any]) -> None:
    remedy = known.get("remedy", {})
    assert set(known) <= {*NEEDED, "remedy", "may_pass", "late"}
    assert all(known[name] for name in NEEDED)
    assert set(remedy) <= {"arguments", "environment", "plan", "shm_size", "time"}
    assert set(remedy.get("plan", {})) <= {"utilization", "below"}
    assert all(isinstance(value, str) for value in remedy.get("environment", {}).values())


def test_diagnosis_tells_cause_evidence_and_fix(host: Host) -> None:
    host.command("systemctl", "NRestarts=1")
    said = "INFO loading\nRuntimeError: CUDA error: no kernel image is available for execution on the device\nINFO bye"
    host.command("journalctl", runs(said))
    _, verdict = host.check("http://127.0.0.1:9")
    assert "dots-ocr.service does not start. The image has no kernels for this GPU." in verdict["problem"]
    assert "dots_ocr_server_profile: auto" in verdict["fix"]
    assert verdict["diagnosis"] == {"server": "dots-ocr", "name": "no_kernel", "evidence": said.splitlines()[1]}


@pytest.mark.parametrize(
    "said",
    [
        # vLLM says this wherever it captures graphs.
        "If out-of-memory error occurs during cudagraph capture, consider decreasing `gpu_memory_utilization`",
        "INFO Capturing CUDA graphs (decode, FULL): 100%\nINFO Graph capturing finished in 16 secs, took 0.31 GiB",
        "engine config: enforce_eager=False, cudagraph_capture_sizes=[1, 2, 4]\nValueError: something else",
        "INFO Using FlashInfer for top-p sampling\nINFO [flashinfer] Autotuning process ends\nninja is not installed",
        "WARNING Using 'pin_memory=False' as WSL is detected. This may slow down the performance.",
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 101376",
    ],
)
def test_what_a_good_start_says_too_is_no_diagnosis(host: Host, said: str) -> None:
    host.command("systemctl", "NRestarts=3")
    host.command("journalctl", runs(said, said, said))
    assert diagnosed(host) == (FAILED, None)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("RuntimeError: CUDA error: unknown error during CUDA graph capture", "graph_capture"),
        ("cudaErrorStreamCaptureInvalidated: previous error during capture", "graph_capture"),
        ("ptxas fatal   : Value 'sm_120' is not defined for option 'gpu-name'", "triton_compilation"),
        ("FlashInfer JIT compilation failed", "flashinfer_compilation"),
        ("ninja: build stopped: subcommand failed.", "flashinfer_compilation"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0", "driver_too_old"),
        ("the provided PTX was compiled with an unsupported toolchain.", "driver_too_old"),
        ("RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment", "no_gpu"),
        ("Fatal Python error: Bus error", "shared_memory"),
        (
            "Unexpected bus error in a worker: this might be caused by insufficient shared memory (shm).",
            "shared_memory",
        ),
        ("RuntimeError: Engine core died with <Signals.SIGBUS: 7>.", "shared_memory"),
        ("Error while creating /dev/shm/nccl-x (size 9637888), error: No space left on device (28)", "shared_memory"),
        ("RuntimeError: cudaErrorInsufficientDriver: CUDA driver version is insufficient", "driver_too_old"),
        ("torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory.", "memory"),
        ("RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB", "memory"),
        ("RuntimeError: CUDA error: out of memory", "memory"),
        ("cudaErrorMemoryAllocation: the API call failed", "memory"),
        ("RuntimeError: CUDA error: operation not permitted when stream is capturing", "graph_capture"),
        ("CUDA error: operation failed due to a previous error during capture", "graph_capture"),
        ("cudaErrorStreamCaptureUnsupported: illegal call", "graph_capture"),
        ("RuntimeError: cudaErrorUnknown at a launch", "unknown_cuda_error"),
        ('File "flashinfer/jit/x.py", line 3\nRuntimeError: Could not find nvcc', "flashinfer_compilation"),
        ("triton.compiler.errors.CompilationError: at 1:0", "triton_compilation"),
        ("ERROR Triton kernel compilation failed", "triton_compilation"),
        ('File "triton/runtime/build.py", line 3\nRuntimeError: Failed to find C compiler.', "triton_compilation"),
        ("torch._dynamo.exc.BackendCompilerFailed: backend raised", "triton_compilation"),
        ("InductorError: AssertionError", "triton_compilation"),
        ("failed to inject devices: unresolvable CDI devices nvidia.com/gpu=all", "no_gpu"),
        ("Failed to initialize NVML: Unknown Error", "no_gpu"),
        ("Unable to find image 'x:y' locally", "no_image"),
        (
            "cudaErrorCompatNotSupportedOnDevice: forward compatibility was attempted on non supported HW",
            "forward_compatibility",
        ),
        ("OSError: [Errno 98] Address already in use", "port_taken"),
    ],
)
def test_other_words_for_the_same_are_diagnosed_too(host: Host, said: str, name: str) -> None:
    host.command("systemctl", "NRestarts=3")
    host.command("journalctl", runs(said, said, said))
    assert diagnosed(host) == (FAILED, name)


@pytest.mark.parametrize(
    "said",
    [
        "torch.compile takes 24.5 s in total",
        "Dynamo bytecode transform time: 12.03 s",
        "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 40%",
        "Autotuning kernels",
        "[AutoTuner]: Autotuning of a kernel starts",
        "Encoder cache will be initialized with a budget of 16384 tokens",
        "Memory profiling takes 3.50 seconds",
        "ninja: Entering directory",
    ],
)
def test_work_of_a_first_start_is_diagnosed_when_the_time_is_over(host: Host, said: str) -> None:
    host.command("systemctl", "NRestarts=0")
    host.command("journalctl", runs(last=said))
    assert diagnosed(host) == (NOT_YET, None)
    assert diagnosed(host, "--deadline=1") == (FAILED, "still_compiling")


def test_diagnosis_is_that_of_the_run_that_failed_last(host: Host) -> None:
    host.command("systemctl", "NRestarts=2")
    host.command("journalctl", runs("No such image: x", "Error 804: forward", last="CUDA out of memory"))
    assert diagnosed(host) == (FAILED, "forward_compatibility")


# Settings


def test_server_without_settings_is_named_with_those_that_there_are(host: Host) -> None:
    host.configure("http://127.0.0.1:9")
    done = host.run("dots-ocr@0")
    verdict = json.loads(done.stdout)
    assert done.returncode == FAILED
    assert f"no {host.settings_folder}/dots-ocr@0.json; servers on this host: dots-ocr." in verdict["problem"]
    assert "ansible-playbook site.yml" in verdict["fix"]


@pytest.mark.parametrize(
    "change",
    [
        {"unit": None},
        {"url": 8000},
        {"url": "127.0.0.1:8000"},
        {"model": ["dots.ocr"]},
        {"likeness": "0.9"},
        {"likeness": True},
        {"likeness": -1},
        {"api_key_file": None},
    ],
)
def test_malformed_setting_is_named(host: Host, change: dict[str, Any]) -> None:
    status, verdict = host.check("http://127.0.0.1:9", **change)
    assert status == FAILED
    assert f"dots-ocr.json has no usable '{next(iter(change))}'" in verdict["problem"]
    assert "ansible-playbook site.yml" in verdict["fix"]


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_malformed_settings_are_no_crash(host: Host, text: str) -> None:
    (host.settings_folder / "dots-ocr.json").write_text(text)
    done = host.run("dots-ocr")
    assert done.returncode == FAILED
    assert "dots-ocr.json" in json.loads(done.stdout)["problem"]


def test_name_that_leads_elsewhere_is_wrong_usage(host: Host) -> None:
    assert host.run("../dots-ocr").returncode == WRONG_USAGE


# The API key


def test_key_is_sent_and_never_shown(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    host.require_key()
    status, verdict = host.check(httpserver)
    assert status == READY
    assert {request.headers["Authorization"] for request, _ in httpserver.log} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(verdict)


def test_without_a_key_none_is_sent(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    host.check(httpserver)
    assert not any("Authorization" in request.headers for request, _ in httpserver.log)


@pytest.mark.parametrize("status_code", [401, 403])
def test_key_that_the_server_refuses_is_a_failure_that_names_its_file(
    httpserver: HTTPServer, host: Host, status_code: int
) -> None:
    httpserver.expect_request("/v1/models").respond_with_data("no", status=status_code)
    serve(httpserver)
    host.require_key()
    status, verdict = host.check(httpserver, "--wait=30")
    assert status == FAILED
    assert f"answers {status_code}" in verdict["problem"]
    assert str(host.key_file) in verdict["problem"]
    assert "ansible-playbook site.yml" in verdict["fix"]


@pytest.mark.parametrize("status_code", [400, 500, 503])
def test_key_that_the_server_repeats_is_not_shown(httpserver: HTTPServer, host: Host, status_code: int) -> None:
    httpserver.expect_request("/v1/models").respond_with_data(f"{'x' * 490} {KEY}", status=status_code)
    serve(httpserver)
    host.require_key()
    _, verdict = host.check(httpserver)
    assert "***" in verdict["problem"]
    assert KEY[:4] not in json.dumps(verdict)


@pytest.mark.parametrize(
    "answer",
    [
        {"data": [{"id": KEY}]},
        {"data": [{"id": "dots.ocr"}], "text": KEY},
        {"data": [{"id": {KEY: 1}}]},
    ],
)
def test_key_in_a_sound_answer_is_not_shown(httpserver: HTTPServer, host: Host, answer: Any) -> None:
    httpserver.expect_request("/v1/models").respond_with_json(answer)
    serve(httpserver, text=f"I was sent {KEY}.")
    host.require_key()
    status, verdict = host.check(httpserver)
    assert status == FAILED
    assert KEY not in json.dumps(verdict)


def test_key_is_hidden_however_it_is_written() -> None:
    server = ocr_probe.Server("", "", "", "", 0.9, "", "a'b\"c\\d/e", {}, Path())
    for form in (server.key, r"a'b\"c\\d/e", r"a'b\"c\\d\/e", "a\\'b\"c\\\\d/e"):
        assert ocr_probe.hide(server, f"<{form}>".encode()) == b"<***>", form


def test_key_in_what_is_no_http_is_not_shown(
    listen: Callable[[Callable[[socket.socket], None]], str], host: Host
) -> None:
    host.require_key()
    status, verdict = host.check(listen(lambda connection: connection.sendall(f"{KEY} {KEY}".encode())))
    assert status == NOT_YET
    assert "***" in verdict["problem"]
    assert KEY not in json.dumps(verdict)


def test_short_key_breaks_no_answer(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    host.require_key("data")
    assert host.check(httpserver)[0] == READY


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/models", "[" * 100_000),
        ("/v1/models", json.dumps({"data": [{"id": f"model {number}"} for number in range(9_999)]})),
        ("/v1/chat/completions", "[" * 100_000),
        ("/v1/chat/completions", '{"choices": [{"message": {"content": "' + "word " * 200_000 + '"}}]}'),
    ],
)
def test_hostile_answer_is_a_failure_and_no_crash(httpserver: HTTPServer, host: Host, path: str, answer: str) -> None:
    httpserver.expect_request(path).respond_with_data(answer, content_type="application/json")
    serve(httpserver)
    status, verdict = host.check(httpserver)
    assert status == FAILED
    assert len(verdict["problem"]) < 5_000


@pytest.mark.parametrize("text", ["", "\n", f"{KEY}\n{KEY}", f"{KEY} x", f"{KEY}é", f"{KEY}\r\n\tX: y"])
def test_file_without_one_key_is_named_and_not_quoted(host: Host, text: str) -> None:
    host.require_key(text)
    status, verdict = host.check("http://127.0.0.1:9")
    assert status == FAILED
    assert str(host.key_file) in verdict["problem"]
    assert KEY not in json.dumps(verdict)


def test_missing_key_file_is_named(host: Host) -> None:
    status, verdict = host.check("http://127.0.0.1:9", api_key_file="/nowhere/api-key")
    assert status == FAILED
    assert "/nowhere/api-key cannot be read" in verdict["problem"]


def test_key_does_not_follow_a_redirect(httpserver: HTTPServer, host: Host) -> None:
    elsewhere = httpserver.url_for("/elsewhere")
    httpserver.expect_request("/v1/models").respond_with_data("", status=302, headers={"Location": elsewhere})
    serve(httpserver)
    host.require_key()
    assert host.check(httpserver)[0] == FAILED
    assert "/elsewhere" not in [request.path for request, _ in httpserver.log]


# TLS


@pytest.fixture
def https_server(tmp_path: Path) -> Iterator[HTTPServer]:
    """A server with a certificate of its own, made for another name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ocr.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    file = tmp_path / "certificate.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    with HTTPServer(host="127.0.0.1", ssl_context=context) as server:
        yield server


def test_certificate_of_its_own_will_do_on_this_machine(https_server: HTTPServer, host: Host) -> None:
    serve(https_server)
    status, verdict = host.check(https_server)
    assert status == READY, verdict


def test_certificate_is_verified_for_another_machine(https_server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(https_server)
    server = ocr_probe.Server("", "", https_server.url_for("").rstrip("/"), "", 0.9, "", "", {}, Path())
    ocr_probe.ask(server, "/health", 5)
    monkeypatch.setattr(ocr_probe, "is_own_address", lambda host: False)
    with pytest.raises(ocr_probe.NotYet, match="CERTIFICATE_VERIFY_FAILED"):
        ocr_probe.ask(server, "/health", 5)


@pytest.mark.parametrize(
    ("address", "own"), [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("", False)]
)
def test_own_addresses_are_told_from_others(address: str, own: bool) -> None:
    assert ocr_probe.is_own_address(address) is own


# A watchdog that gave up


def give_up(host: Host, **changes: str) -> None:
    """Leave the state of a watchdog that gave up."""
    state = {
        "state": "gave_up",
        "boot": ocr_probe.boot_id(),
        "invocation": INVOCATION,
        "since": "2026-11-24",
        **changes,
    }
    (host.folder / "dots-ocr.json").write_text(json.dumps({**state, "reason": "it hangs."}))


@pytest.mark.parametrize("status_code", [400, 500])
def test_watchdog_that_gave_up_is_mentioned(httpserver: HTTPServer, host: Host, status_code: int) -> None:
    httpserver.expect_request("/health").respond_with_data("", status=status_code)
    give_up(host)
    _, verdict = host.check(httpserver)
    assert f"answers {status_code}" in verdict["problem"]
    assert verdict["problem"].endswith("The watchdog gave up restarting it at 2026-11-24: it hangs.")


@pytest.mark.parametrize("change", [{"boot": "another"}, {"invocation": "another"}, {"state": "failing"}])
def test_watchdog_that_gave_up_on_an_earlier_start_is_not_mentioned(host: Host, change: dict[str, str]) -> None:
    give_up(host, **change)
    assert "watchdog" not in host.check("http://127.0.0.1:9")[1]["problem"]


def test_server_that_is_ready_is_ready_whatever_the_watchdog_thinks(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    give_up(host)
    assert host.check(httpserver)[0] == READY


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_state_of_a_watchdog_that_makes_no_sense_is_no_crash(host: Host, text: str) -> None:
    (host.folder / "dots-ocr.json").write_text(text)
    assert host.check("http://127.0.0.1:9")[0] == NOT_YET


# Likeness


def common_subsequence(first: str, second: str) -> int:
    """Return the length of the longest common subsequence, by its definition."""
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + common_subsequence(first[1:], second[1:])
    return max(common_subsequence(first[1:], second), common_subsequence(first, second[1:]))


def test_likeness_is_twice_the_common_subsequence_by_both_lengths() -> None:
    words = ["".join(letters) for length in range(1, 5) for letters in itertools.product("abc", repeat=length)]
    for first, second in itertools.product(words, words):
        expected = 2 * common_subsequence(first, second) / (len(first) + len(second))
        assert ocr_probe.compare(first, second) == expected, (first, second)


@pytest.mark.parametrize(
    ("first", "second", "likeness"), [("", "", 1.0), ("a", "", 0.0), ("", "a", 0.0), (" ", "", 1.0)]
)
def test_likeness_of_nothing(first: str, second: str, likeness: float) -> None:
    assert ocr_probe.compare(first, second) == likeness


def test_likeness_of_long_pages_takes_no_time() -> None:
    page = GOLDEN * 200
    start = time.monotonic()
    assert ocr_probe.compare(page, page.replace("7", "1")) > 0.9
    assert time.monotonic() - start < 5


# What is kept of a container


def keep(host: Host, server: HTTPServer, home: Path, *, read: int = 1) -> tuple[dict[str, Any], Path]:
    """Run the check as a deployment does; return its verdict and the folder of what is kept."""
    serve(server)
    server.expect_request("/metrics").respond_with_data(
        f'vllm:request_success_total{{finished_reason="stop"}} {read}\n'
    )
    compiled = {"home": str(home), "kept": str(host.folder / "cache/dots-ocr/settings")}
    (host.folder / "cache/dots-ocr/settings").mkdir(parents=True, exist_ok=True)  # as Docker does for the mount
    status, verdict = host.check(server, "--keep-compiled", container="dots-ocr", compiled=compiled)
    assert status == READY
    return verdict, Path(compiled["kept"])


def files(folder: Path) -> set[str]:
    """Return what there is below a folder, other than folders."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_compiled_code_is_kept_once(httpserver: HTTPServer, host: Host) -> None:
    home = host.contain(
        ".cache/vllm/torch/graph.so", ".triton/kernel.cubin", ".nv/index", ".local/lib/evil.pth", ".profile"
    )
    (home / ".nv/link").symlink_to("/etc/shadow")
    os.mkfifo(home / ".nv/pipe")
    (home / ".nv/index").chmod(0o4777)
    os.utime(home / ".nv/index", (1, 1))
    (host.folder / "cache/dots-ocr/other-settings").mkdir(parents=True)
    verdict, kept = keep(host, httpserver, home)
    assert verdict["summary"].endswith("likeness 1.000.")
    assert files(kept) == {".cache/vllm/torch/graph.so", ".triton/kernel.cubin", ".nv/index", ".whole"}
    assert (kept / ".nv/index").read_text() == ".nv/index"
    assert ((kept / ".nv/index").stat().st_mode & 0o7777, (kept / ".nv/index").stat().st_mtime) == (0o644, 1)
    assert kept.stat().st_mode & 0o777 == 0o755  # the container's user reads it
    assert [path.name for path in kept.parent.iterdir()] == ["settings"]

    (home / ".nv/index").write_text("of somebody who has taken the container over")
    keep(host, httpserver, home)
    assert (kept / ".nv/index").read_text() == ".nv/index"


@pytest.mark.parametrize("read", [0, 2, 4711])
def test_nothing_is_kept_of_a_server_that_others_have_asked(httpserver: HTTPServer, host: Host, read: int) -> None:
    verdict, kept = keep(host, httpserver, host.contain(".nv/index"), read=read)
    assert verdict["summary"].endswith("likeness 1.000.")
    assert files(kept.parent) == set()


def test_nothing_is_kept_without_being_asked_for(httpserver: HTTPServer, host: Host) -> None:
    serve(httpserver)
    compiled = {"home": str(host.contain(".nv/index")), "kept": str(host.folder / "kept")}
    assert host.check(httpserver, container="dots-ocr", compiled=compiled)[0] == READY
    assert not (host.folder / "kept").exists()


@pytest.mark.parametrize("docker", ["exit 125", "tar --create --file=- -C / etc/hostname; exit 1", "echo no archive"])
def test_server_is_ready_all_the_same_if_it_cannot_be_kept(httpserver: HTTPServer, host: Host, docker: str) -> None:
    home = host.contain(".nv/index")
    (host.folder / "docker").write_text(f"#!/bin/sh\n{docker}\n")
    verdict, kept = keep(host, httpserver, home)
    assert "Its compiled code is not kept: " in verdict["summary"]
    assert files(kept) == set()


def archive(*members: tuple[str, bytes]) -> io.BytesIO:
    """Return an archive of entries of these names and types."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as writer:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname, member.mode = kind, 4 * (kind == tarfile.REGTYPE), "/etc", 0o6777
            writer.addfile(member, io.BytesIO(b"code"))
    stream.seek(0)
    return stream


def test_archive_writes_nothing_but_files_of_its_own(tmp_path: Path) -> None:
    names = ["../up", "/absolute", "a/../../up", "a/file"]
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    (tmp_path / "new").mkdir()
    ready.unpack(
        archive(*((name, tarfile.REGTYPE) for name in names), *(("link", kind) for kind in kinds)), tmp_path / "new"
    )
    assert files(tmp_path) == {"new/a/file"}
    ready.unpack(archive(("link", tarfile.SYMTYPE), ("link/passwd", tarfile.REGTYPE)), tmp_path / "new")
    assert files(tmp_path) == {"new/a/file", "new/link/passwd"}


def test_archive_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "COMPILED_BYTES", 7)
    with pytest.raises(ready.Failed, match="larger than 7 bytes"):
        ready.unpack(archive(("a", tarfile.REGTYPE), ("b", tarfile.REGTYPE)), tmp_path)
