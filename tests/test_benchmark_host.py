"""The benchmark of runs that change nothing (benchmarks.host): it reads Ansible's report, and refuses any other run."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import host
from benchmarks.figures import BenchmarkError
from benchmarks.host import Run, read, tables
from client.benchmarks import machine


def report(*tasks: tuple[str, float, float, dict[str, Any]], **stats: int) -> str:
    """Return what the callback prints about tasks, each with its name, start, end and what it told of host `a`."""
    entries = [
        {
            "task": {
                "name": name,
                "duration": {"start": f"2026-11-26T10:00:{start:09.6f}Z", "end": f"2026-11-26T10:00:{end:09.6f}Z"},
            },
            "hosts": {"a": result},
        }
        for name, start, end, result in tasks
    ]
    summary = {"changed": 0, "failures": 0, "ok": len(tasks), "unreachable": 0} | stats
    plays = [
        {"play": {"name": "One"}, "tasks": entries[:2]},
        {"play": {"name": "Other"}, "tasks": entries[2:]},
        {"play": {"name": "Not for these hosts"}, "tasks": []},
    ]
    return json.dumps({"plays": plays, "stats": {"a": summary}}, indent=4)


def test_tasks_are_counted_and_timed() -> None:
    text = report(
        ("Gathering Facts", 0, 1.5, {"changed": False}),
        ("docker_engine : Restart", 1.5, 1.6, {"changed": False, "skipped": True}),
        ("preflight : Measure", 2, 3, {"changed": False}),
        ("preflight : Measure", 3.5, 4, {"changed": False}),
    )
    run = read(f"[WARNING]: something\n{text}\n", 5)
    plays = {
        "One": Run({"Gathering Facts": 1.5}, 1, 1, 1.6, 1.6),
        "Other": Run({"preflight : Measure": 1.5}, 2, 0, 2, 2),
    }
    assert run == Run({"Gathering Facts": 1.5, "preflight : Measure": 1.5}, 3, 1, 4, 5, plays)


def test_run_that_changes_something_is_refused() -> None:
    text = report(("docker_engine : Configure", 0, 1, {"changed": True}), ("other", 1, 2, {"changed": False}))
    with pytest.raises(BenchmarkError, match=r"these tasks change something: docker_engine : Configure\. Fix: deploy"):
        read(text, 2)


def test_run_that_fails_is_refused_with_the_reason() -> None:
    text = report(("preflight : Stop", 0, 1, {"changed": False, "failed": True, "msg": "no GPU"}), failures=1)
    with pytest.raises(BenchmarkError, match="failed on a: no GPU"):
        read(text, 2)


def test_host_that_does_not_answer_is_refused() -> None:
    text = report(("Gathering Facts", 0, 1, {"unreachable": True, "msg": "no route"}), unreachable=1)
    with pytest.raises(BenchmarkError, match="failed on a: no route"):
        read(text, 2)


@pytest.mark.parametrize("text", ["", "ERROR! the playbook could not be found\n"])
def test_run_without_a_report_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="printed no result"):
        read(text, 1)


def test_run_without_tasks_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="no task ran"):
        read(report(), 1)


def test_tables_give_medians_ratios_and_the_slowest() -> None:
    tasks = {"slow": 3.0, "quick": 0.5, "middle": 1.0, "fast": 0.1, "faster": 0.05, "fastest": 0.01}
    site = [
        Run(tasks, 10, 2, seconds, seconds + 1, {"Prepare": Run({}, 4, 1, seconds / 2, seconds / 2)})
        for seconds in (6.0, 5.0, 10.0)
    ]
    facts = [Run({"Gather facts": 1.0}, 1, 0, seconds, 2.0) for seconds in (1.0, 1.0, 2.0)]
    lines = tables(site, facts).splitlines()
    assert lines[2] == "| site.yml | 10 (2) | 6.00 (5.00 to 10.00) | 5.0 (5.0 to 6.0) | 7.00 (6.00 to 11.00) |"
    assert lines[3] == "| - Prepare | 4 (1) | 3.00 (2.50 to 5.00) | 2.5 (2.5 to 3.0) |  |"
    assert lines[4] == "| fact gathering alone | 1 (0) | 1.00 (1.00 to 2.00) | 1.0 (1.0 to 1.0) | 2.00 (2.00 to 2.00) |"
    assert [line.split(" | ")[0] for line in lines[8:]] == ["| slow", "| middle", "| quick", "| fast", "| faster"]
    assert lines[8] == "| slow | 3.00 (3.00 to 3.00) | 50 |"


def test_nothing_is_measured_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0)
    monkeypatch.setattr(host, "play", lambda *words: pytest.fail("it was measured"))
    monkeypatch.setattr(sys, "argv", ["host", "--others", "-1"])
    assert host.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing was measured: others took" in printed.err
