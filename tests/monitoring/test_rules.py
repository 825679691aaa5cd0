"""Rules, alerts and dashboard: as the role writes them, judged by promtool, against what was really scraped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.live import BUILT_IN, SCRAPED, dashboard_expressions, metric_names, profile_names

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
ROLE = REPOSITORY / "roles/monitoring"
SERVER = REPOSITORY / "roles/dots_ocr_server"
DOCUMENTATION = REPOSITORY / "docs/operate/monitoring.md"
PLAYBOOK = [
    {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": {"ansible_python_interpreter": sys.executable},
        "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
        "tasks": [
            {
                "include_role": {"name": "dots_ocr.deploy.dots_ocr_server", "tasks_from": "plan"},
                "vars": {"dots_ocr_server_host": {"platform": "", "gpus": []}},
            },
            {
                "template": {
                    "src": str(ROLE / "templates/rules/{{ item }}.yml.j2"),
                    "dest": "{{ folder }}/{{ item }}.yml",
                },
                "loop": ["recording", "alerts"],
            },
        ],
    }
]


def promtool(*words: str, cwd: Path) -> None:
    """Run promtool, and show what it says if it fails."""
    program = shutil.which("promtool")
    assert program, "promtool is missing. Fix: apt-get install prometheus"
    done = subprocess.run([program, *words], cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the rules as Ansible renders them, and the cases for promtool."""
    folder = tmp_path_factory.mktemp("rules")
    playbook = folder / "playbook.yml"
    playbook.write_text(yaml.safe_dump(PLAYBOOK))
    command = ["ansible-playbook", "-i", "localhost,", "-e", f"folder={folder}", str(playbook)]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(HERE / "rules_test.yml", folder)
    return folder


@pytest.fixture(scope="module")
def rules(folder: Path) -> list[dict[str, Any]]:
    """Return all rules."""
    files = [yaml.safe_load((folder / name).read_text()) for name in ("recording.yml", "alerts.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the alerts."""
    found = [rule for rule in rules if "alert" in rule]
    assert found
    return found


@pytest.fixture(scope="module")
def recorded(rules: list[dict[str, Any]]) -> dict[str, str]:
    """Return the expressions of what is recorded, by name."""
    return {rule["record"]: rule["expr"] for rule in rules if "record" in rule}


def cases() -> list[dict[str, Any]]:
    """Return the cases for promtool; the first is the one in which all is well."""
    found: list[dict[str, Any]] = yaml.safe_load((HERE / "rules_test.yml").read_text())["tests"]
    return found


def test_promtool_accepts_the_rules(folder: Path) -> None:
    promtool("check", "rules", "recording.yml", "alerts.yml", cwd=folder)


def test_alerts_fire_when_they_should_and_no_others(folder: Path) -> None:
    promtool("test", "rules", "rules_test.yml", cwd=folder)


def test_every_alert_fires_in_a_case(alerts: list[dict[str, Any]]) -> None:
    fired = set(re.findall(r'alertname="(\w+)"', json.dumps(cases()).replace("\\", "")))
    assert fired == {alert["alert"] for alert in alerts}


def test_nothing_fires_when_all_is_well_although_everything_is_told(
    alerts: list[dict[str, Any]], recorded: dict[str, str]
) -> None:
    well = cases()[0]
    assert well["promql_expr_test"][0] == {"expr": "ALERTS", "eval_time": "100m", "exp_samples": []}
    told = {entry["series"].split("{")[0] for entry in well["input_series"]}
    for alert in alerts:
        for name in metric_names(alert["expr"]):
            sources = metric_names(recorded[name]) if name in recorded else {name}
            assert sources & told, f"{alert['alert']} asks for {name}"


def test_alerts_say_what_where_and_what_to_do(alerts: list[dict[str, Any]]) -> None:
    headings = re.findall(r"^#+ (.+)$", DOCUMENTATION.read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for alert in alerts:
        name, annotations = alert["alert"], alert["annotations"]
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert re.search(r"\{\{ [$]|None", annotations["summary"]), name
        assert " Fix: " in annotations["description"], name
        file, anchor = annotations["runbook_url"].split("#")
        assert (file, anchor) == ("docs/operate/monitoring.md", name.lower())
        assert anchor in anchors, f"{name} has no section in {DOCUMENTATION}"


def test_rules_and_dashboard_use_only_what_was_scraped(rules: list[dict[str, Any]], recorded: dict[str, str]) -> None:
    scraped = {name for names in json.loads(SCRAPED.read_text()).values() for name in names}
    known = scraped | profile_names() | set(recorded) | BUILT_IN
    for expression in [rule["expr"] for rule in rules] + dashboard_expressions():
        assert metric_names(expression) <= known, expression


def test_what_is_recorded_is_used(rules: list[dict[str, Any]], recorded: dict[str, str]) -> None:
    expressions = [rule["expr"] for rule in rules] + dashboard_expressions()
    assert set(recorded) <= {name for expression in expressions for name in metric_names(expression)}


@pytest.mark.parametrize("key", ["running", "waiting", "kv_cache_usage"])
def test_every_profile_is_recorded(key: str, recorded: dict[str, str]) -> None:
    names = {"running": "pages_running", "waiting": "pages_waiting"}
    sources = metric_names(recorded[f"dots_ocr:{names.get(key, key)}"])
    profiles = [yaml.safe_load(file.read_text()) for file in (SERVER / "profiles").glob("*.yml")]
    assert {profile["metrics"][key] for entry in profiles for profile in entry.values()} <= sources


def test_engine_cpu_has_the_names_of_its_role() -> None:
    of_server = yaml.safe_load((SERVER.with_name("dots_ocr_cpu") / "vars/main.yml").read_text())[
        "_dots_ocr_cpu_metrics"
    ]
    ours = yaml.safe_load((ROLE / "vars/main.yml").read_text())["_monitoring_cpu"]
    assert ours["metrics"] == {key: of_server[key] for key in ("running", "waiting")}
    assert f"{ours['latency']}_count" == of_server["success"]


def test_dcgm_exporter_is_asked_for_what_the_textfile_tells_too() -> None:
    asked = re.findall(r"^DCGM_\w+", (ROLE / "files/dcgm-metrics.csv").read_text(), re.MULTILINE)
    told = json.loads(SCRAPED.read_text())["textfile"]
    assert sorted(asked) == sorted(name for name in told if name.startswith("DCGM_"))
