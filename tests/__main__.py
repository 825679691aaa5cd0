"""Run every part of the test suite, count what ran, and report what each costs: `python -m tests [PART ...]`.

A part that fails does not keep the others from running. A part that ran nothing is red: an empty scenario or an
empty test folder must not pass for success. What failed, and why, is said at the end, which is often all that is left
of a long output. Beside it stand each part's wall and CPU seconds against tests/budget.toml.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import usage

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
REPORTS = REPOSITORY / ".cache/junit"
BUDGET = REPOSITORY / "tests/budget.toml"
WORKERS = 3  # side by side, on two cores: parts wait for a third of their time
BESIDE = "DOTS_OCR_TESTS_BESIDE"  # set for a part that runs beside others: all has been prepared
LIMIT = 30 * 60.0  # seconds for a part; the longest takes 18 minutes
TEST_LIMIT = 900  # seconds for a test; those of a fault wait for a server as long as that
OVER = 1.5  # a part that takes more than so many times its budget is named at the end
# One host, one after the other: what `make rehearse` leaves running is what the others begin with.
CHAIN = ("rehearse", "live_client", "molecule site")
# The longest begin first. Those that need vLLM's image come last, when the chain has built it.
FIRST = ("molecule fleet", "molecule dots_ocr_server", "molecule airgap", "molecule cpu", "molecule nvidia_driver")
LAST = ("command_line", "qwen")
TOTAL = re.compile(r"^(\d+) passed, (\d+) failed, (\d+) skipped\n*\Z", re.MULTILINE)
REASON = re.compile(r"^not passed: (.*)$", re.MULTILINE)
DECORATION = re.compile(r"\x1b\[[\d;]*m|^ *│ *", re.MULTILINE)  # Molecule frames and colours what it hands on
COMPLAINTS = (re.compile(r"^(?:fatal|failed): ", re.MULTILINE), re.compile(r"^(?:\[?ERROR|CRITICAL)\b", re.MULTILINE))
REASON_LENGTH = 500  # characters
PLAYED = re.compile(r" PLAY \[.*?(?=fatal: |\[ERROR\])")  # what Ansible says before it says why


@dataclass(frozen=True)
class Count:
    """How many checks passed, failed and were skipped, and why those failed, a line each."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def __add__(self, other: Count) -> Count:
        """Add up two counts."""
        numbers = (self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)
        return Count(*numbers, self.reasons + other.reasons)


def failure(reason: str) -> Count:
    """Return the count of one failed check."""
    said = PLAYED.sub(" … ", " ".join(reason.split()))
    return Count(failed=1, reasons=(said[:REASON_LENGTH],))


@dataclass(frozen=True)
class Result:
    """What came of a part, and what it took: seconds by the clock, and of the processor with its hosts'."""

    name: str
    count: Count
    seconds: float
    cpu: float

    def row(self, total: float, budget: float | None) -> str:
        """Return its line of the table at the end; `total` is all parts' CPU seconds, `budget` what this may take."""
        change = f"{self.cpu / budget - 1:+5.0%}" if budget else "  new"
        count = f"{self.count.passed} passed, {self.count.failed} failed, {self.count.skipped} skipped"
        share = self.cpu / (total or 1.0)
        return f"{self.name:35} {self.seconds:6.0f} {self.cpu:6.0f} {share:5.0%} {change:>6}   {count}"


def command(*words: str, cwd: Path = REPOSITORY) -> Count:
    """Run one command that is one check, with its output shown: status 0 is a pass."""
    text = " ".join(words)
    print(f"--- {text}", flush=True)
    output = []
    with subprocess.Popen(
        words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        for line in running.stdout or ():
            output.append(line.decode(errors="replace"))
            print(output[-1], end="", flush=True)
    if running.returncode == 0:
        return Count(passed=1)
    return failure(f"{text}: status {running.returncode} {last_complaint(''.join(output))}")


def last_complaint(output: str) -> str:
    """Return the last failure that Ansible tells of, else the last error of all, with what follows; or nothing."""
    # Molecule tries to clean up after the action that failed.
    plain = DECORATION.sub("", DECORATION.sub("", output)).partition("Executed: Failed")[0]
    for pattern in COMPLAINTS:
        if starts := [found.start() for found in pattern.finditer(plain)]:
            return plain[starts[-1] :]
    return ""


def read_report(file: Path) -> Count:
    """Count the tests in a JUnit report; none at all, or no report, is a failure."""
    if not file.exists():
        return failure(f"no report was written: {file.name}")
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    if total == skipped:
        return failure(f"no test ran: {file.name}")
    reasons = [
        failure(f"{case.attrib['classname']}::{case.attrib['name']}: {fault.attrib.get('message', '')}").reasons
        for case in suite.iter("testcase")
        for fault in [*case.findall("failure"), *case.findall("error")]
    ]
    return Count(total - skipped - failed, failed, skipped, sum(reasons, ()))


def without_skips(count: Count) -> Count:
    """Count what was skipped as failed."""
    reasons = (f"{count.skipped} were skipped",) if count.skipped else ()
    return Count(count.passed, count.failed + count.skipped, reasons=count.reasons + reasons)


def pytest(name: str, *words: str, cwd: Path = REPOSITORY) -> Count:
    """Run pytest and count its tests; a status that its tests do not explain is a failure more."""
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    # In the place of a worker that crashed, a new one may wait for ever (pytest-dev/pytest-xdist#1323).
    status = command("pytest", *words, "--max-worker-restart=0", f"--junitxml={report}", cwd=cwd)
    count = read_report(report)
    return count + status if status.failed and not count.failed else count


def lint() -> Count:
    """Look at the sources without running them."""
    checks = [
        command("ruff", "check", "."),
        command("ruff", "format", "--check", "."),
        command("mypy"),
        command("mypy", "--cache-dir=../.mypy_cache", cwd=REPOSITORY / "client"),  # half of it was just checked
        command("typos"),
        command("yamllint", "--strict", "."),
        command("ansible-lint", "site.yml", "playbooks", "roles", "plugins", "inventory"),
        command("ansible-playbook", "--syntax-check", "site.yml", "-i", "inventory/local"),
    ]
    return sum(checks, Count())


def rehearse() -> Count:
    """Try check mode on a fresh host, then keep the README's first command true, by an operator who has a password."""
    operator = ("--user=operator-of-26", "--extra-vars=ansible_become_password=secret")  # molecule/userland.yml
    check = command("molecule", "check", "--scenario-name", "site")
    return check + command(sys.executable, "-m", "rehearsal", "run", "--", *operator)


def module(name: str) -> Count:
    """Run the module tests.NAME, which prepares what its tests need, and count these as `pytest` does."""
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    status = command(sys.executable, "-m", f"tests.{name}", str(report))
    count = read_report(report)
    return count + status if status.failed and not count.failed else count


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
    """Return every part: the sources, the programs, the client, the rehearsal, then a scenario of Molecule each."""
    scenarios = sorted(path.parent.name for path in (REPOSITORY / "molecule").glob("*/molecule.yml"))
    ignored = [f"--ignore=tests/{name}" for name in ("command_line", "fleet", "live_client", "examples")]
    return {
        "lint": lint,
        "unit": lambda: pytest("unit", "tests", "rehearsal/tiny_model", *ignored, "-n2", "--dist=loadgroup"),
        "client": lambda: pytest("client", "-n2", "--dist=worksteal", cwd=REPOSITORY / "client"),
        "rehearse": rehearse,
        "live_client": lambda: pytest("live_client", "tests/live_client"),
        "qwen": lambda: module("qwen"),
        "examples": lambda: module("examples"),
        "command_line": lambda: pytest("command_line", "tests/command_line"),
        **{f"molecule {name}": scenario(name) for name in scenarios},
    }


def prepare() -> None:
    """Put the environment's programs on the PATH, and install what the client's tests and the rehearsal need.

    The limit of each test is set here, since Molecule and the rehearsal run pytest, too.
    """
    os.environ["PATH"] = f"{PROGRAMS}:{os.environ['PATH']}"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of some thousand processes would compile its sources again
    os.environ["PYTEST_TIMEOUT"] = str(TEST_LIMIT)
    REPORTS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "rehearsal", "prepare"], cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        sys.exit("nothing was tested: what the tests need could not be prepared, see above")


def hosts_of(name: str) -> str:
    """Return how the names of the hosts begin that a part uses."""
    return "dots-ocr-rehearsal-host" if name in CHAIN else f"test-{name.removeprefix('molecule ').replace('_', '-')}"


def run_part(name: str) -> Result:
    """Run a part in this process."""
    print(f"\n=== {name}", flush=True)
    start, before = time.monotonic(), usage.processes()
    with usage.measured(hosts_of(name)) as meter:
        count = parts()[name]()
    return Result(name, count, time.monotonic() - start, usage.processes() - before + meter.total)


def end(process: int) -> list[str]:
    """Kill a process and those that it started; return their command lines, the youngest first."""
    found = {}
    for one in sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):  # it has ended
            if str(process) in usage.ancestors(str(one)):
                found[one] = Path(f"/proc/{one}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    for one in found:  # the oldest first: it would go on when what it waits for ends
        with suppress(OSError):
            os.kill(one, signal.SIGKILL)
    return list(reversed(found.values()))


def run_beside(name: str) -> Result:
    """Run a part in a process of its own, and print its output when it has ended; what hangs is ended and named."""
    count, seconds, cpu = Count(), 0.0, 0.0
    # A pipe would be open until the last process has gone that the part left behind.
    with tempfile.TemporaryFile() as log:
        done = subprocess.Popen(
            [sys.executable, "-m", "tests", name],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, BESIDE: "1"},
        )  # fmt: skip
        try:
            done.wait(LIMIT)
        except subprocess.TimeoutExpired:
            count += failure(f"{name}: not ended after {LIMIT:.0f} s, while these ran: {'; '.join(end(done.pid))}")
            done.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    print(output, flush=True)
    if found := TOTAL.search(output):
        passed, failed, skipped = map(int, found.groups())
        count += Count(passed, failed, skipped, tuple(REASON.findall(output)))
        if row := re.search(rf"^{re.escape(name)} +(\d+) +(\d+) ", output, re.MULTILINE):
            seconds, cpu = map(float, row.groups())
    if (not found or done.returncode != 0) and not count.failed:
        count += failure(f"{name}: ended with status {done.returncode}")
    return Result(name, count, seconds, cpu)


def chains(names: Iterable[str]) -> list[list[str]]:
    """Return parts in the order in which they begin; those of a list run one after the other."""
    left = set(names)
    places = [*FIRST, *sorted(left.difference(CHAIN, FIRST, LAST)), *LAST]
    return [[name for name in CHAIN if name in left], *([name] for name in places if name in left)]


def run_all(names: Iterable[str]) -> list[Result]:
    """Run parts side by side, WORKERS at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        done = pool.map(lambda chain: [run_beside(name) for name in chain], chains(names))
        return [result for results in done for result in results]


def table(results: Iterable[Result], seconds: float) -> list[str]:
    """Return what each part took, against tests/budget.toml, and name those that take far more than they may."""
    done = list(results)
    budget = tomllib.loads(BUDGET.read_text())
    total = Result("all", sum((one.count for one in done), Count()), seconds, sum(one.cpu for one in done))
    over = [one for one in done if one.cpu > OVER * budget.get(one.name, one.cpu)]
    return [
        f"{'part':35} {'wall s':>6} {'CPU s':>6} {'share':>5} {'budget':>6}",
        *(one.row(total.cpu, budget.get(one.name)) for one in done),
        total.row(total.cpu, sum(budget.get(one.name, 0.0) for one in done)),
        *(f"over its budget by more than half: {one.name}, {one.cpu:.0f} CPU s" for one in over),
    ]


def main() -> int:
    """Run the parts that the command line names, or all; status 0 if nothing failed."""
    available = parts()
    wanted = sys.argv[1:]
    unknown = [name for name in wanted if name not in available]
    if unknown:
        print(f"unknown parts: {', '.join(unknown)}; there are: {', '.join(available)}")
        return 2
    if BESIDE not in os.environ:
        prepare()
    start = time.monotonic()
    results = [run_part(wanted[0])] if len(wanted) == 1 else run_all(wanted or available)
    total = sum((result.count for result in results), Count())
    notes = [f"not passed: {reason}" for reason in total.reasons]
    if BESIDE not in os.environ and (left := [name for name in available if name not in {one.name for one in results}]):
        notes.append(f"not run: {', '.join(left)}")
    print("\n".join(["", *table(results, time.monotonic() - start), "", *notes]))
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
