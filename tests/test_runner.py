"""The runner behind `make test`: nothing that did not run may count as passed."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests import usage
from tests.__main__ import (
    CHAIN,
    FIRST,
    LAST,
    REPOSITORY,
    Count,
    Result,
    chains,
    command,
    end,
    failure,
    main,
    parts,
    prepare,
    read_report,
    run_all,
    run_beside,
    table,
    without_skips,
)
from tests.__main__ import pytest as run_pytest
from tests.usage import Meter

REPORT = '<testsuites><testsuite tests="{0}" failures="{1}" errors="{2}" skipped="{3}"/></testsuites>'


def test_report_that_was_not_written_is_a_failure(tmp_path: Path) -> None:
    assert read_report(tmp_path / "none.xml") == Count(failed=1)


@pytest.mark.parametrize(
    ("numbers", "count"),
    [
        ((0, 0, 0, 0), Count(failed=1)),
        ((2, 0, 0, 2), Count(failed=1)),
        ((5, 0, 0, 0), Count(passed=5)),
        ((5, 1, 1, 2), Count(passed=1, failed=2, skipped=2)),
    ],
)
def test_report_is_counted_and_an_empty_one_is_a_failure(
    tmp_path: Path, numbers: tuple[int, ...], count: Count
) -> None:
    file = tmp_path / "report.xml"
    file.write_text(REPORT.format(*numbers))
    assert read_report(file) == count


def test_failed_test_is_named_with_its_message(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    case = '<testcase classname="tests.test_x" name="test_y"><failure message="assert 1 ==\n 2"/></testcase>'
    file.write_text(f'<testsuite tests="2" failures="1" errors="0" skipped="0"><testcase/>{case}</testsuite>')
    assert read_report(file).reasons == ("tests.test_x::test_y: assert 1 == 2",)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "noise\nfatal: [a]: FAILED! => first\n  │ \x1b[0;31mfatal: [b]: FAILED! =>\n  │   last\n"
            "CRITICAL Executed: Failed\nfatal: [b]: FAILED! => while it cleans up",
            "fatal: [b]: FAILED! => last CRITICAL",
        ),
        ("", ""),
    ],
)
def test_failed_command_is_named_with_its_last_complaint(output: str, reason: str) -> None:
    count = command("sh", "-c", 'printf "$1"; exit 3', "sh", output)
    assert count == Count(failed=1)
    assert f"status 3 {reason}".strip() in count.reasons[0]
    assert command("true") == Count(passed=1)


def test_what_must_run_everything_may_skip_nothing() -> None:
    assert without_skips(Count(passed=17, skipped=3)) == Count(passed=17, failed=3)


def test_every_part_runs_once_and_those_that_share_a_host_one_after_the_other() -> None:
    order = chains(parts())
    assert sorted(name for chain in order for name in chain) == sorted(parts())
    assert order[0] == list(CHAIN)
    assert {len(chain) for chain in order[1:]} == {1}
    assert set(FIRST) | set(LAST) <= set(parts())


@pytest.mark.parametrize(
    ("output", "status", "count"),
    [
        ("noise\n5 passed, 0 failed, 1 skipped", 0, Count(5, 0, 1)),
        ("5 passed, 2 failed, 1 skipped", 1, Count(5, 2, 1)),
        ("5 passed, 0 failed, 1 skipped\nkilled", 137, Count(failed=1)),
        ("5 passed, 0 failed, 1 skipped", 137, Count(5, 1, 1)),
        ("", 0, Count(failed=1)),
    ],
)
def test_part_beside_others_counts_by_its_last_line_and_its_status(
    output: str, status: int, count: Count, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert run_beside("lint").count == count


def test_part_beside_others_hands_on_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\necho 'failed: [host] => {}\nnot passed: a test: why\n0 passed, 1 failed, 0 skipped'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert run_beside("lint").count.reasons == ("a test: why",)


def test_part_that_hangs_is_ended_and_says_what_it_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\necho begun\nsleep 987 &\necho $! >pid\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr("tests.__main__.LIMIT", 1.0)
    count = run_beside("lint").count
    assert count == Count(failed=1)
    assert count.reasons[0].startswith("lint: not ended after 1 s, while these ran: sleep 987; /bin/sh ")
    left, begun = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat"), time.monotonic()
    while left.exists() and left.read_text().split()[2] != "Z":
        assert time.monotonic() < begun + 10


def test_whatever_words_a_program_was_given_it_is_ended() -> None:
    with subprocess.Popen([b"sh", b"-c", b"read line", b"\xff"], stdin=subprocess.PIPE) as process:
        assert end(process.pid) == ["sh -c read line \ufffd"]


def test_part_ends_although_something_that_it_started_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 5 &\necho '5 passed, 0 failed, 0 skipped'\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    begun = time.monotonic()
    assert run_beside("lint").count == Count(passed=5)
    assert time.monotonic() - begun < 5


def test_reason_of_a_play_begins_where_ansible_says_it() -> None:
    said = "AssertionError: PLAY [host] ***\n" + "TASK [Check] ***\n" * 99 + "fatal: [host]: FAILED! => no disk"
    assert failure(f"a test: {said}").reasons == ("a test: AssertionError: … fatal: [host]: FAILED! => no disk",)


CRASHES = """
import os
import pytest

@pytest.mark.parametrize("n", range(4))
def test_it(n):
    assert n < 3 or os._exit(1)
"""


def test_crash_is_a_failure_and_keeps_no_part_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_crash.py").write_text(CRASHES)
    monkeypatch.setattr("tests.__main__.REPORTS", tmp_path)
    count = run_pytest("crash", "-n2", "--dist=loadgroup", "-pno:cacheprovider", ".", cwd=tmp_path)
    assert (count.failed, count.passed) == (1, 3)
    assert "crashed while running 'test_crash.py::test_it[3]'" in count.reasons[0]


def test_every_test_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_hangs.py").write_text("import time\n\n\ndef test_it():\n    time.sleep(9)\n")
    monkeypatch.setattr("tests.__main__.TEST_LIMIT", 1)
    monkeypatch.setattr("tests.__main__.PROGRAMS", tmp_path)
    monkeypatch.setattr("sys.executable", "/bin/true")
    for name in ("PATH", "PYTEST_TIMEOUT"):  # which are to be as before
        monkeypatch.setenv(name, os.environ.get(name, ""))
    prepare()
    done = subprocess.run(["pytest", "-p", "no:cacheprovider", tmp_path], capture_output=True, text=True, check=False)
    assert "Timeout (>1.0s) from pytest-timeout" in done.stdout


def test_parts_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    both, finished = threading.Barrier(2, timeout=10), []

    def run(name: str) -> Result:
        if name in ("unit", "rehearse"):
            both.wait()
        finished.append(name)
        return Result(name, Count(1), 0.0, 0.0)

    monkeypatch.setattr("tests.__main__.run_beside", run)
    names = ["molecule site", "live_client", "unit", "rehearse"]
    assert {result.name for result in run_all(names)} == set(names)
    assert [name for name in finished if name != "unit"] == list(CHAIN)


def test_table_shows_the_change_and_names_what_is_far_over_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = tmp_path / "budget.toml"
    budget.write_text('lint = 10\n"molecule site" = 100\n')
    monkeypatch.setattr("tests.__main__.BUDGET", budget)
    results = [
        Result("lint", Count(7), 9.0, 16.0),
        Result("molecule site", Count(40), 300.0, 149.0),
        Result("ray", Count(5), 20.0, 35.0),
    ]
    _, lint, site, ray, total, *over = table(results, 305.0)
    assert lint.split()[:5] == ["lint", "9", "16", "8%", "+60%"]
    assert site.split()[2:6] == ["300", "149", "74%", "+49%"]
    assert ray.split()[4] == "new"
    assert total.split()[:4] == ["all", "305", "200", "100%"]
    assert over == ["over its budget by more than half: lint, 16 CPU s"]


def test_every_scenario_is_a_part_and_has_hosts() -> None:
    scenarios = {name.removeprefix("molecule ") for name in parts() if name.startswith("molecule ")}
    assert scenarios
    for inventory in ("molecule/inventory", "molecule/fleet/inventory"):
        command = ["ansible-inventory", "--inventory", str(REPOSITORY / inventory), "--list"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        groups = json.loads(listing)
        scenarios -= {name for name in scenarios if has_hosts(groups, name)}
    assert scenarios == set()


def has_hosts(groups: dict[str, dict[str, list[str]]], name: str) -> bool:
    """Tell whether there is a host in a group or in one below it."""
    group = groups.get(name, {})
    return bool(group.get("hosts")) or any(has_hosts(groups, child) for child in group.get("children", []))


def test_meter_adds_up_new_containers_and_those_that_were_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([{"host": 5.0}, {"host": 7.0, "inside": 1.0}, {"host": 0.5, "inside": 1.5}, {}])
    monkeypatch.setattr(Meter, "_read", lambda self: next(looks))
    meter = Meter("test-")
    for _ in range(3):
        meter.look()
    assert meter.total == 2.0 + 1.0 + 0.5 + 0.5


def test_meter_counts_nothing_where_no_engine_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.usage.SOCKET", tmp_path / "docker.sock")
    with usage.measured("test-") as meter:
        pass
    assert meter.total == 0.0


def test_what_a_smaller_run_leaves_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.__main__.prepare", lambda: None)
    monkeypatch.setattr("tests.__main__.run_beside", lambda name: Result(name, Count(1), 1.0, 1.0))
    monkeypatch.delenv("DOTS_OCR_TESTS_BESIDE", raising=False)
    monkeypatch.setattr("sys.argv", ["tests", "lint", "unit", "client"])
    assert main() == 0
    *_, left, last = capsys.readouterr().out.splitlines()
    assert left.removeprefix("not run: ").split(", ") == [
        name for name in parts() if name not in ("lint", "unit", "client")
    ]
    assert last == "3 passed, 0 failed, 0 skipped"
