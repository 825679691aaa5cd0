"""Print the table of docs/understand/performance.md about runs that change nothing: `make bench-host`.

Runs site.yml on hosts where all of it is in place, and plain fact gathering on the same hosts over the same connection,
in turn. Only ratios carry over to other machines.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import BenchmarkError, spread
from client.benchmarks.machine import LIMIT, BusyError, refuse_if_busy

REPOSITORY = Path(__file__).resolve().parent.parent
REHEARSAL = "inventory/rehearsal"
SITE, FACTS = "site.yml", "benchmarks/facts.yml"
GOAL = 10  # times the fact gathering, in tasks
SLOWEST = 5
CALLBACK = {
    "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
    "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.json",  # and none of those whose tables would be in between
    "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
    "ANSIBLE_FORCE_COLOR": "false",
}


@dataclass(frozen=True)
class Run:
    """One run of a playbook.

    Attributes:
        tasks: seconds per task that ran, by its name; tasks of the same name are one.
        count: how many tasks ran on at least one host.
        skipped: how many did not.
        in_tasks: seconds from the start of the first task to the end of the last.
        total: seconds of the whole program, its start and end included.
        plays: the same of each play that has tasks which ran, by its name; its total is what it has in tasks.
    """

    tasks: dict[str, float]
    count: int
    skipped: int
    in_tasks: float
    total: float
    plays: dict[str, Run] = field(default_factory=dict)


def moment(text: str) -> datetime:
    """Return a time of the callback's."""
    return datetime.fromisoformat(text.removesuffix("Z"))


def read(text: str, total: float) -> Run:
    """Read what the callback ansible.posix.json printed.

    Args:
        text: its output, perhaps with lines of others before it.
        total: seconds that the whole program took.

    Raises:
        BenchmarkError: the run changed something, or failed.
    """
    begin = text.find("{\n")
    if begin < 0:
        raise BenchmarkError(
            f"the run printed no result: {text.strip()[-500:] or 'nothing'}. Fix: run the playbook by hand"
        )
    report: dict[str, Any] = json.loads(text[begin:])
    tasks = [task for play in report["plays"] for task in play["tasks"] if "end" in task["task"]["duration"]]
    if not tasks:
        raise BenchmarkError("no task ran. Fix: check the inventory and --limit")
    broken = [host for host, summary in report["stats"].items() if summary["failures"] or summary["unreachable"]]
    if broken:
        results = [task["hosts"].get(host, {}) for task in tasks for host in broken]
        message = next(
            (found["msg"] for found in reversed(results) if found.get("failed") or found.get("unreachable")), ""
        )
        raise BenchmarkError(f"the run failed on {', '.join(broken)}: {message}. Fix: deploy first, then measure")
    changed = [task["task"]["name"] for task in tasks if any(found.get("changed") for found in task["hosts"].values())]
    if changed:
        raise BenchmarkError(
            f"not all is in place, these tasks change something: {'; '.join(changed)}. Fix: deploy first, then measure"
        )
    of_plays = {
        play["play"]["name"]: timed([task for task in play["tasks"] if task in tasks]) for play in report["plays"]
    }
    return replace(timed(tasks, total), plays={name: run for name, run in of_plays.items() if run.count})


def timed(tasks: Sequence[dict[str, Any]], total: float | None = None) -> Run:
    """Return what tasks in a row took; without a total it is what they took."""
    if not tasks:
        return Run({}, 0, 0, 0, 0)
    seconds: Counter[str] = Counter()
    ran = [task for task in tasks if not all(found.get("skipped") for found in task["hosts"].values())]
    for task in ran:
        duration = task["task"]["duration"]
        seconds[task["task"]["name"]] += (moment(duration["end"]) - moment(duration["start"])).total_seconds()  # type: ignore[assignment]
    first, last = (tasks[0]["task"]["duration"]["start"], tasks[-1]["task"]["duration"]["end"])
    in_tasks = (moment(last) - moment(first)).total_seconds()
    return Run(dict(seconds), len(ran), len(tasks) - len(ran), in_tasks, in_tasks if total is None else total)


def play(playbook: str, options: Sequence[str]) -> Run:
    """Run a playbook and measure it.

    Raises:
        BenchmarkError: it changed something, or failed.
    """
    command = [str(Path(sys.executable).parent / "ansible-playbook"), playbook, *options]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **CALLBACK}, stdout=subprocess.PIPE, text=True, check=False
    )
    return read(done.stdout, time.monotonic() - start)


def tables(site: Sequence[Run], facts: Sequence[Run]) -> str:
    """Return the tables: medians, with the least and the greatest of the runs."""
    slowest = sorted(
        {name for run in site for name in run.tasks},
        key=lambda name: -statistics.median(run.tasks.get(name, 0.0) for run in site),
    )[:SLOWEST]
    parts = [("site.yml", site), *((f"- {name}", [run.plays[name] for run in site]) for name in site[-1].plays)]
    lines = [
        f"| | tasks that ran (skipped) | in tasks, s | ÷ fact gathering (goal: at most {GOAL}) | whole command, s |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, runs in (*parts, ("fact gathering alone", facts)):
        cells = [
            name,
            f"{runs[-1].count} ({runs[-1].skipped})",
            spread([run.in_tasks for run in runs]),
            spread([one.in_tasks / other.in_tasks for one, other in zip(runs, facts, strict=True)], 1),
            "" if name.startswith("- ") else spread([run.total for run in runs]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| slowest tasks | s | of all, % |", "|---|--:|--:|"]
    for name in slowest:
        times = [run.tasks.get(name, 0.0) for run in site]
        share = statistics.median(100 * run.tasks.get(name, 0.0) / run.in_tasks for run in site)
        lines.append(f"| {name} | {spread(times)} | {share:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("-i", "--inventory", default=REHEARSAL, help="default: the rehearsal's host")
    parser.add_argument("--limit", default="ocr_servers", help="hosts; default: all")
    parser.add_argument("--runs", type=int, default=5, help="of each; default: 5")
    parser.add_argument("--ask-become-pass", action="store_true", help="let Ansible ask for sudo's password, each time")
    parser.add_argument("--others", type=float, default=LIMIT, help=f"share of CPU they may take; default: {LIMIT}")
    known = parser.parse_args()
    if known.inventory == REHEARSAL:
        importlib.import_module("rehearsal.engine")  # sets how Ansible reaches its hosts, as for `make rehearse`
    options = ["--inventory", known.inventory, "--limit", known.limit]
    options += ["--ask-become-pass"] if known.ask_become_pass else []
    site, facts = [], []
    try:
        # Before and after: what a host beside this process does for the measurement would count as that of others.
        before = refuse_if_busy(known.others)
        # Changes nothing, in case that there is something to do.
        play(SITE, [*options, "--check"])
        for number in range(known.runs):
            print(f"run {number + 1} of {known.runs}", file=sys.stderr, flush=True)
            facts.append(play(FACTS, options))
            site.append(play(SITE, options))
        after = refuse_if_busy(known.others)
    except (BenchmarkError, BusyError) as error:
        print(f"nothing was measured: {error}.", file=sys.stderr)
        return 1
    print(f"{tables(site, facts)}\n\nBefore: {before} After: {after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
