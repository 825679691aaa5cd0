"""The benchmark of the gateway (benchmarks.gateway): its arithmetic, and a few pages through a real HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gateway as benchmark
from benchmarks.figures import BenchmarkError
from benchmarks.gateway import (
    DIRECT,
    FULL,
    HTTP,
    TLS,
    Flow,
    Load,
    Round,
    Sender,
    cpu_seconds,
    cpu_ticks,
    haproxy,
    overhead_tables,
    pages_per_second,
    scaling_tables,
)
from client.benchmarks import machine
from tests.gateway.support import Backend, free_ports, wait_until

TINY = Load(
    rounds=1,
    pages={1000: 3, 300_000: 3},
    at_once=2,
    slow_pages={1000: 1},
    latency=0.1,
    fleets=((1,), (2, 4)),
    body=1000,
    waves=3,
    beside=3,
    beside_body=1000,
    beside_latency=0.01,
)
FIGURE = r"(-?[\d.]+) \(-?[\d.]+ to -?[\d.]+\)"


def test_cpu_time_is_read_behind_any_name() -> None:
    assert cpu_ticks("4711 (a) b) 7 S) S 1 4711 4711 0 -1 4194560 3333 44 5 6 120 34 7 8 20 0 3 0 1234 99 88") == 154


def test_cpu_time_of_children_counts() -> None:
    # The shell waits, and uses nothing itself.
    with subprocess.Popen(["sh", "-c", "while :; do :; done & echo $!; wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = process.stdout.readline().strip()
        try:
            wait_until(lambda: cpu_seconds(process.pid) > 0.2, "CPU time of the child")
        finally:
            subprocess.run(["kill", child], check=True)


def test_rate_leaves_out_the_beginning_and_the_end() -> None:
    assert pages_per_second([5.0, 9.0, 10.0, 10.5, 11.0, 11.5, 30.0], skipped=3, counted=3) == 2.0


def test_overhead_tables_compare_rounds_of_the_same_turn() -> None:
    ways = {
        DIRECT: [Round(0.010, 100, 0), Round(0.020, 50, 0), Round(0.040, 80, 0)],
        HTTP: [Round(0.012, 90, 0.0010), Round(0.020, 60, 0.0012), Round(0.060, 40, 0.0011)],
    }
    slow = {DIRECT: [Round(1.0, 8, 0)] * 3, TLS: [Round(1.01, 8, 0)] * 3}
    lines = overhead_tables({100_000: ways}, {5_000_000: slow}, FULL).splitlines()
    assert lines[2:4] == [
        "| no time | 0.1 | HTTP | 20.0 (10.0 to 40.0) | 20.0 (12.0 to 60.0) | 2.0 (0.0 to 20.0) |"
        " 1.20 (1.00 to 1.50) |",
        "| 1 s | 5 | TLS | 1000.0 (1000.0 to 1000.0) | 1010.0 (1010.0 to 1010.0) | 10.0 (10.0 to 10.0) |"
        " 1.01 (1.01 to 1.01) |",
    ]
    assert lines[7:] == ["| 0.1 | HTTP | 80 (50 to 100) | 60 (40 to 90) | 0.90 (0.50 to 1.20) | 1.10 (1.00 to 1.20) |"]


def test_scaling_tables_compare_with_what_is_possible_and_with_one_server() -> None:
    load = replace(FULL, latency=2.0, fleets=((8,), (2, 6)))
    one, two = [Flow(4.0, (1.0,)), Flow(3.0, (1.0,))], [Flow(3.6, (0.25, 0.75)), Flow(3.0, (0.35, 0.65))]
    lines = scaling_tables([one, two], [Flow(2.0, (0.2, 0.8))] * 2, load).splitlines()
    assert lines[2:4] == [
        "| 8 | 4 | 3.50 (3.00 to 4.00) | 0.875 (0.750 to 1.000) | 1.00 (1.00 to 1.00) |",
        "| 2, 6 | 4 | 3.30 (3.00 to 3.60) | 0.825 (0.750 to 0.900) | 0.95 (0.90 to 1.00) |",
    ]
    assert lines[7:] == [
        "| 2 | 25.0 | 30.0 (25.0 to 35.0) | 20.0 (20.0 to 20.0) |",
        "| 6 | 75.0 | 70.0 (65.0 to 75.0) | 80.0 (80.0 to 80.0) |",
    ]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little, on however busy a machine."""
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0)
    monkeypatch.setattr(benchmark, "LIMIT", 99.0)
    monkeypatch.setattr(benchmark, "FULL", TINY)
    monkeypatch.setattr(benchmark, "PAUSE", 0.5)
    monkeypatch.setattr(benchmark, "ATTACKS", [replace(attack, count=3) for attack in benchmark.ATTACKS])


@pytest.mark.usefixtures("tiny")
def test_pages_through_a_real_gateway_become_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--rounds", "1"]) == 0
    output = capsys.readouterr().out
    slow = re.search(rf"^\| 0.1 s \| 0.001 \| TLS \| {FIGURE} \| {FIGURE} \|", output, re.MULTILINE)
    assert slow
    assert all(100 <= float(each) < 1000 for each in slow.groups())
    assert len(re.findall(rf"^\| no time \| [\d.]+ \| (?:HTTP|TLS) \| {FIGURE}", output, re.MULTILINE)) == 4
    assert len(re.findall(rf"^\| [\d.]+ \| (?:HTTP|TLS) \| {FIGURE}", output, re.MULTILINE)) == 4
    fleet = re.search(rf"^\| 2, 4 \| 60 \| {FIGURE} \| {FIGURE} \| {FIGURE} \|$", output, re.MULTILINE)
    assert fleet
    # So short a time says no more than that the order is right, least of all where other things run.
    assert 0.1 < float(fleet[2]) < 2
    assert re.search(r"^Others took \d+% of \d+ processors; load average at the beginning [\d.]+", output, re.MULTILINE)
    shares = re.findall(rf"^\| \d \| (?:33.3|66.7) \| {FIGURE} \| {FIGURE} \|$", output, re.MULTILINE)
    assert [round(sum(map(float, column))) for column in zip(*shares, strict=True)] == [100, 100]


@pytest.mark.usefixtures("tiny")
def test_pages_beside_attacks_become_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--part", "attacks", "--rounds", "1"]) == 0
    rows = re.findall(rf"^\| [^|]+ \| (\d) [^|]+ \| {FIGURE} \| {FIGURE} \|", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["3"] * len(benchmark.ATTACKS)
    assert any(before != during for _, before, during in rows)  # other pages than those before the attack


@pytest.mark.usefixtures("tiny")
def test_no_figure_where_a_page_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @contextlib.contextmanager
    def failing(capacities: Sequence[int], seconds: float) -> Iterator[list[int]]:
        backends = [Backend("failing", status=500) for _ in capacities]
        for backend in backends:
            backend.gate.set()
        yield [backend.port for backend in backends]
        for backend in backends:
            backend.stop()

    monkeypatch.setattr(benchmark, "servers", failing)
    for part in benchmark.PARTS:
        assert benchmark.main(["--part", part]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "nothing was measured: a page was refused with 500: " in printed.err


@pytest.mark.usefixtures("tiny")
def test_no_figure_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda part, load: pytest.fail("it was measured"))
    assert benchmark.main(["--others", "-1"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing was measured: others took" in printed.err


def test_page_that_is_not_read_is_an_error(tmp_path: Path) -> None:
    async def send(sender: Sender) -> None:
        async with sender.client:
            await sender.flood(b"x", 3, 2)

    with pytest.raises(BenchmarkError, match=r"a page was not read: .*Fix"):
        asyncio.run(send(Sender(free_ports(1)[0])))
    with benchmark.servers([1], 0) as (port,), haproxy(tmp_path, [(port, 1)]) as gateway:
        sender = Sender(gateway.port, gateway)
        sender.client.headers["Authorization"] = "Bearer another"
        with pytest.raises(BenchmarkError, match="a page was refused with 401"):
            asyncio.run(send(sender))


def test_server_that_was_out_meanwhile_is_an_error(tmp_path: Path) -> None:
    with (
        benchmark.servers([1], 0) as (port,),
        pytest.raises(BenchmarkError, match="did not answer the gateway for a while: server1"),
        haproxy(tmp_path, [(port, 1)]) as gateway,
    ):
        gateway.command("set server ocr/server1 health down")


def test_missing_haproxy_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "HAPROXY", "/nowhere/haproxy")
    with pytest.raises(BenchmarkError, match=r"HAProxy is missing\. Fix: "), haproxy(tmp_path, []):
        pass
