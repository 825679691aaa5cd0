"""Write the generated part of docs/tuning.md: `python docs/tables.py`; with --check, only tell whether it is needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "tuning.md"
BEGIN, END = "<!-- BEGIN memory_plan: python docs/tables.py -->", "<!-- END memory_plan -->"

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


def load_filter() -> Any:
    """Return the filter, which lies outside of any package."""
    spec = importlib.util.spec_from_file_location("memory_plan", DOCS.parent / "plugins/filter/memory_plan.py")
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


def generate() -> str:
    """Return the table, and the arithmetic behind one plan and behind each refusal."""
    memory_plan = load_filter()
    plans = []
    for index, (card, platform, total, free) in enumerate(CARDS):
        plan = memory_plan({"memory_total_mib": total, "memory_free_mib": free}, platform)
        text = plan["explanation"] if plan["fits"] else f"{plan['problem']}. Cure: {plan['cure']}"
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


def main() -> int:
    """Rewrite the page, or with --check return 1 if that would change it."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n\n{generate()}\n\n{END}{after}"
    if sys.argv[1:] == ["--check"]:
        return int(text != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
