"""Print the tables of docs/understand/performance.md: `make bench-client`, some twenty minutes on a quiet machine.

`--part` chooses some of them. A part during which others took more of the processors than `--others` is not printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dots_ocr_client.engines.admission import START
from dots_ocr_client.pages.rasterizer import MALLOC

from .documents import A6, write_images, write_scan_pdf, write_text_pdf
from .machine import LIMIT, BusyError, Watch, refuse_if_busy
from .peers import PEERS, peer_command
from .vllm import compare_with_vllm, gateway, vllm_bench

FEW, MANY = 20, 120
"""Pages; the difference of two runs leaves out what it costs to start. Scripts, which are slow, get a fifth."""
ROUNDS = 3
LATENCY = 4.0
"""Of the ideal server, in seconds: what a page of dots.ocr takes at least on a busy GPU."""
ROWS = (("A4", 1, 5, LATENCY), ("A4", 8, 40, LATENCY), ("A4", 32, 320, LATENCY), ("small images", 32, 300, 1.0))
"""For pages per second: what, slots, pages, seconds that each takes the server."""


@dataclass(frozen=True)
class Usage:
    """What one process and its children used."""

    result: dict[str, float]
    cpu_seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Goal:
    """A figure that has a limit."""

    what: str
    measured: float
    limit: float
    at_most: bool = False

    @property
    def row(self) -> str:
        """The goal as a row of a table."""
        met = self.measured <= self.limit if self.at_most else self.measured >= self.limit
        bound = "at most" if self.at_most else "at least"
        return f"| {self.what} | {self.measured:.3f} | {bound} {self.limit:g} | {'yes' if met else 'NO'} |"


Table = tuple[list[str], list[Goal]]


def work(*words: str | Path | int, command: Sequence[str] = ()) -> Usage:
    """Run a piece of work.py, or another command, as a process and measure it."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*(command or (sys.executable, "-m", "benchmarks.work")), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **MALLOC} if words[0] == "draw" else None,  # what our own processes have
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(map(str, words))} ended with status {process.returncode}:\n{said.read()[-2000:]}")
    return Usage(json.loads(output.splitlines()[-1]), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@contextmanager
def server(slots: int, seconds: float, address: str = "127.0.0.1") -> Iterator[str]:
    """Run the ideal server and yield its base URL."""
    command = [sys.executable, "-m", "benchmarks.server", str(slots), str(seconds), address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://{address}:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


def cpu(job: str, folder: Path, kind: str, few: int, many: int, command: Sequence[str] = ()) -> float:
    """Return the milliseconds of CPU that a page costs a job."""
    write = {"text": write_text_pdf, "scan": write_scan_pdf}[kind]
    used = []
    for pages in (few, many):
        file = folder / f"{kind}-{pages}.pdf"
        if not file.exists():
            write(file, pages)
        with server(32, 0) as url:
            words = {"draw": (file,), "read": (file, url, 8, 8)}.get(job, (file, url, 8))
            used.append(work(job, *words, command=command).cpu_seconds)
    return 1000 * (used[1] - used[0]) / (many - few)


def rate(
    job: str, document: Path, pages: int, slots: int, *more: int, seconds: float = LATENCY, command: Sequence[str] = ()
) -> float:
    """Return the pages per second of a job from the first request on, as a part of what the ideal server can read."""
    with server(slots, seconds) as url:
        result = work(job, document, url, slots, *more, command=command).result
        with urllib.request.urlopen(url.removesuffix("/v1") + "/times") as answer:
            first, last = json.load(answer)
    return float(pages / (result.get("ended", last) - first) / (slots / seconds))


def cpu_per_page(folder: Path, rounds: int) -> Table:
    """Compare seconds of CPU: the client and a plain script with drawing and the fastest lossless encoder alone."""
    lines = [
        "| A4 pages | draw and encode alone, CPU ms a page | the client | a script | client ÷ alone | client ÷ script |"
    ]
    lines.append("|---|---|---|---|---|---|")
    goals = []
    for kind in ("text", "scan"):
        jobs = {"draw": (FEW, MANY), "read": (FEW, MANY), "script": (FEW // 5, MANY // 5)}
        found = [[cpu(job, folder, kind, *pages) for job, pages in jobs.items()] for _ in range(rounds)]
        alone, client, script = (statistics.median(column) for column in zip(*found, strict=True))
        to_alone = statistics.median(one[1] / one[0] for one in found)
        to_script = statistics.median(one[1] / one[2] for one in found)
        lines.append(f"| {kind} | {alone:.1f} | {client:.1f} | {script:.1f} | {to_alone:.2f} | {to_script:.2f} |")
        goals.append(Goal(f"CPU per A4 page, {kind}: client ÷ draw and encode alone", to_alone, 1.5, at_most=True))
        goals.append(Goal(f"CPU per A4 page, {kind}: client ÷ script", to_script, 1, at_most=True))
    return lines, goals


def throughput(folder: Path, rounds: int) -> Table:
    """Compare pages per second with what a server of fixed latency could read, and with a plain script.

    The client begins as with any server that it knows nothing of. Short rows, where a second counts, are repeated.
    """
    lines = ["| pages | how many | slots | s a page | the client | a script | client ÷ script |", "|---" * 7 + "|"]
    goals = []
    for what, slots, pages, seconds in ROWS:
        document = folder / f"{what}-{pages}"
        (write_text_pdf if what == "A4" else write_images)(document, pages)
        found = []
        for _ in range(rounds if seconds < LATENCY else 1):
            client = rate("read", document, pages, slots, min(START, slots), seconds=seconds)
            found.append((client, rate("script", document, pages, slots, seconds=seconds)))
        client, script = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(one / other for one, other in found)
        name = f"pages/s, {what}, {slots} slots, {pages} pages"
        lines.append(f"| {what} | {pages} | {slots} | {seconds:g} | {client:.3f} | {script:.3f} | {ratio:.3f} |")
        goals.append(Goal(f"{name}: client ÷ script", ratio, 1))
        if (what, slots) == ("A4", 32):
            goals.append(Goal(f"{name}, from cold: client ÷ possible", client, 0.97))
    return lines, goals


def beside_vllm(folder: Path, rounds: int) -> Table:
    """Compare with `vllm bench serve`: on a server with a GPU of its own, and on one that computes on our cores."""
    what, slots, pages, seconds = ROWS[2]
    document = folder / what
    write_text_pdf(document, pages)
    client = rate("read", document, pages, slots, START, seconds=seconds)
    with server(slots, seconds, gateway()) as url:
        theirs = vllm_bench(url, pages, slots) / (slots / seconds)
    lines, ratio = compare_with_vllm(rounds)
    return [
        "| server | pages | at once | `vllm bench serve` | the client | ratio |",
        "|---" * 6 + "|",
        f"| ideal, {seconds:g} s a page, part of the possible | {pages} | {slots} "
        f"| {theirs:.3f} | {client:.3f} | {client / theirs:.3f} |",
        *lines,
    ], [
        Goal("pages/s on the ideal server: client ÷ vllm bench serve", client / theirs, 1),
        Goal("pages/s on vLLM's CPU build: client ÷ vllm bench serve", ratio, 1),
    ]


def beside_peers(folder: Path, chosen: dict[str, str]) -> Table:
    """Compare with what others have published, where it is installed."""
    lines = ["| | CPU ms a page of text | a scan | part of 32 slots used, 96 pages of text |", "|---|---|---|---|"]
    document = folder / "peers-96.pdf"
    write_text_pdf(document, 96)
    commands: dict[str, tuple[str, tuple[str, ...]]] = {"the client": ("read", ()), "a script": ("script", ())}
    commands |= {name: (name, peer_command(name, python)) for name, python in chosen.items()}
    for name, (job, command) in commands.items():
        costs = [cpu(job, folder, kind, FEW // 5, MANY // 5, command) for kind in ("text", "scan")]
        part = rate(job, document, 96, 32, *((START,) if job == "read" else ()), command=command)
        lines.append(f"| {name} | {costs[0]:.0f} | {costs[1]:.0f} | {part:.3f} |")
    lines += [f"| {name} | not installed: --peer {name}=PYTHON | | |" for name in PEERS if name not in chosen]
    return lines, []


def long_documents(folder: Path, _: int) -> Table:
    """Show memory and the time to the first page for a short and a very long document."""
    lines = [
        "| pages of A6 | peak memory of the largest process, MiB | to the first page, s | pages/s |",
        "|---|---|---|---|",
    ]
    for pages in (50, 5000):
        file = folder / f"long-{pages}.pdf"
        write_text_pdf(file, pages, A6)
        with server(32, 0.1) as url:
            usage = work("read", file, url, 32, START)
        result = usage.result
        lines.append(f"| {pages} | {usage.peak_mib:.0f} | {result['first']:.2f} | {pages / result['seconds']:.1f} |")
    return lines, []


def main(words: Sequence[str] | None = None) -> int:
    """Measure the parts that are wanted, and print their tables and goals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ("cpu", "rate", "vllm", "peers", "long")
    parser.add_argument("--part", choices=names, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of what is repeated; default: {ROUNDS}")
    parser.add_argument("--others", type=float, default=LIMIT, help=f"share of CPU they may take; default: {LIMIT}")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", type=lambda text: tuple(text.split("=", 1)),
        help=f"the Python of an environment that has one of {', '.join(PEERS)}",
    )  # fmt: skip
    options = parser.parse_args(words)
    parts: dict[str, Callable[[Path, int], Table]] = {
        "cpu": cpu_per_page,
        "rate": throughput,
        "vllm": beside_vllm,
        "peers": lambda folder, _: beside_peers(folder, dict(options.peer)),
        "long": long_documents,
    }
    goals: list[Goal] = []
    failed = False
    for name in options.part or names:
        try:
            before = refuse_if_busy(options.others)
            watch = Watch()
            with tempfile.TemporaryDirectory() as folder:
                lines, found = parts[name](Path(folder), options.rounds)
            # The real server is no child of this process: what it takes would count as that of others.
            lines += ["", before if name == "vllm" else watch.record(options.others)]
        except BusyError as error:
            print(f"part {name} is not printed: {error}", file=sys.stderr)
            failed = True
        else:
            print("\n".join(["", *lines]), flush=True)
            goals += found
    if goals:
        print("\n".join(["", "| goal | measured | limit | met |", "|---|---|---|---|", *(goal.row for goal in goals)]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
