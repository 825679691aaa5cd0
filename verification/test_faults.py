"""The fault matrix: break one thing under load; the server reads again without help, and no request is lost silently.

What was measured is printed at the end as the table of docs/understand/verification-cases.md.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from testinfra.host import Host

from conftest import MATRIX, STAND_IN
from server import Settings, python, ready

pytestmark = pytest.mark.disruptive

RECOVERY_SECONDS = 900  # a real model starts in minutes
HEALTHY_SECONDS = 3  # of load before and after
CLIENTS = 2
RESULTS = "/run/dots-ocr-load.json"
LOAD = (Path(__file__).parent / "load.py").read_text()


@dataclass
class Measurement:
    """One row of the matrix; times in seconds."""

    fault: str
    ready_after: float = 0.0
    restarts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    misread: list[Settings] = field(default_factory=list)


@pytest.fixture(scope="module", autouse=True)
def matrix(request: pytest.FixtureRequest) -> Iterator[list[Measurement]]:
    """Collect the measurements and hand them to the report."""
    rows: list[Measurement] = []
    yield rows
    request.config.stash[MATRIX] = [
        f"| {row.fault} | {row.ready_after:.0f} | {row.restarts} | "
        + " | ".join(str(row.outcomes[outcome]) for outcome in ("read", "failed", "refused", "silent", "misread"))
        + " |"
        for row in rows
    ]


def restarts(host: Host, server: Settings) -> int:
    """Return how often the unit was started since the boot, by whomever."""
    with host.sudo():
        starts = host.check_output(
            "journalctl --boot --unit %s --output=cat --grep='^Started ' || true", server["unit"]
        )
    return len(str(starts).splitlines())


@contextmanager
def load(host: Host, server: Settings, measurement: Measurement) -> Iterator[None]:
    """Keep clients reading on the host, and count how their requests end."""
    with host.sudo():
        host.check_output("rm -f %s", RESULTS)
        command = ["python3", "-c", LOAD, f"/etc/dots-ocr/server/{server['name']}.json", RESULTS, str(CLIENTS)]
        host.check_output(
            "systemd-run --quiet --collect --unit=dots-ocr-load " + " ".join(["%s"] * len(command)), *command
        )
        time.sleep(HEALTHY_SECONDS)
        try:
            yield
            time.sleep(HEALTHY_SECONDS)
        finally:
            outcomes = python(
                host,
                """
                import os, pathlib, time
                file = pathlib.Path(results)
                file.unlink(missing_ok=True)
                end = time.monotonic() + 150
                while not file.exists() and time.monotonic() < end:
                    time.sleep(0.2)
                print(file.read_text())
                """,
                results=RESULTS,
            )
            measurement.outcomes.update(request["outcome"].partition(" ")[0] for request in outcomes)
            measurement.misread += [request for request in outcomes if request["outcome"].startswith("misread")]


def wait_until_ready(host: Host, server: Settings) -> None:
    """Wait until the server reads; a check that finds no server is not the end."""
    end = time.monotonic() + RECOVERY_SECONDS
    verdict: Settings = {}
    while time.monotonic() < end:
        verdict = ready(host, server["name"], wait=10)
        if verdict["ready"]:
            return
        time.sleep(1)
    raise AssertionError(verdict)


def invocation(host: Host, server: Settings) -> str:
    """Return systemd's id of the present start of the unit."""
    return str(host.check_output("systemctl show --property=InvocationID --value %s", server["unit"]))


@contextmanager
def fault(
    host: Host, server: Settings, rows: list[Measurement], name: str, *, new_start: bool = True
) -> Iterator[None]:
    """Measure what a fault costs; after the block it has happened, and what it took away is back."""
    measurement = Measurement(name)
    rows.append(measurement)
    wait_until_ready(host, server)
    before, started = invocation(host, server), restarts(host, server)
    with load(host, server, measurement):
        start = time.monotonic()
        yield
        while new_start and invocation(host, server) == before and time.monotonic() < start + RECOVERY_SECONDS:
            time.sleep(1)
        wait_until_ready(host, server)
        measurement.ready_after = time.monotonic() - start
    measurement.restarts = restarts(host, server) - started
    assert (invocation(host, server) != before) == new_start
    assert measurement.outcomes["read"] > 0
    assert measurement.outcomes["silent"] == 0, measurement
    assert not measurement.misread
    with host.sudo():
        assert not host.check_output("docker ps --all --quiet --filter status=exited")


def signal(host: Host, name: str, pattern: str) -> None:
    """Send a signal to the oldest process whose command line matches."""
    with host.sudo():
        host.check_output("pkill --signal %s --oldest --full %s", name, pattern)


def flush_firewall(host: Host, server: Settings) -> None:
    """Do what `systemctl restart nftables` does, and wait until the watchdog has closed the container again."""
    rule = "iptables --table mangle --list-rules PREROUTING | grep --quiet -- '-i dots-ocr0 .*-j DROP'"
    with host.sudo():
        for table in ("filter", "nat", "mangle", "raw"):
            host.check_output("iptables --table %s --flush && iptables --table %s --delete-chain", table, table)
        end = time.monotonic() + 60
        while host.run(rule).rc != 0:
            assert time.monotonic() < end, "the watchdog does not close it"
            # As its timer does, only sooner.
            host.run("systemctl start %s", f"dots-ocr-watchdog@{server['name']}.service")
    assert ready(host, server["name"], wait=0)["ready"]


def test_api_process_is_killed(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    """On a stand-in after a flush of the firewall, which on a real host would lose somebody's own rules.

    What somebody who has taken the container over leaves in its home folder ends with it.
    """
    planted = "mkdir -p ~/.cache && touch ~/.cache/planted.so && ls ~/.cache"
    with host.sudo():
        assert "planted.so" in host.check_output("docker exec %s sh -c %s", server["container"], planted)
    flushed = host.file(STAND_IN).exists
    first = "the firewall flushed, then " if flushed else ""
    with fault(host, server, matrix, f"{first}`kill -9` of the API process"):
        if flushed:
            flush_firewall(host, server)
        signal(host, "KILL", "[v]llm serve")
    with host.sudo():
        host.check_output("/usr/local/lib/dots-ocr/firewall prove %s", server["name"])
        assert host.run("docker exec %s sh -c 'test -e ~/.cache/planted.so'", server["container"]).rc == 1


def test_engine_process_is_killed(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    with fault(host, server, matrix, "`kill -9` of the engine process"):
        signal(host, "KILL", "^VLLM::EngineCore")


def test_engine_hangs(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    with fault(host, server, matrix, "the engine process hangs (SIGSTOP)"):
        signal(host, "STOP", "^VLLM::EngineCore")
    with host.sudo():
        journal = host.check_output(
            "journalctl --output=cat --since=-15min --unit %s", f"dots-ocr-watchdog@{server['name']}"
        )
    assert "restart" in journal


def test_docker_restarts(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    with fault(host, server, matrix, "`systemctl restart docker`"), host.sudo():
        host.check_output("systemctl restart docker.service")


def test_systemd_reloads(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    with fault(host, server, matrix, "`systemctl daemon-reload`", new_start=False), host.sudo():
        host.check_output("systemctl daemon-reload")
    assert matrix[-1].outcomes["failed"] == matrix[-1].outcomes["refused"] == 0
    with host.sudo():
        assert host.run("docker exec %s nvidia-smi -L", server["container"]).rc == 0


def test_gpu_goes_and_comes_back(host: Host, server: Settings, matrix: list[Measurement], stand_in: str) -> None:
    with fault(host, server, matrix, "the GPU gone for 15 s"), host.sudo():
        host.check_output("mv %s %s.gone && rm /var/run/cdi/nvidia.yaml", stand_in, stand_in)
        try:
            signal(host, "KILL", "[v]llm serve")
            time.sleep(15)
            assert not ready(host, server["name"], wait=0)["ready"]
        finally:
            # A refresh that is still trying by itself would pass its failure on to this restart.
            refresh = "nvidia-cdi-refresh.service"
            host.check_output("systemctl stop %s && systemctl reset-failed %s", refresh, refresh)
            host.check_output("mv %s.gone %s && systemctl restart %s", stand_in, stand_in, refresh)


def test_gpu_memory_is_gone_at_the_start(
    host: Host, server: Settings, matrix: list[Measurement], stand_in: str
) -> None:
    with fault(host, server, matrix, "the GPU's memory taken for 15 s at the start"), host.sudo():
        state = json.loads(host.check_output("cat %s", stand_in))
        state["gpus"][0]["memory.used"] += 14000
        python(host, "print(open(file, 'w').write(json.dumps(state)))", file=stand_in, state=state)
        try:
            signal(host, "KILL", "[v]llm serve")
            time.sleep(15)
            # A machine that others keep busy may take longer to get that far.
            end = time.monotonic() + 45
            complaint = "Free memory on device"
            while complaint not in host.check_output("journalctl --since=-2min --unit %s", server["unit"]):
                assert time.monotonic() < end, f"vLLM does not say '{complaint}'"
                time.sleep(1)
        finally:
            state["gpus"][0]["memory.used"] -= 14000
            python(host, "print(open(file, 'w').write(json.dumps(state)))", file=stand_in, state=state)


def test_page_in_flight_survives_a_restart(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    """A page that takes long is read to its end while the service stops, and gets its answer."""
    with fault(host, server, matrix, "`systemctl restart dots-ocr` with a long page in flight"):
        status, finish, missing, seconds = python(
            host,
            LOAD.partition("\ndef main")[0]
            + """
import subprocess
def answer_of(tokens):
    page = request(server)
    to_the_end = {"stop": [], "ignore_eos": True, "max_completion_tokens": tokens}
    page.data = json.dumps(json.loads(page.data) | to_the_end).encode()
    with urllib.request.urlopen(page, timeout=SILENCE, context=ssl._create_unverified_context()) as answer:
        return json.loads(answer.read()) | {"status": answer.status}
def seconds(tokens):
    sent = time.monotonic()
    answer_of(tokens)
    return time.monotonic() - sent
# What this machine reads in some 6 s while nothing else slows it: it takes less to tell the service to stop, and the
# service may take longer.
wanted = min(4000, int(300 / min(seconds(300) for _ in range(4)) * 6))
def send():
    ended.update(answer_of(wanted), at=time.monotonic())
for _ in range(5):
    ended, sent = {}, time.monotonic()
    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.5)
    stopped = time.monotonic()
    if not ended and stopped - sent < 1.5:
        break
    thread.join()  # a busy machine let us sleep too long: the page may be nearly read
subprocess.run(["systemctl", "restart", server["unit"]], check=True)
thread.join()
print(json.dumps([ended["status"], ended["choices"][0]["finish_reason"], wanted - ended["usage"]["completion_tokens"],
    ended["at"] - stopped]))
""",
            server=server,
        )
        assert (status, finish, missing) == (200, "length", 0)
        assert seconds > 1, "the page had ended before the service was told to stop"


def test_host_reboots(host: Host, server: Settings, matrix: list[Measurement]) -> None:
    """Without load, which would end with the host."""
    started = host.check_output("systemctl show --property=UserspaceTimestampMonotonic --value")
    measurement = Measurement("the host reboots")
    start = time.monotonic()
    with host.sudo():
        host.run("systemctl reboot")
    while True:
        time.sleep(2)
        now = host.run("systemctl show --property=UserspaceTimestampMonotonic --value")
        if now.rc == 0 and now.stdout.strip() not in ("", "0", started):
            break
        assert time.monotonic() < start + RECOVERY_SECONDS
    wait_until_ready(host, server)
    measurement.ready_after = time.monotonic() - start
    matrix.append(measurement)
