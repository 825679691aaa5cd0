"""Write the generated tables of the documentation: `python docs/tables.py`; --check only tells whether it is needed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).resolve().parent
MOLECULE = DOCS.parent / "molecule"

# Of the cases of host preparation, those that were seen on a real machine, by their names.
SEEN_ON_REAL_HARDWARE: frozenset[str] = frozenset()

# What it is, platform, total and free memory (MiB).
CARDS = (
    ("RTX 5070 Ti, 16 GB", "bare_metal", 16303, 15791),
    ("the same, WSL2, idle desktop", "wsl2", 16303, 14900),
    ("the same, WSL2, busy desktop", "wsl2", 16303, 12800),
    ("RTX 5070 Ti Laptop, 12 GB", "bare_metal", 12227, 11700),
    ("the same, WSL2", "wsl2", 12227, 10900),
    ("24 GB", "bare_metal", 24564, 24000),
    ("32 GB", "bare_metal", 32607, 31800),
    ("8 GB", "bare_metal", 8151, 7900),
)


def load_plan() -> Any:
    """Return the function, which lies outside of any package."""
    spec = importlib.util.spec_from_file_location("memory_plan", DOCS.parent / "plugins/plugin_utils/memory_plan.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.memory_plan


def row(card: str, total: int, free: int, plan: dict[str, Any]) -> str:
    """Return one line of the table."""
    cells = ["refused, see below", *["-"] * 5]
    if plan["fits"]:
        cells = [
            f"{plan['gpu_memory_utilization']:.2f}",
            f"{plan['max_pixels'] / 1e6:.2f}",
            f"{plan['max_model_len']:,}",
            str(plan["max_num_seqs"]),
            str(plan["max_num_queued_reqs"]),
            f"{plan['kv_tokens']:,}",
        ]
    return f"| {' | '.join([card, f'{total:,}', f'{free:,}', *cells])} |"


def memory_plans() -> str:
    """Return the table of cards, and the arithmetic behind one plan and behind each refusal."""
    memory_plan = load_plan()
    plans = []
    for index, (card, platform, total, free) in enumerate(CARDS):
        plan = memory_plan({"memory_total_mib": total, "memory_free_mib": free}, platform)
        text = plan["explanation"] if plan["fits"] else f"{plan['problem']}. Fix: {plan['fix']}"
        plans.append((row(card, total, free, plan), f"{card}:\n\n> {text}.", index == 0 or not plan["fits"]))
    return "\n".join(
        [
            "| card | total, MiB (given) | free, MiB (given) | utilization (computed) | largest image, MP (computed) "
            "| longest request, tokens (computed) | pages at once (computed) | with those that wait (computed) "
            "| KV tokens (computed) |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(line for line, _, _ in plans),
            *(f"\n{text}" for _, text, shown in plans if shown),
        ]
    )


@dataclass(frozen=True, order=True)
class Case:
    """One row of the matrix of host preparation."""

    platform: str
    case: str
    outcome: str
    fix: str
    scenario: str

    def row(self) -> str:
        """Return its line of the table."""
        seen = "yes" if self.case in SEEN_ON_REAL_HARDWARE else "never"
        cells = (self.platform, self.case, self.outcome, self.fix or "-", f"`{self.scenario}`", seen)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping below a node of a playbook, tasks in blocks included."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from tasks(child)


def expected_cases(scenario: str, playbook: Any) -> Iterator[Case]:
    """Yield the cases of a playbook: its includes of expect_failure.yml and expect_success.yml that name one.

    Raises:
        ValueError: a case is not spelt out but computed.
    """
    for task in tasks(playbook):
        wanted = str(task.get("ansible.builtin.include_tasks", ""))
        told = task.get("vars", {})
        if not wanted.endswith(("expect_failure.yml", "expect_success.yml")) or "case" not in told:
            continue
        success = wanted.endswith("expect_success.yml")
        outcome = told["outcome"] if success else f"refused: {told['complaint']}"
        found = Case(told["platform"], told["case"], outcome, "" if success else told["fix"], scenario)
        if "{{" in str(found):
            raise ValueError(f"{scenario}: a case of the matrix must be spelt out: {found}")
        yield found


def preflight_cases(inventory: Any) -> Iterator[Case]:
    """Yield the cases of the preflight: one host each."""
    for host in inventory["ocr_servers"]["children"]["preflight"]["hosts"].values():
        problems = host["expected_problems"]
        outcome = "; ".join(f"refused: {entry['problem']}" for entry in problems) or "can serve"
        fix = "; ".join(entry["fix"] for entry in problems)
        yield Case(host["platform"], host["case"], outcome, fix, "preflight")


def host_matrix() -> str:
    """Return the table of every case of host preparation: platform, case, outcome, fix."""
    cases = set(preflight_cases(yaml.safe_load((MOLECULE / "inventory/hosts.yml").read_text())))
    for file in sorted(MOLECULE.glob("*/*.yml")):
        cases |= set(expected_cases(file.parent.name, yaml.safe_load(file.read_text())))
    head = ["platform", "case", "expected outcome", "fix", "scenario", "on real hardware"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(case.row() for case in sorted(cases))])


class Attacks:
    """Pytest's plugin that counts the cases of each attack."""

    def __init__(self) -> None:
        """Begin with none."""
        self.found: Counter[tuple[str, str, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Count what was collected."""
        for item in items:
            for mark in item.iter_markers("attack"):
                self.found[item.path.relative_to(DOCS.parent).as_posix(), *mark.args] += 1


def attacks() -> str:
    """Return the table of attacks that are tests: what is tried, what comes of it, in how many cases, and where."""
    rows: list[str] = []
    cases = 0
    for folder in ("tests", "client"):
        files = sorted(file for file in (DOCS.parent / folder).rglob("test_*.py") if "mark.attack(" in file.read_text())
        command = [sys.executable, __file__, "--attacks", *map(str, files)]
        counted = json.loads(subprocess.run(command, cwd=DOCS.parent / folder, check=True, capture_output=True).stdout)
        for file, what, outcome, count in counted:
            rows.append(f"| {what} | {outcome} | {count} | `{file}` |")
            cases += count
    return "\n".join(["| attack | outcome | cases | test |", "|---|---|--:|---|", *rows, f"| all | | {cases} | |"])


def count_attacks(files: list[str]) -> int:
    """Print what the tests of these files attack, as JSON."""
    plugin = Attacks()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], plugins=[plugin])
    print(json.dumps([[*key, count] for key, count in plugin.found.items()]))
    return 0 if plugin.found else 1


def left_on_purpose() -> str:
    """Return the table of what the uninstallation of everything leaves."""
    left = yaml.safe_load((MOLECULE / "host_state/vars/main.yml").read_text())["left_on_purpose"]
    return "\n".join(["| what | why |", "|---|---|", *(f"| {entry['shown']} | {entry['reason']} |" for entry in left)])


def diagnoses() -> str:
    """Return the table of what is known of starts that fail: what the journal says, cause, meaning, remedy, fix."""
    rows = []
    for known in json.loads((DOCS.parent / "roles/dots_ocr_server/files/diagnoses.json").read_text()):
        remedy = "; ".join(remedies(known.get("remedy", {}))) or "none"
        said = f"`{known['example'].splitlines()[-1].replace('`', chr(39))}`"
        cells = (said, f"{known['cause']}. {known['meaning']}", remedy, known["advice"], known["source"])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    head = ["the journal says, for instance", "cause and meaning", "automatic remedy", "by hand", "source"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def remedies(remedy: dict[str, Any]) -> Iterator[str]:
    """Yield what a remedy changes, for humans."""
    yield from (f"`{argument}`" for argument in remedy.get("arguments", []))
    yield from (f"`{name}={value}`" for name, value in remedy.get("environment", {}).items())
    plan = remedy.get("plan", {})
    if "utilization" in plan:
        yield f"utilization lowered by {plan['utilization']}"
    yield from (f"a rung of the plan with a lower `{limit}`" for limit in plan.get("below", []))
    if "shm_size" in remedy:
        yield f"shared memory of {remedy['shm_size']}"
    if "time" in remedy:
        yield f"{remedy['time']} times `dots_ocr_server_ready_timeout`"


# Which table goes where.
TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "memory_plan": (DOCS / "understand/tuning.md", memory_plans),
    "diagnoses": (DOCS / "operate/troubleshooting.md", diagnoses),
}
# Tables of the page of cases.
CASE_TABLES = {"host_matrix": host_matrix, "attacks": attacks, "left_on_purpose": left_on_purpose}
CASES_HEAD = """# What was verified, case by case

<!-- Generated from docs/cases.yml by `make docs`: change it there. -->

What was never run, and what only a stand-in has shown: [the summary](verification.md)."""


def section(part: dict[str, Any]) -> str:
    """Return one section of the page of cases: its heading, text, table and the text below it."""
    rows = [list(row.values()) if isinstance(row, dict) else row for row in part.get("rows", ())]
    columns = part.get("columns", ["case", "outcome", "proven by"][: len(rows[0])] if rows else [])
    table = "\n".join(
        f"| {' | '.join(map(str, cells))} |" for cells in ([columns, ["---"] * len(columns), *rows] if rows else ())
    )
    if "table" in part:
        table = CASE_TABLES[part["table"]]()
    return "\n\n".join(
        filter(None, (f"## {part['title']}", part.get("before", "").strip(), table, part.get("after", "").strip()))
    )


def cases_page() -> str:
    """Return the page of all that was verified, from docs/cases.yml."""
    parts = yaml.safe_load((DOCS / "cases.yml").read_text())
    return "\n\n".join([CASES_HEAD, *map(section, parts)]) + "\n"


def main() -> int:
    """Rewrite the pages, or with --check return 1 if that would change one."""
    if sys.argv[1:2] == ["--attacks"]:
        return count_attacks(sys.argv[2:])
    wanted = {DOCS / "understand/verification-cases.md": cases_page()}
    for name, (page, generate) in TABLES.items():
        begin, end = f"<!-- BEGIN {name}: python docs/tables.py -->", f"<!-- END {name} -->"
        before, rest = page.read_text().split(begin)
        wanted[page] = f"{before}{begin}\n\n{generate()}\n\n{end}{rest.split(end)[1]}"
    stale = any(not page.exists() or page.read_text() != text for page, text in wanted.items())
    if sys.argv[1:] != ["--check"]:
        for page, text in wanted.items():
            page.write_text(text)
    return int(stale and sys.argv[1:] == ["--check"])


if __name__ == "__main__":
    sys.exit(main())
