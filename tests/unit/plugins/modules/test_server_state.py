"""The module server_state: what it makes of what a host says, and when nothing is left to be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.dots_ocr.deploy.plugins.module_utils import servers
from ansible_collections.dots_ocr.deploy.plugins.modules import server_state as module

SETTINGS = {
    "watched": True,
    "allowed_networks": [],
    "image": {"pin": "image@sha256:1"},
    "device": "nvidia.com/gpu=all",
}
UP = "ActiveState=active\nUnitFileState=enabled\n"
ANSWERS = {
    "systemctl show": f"NRestarts=0\n{UP}\n{UP}",
    "docker image": json.dumps([{"Id": "sha256:1"}]),
    "ss": "LISTEN 0 9 127.0.0.1:8000 0.0.0.0:* users:((docker))\nLISTEN 0 9 [::1]:8000 [::]:*\nLISTEN 0 9 *:22 *:*\n",
    "state compare": '{"same": true}',
    "ready dots-ocr": '{"ready": true, "summary": "It reads."}',
    "docker run": "GPU 0",
    "golden_pages dots-ocr": '{"passed": true}',
    "firewall prove": "",
    "firewall close": "",
    "journalctl": "2026-11-30T11:13:13+00:00 host systemd[1]: Stopped dots-ocr.service.\n",
    "systemd-run": "",
    "systemctl stop": "",
}


class Host:
    """A host with one server, whose commands answer what they are told to; nothing means that they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.answers: dict[str, str | None] = dict(ANSWERS)
        self.settings: dict[str, Any] = dict(SETTINGS)
        self.folder = folder
        self.called: list[str] = []
        for place in (module, servers):
            monkeypatch.setattr(place, "DEFINITION", folder)
        monkeypatch.setattr(servers, "PROVEN", folder)
        monkeypatch.setattr(module, "run", self.run)
        for place in (module, servers):
            monkeypatch.setattr(place, "ask", lambda *command: self.run(*command)[1])

    def run(self, *command: str) -> tuple[int, str, str]:
        words = " ".join([Path(command[0]).name, *command[1:]])
        self.called.append(words)
        answer = next(text for start, text in self.answers.items() if words.startswith(start))
        return (1, "", f"{words} fails") if answer is None else (0, answer, "")

    def look(self, capsys: pytest.CaptureFixture[str], check: bool = False, **wanted: Any) -> dict[str, Any]:
        (self.folder / "dots-ocr.json").write_text(json.dumps(self.settings))
        with patch_module_args({**wanted, "_ansible_check_mode": check}), pytest.raises(SystemExit):
            module.main()
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(monkeypatch, tmp_path)


def test_tells_what_is_there(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    found = host.look(capsys)
    assert (found["servers"], found["proven"]) == ({"dots-ocr": SETTINGS}, {"dots-ocr": SETTINGS})
    assert (found["running"], found["settled"], found["images"]) == (
        ["dots-ocr"],
        True,
        {"image@sha256:1": {"Id": "sha256:1"}},
    )
    assert set(found["listeners"]) == {"8000", "22"}
    assert found["listeners"]["8000"].count("\n") == 1


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("state compare", '{"same": false}'),
        ("state compare", None),
        ("systemctl show", f"NRestarts=1\n{UP}\n{UP}"),
        ("systemctl show", f"NRestarts=0\nActiveState=activating\nUnitFileState=enabled\n\n{UP}"),
        ("systemctl show", f"NRestarts=0\nActiveState=active\nUnitFileState=disabled\n\n{UP}"),
        ("systemctl show", f"NRestarts=0\n{UP}\nNeedDaemonReload=yes\n{UP}"),
        ("systemctl show", f"NRestarts=0\n{UP}\n{UP}\nNeedDaemonReload=no\n\nNeedDaemonReload=yes\n"),  # front
        ("systemctl show", f"NRestarts=0\n{UP}\nActiveState=inactive\nUnitFileState=disabled\n"),
        ("systemctl show", None),
    ],
)
def test_something_is_left_to_be_done(
    host: Host, capsys: pytest.CaptureFixture[str], command: str, answer: str | None
) -> None:
    host.answers[command] = answer
    assert not host.look(capsys)["settled"]


DOWN = "ActiveState=inactive\nUnitFileState=disabled\n"


@pytest.mark.parametrize(
    ("answer", "since"),
    [
        (f"NRestarts=0\n{DOWN}\n{DOWN}", "2026-11-30T11:13:13+00:00"),
        (f"NRestarts=3\nActiveState=failed\nUnitFileState=disabled\n\n{DOWN}", "2026-11-30T11:13:13+00:00"),
        # Stopped for now, being started by hand, and a change of engines that was broken off.
        (f"NRestarts=0\nActiveState=inactive\nUnitFileState=enabled\n\n{UP}", ""),
        (f"NRestarts=0\nActiveState=activating\nUnitFileState=disabled\n\n{DOWN}", ""),
        (f"NRestarts=0\n{DOWN}\n{UP}", ""),
        (None, ""),
    ],
)
def test_tells_since_when_the_owner_has_stopped_it(
    host: Host, capsys: pytest.CaptureFixture[str], answer: str | None, since: str
) -> None:
    host.answers["systemctl show"] = answer
    assert host.look(capsys)["stopped"] == since
    host.answers["journalctl"] = ""
    assert bool(host.look(capsys)["stopped"]) == bool(since)


def test_an_installation_that_never_read_is_not_stopped(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host.answers["systemctl show"] = f"NRestarts=0\n{DOWN}\n{DOWN}"
    monkeypatch.setattr(servers, "PROVEN", tmp_path / "nothing")
    assert host.look(capsys)["stopped"] == ""


def test_a_server_without_watchdog_has_no_timer(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.settings["watched"] = False
    assert not host.look(capsys)["settled"]
    host.answers["systemctl show"] = f"NRestarts=0\n{UP}\nActiveState=inactive\nUnitFileState=disabled\n"
    assert host.look(capsys)["settled"]


def test_a_server_that_is_asleep_is_left_so(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers["systemctl show"] = f"NRestarts=1\nActiveState=inactive\nUnitFileState=enabled\n\n{UP}"
    assert not host.look(capsys)["settled"]
    host.settings["on_demand"] = {"idle": 60}
    found = host.look(capsys)
    assert (found["settled"], found["asleep"], found["running"]) == (True, ["dots-ocr"], [])
    found = host.look(capsys, prove=["dots-ocr"], isolated=True, unlock=True)
    assert found["proofs"] == ["dots-ocr is asleep, and stays so: the next page wakes it."]
    assert found["pages"] == []
    assert not any(words.startswith(("ready", "docker run", "golden_pages")) for words in host.called)
    host.answers["systemctl show"] = f"NRestarts=0\nActiveState=failed\nUnitFileState=enabled\n\n{UP}"
    found = host.look(capsys)
    assert (found["settled"], found["asleep"]) == (False, [])


def test_broken_settings_name_the_way_back(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.look(capsys)
    (host.folder / "dots-ocr.json").write_text("")
    with patch_module_args({}), pytest.raises(SystemExit):
        module.main()
    said = json.loads(capsys.readouterr().out)["msg"]
    assert said.startswith(f"{host.folder}/dots-ocr.json is not JSON. Fix: '")
    assert "state restore good' on the host, then run again." in said


def test_a_lock_that_another_holds_is_not_taken(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.look(capsys, lock="me")["locked"]
    host.answers["systemd-run"] = None
    host.answers = {"systemctl show --property=Desc": "Description=You\nActiveEnterTimestamp=Noon\n", **host.answers}
    found = host.look(capsys, lock="me", lock_seconds=5)
    assert not found["locked"]
    assert "--description=me --property=RuntimeMaxSec=5" in found["holder"]
    assert found["holder"].endswith(" (Description=You, ActiveEnterTimestamp=Noon)")
    assert host.look(capsys, check=True, lock="me")["locked"]


def test_a_look_that_fails_gives_the_lock_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(module, "refused", stale)
    (host.folder / "dots-ocr.json").write_text(json.dumps(host.settings))
    wanted = {"lock": "me", "weights": "/weights", "remote_code": {"v0_32": []}}
    with patch_module_args(wanted), pytest.raises((OSError, SystemExit)):
        module.main()
    assert host.called == [
        "systemd-run --unit=dots-ocr-deployment.service --description=me --property=RuntimeMaxSec=86400 --quiet "
        "sleep infinity",
        "systemctl stop dots-ocr-deployment.service",
    ]


def test_a_server_proves_that_it_reads_and_the_lock_goes_back(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.settings["allowed_networks"] = ["192.0.2.0/24"]
    found = host.look(capsys, prove=["dots-ocr"], isolated=True, unlock=True)
    assert found["proofs"] == ["It reads."]
    assert found["pages"] == [{"item": "dots-ocr", "rc": 0, "stdout": '{"passed": true}', "stderr": ""}]
    assert "systemctl stop dots-ocr-deployment.service" in host.called
    for command in ("docker run", "firewall prove", "firewall close", "ready dots-ocr"):
        host.answers = {**ANSWERS, command: None}
        host.called.clear()
        found = host.look(capsys, prove=["dots-ocr"], isolated=True, unlock=True)
        assert (found["proofs"], found["pages"]) == ([], [])
        assert not any(words.startswith("systemctl stop") for words in host.called)


def test_golden_pages_that_differ_leave_the_proof_as_it_is(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers["golden_pages dots-ocr"] = None
    found = host.look(capsys, prove=["dots-ocr"])
    assert (found["proofs"], [one["rc"] for one in found["pages"]]) == (["It reads."], [1])


def test_tells_by_profile_which_code_the_weights_may_not_name(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    allowed = {"old": ["code"], "new": []}
    found = host.look(capsys, weights=str(folder), remote_code=allowed)
    assert found["weights"] == {"exists": False, "refused": {"old": [], "new": []}}
    folder.mkdir()
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "code.C"}}')
    found = host.look(capsys, weights=str(folder), remote_code=allowed)
    assert found["weights"] == {
        "exists": True,
        "refused": {"old": [], "new": ["config.json names code.C (AutoConfig)"]},
    }
    assert host.look(capsys)["weights"] == {}
