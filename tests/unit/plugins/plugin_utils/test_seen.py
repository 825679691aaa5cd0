"""Tests of what the action plugins apt_set and docker_daemon do before their modules."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.action import apt_set, docker_daemon, watched
from ansible_collections.dots_ocr.deploy.plugins.plugin_utils import seen

MET = {"changed": False, "installed": {"docker-ce": "5:29.1"}, "kept": []}


class Host:
    """A host whose packages and settings lie in a folder; it counts the module's calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = folder / "apt"
        self.settings.mkdir()
        self.answer: dict[str, Any] = MET
        self.calls = 0
        for action in (apt_set, docker_daemon):
            monkeypatch.setattr(action.ActionModule, "places", (str(self.settings), str(folder / "{}.json")))
        monkeypatch.setattr(seen, "LAST", str(folder / "last-{}"))
        for action in (watched, docker_daemon.normal):
            monkeypatch.setattr(action.ActionModule, "run", lambda *_: self.module())

    def module(self) -> dict[str, Any]:
        self.calls += 1
        return {"invocation": {}, **self.answer}

    def shell(self, command: str, in_data: bytes = b"") -> dict[str, str]:
        stdout = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False).stdout
        if not in_data:  # over ssh, on a terminal then
            stdout = f"sudo: unable to resolve host\n{stdout}".replace("\n", "\r\n")
        return {"stdout": stdout}

    def run(self, check: bool = False, name: str = "apt_set", **wishes: Any) -> dict[str, Any]:
        plugin = {"apt_set": apt_set, "docker_daemon": docker_daemon}[name]
        arguments = {"id": "docker-engine", "name": ["docker-ce"], **wishes} if name == "apt_set" else wishes
        action = object.__new__(plugin.ActionModule)
        action._task = SimpleNamespace(action=f"dots_ocr.deploy.{name}", args=arguments, check_mode=check)
        action._low_level_execute_command = self.shell
        result: dict[str, Any] = action.run(None, {})
        return result


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_what_was_found_in_place_is_not_looked_at_again(host: Host) -> None:
    assert {name: host.run()[name] for name in MET} == host.run() == host.run(check=True) == MET
    assert host.calls == 1


@pytest.mark.parametrize("change", ["a new file", "other content", "another mode", "a file less", "a record"])
def test_whatever_changes_on_the_host_is_looked_at(host: Host, change: str) -> None:
    file = host.settings / "docker.sources"
    file.write_text("one")
    host.run()
    match change:
        case "a new file":
            (host.settings / "other.list").touch()
        case "other content":
            file.write_text("two")
        case "another mode":
            file.chmod(0o600)
        case "a file less":
            file.unlink()
        case "a record":
            (host.settings.parent / "docker-engine.json").touch()
    host.run()
    assert host.calls == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"hold": True}),  # other wishes
        ({}, {"id": "nvidia-driver"}),
        ({"state": "absent"}, {"state": "absent"}),
        ({"upgrade": True}, {"upgrade": True}),  # which depends on what is offered
        ({"check": True}, {}),  # which keeps nothing
    ],
)
def test_other_wishes_are_looked_at(host: Host, first: dict[str, Any], second: dict[str, Any]) -> None:
    host.run(**first)
    host.run(**second)
    assert host.calls == 2


@pytest.mark.parametrize("answer", [{**MET, "changed": True}, {"failed": True, "msg": "no"}, {**MET, "failed": True}])
def test_only_what_was_in_place_is_kept(host: Host, answer: dict[str, Any]) -> None:
    host.answer = answer
    host.run()
    host.run()
    assert host.calls == 2


def test_certificate_that_the_engine_is_given_is_looked_at(host: Host) -> None:
    host.answer = {"changed": False, "restart": False}
    file = host.settings.parent / "authority.pem"
    wishes: dict[str, Any] = {"registry_ca": {"mirror:5000": str(file), "other": "-----BEGIN CERTIFICATE-----"}}
    file.write_text("one")
    for _ in range(2):
        assert not host.run(name="docker_daemon", **wishes)["restart"]
    assert host.calls == 1
    file.write_text("two")
    host.run(name="docker_daemon", **wishes)
    assert host.calls == 2


@pytest.mark.parametrize("changed", ["apt_set.py", "apt_source.py"])
def test_another_version_of_the_module_looks_again(changed: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run()
    read = Path.read_bytes
    monkeypatch.setattr(seen.Path, "read_bytes", lambda path: b"another" if path.name == changed else read(path))
    host.run()
    assert host.calls == 2


def test_what_was_kept_by_halves_is_not_taken(host: Host) -> None:
    host.run()
    last = host.settings.parent / "last-apt_set-docker-engine"
    assert last.stat().st_mode & 0o777 == 0o600  # the wishes in it may have a password
    last.write_text(last.read_text()[:80])
    host.run()
    assert host.calls == 2


def test_wishes_may_be_of_any_type_that_the_module_takes(host: Host) -> None:
    host.answer = {"changed": False, "restart": False}
    host.run(name="docker_daemon", registry_ca="mirror:5000=/a.pem")
    host.run(name="docker_daemon", registry_ca={"mirror:5000": "/{a}.pem"})
    host.run(name="docker_daemon", options={"labels": [datetime.date(2026, 1, 31)]})  # YAML makes one of such words
    assert host.calls == 3


@pytest.mark.parametrize(("check", "left"), [(True, True), (False, False)])
def test_removal_leaves_nothing_in_run(check: bool, left: bool, host: Host) -> None:
    host.run()
    host.run(check=check, state="absent")
    assert (host.settings.parent / "last-apt_set-docker-engine").exists() is left
