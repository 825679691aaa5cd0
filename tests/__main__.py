"""Run every part of the test suite, count what ran, and report the time of each: `python -m tests [PART ...]`.

A part that fails does not keep the others from running. A part that ran nothing is red: an empty scenario or an
empty test folder must not pass for success. What failed, and why, is said at the end, which is often all that is left
of a long output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
REPORTS = REPOSITORY / ".cache/junit"
# Side by side in each stage, on two cores: parts wait for a third of their time, and the first stage times nothing.
WORKERS = (3, 1, 2)
TOTAL = re.compile(r"^(\d+) passed, (\d+) failed, (\d+) skipped\n*\Z", re.MULTILINE)
REASON = re.compile(r"^not passed: (.*)$", re.MULTILINE)
DECORATION = re.compile(r"\x1b\[[\d;]*m|^ *│ *", re.MULTILINE)  # Molecule frames and colours what it hands on
COMPLAINTS = (re.compile(r"^(?:fatal|failed): ", re.MULTILINE), re.compile(r"^(?:\[?ERROR|CRITICAL)\b", re.MULTILINE))
REASON_LENGTH = 500  # characters


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
    return Count(failed=1, reasons=(" ".join(reason.split())[:REASON_LENGTH],))


@dataclass(frozen=True)
class Result:
    """What came of a part, and how long it took in seconds."""

    name: str
    count: Count
    seconds: float

    def row(self) -> str:
        """Return its line of the table at the end."""
        count = f"{self.count.passed} passed, {self.count.failed} failed, {self.count.skipped} skipped"
        return f"{self.name:35} {self.seconds:6.0f} s   {count}"


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
    apart = ("tests/command_line", "tests/fleet", "tests/live_client", "tests/ray")
    return pytest("unit", "tests", "rehearsal/tiny_model", *(f"--ignore={folder}" for folder in apart))


def client() -> Count:
    """Test the client over real sockets and with the real Tesseract."""
    return pytest("client", cwd=REPOSITORY / "client")


def rehearse() -> Count:
    """Keep the README's first command true."""
    return command(sys.executable, "-m", "rehearsal", "run")


def module(name: str) -> Count:
    """Run the module tests.NAME, which prepares what its tests need, and count these as `pytest` does."""
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    status = command(sys.executable, "-m", f"tests.{name}", str(report))
    count = read_report(report)
    return count + status if status.failed and not count.failed else count


def qwen() -> Count:
    """Put the client's Qwen engine to real torch and transformers, inside vLLM's image."""
    return module("qwen")


def ray() -> Count:
    """Run the client's example for Ray Data with a real Ray."""
    return module("ray")


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
        "qwen": qwen,
        "ray": ray,
        "live_client": live_client,
        "command_line": command_line,
        **{f"molecule {name}": scenario(name) for name in scenarios},
    }


def stages(names: Iterable[str]) -> list[list[str]]:
    """Return the order of the parts: stages one after the other, the parts of each side by side, the first ones first.

    What measures time is a stage of its own.
    """
    left = list(names)

    def take(*wanted: str) -> list[str]:
        taken = [name for name in wanted if name in left]
        left[:] = [name for name in left if name not in taken]
        return taken

    # None of the others needs vLLM, which the rehearsal has to build first. The long ones first: none is left over.
    first = take(
        *("rehearse", "molecule cpu", "molecule nvidia_driver", "molecule docker_engine", "client"),
        *("molecule wsl", "molecule preflight", "lint", "unit", "command_line"),
    )
    alone = take("live_client")
    longest = take("molecule fleet", "molecule dots_ocr_server", "molecule site", "molecule airgap")
    return [first, alone, longest + left]


def prepare() -> None:
    """Put the environment's programs on the PATH, and install what the client's tests and the rehearsal need."""
    os.environ["PATH"] = f"{PROGRAMS}:{os.environ['PATH']}"
    REPORTS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "rehearsal", "prepare"], cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        sys.exit("nothing was tested: what the tests need could not be prepared, see above")


def run_here(name: str) -> Result:
    """Run a part in this process, with its output on the terminal."""
    print(f"\n=== {name}", flush=True)
    start = time.monotonic()
    return Result(name, parts()[name](), time.monotonic() - start)


def run_beside(name: str) -> Result:
    """Run a part in a process of its own, and print its output when it has ended."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests", name]
    done = subprocess.run(
        command, cwd=REPOSITORY, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode(errors="replace")
    print(output, flush=True)
    found = TOTAL.search(output)
    ending = f"{name}: ended with status {done.returncode}"
    count = failure(ending)
    if found:
        passed, failed, skipped = map(int, found.groups())
        count = Count(passed, failed, skipped, tuple(REASON.findall(output)))
    if done.returncode != 0 and not count.failed:
        count += failure(ending)
    return Result(name, count, time.monotonic() - start)


def run_all(names: Iterable[str]) -> list[Result]:
    """Run parts in their stages, as many side by side as WORKERS says."""
    results: list[Result] = []
    for stage, workers in zip(stages(names), WORKERS, strict=True):
        if len(stage) == 1:
            results += map(run_here, stage)
        else:
            with ThreadPoolExecutor(workers) as pool:
                results += pool.map(run_beside, stage)
    return results


def main() -> int:
    """Run the parts that the command line names, one after the other, or all; status 0 if nothing failed."""
    available = parts()
    wanted = sys.argv[1:]
    unknown = [name for name in wanted if name not in available]
    if unknown:
        print(f"unknown parts: {', '.join(unknown)}; there are: {', '.join(available)}")
        return 2
    prepare()
    results = list(map(run_here, wanted)) if wanted else run_all(available)
    total = sum((result.count for result in results), Count())
    reasons = [f"not passed: {reason}" for reason in total.reasons]
    print("\n".join(["", *(result.row() for result in results), "", *reasons]))
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
