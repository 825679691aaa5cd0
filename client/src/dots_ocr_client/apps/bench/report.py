"""What `dots_ocr_client.apps.bench.measure` found, as JSON and as Markdown."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ...texts import count
from ..doctor import installed
from .measure import Load, Measurement, first_measured, ratios
from .pages import BenchmarkPage

# Whose versions a report names.
PACKAGES: Final = ("dots-ocr-client", "openai", "pillow", "pypdfium2", "torch", "transformers")
EXTRA: Final = "pip install 'dots-ocr-client[bench]'"

_NOTES = (
    "Engines are asked directly, one after the other, for the same pages. A page that was not read counts in no time "
    "and no rate but as not read.",
    "First page: with all that is loaded for it. Load: how much longer that was than the same page once more.",
    "p50 and p95: seconds for a page at the lowest concurrency, by nearest rank; with fewer than 20 pages p95 is the "
    "slowest.",
    "Pages/s: at the best concurrency, in brackets. Ratios: to the first engine that was measured.",
    "Character errors: edits by the length of the right text, white space collapsed; of pages that were read.",
    "Memory: peak of this process until then, engines measured earlier included, and of its largest child process, as "
    "an upper bound. A server's memory is not in it.",
)


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """A whole run."""

    measurements: Sequence[Measurement]  # one for each engine, in the order in which they were measured
    pages: Sequence[BenchmarkPage]
    mode: str
    machine: dict[str, Any]  # on what; see `describe_machine`

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values; times are seconds."""
        first = first_measured(self.measurements)
        return {
            "machine": self.machine,
            "mode": self.mode,
            "pages": [
                {
                    "name": page.name,
                    "language": page.language,
                    "width": page.image.width,
                    "height": page.image.height,
                    "characters": None if page.truth is None else len(" ".join(page.truth.split())),
                }
                for page in self.pages
            ],
            "engines": [{**asdict(one), "ratios": ratios(one, first)} for one in self.measurements],
        }

    def markdown(self) -> str:
        """Return two tables (engines; pages per second by concurrency), and what the numbers mean."""
        first = first_measured(self.measurements)
        sizes = sorted({f"{page.image.width} x {page.image.height}" for page in self.pages})
        several = ", ".join(sizes[:3]) + " …" * (len(sizes) > 3)
        machine, packages = self.machine, ", ".join(map(" ".join, self.machine["packages"].items()))
        host = f"{machine['processors']} processors ({_cell(machine['processor'])}), {machine['system']}"
        lines = [
            "# Engines side by side",
            "",
            f"{machine['time']}: {host}, Python {machine['python']}, {packages}.",
            "",
            f"{count(len(self.pages), 'page')} of {several} px, mode {self.mode}.",
            "",
            "| engine | model | first page, s | load, s | p50, s | p95, s | p50 ratio | pages/s | ratio | tokens/s "
            "| character errors | not read | memory, MiB |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(one, first) for one in self.measurements),
        ]
        levels = sorted({load.at_once for one in self.measurements for load in one.loads})
        if levels:
            lines += ["", "Pages per second, by pages at once:", ""]
            lines += [f"| engine | {' | '.join(map(str, levels))} |", "|---" * (len(levels) + 1) + "|"]
            for one in self.measurements:
                rates = {load.at_once: f"{load.pages_per_second:.2f}" for load in one.loads}
                if rates:
                    lines.append(f"| {_cell(one.engine)} | {' | '.join(rates.get(level, '') for level in levels)} |")
        return "\n".join([*lines, "", *(f"- {note}" for note in _NOTES)])


def describe_machine() -> dict[str, Any]:
    """Return the time, the processors and the versions that a run depends on."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _row(one: Measurement, first: Measurement | None) -> str:
    if one.unavailable is not None:
        return f"| {_cell(one.engine)} | not available: {_cell(one.unavailable)} |" + " |" * 11
    lowest, best, compared = one.loads[0], one.best or one.loads[0], ratios(one, first)
    cells = (
        _cell(one.engine),
        _cell(one.model or ""),
        _number(one.first_seconds),
        _number(one.load_seconds),
        _number(lowest.p50),
        _number(lowest.p95),
        _number(compared.get("p50")),
        f"{best.pages_per_second:.2f} ({best.at_once})",
        _number(compared.get("pages_per_second")),
        _number(best.tokens_per_second, 0),
        _errors(one),
        _not_read(one.loads),
        f"{one.process_mib or 0:.0f} + {one.child_mib or 0:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _errors(one: Measurement) -> str:
    rates = one.character_errors
    if not rates:
        return "-"
    languages = ", ".join(f"{name} {rate:.2%}" for name, rate in sorted(rates.items()) if name != "all")
    return f"{rates['all']:.2%}" + (f" ({languages})" if len(rates) > 2 else "")


def _not_read(loads: Sequence[Load]) -> str:
    counts = sum((Counter(load.failures) for load in loads), Counter[str]())
    total = counts.total() + sum(load.read for load in loads)
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    return f"{counts.total()} of {total}" + (f" ({kinds})" if kinds else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
