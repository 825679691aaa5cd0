"""The runner behind `make test`: nothing that did not run may count as passed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.__main__ import REPOSITORY, Count, parts, read_report, without_skips

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


def test_what_must_run_everything_may_skip_nothing() -> None:
    assert without_skips(Count(passed=17, skipped=3)) == Count(passed=17, failed=3)


def test_every_scenario_is_a_part_and_has_hosts() -> None:
    command = ["ansible-inventory", "--inventory", str(REPOSITORY / "molecule/inventory"), "--list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    groups = json.loads(listing)
    scenarios = {name.removeprefix("molecule ") for name in parts() if name.startswith("molecule ")}
    assert scenarios
    assert [name for name in scenarios if not groups.get(name, {}).get("hosts")] == []
