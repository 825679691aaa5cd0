"""Tests of the action plugin watched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
LIMIT = 60  # seconds for a play, which takes some 5


def play(folder: Path, task: dict[str, Any], seconds: float, until: str = "never") -> str:
    """Return what ansible-playbook says of a task that is shown every so many seconds; words of it let the task end.

    The task reads a line of the pipe `seen`. Where those words never come, the play is ended after LIMIT seconds.
    """
    os.mkfifo(folder / "seen")
    values = {"_dots_ocr_watch_seconds": seconds, "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    tasks = [{"name": "Take long", **task}]
    playbook = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": values, "tasks": tasks}]
    (folder / "play.yml").write_text(json.dumps(playbook))
    command = ["timeout", str(LIMIT), "ansible-playbook", "--inventory=localhost,", str(folder / "play.yml")]
    said = ""
    # Open for both, it waits for no reader; and whatever still reads when the play was ended ends with it.
    with (
        (folder / "seen").open("r+b", buffering=0) as seen,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as running,
    ):
        for line in running.stdout or ():
            if until in line and until not in said:
                seen.write(b"by the test\n")
            said += line
    assert running.returncode != 124, f"the play had not ended after {LIMIT} s: {said}"
    return said


@pytest.mark.parametrize(
    "what", [{"cmd": "head -n 1 seen"}, {"module": "ansible.builtin.command", "argv": ["head", "-n", "1", "seen"]}]
)
def test_what_takes_long_is_shown(what: dict[str, Any], tmp_path: Path) -> None:
    task = {**what, "chdir": str(tmp_path), "watch": "echo 3 of; echo 4 layers"}
    said = play(tmp_path, {"dots_ocr.deploy.watched": task}, 0.1, "3 of 4 layers")
    assert re.search(r"localhost: Take long: \d+ s so far\. 3 of 4 layers", said)
    assert "failed=0" in said


def test_how_far_a_file_is_read_is_shown(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(4 << 20))
    shutil.copy(shutil.which("head") or "", tmp_path / "half-way-there")
    cmd = "exec 3<large; dd bs=1M count=2 <&3 >/dev/null 2>&1; exec ./half-way-there -n 1 seen"
    watched = {"cmd": cmd, "chdir": str(tmp_path), "reads": "no-such-thing|half-way-there"}
    said = play(tmp_path, {"dots_ocr.deploy.watched": watched}, 0.1, "large: 50 %")
    assert re.search(r"localhost: Take long: \d+ s so far\. large: 50 %", said)
    assert "failed=0" in said


def test_what_is_quick_shows_nothing_and_fails_as_a_command_does(tmp_path: Path) -> None:
    said = play(tmp_path, {"dots_ocr.deploy.watched": {"cmd": "echo gone >&2; exit 3", "watch": "false"}}, 60)
    assert "so far" not in said
    assert ("rc: 3" in said, " gone\n" in said, "failed=1" in said) == (True, True, True)


def test_command_has_its_folder_and_the_environment_of_the_task(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    watched = {"cmd": "echo one >file; echo $WORDS $PWD", "chdir": str(folder)}
    task = {"dots_ocr.deploy.watched": watched, "environment": {"WORDS": "a; b"}, "failed_when": True}
    said = play(tmp_path, task, 60)
    assert f"a; b {folder}" in said
    assert (folder / "file").read_text() == "one\n"


def test_errors_stay_apart_on_a_host_of_ssh(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"  # on a terminal there is no other output
    ssh.write_text('#!/bin/sh\ncase " $* " in *" -tt "*) exec 2>&1 ;; esac\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    task = {
        **{"dots_ocr.deploy.watched": {"cmd": "echo output; echo gone >&2"}, "connection": "ssh", "register": "it"},
        **{"vars": {"ansible_ssh_executable": str(ssh)}, "failed_when": "it.stderr_lines != ['gone']"},
    }
    assert "failed=0" in play(tmp_path, task, 60)


def test_command_does_not_run_in_check_mode(tmp_path: Path) -> None:
    watched = {"cmd": f"touch {tmp_path}/file"}
    task = {"dots_ocr.deploy.watched": watched, "check_mode": True, "register": "it", "until": "it.rc == 0"}
    said = play(tmp_path, task, 60)
    assert "skipped=1" in said
    assert not (tmp_path / "file").exists()


def test_installation_is_watched(tmp_path: Path) -> None:
    said = play(tmp_path, {"dots_ocr.deploy.apt_set": {"id": "test", "name": ["dpkg"]}, "check_mode": True}, 0.01)
    assert re.search(r"localhost: Take long: \d+ s so far\. \S+ fetched; last in dpkg\.log: ", said)
    assert "failed=0" in said
