"""Run every part of the test suite, count what ran, and report the time of each: `python -m tests [PART ...]`.

A part that fails does not keep the others from running. A part that ran nothing is red: an empty scenario or an
empty test folder must not pass for success.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
REPORTS = REPOSITORY / ".cache/junit"


@dataclass(frozen=True)
class Count:
    """How many checks passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        """Add up two counts."""
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)


def command(*words: str, cwd: Path = REPOSITORY) -> Count:
    """Run one command that is one check: status 0 is a pass."""
    print(f"--- {' '.join(words)}", flush=True)
    done = subprocess.run(words, cwd=cwd, check=False, stdin=subprocess.DEVNULL)
    return Count(passed=1) if done.returncode == 0 else Count(failed=1)


def read_report(file: Path) -> Count:
    """Count the tests in a JUnit report; none at all, or no report, is a failure."""
    if not file.exists():
        print(f"no report was written: {file.name}", flush=True)
        return Count(failed=1)
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    if total == skipped:
        print(f"no test ran: {file.name}", flush=True)
        return Count(failed=1)
    return Count(total - skipped - failed, failed, skipped)


def without_skips(count: Count) -> Count:
    """Count what was skipped as failed."""
    return Count(count.passed, count.failed + count.skipped)


def pytest(name: str, *words: str, cwd: Path = REPOSITORY) -> Count:
    """Run pytest and count its tests; a status that its tests do not explain is a failure more."""
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    status = command("pytest", *words, f"--junitxml={report}", cwd=cwd)
    count = read_report(report)
    return count + status if status.failed and not count.failed else count


def lint() -> Count:
    """Look at the sources without running them."""
    playbooks = [str(file.relative_to(REPOSITORY)) for file in sorted(REPOSITORY.glob("playbooks/*.yml"))]
    checks = [
        command("ruff", "check", "."),
        command("ruff", "format", "--check", "."),
        command("mypy"),
        command("mypy", cwd=REPOSITORY / "client"),
        command("yamllint", "--strict", "."),
        command("ansible-lint"),
        command("ansible-playbook", "--syntax-check", "site.yml", *playbooks, "-i", "inventory/local"),
    ]
    return sum(checks, Count())


def unit() -> Count:
    """Test the modules, the roles' contracts and the rehearsal's own code."""
    return pytest("unit", "tests", "rehearsal/tiny_model", "--ignore=tests/command_line", "--ignore=tests/live_client")


def client() -> Count:
    """Test the client over real sockets and with the real Tesseract."""
    return pytest("client", cwd=REPOSITORY / "client")


def rehearse() -> Count:
    """Keep the README's first command true."""
    return command(sys.executable, "-m", "rehearsal", "run")


def live_client() -> Count:
    """Put the client to the real vLLM that the rehearsal has left running."""
    return pytest("live_client", "tests/live_client")


def command_line() -> Count:
    """Put the role's command lines to the argument parsers of the vLLM versions that they are for."""
    return pytest("command_line", "tests/command_line")


def scenario(name: str) -> Callable[[], Count]:
    """Return the part that runs one Molecule scenario, whose verification has to run tests.

    What the others may skip, since it stops or breaks the service, `site` has to run.
    """

    def run() -> Count:
        report = REPORTS / f"{name}.xml"
        report.unlink(missing_ok=True)
        count = command("molecule", "test", "--scenario-name", name) + read_report(report)
        return without_skips(count) if name == "site" else count

    return run


def parts() -> dict[str, Callable[[], Count]]:
    """Return every part in the order to run, cheap ones first."""
    scenarios = sorted(path.parent.name for path in (REPOSITORY / "molecule").glob("*/molecule.yml"))
    return {
        "lint": lint,
        "unit": unit,
        "client": client,
        "rehearse": rehearse,
        "live_client": live_client,
        "command_line": command_line,
        **{f"molecule {name}": scenario(name) for name in scenarios},
    }


def prepare() -> None:
    """Put the environment's programs on the PATH, and install what the client's tests and the rehearsal need."""
    os.environ["PATH"] = f"{PROGRAMS}:{os.environ['PATH']}"
    REPORTS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "rehearsal", "prepare"], cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        sys.exit("nothing was tested: what the tests need could not be prepared, see above")


def main() -> int:
    """Run the parts that the command line names, or all; the exit status is 0 if nothing failed."""
    available = parts()
    wanted = sys.argv[1:] or list(available)
    unknown = [name for name in wanted if name not in available]
    if unknown:
        print(f"unknown parts: {', '.join(unknown)}; there are: {', '.join(available)}")
        return 2
    prepare()
    total, rows = Count(), []
    for name in wanted:
        print(f"\n=== {name}", flush=True)
        start = time.monotonic()
        count = available[name]()
        total += count
        rows.append(
            f"{name:35} {time.monotonic() - start:6.0f} s   {count.passed} passed, {count.failed} failed,"
            f" {count.skipped} skipped"
        )
    print("\n".join(["", *rows, ""]))
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
