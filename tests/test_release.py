"""A release: the versions agree, and the files for those who join are valid."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_collection_client_and_changelog_have_the_same_version() -> None:
    client = re.search(r'__version__ = "(.*)"', (ROOT / "client/src/dots_ocr_client/version.py").read_text())
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert client
    assert changelog
    assert {load("galaxy.yml")["version"], client[1], changelog[1]} == {client[1]}


def test_each_version_has_upgrade_notes() -> None:
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert [text.splitlines()[0] for text in versions if "\n### Upgrade notes\n" not in text] == []


def test_hooks_call_programs_of_the_environment() -> None:
    """Nothing is downloaded, and no linter has another version than in the tests."""
    (local,) = load(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    pinned = (ROOT / "requirements.txt").read_text()
    for hook in local["hooks"]:
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/")
        assert f"\n{Path(program).name}==" in pinned


def test_owners_own_what_there_is() -> None:
    lines = (ROOT / ".github/CODEOWNERS").read_text().splitlines()
    places = [line.split()[0] for line in lines if line and line[0] == "/"]
    assert [place for place in places if not (ROOT / place[1:]).is_dir()] == []
    roles = {f"/roles/{path.name}/" for path in (ROOT / "roles").iterdir()}
    assert roles <= set(places)


def test_workflow_runs_targets_of_make_on_the_promised_systems() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert jobs["check"]["strategy"]["matrix"]["image"] == ["debian:12", "debian:13", "ubuntu:24.04", "ubuntu:26.04"]
    assert [one["core"] for one in jobs["ansible-core"]["strategy"]["matrix"]["include"]] == ["2.19", "2.20", "2.21"]
    makefile = (ROOT / "Makefile").read_text()
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for target in re.findall(r"^make (\S+)", "\n".join(steps), re.MULTILINE):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_execution_environment_takes_the_collections_ansible_core() -> None:
    environment = load("execution-environment.yml")
    assert environment["version"] == 3
    oldest = load("meta/runtime.yml")["requires_ansible"].removeprefix(">=").removesuffix(".0")
    assert environment["dependencies"]["ansible_core"]["package_pip"].startswith(f"ansible-core>={oldest}")


@pytest.mark.parametrize("file", ["pyproject.toml", "client/pyproject.toml"])
def test_line_length_is_that_of_the_editor(file: str) -> None:
    editor = (ROOT / ".editorconfig").read_text()
    length = tomllib.loads((ROOT / file).read_text())["tool"]["ruff"]["line-length"]
    assert f"[*]\n{editor.split('[*]')[1].split('[')[0]}".count(f"max_line_length = {length}") == 1


def test_whitespace_is_as_the_editor_keeps_it() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    texts = [ROOT / name for name in tracked if Path(name).suffix in (".md", ".py", ".yml", ".j2", ".toml", ".ps1")]
    wrong = [
        str(path.relative_to(ROOT))
        for path in texts
        if path.is_file() and re.search(r"[ \t]+$|[^\n]\Z", path.read_text(), re.MULTILINE)
    ]
    assert wrong == []
