"""Do rules and dashboard fit what a real Prometheus gets? `python -m tests.monitoring.live URL [--record]`.

A scenario with real servers calls `problems(URL)`. With --record the names of what was scraped are written down for the
tests that have no servers (metrics.json), beside those of kinds that were not there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DASHBOARD = REPOSITORY / "roles/monitoring/files/dashboard.json"
SCRAPED = Path(__file__).parent / "metrics.json"

KEYWORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right"}
# Prometheus' own: `up` is there for each target, the others come with the first alert.
BUILT_IN = {"up", "ALERTS", "ALERTS_FOR_STATE"}


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression."""
    text = re.sub(r'"(?:\\.|[^"\\])*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
    text = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
    names = re.findall(r"(?<![\w:.$])[A-Za-z_:][\w:]*\b(?!\s*\()", text)
    return set(names) - KEYWORDS


def dashboard_expressions() -> list[str]:
    """Return every query of the dashboard, the one for its variable too."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [entry["query"]["query"] for entry in dashboard["templating"]["list"]]
    return queries + [re.sub(r"label_values\((\w+),\s*\w+\)", r"\1", query) for query in variables]


def profile_names() -> set[str]:
    """Return the names that the image profiles give: some are of versions that no rehearsal runs."""
    found: set[str] = set()
    for file in sorted((REPOSITORY / "roles/dots_ocr_server/profiles").glob("*.yml")):
        for profile in yaml.safe_load(file.read_text()).values():
            for names in profile["metrics"].values():
                found |= {names} if isinstance(names, str) else set(names)
    return found


def ask(url: str, path: str, **parameters: str) -> Any:
    """Return the data of an answer of Prometheus' API."""
    query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
    with urllib.request.urlopen(f"{url.rstrip('/')}/api/v1/{path}{query}", timeout=30) as answer:
        return json.loads(answer.read())["data"]


def rules(url: str) -> Iterator[dict[str, Any]]:
    """Return every rule that Prometheus evaluates."""
    for group in ask(url, "rules")["groups"]:
        yield from group["rules"]


def kinds(url: str) -> set[str]:
    """Return what kinds of metrics there should be: those of each job and profile that has a target which answers."""
    found = {"textfile"}
    for target in ask(url, "targets", state="active")["activeTargets"]:
        if target["health"] == "up":
            labels = target["labels"]
            found.add(labels.get("profile", labels["job"]))
    return found


def problems(url: str, without: Iterable[str] = ()) -> list[str]:
    """Return what does not fit: rules that fail, and metrics that rules or dashboard use and that nobody tells.

    Only metrics of kinds that are there are demanded, as they were recorded in metrics.json: where no gateway answers,
    nothing of HAProxy is. `without` names metrics that this Prometheus need not have.
    """
    there = set(ask(url, "label/__name__/values"))
    loaded = list(rules(url))
    if not loaded:
        return ["Prometheus has no rules"]
    found = [f"rule {rule['name']}: {rule['lastError']}" for rule in loaded if rule["health"] == "err"]
    recorded = {rule["name"] for rule in loaded if rule["type"] == "recording"}
    used: set[str] = set()
    for expression in [rule["query"] for rule in loaded] + dashboard_expressions():
        used |= metric_names(expression)
    scraped: dict[str, list[str]] = json.loads(SCRAPED.read_text())
    demanded = {name for kind in kinds(url) for name in scraped.get(kind, [])} & used
    known = {name for names in scraped.values() for name in names} | profile_names() | recorded | BUILT_IN
    found += [f"{name} is used, and Prometheus has none" for name in sorted(demanded - there - set(without))]
    found += [
        f"{name} is used, and nothing is known to tell it" for name in sorted(used - known - there - set(without))
    ]
    return found


def scraped_names(url: str) -> dict[str, list[str]]:
    """Return the names of what Prometheus gets now, by kind."""
    found: dict[str, set[str]] = {}
    for series in ask(url, "series", **{"match[]": '{job!="",__name__!~"ALERTS.*|.*:.*:.*|dots_ocr:.*"}'}):
        name, kind = series["__name__"], series.get("profile", series["job"])
        if kind == "prometheus":
            continue
        if kind == "node" and re.match(r"dots_ocr_|DCGM_", name):
            kind = "textfile"
        if not name.startswith("scrape_") and name not in BUILT_IN:
            found.setdefault(kind, set()).add(name)
    return {kind: sorted(names) for kind, names in sorted(found.items())}


def main() -> int:
    """Compare, or record."""
    parser = argparse.ArgumentParser(description="Compare rules and dashboard with a real Prometheus.")
    parser.add_argument("url", metavar="URL", help="of Prometheus, such as http://127.0.0.1:9090")
    parser.add_argument("--without", action="append", default=[], metavar="METRIC", help="that need not be there")
    parser.add_argument("--record", action="store_true", help="write down what is there instead")
    arguments = parser.parse_args()
    if arguments.record:
        before = json.loads(SCRAPED.read_text()) if SCRAPED.exists() else {}
        names = {**before, **scraped_names(arguments.url)}
        SCRAPED.write_text(json.dumps(names, indent=1, sort_keys=True) + "\n")
        return 0
    found = problems(arguments.url, arguments.without)
    print("\n".join(found) or "rules and dashboard fit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
