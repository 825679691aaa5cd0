"""The documentation: generated tables are up to date and complete, proofs exist, words are plain."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
FILE = REPOSITORY / "docs/tables.py"
spec = importlib.util.spec_from_file_location("tables", FILE)
assert spec
assert spec.loader
tables = importlib.util.module_from_spec(spec)
sys.modules["tables"] = tables  # its dataclass looks itself up
spec.loader.exec_module(tables)

PLAYBOOK = """
- hosts: all
  tasks:
    - block:
        - ansible.builtin.include_tasks: ../expect_failure.yml
          vars: {role: x, case: mirror down, platform: Debian 13, complaint: cannot fetch, fix: check the network}
      rescue:
        - ansible.builtin.include_tasks: ../expect_success.yml
          vars: {role: x, case: pinned, platform: Debian 13, outcome: runs on}
    - ansible.builtin.include_tasks: ../expect_failure.yml
      vars: {role: x, complaint: no row}
"""


def test_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, FILE, "--check"], check=False)
    assert done.returncode == 0, "run: python docs/tables.py"


def test_what_proves_a_case_exists() -> None:
    parts = yaml.safe_load((FILE.parent / "cases.yml").read_text())
    proofs = [row["proof"] for part in parts for row in part.get("rows", ()) if "proof" in row]
    paths = {path for proof in proofs for path in re.findall(r"`([^` ]+/[^` ]+)`", proof)}
    scenarios = {name for proof in proofs for name in re.findall(r"scenario `(\w+)`", proof)}
    assert len(proofs) > 50
    assert [path for path in sorted(paths) if not list(REPOSITORY.glob(path))] == []
    assert [name for name in sorted(scenarios) if not (REPOSITORY / "molecule" / name / "molecule.yml").is_file()] == []


# What native readers of English read twice. Say instead: fix, again, continues, no longer, rolled back, should, if.
PUZZLING = re.compile(
    r"\bCure:|\bWho did\b|\bDoes (it|he) \w+, |\bany more\b|\bWhich is how\b|\bcame along\b|\bby hand of\b"
    r"|\btakes? care\b|\bshall\b|(?<!if )\banew\b(?![:)=]| or )|\bwithout a word\b|\blet go\b|\btaken back\b"
    r"|\bgoes on\b|\blest\b|\bdoes so\b|\b[Mm]end(s|ed|ing)? (it|that|them|the|what)\b|\bwhat comes first\b"
    r"|(?<![Tt]here) is no (checkout|JSON|PNG|air-gap|(CDI )?device|(OpenPGP )?key)\b"
)


def test_words_are_plain() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    told = re.compile(r"\.(md|yml|j2|py|ps1)$|/files/[a-z_-]+$|^Makefile$")
    # Tests quote others; what trained the tiny model is held by its fingerprint.
    elsewhere = ("client/", "tests/", "CHANGELOG", "rehearsal/tiny_model/")
    files = [REPOSITORY / name for name in listed if told.search(name) and not name.startswith(elsewhere)]
    lines = [(file, line) for file in files if file.is_file() for line in file.read_text().splitlines()]
    assert len(lines) > 20_000
    assert [f"{file.relative_to(REPOSITORY)}: {line.strip()}" for file, line in lines if PUZZLING.search(line)] == []


def test_cases_are_found_in_blocks_too() -> None:
    found = sorted(tables.expected_cases("x", yaml.safe_load(PLAYBOOK)))
    assert [case.row() for case in found] == [
        "| Debian 13 | mirror down | refused: cannot fetch | check the network | `x` | never |",
        "| Debian 13 | pinned | runs on | - | `x` | never |",
    ]


def test_case_that_is_computed_is_an_error() -> None:
    playbook = yaml.safe_load(PLAYBOOK.replace("check the network", "'{{ item }}'"))
    with pytest.raises(ValueError, match="must be spelt out"):
        list(tables.expected_cases("x", playbook))


def test_case_without_a_fix_is_an_error() -> None:
    playbook = yaml.safe_load(PLAYBOOK.replace(", fix: check the network", ""))
    with pytest.raises(KeyError, match="fix"):
        list(tables.expected_cases("x", playbook))


def test_hosts_of_the_preflight_are_cases() -> None:
    host = {"platform": "WSL2", "case": "12 GB", "expected_problems": [{"problem": "old driver", "fix": "newer"}]}
    good = {"platform": "WSL2", "case": "16 GB", "expected_problems": []}
    groups = {"preflight": {"hosts": {"a": host, "b": good}}}
    found = list(tables.preflight_cases({"ocr_servers": {"children": groups}}))
    assert [case.outcome for case in found] == ["refused: old driver", "can serve"]
    assert [case.fix for case in found] == ["newer", ""]


def test_remedies_are_told_in_words() -> None:
    remedy = {
        "arguments": ["--enforce-eager"],
        "environment": {"A": "1"},
        "plan": {"utilization": 0.05, "below": ["max_pixels"]},
        "shm_size": "4g",
        "time": 2,
    }
    assert list(tables.remedies(remedy)) == [
        "`--enforce-eager`",
        "`A=1`",
        "utilization lowered by 0.05",
        "a rung of the plan with a lower `max_pixels`",
        "shared memory of 4g",
        "2 times `dots_ocr_server_ready_timeout`",
    ]
    assert list(tables.remedies({})) == []
