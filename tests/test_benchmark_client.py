"""The benchmarks of the client: what they refuse to print, and that each of their jobs reads pages."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from client.benchmarks import __main__ as benchmark
from client.benchmarks import machine, work
from client.benchmarks.documents import A6, write_images, write_text_pdf
from client.benchmarks.server import Server

# user nice system idle iowait irq softirq steal guest guest_nice
STAT = "cpu  100 20 30 4000 500 6 7 8 90 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n"


def test_everything_but_idling_and_waiting_is_busy() -> None:
    assert machine.busy_seconds(STAT) == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize(
    ("busy", "own", "seconds", "share"),
    [(8, 2, 10, 0.3), (20, 0, 10, 1.0), (2, 2, 10, 0.0), (2, 2.1, 10, 0.0)],
)
def test_what_the_measurement_takes_itself_does_not_count(
    busy: float, own: float, seconds: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert machine.others(busy, own, seconds) == pytest.approx(share)


def test_own_processes_count_as_soon_as_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "times", lambda: os.times_result((1, 2, 30, 40, 500)))
    assert machine.own_seconds() == 73


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """What a watch reads, in turn: seconds busy, seconds of our own, the time."""
    readings = [(0.0, 0.0, 0.0)]
    monkeypatch.setattr(machine.Watch, "_now", staticmethod(lambda: readings.pop(0)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0)
    return readings


def test_a_quiet_machine_is_recorded(quiet: list[tuple[float, float, float]]) -> None:
    quiet.append((18.0, 17.0, 10.0))
    assert machine.Watch().record() == "Others took 5% of 2 processors; load average at the beginning 0.25."


@pytest.mark.parametrize("limit", [0.1, 0.29])
def test_a_busy_machine_is_refused(quiet: list[tuple[float, float, float]], limit: float) -> None:
    quiet.append((18.0, 12.0, 10.0))
    with pytest.raises(machine.BusyError, match=rf"others took 30% .* {limit:.0%} is the limit\. Fix: end what"):
        machine.Watch().record(limit)


def test_nothing_is_begun_on_a_busy_machine(quiet: list[tuple[float, float, float]]) -> None:
    quiet.append((6.0, 0.0, 3.0))
    with pytest.raises(machine.BusyError, match="others took 100%"):
        machine.refuse_if_busy()


def test_every_job_reads_every_page(tmp_path: Path) -> None:
    write_text_pdf(tmp_path / "a.pdf", 2, A6)
    write_images(tmp_path / "images", 3)
    assert work.draw(str(tmp_path / "a.pdf"))["seconds"] > 0

    async def run(job: Callable[..., Coroutine[Any, Any, dict[str, float]]], file: str, *more: int) -> float:
        server = await asyncio.start_server(Server(2, 0).serve, "127.0.0.1", 0, limit=2**20)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            return (await job(str(tmp_path / file), url, 2, *more))["pages"]

    for file, pages in (("a.pdf", 2), ("images", 3)):
        assert asyncio.run(run(work.read, file, 1)) == pages
        assert asyncio.run(run(work.script, file)) == pages


@pytest.fixture
def no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("write_text_pdf", "write_images"):
        monkeypatch.setattr(benchmark, name, lambda *words: None)


@pytest.mark.usefixtures("no_documents")
def test_the_goals_stand_beside_their_limits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = {"draw": 20.0, "read": 31.0, "script": 160.0}
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0)
    monkeypatch.setattr(benchmark, "cpu", lambda job, folder, kind, few, many: costs[job] - (kind == "scan"))
    monkeypatch.setattr(
        benchmark, "rate", lambda job, document, pages, slots, *start, seconds: 0.8 if job == "script" else 0.95
    )
    assert benchmark.main(["--part", "cpu", "--part", "rate", "--rounds", "1", "--others", "99"]) == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"^Others took \d+% of", output, re.MULTILINE)) == 2
    goals = re.findall(r"^\| (.*) \| ([\d.]+) \| at (?:most|least) ([\d.]+) \| (yes|NO) \|$", output, re.MULTILINE)
    name = "pages/s, A4, 32 slots, 320 pages"
    assert [goal for goal in goals if goal[0].endswith(("alone", "possible"))] == [
        ("CPU per A4 page, text: client ÷ draw and encode alone", "1.550", "1.5", "NO"),
        ("CPU per A4 page, scan: client ÷ draw and encode alone", "1.579", "1.5", "NO"),
        (f"{name}, from cold: client ÷ possible", "0.950", "0.97", "NO"),
    ]
    assert [goal[1:] for goal in goals if goal[0].endswith("images, 32 slots, 300 pages: client ÷ script")] == [
        ("1.187", "1", "yes")
    ]


@pytest.mark.usefixtures("no_documents")
def test_a_part_on_a_busy_machine_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: machine.Watch, limit: float) -> str:
        raise machine.BusyError("others took 30%")

    monkeypatch.setattr(benchmark, "refuse_if_busy", lambda limit: "quiet before")
    monkeypatch.setattr(benchmark, "rate", lambda *words, seconds: 1.0)
    monkeypatch.setattr(machine.Watch, "record", refuse)
    assert benchmark.main(["--part", "rate"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, "part rate is not printed: others took 30%" in printed.err) == ("", True)
