"""Tests of the callback plugin once, as ansible.cfg names it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
MESSAGE = "The disk isn't large enough: 3 GiB. Fix: free some space."
ASSERT = {"ansible.builtin.assert": {"that": False, "fail_msg": MESSAGE, "quiet": True}}
TASKS: dict[str, dict[str, Any]] = {
    "assert": ASSERT,
    "loop": {**ASSERT, "loop": [1, 2]},
    "module": {"dots_ocr.deploy.apt_set": {"id": "test", "source": {"name": "test"}}, "check_mode": True},
    "program": {"ansible.builtin.command": {"argv": ["sh", "-c", "echo no such page >&2; exit 4"]}},
    "playbook": {"ansible.builtin.debug": {"msg": "{{ nobody_knows }}"}},
}


def play(folder: Path, *options: str) -> dict[str, str]:
    """Return what ansible-playbook says of each task, in one line."""
    tasks = [{"name": name, "ignore_errors": True, **task} for name, task in TASKS.items()]
    values = {"ansible_python_interpreter": "{{ ansible_playbook_python }}"}  # the first in PATH may not start
    playbook = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": values, "tasks": tasks}]
    (folder / "play.yml").write_text(json.dumps(playbook))
    command = ["ansible-playbook", "--inventory=localhost,", *options, str(folder / "play.yml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"TASK \[(\w+)\] \*+\n(.*?)(?=\.\.\.ignoring)", f"{done.stderr}{done.stdout}", re.DOTALL)
    return {name: " ".join(words.split()) for name, words in told}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is told of each task."""
    return play(tmp_path_factory.mktemp("once"))


def test_failure_with_a_fix_is_its_message_alone(told: dict[str, str]) -> None:
    assert told["assert"] == f"fatal: [localhost]: FAILED! => {MESSAGE}"
    assert told["loop"] == " ".join(f"failed: [localhost] (item={item}) => {MESSAGE}" for item in (1, 2))
    assert told["module"] == "fatal: [localhost]: FAILED! => uri and key are required. Fix: set both."


def test_failure_of_a_program_is_told_once_and_whole(told: dict[str, str]) -> None:
    said = told["program"]
    assert said.startswith("fatal: [localhost]: FAILED! => ")
    assert (said.count("non-zero return code"), said.count("stderr: no such page"), "rc: 4" in said) == (1, 1, True)
    assert "[ERROR]" not in said


def test_error_in_a_playbook_keeps_its_place(told: dict[str, str]) -> None:
    assert "[ERROR]: Task failed: " in told["playbook"]
    assert "Origin: /" in told["playbook"]


def test_who_asks_for_more_gets_all(tmp_path: Path) -> None:
    said = play(tmp_path, "-v")["assert"]
    assert f"[ERROR]: Task failed: Action failed: {MESSAGE} Origin: " in said
    assert "evaluated_to: false" in said
