"""The become plugin any_sudo and the Makefile: sudo-rs, which is Ubuntu's sudo from 25.10 on, and the classic sudo.

What the real sudo-rs makes of it is tested on the host of the scenario `site` (molecule/userland.yml).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible import constants
from ansible.plugins.become import sudo
from ansible.plugins.loader import become_loader

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def plugin() -> Any:
    """The plugin, as ansible.cfg names it, with a password."""
    become_loader.add_directory(str(REPOSITORY / "plugins/become"))
    found = become_loader.get("any_sudo")
    found.set_options(direct={"become_pass": "secret"})
    found.prompt = "[sudo via ansible, key=abc] password:"
    return found


@pytest.mark.parametrize(
    ("output", "asks"),
    [
        (b"[sudo via ansible, key=abc] password:", True),  # classic
        (b"[sudo: [sudo via ansible, key=abc] password:] Password: ", True),  # sudo-rs 0.2.5
        (b"sudo: unable to resolve host ocr\n[sudo: [sudo via ansible, key=abc] password:] Password: ", True),
        (b"[sudo: authenticate] Password: ", False),
        (b"", False),
    ],
)
def test_prompt_is_seen_in_that_of_either_sudo(output: bytes, asks: bool, plugin: Any) -> None:
    assert plugin.check_password_prompt(output) is asks


def test_without_a_password_nothing_is_a_prompt(plugin: Any) -> None:
    plugin.prompt = ""
    assert plugin.check_password_prompt(b"anything") is False


@pytest.mark.parametrize(
    "words",
    [b"Sorry, try again.", b"sudo: Authentication failed, try again.", b"sudo-rs: 3 incorrect authentication attempts"],
)
def test_wrong_password_is_told_by_either_sudo(words: bytes, plugin: Any) -> None:
    assert plugin.check_incorrect_password(words)


@pytest.mark.parametrize("words", [b"sudo: a password is required", b"sudo-rs: interactive authentication is required"])
def test_missing_password_is_told_by_either_sudo(words: bytes, plugin: Any) -> None:
    assert plugin.check_missing_password(words)


def test_options_are_those_of_ansibles_own_plugin(plugin: Any) -> None:
    own = yaml.safe_load(sudo.DOCUMENTATION)["options"]
    ours = constants.config.get_configuration_definitions("become", plugin._load_name)
    for name, option in own.items():
        for source in ("vars", "env", "ini", "keyword"):
            assert [entry.items() for entry in ours[name].get(source, [])] == [
                entry.items() for entry in option.get(source, [])
            ]
    assert set(ours) == set(own)


@pytest.mark.parametrize("programs", [["sudo"], ["sudo", "sudo.ws"]], ids=["one", "both"])
def test_classic_sudo_is_taken_where_there_is_one(programs: list[str], plugin: Any, tmp_path: Path) -> None:
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    wanted = str(tmp_path / "sudo.ws") if "sudo.ws" in programs else "sudo"

    def run(*command: str) -> str:
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert run("sh", "-c", f"echo {plugin.get_option('become_exe')}").strip() == wanted
    make = ("make", "--directory", str(REPOSITORY), "--dry-run", "--assume-old=.venv/ready")
    makefile = run(*make, "rehearse", "verify")
    assert f"{wanted} -E .venv/bin/python -m rehearsal run" in makefile
    # That of testinfra, by its plain name, has a password then.
    assert "\nsudo true\n.venv/bin/pytest verification " in makefile
