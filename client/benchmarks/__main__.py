"""Print the tables of docs/performance.md: `make bench-client`, some twenty minutes on an idle machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .documents import A6, write_scan_pdf, write_text_pdf
from .vllm import compare_with_vllm

FEW, MANY = 20, 120
"""Pages; the difference of two runs leaves out what it costs to start."""
LATENCY = 4.0
"""Of the ideal server, in seconds: what a page of dots.ocr takes at least on a busy GPU."""


@dataclass(frozen=True)
class Usage:
    """What one process and its children used."""

    result: dict[str, float]
    cpu_seconds: float
    peak_mib: float


def work(*words: str | Path | int) -> Usage:
    """Run a piece of work.py as a process and measure it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.work", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, words))} ended with status {os.waitstatus_to_exitcode(status)}")
    return Usage(json.loads(output), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@contextmanager
def server(slots: int, seconds: float) -> Iterator[str]:
    """Run the ideal server and yield its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server", str(slots), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


def cpu_per_page(folder: Path) -> None:
    """Compare seconds of CPU: the whole client with drawing and encoding alone."""
    print("\n| pages | draw and encode alone, CPU ms a page | the whole client | ratio |\n|---|---|---|---|")
    for kind, write in (("printed text", write_text_pdf), ("scan", write_scan_pdf)):
        costs = []
        for job in ("draw", "read"):
            used = []
            for pages in (FEW, MANY):
                file = folder / f"{kind}-{pages}.pdf"
                write(file, pages)
                with server(32, 0) as url:
                    usage = work("draw", file) if job == "draw" else work("read", file, url, 8, 8)
                used.append(usage.cpu_seconds)
            costs.append(1000 * (used[1] - used[0]) / (MANY - FEW))
        print(f"| {kind} | {costs[0]:.0f} | {costs[1]:.0f} | {costs[1] / costs[0]:.2f} |")


def throughput(folder: Path) -> None:
    """Compare pages per second, from the first request on, with what a server of fixed latency could take."""
    print(f"\n| slots of a server that takes {LATENCY:g} s | pages/s possible | pages/s | ratio | from a cold start |")
    print("|---|---|---|---|---|")
    for slots in (1, 8, 32):
        pages = 20 * slots
        file = folder / f"throughput-{pages}.pdf"
        write_text_pdf(file, pages)
        rates = []
        for start in (slots, min(4, slots)):
            with server(slots, LATENCY) as url:
                ended = work("read", file, url, slots, start).result["ended"]
                with urllib.request.urlopen(url.removesuffix("/v1") + "/first") as answer:
                    rates.append(pages / (ended - json.load(answer)))
        ideal = slots / LATENCY
        print(f"| {slots} | {ideal:.2f} | {rates[0]:.2f} | {rates[0] / ideal:.3f} | {rates[1] / ideal:.3f} |")


def long_documents(folder: Path) -> None:
    """Show memory and the time to the first page for a short and a very long document."""
    print("\n| pages of A6 | peak memory of the largest process, MiB | to the first page, s | pages/s |")
    print("|---|---|---|---|")
    for pages in (50, 5000):
        file = folder / f"long-{pages}.pdf"
        write_text_pdf(file, pages, A6)
        with server(32, 0.1) as url:
            usage = work("read", file, url, 32, 4)
        print(
            f"| {pages} | {usage.peak_mib:.0f} | {usage.result['first']:.2f} | {pages / usage.result['seconds']:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print every table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cpu_per_page(folder)
        throughput(folder)
        compare_with_vllm(folder)
        long_documents(folder)


if __name__ == "__main__":
    main()
