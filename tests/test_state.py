"""The program that keeps the proven states of the servers (roles/dots_ocr_server/files/state)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import programs

state = programs.load("state")


class Host:
    """A root folder, and a systemctl that notes how it was called."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.call: programs.Call = programs.call
        self.calls = root / "systemctl.log"
        (root / "bin").mkdir()
        systemctl = root / "bin/systemctl"
        systemctl.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >>{self.calls}\n'
            f'[ "$1" != stop ] || echo "$2 is $(cat {root}/etc/systemd/system/$2)" >>{self.calls}.stopped\n'
            'case "$1" in "$FAIL") exit 1 ;; esac\n'
        )
        systemctl.chmod(0o755)
        docker = root / "bin/docker"
        docker.write_text(f"#!/bin/sh\ntest -e {root}/images/$3 || {{ echo No such image >&2; exit 1; }}\n")
        docker.chmod(0o755)
        (root / "etc/systemd/system").mkdir(parents=True)

    def install(self, version: str, *names: str) -> None:
        """Install servers of one version, as the role does."""
        folder = self.root / "etc/dots-ocr/server"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names or ("dots-ocr",):
            image = {"reference": f"mirror:5000/vllm/vllm-openai:{version}", "pin": f"sha256:{version}"}
            settings = {"image": image, "weights": self.weights(version), "watched": version != "unwatched"}
            for made in (Path(self.weights(version)), self.root / "images" / image["pin"]):
                made.mkdir(parents=True, exist_ok=True)
            settings |= {"on_demand": {"idle": 60}} if version == "on-demand" else {}
            (folder / f"{name}.json").write_text(json.dumps(settings))
            (self.root / f"etc/systemd/system/{name}.service").write_text(version)

    def weights(self, version: str) -> str:
        return str(self.root / "weights" / version)

    def unit(self, name: str = "dots-ocr") -> str:
        return (self.root / f"etc/systemd/system/{name}.service").read_text()

    def run(self, *words: str, fail: str = "-") -> subprocess.CompletedProcess[str]:
        path = f"{self.root}/bin:{os.environ['PATH']}"
        return self.call(state, f"--root={self.root}", *words, PATH=path, FAIL=fail)

    def ask(self, *words: str) -> Any:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def stopped_units(self) -> list[str]:
        """Each stop, with what the unit contained at that time."""
        return self.calls.with_name(f"{self.calls.name}.stopped").read_text().splitlines()

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_first_state_is_recorded_once(host: Host) -> None:
    host.install("1")
    assert host.ask("compare") == {"same": False}
    assert host.ask("record") == {"changed": True}
    assert host.ask("compare") == {"same": True}
    assert host.ask("record") == {"changed": False}
    assert not (host.root / "var/lib/dots-ocr/states/previous").exists()


def test_failed_change_goes_back_to_good(host: Host) -> None:
    host.call = programs.run
    host.install("1")
    host.ask("record")
    host.install("2")
    assert host.ask("restore", "good")["running"]["dots-ocr"]["image"]["pin"] == "sha256:1"
    assert host.unit() == "1"
    assert host.ask("compare") == {"same": True}
    assert "restart dots-ocr.service dots-ocr-watchdog@dots-ocr.timer" in host.called()
    assert host.called().index("daemon-reload") < len(host.called()) - 1


def test_rollback_swaps_good_and_previous(host: Host) -> None:
    for version in "12":
        host.install(version)
        host.ask("record")
    host.ask("restore", "previous")
    assert host.unit() == "1"
    assert host.ask("compare") == {"same": True}
    host.ask("restore", "previous")
    assert host.unit() == "2"


def test_what_was_not_proven_goes_back_to_good(host: Host) -> None:
    """A deployment was cut off: the state before it is the one that was proven last, not the one before that."""
    for version in "12":
        host.install(version)
        host.ask("record")
    host.install("3")
    host.ask("restore", "previous")
    assert host.unit() == "2"
    host.ask("restore", "previous")
    assert host.unit() == "1"


@pytest.mark.parametrize("gone", ["images/sha256:1", "weights/1"])
def test_no_way_back_to_what_is_gone(host: Host, gone: str) -> None:
    for version in "12":
        host.install(version)
        host.ask("record")
    (host.root / gone).rmdir()
    done = host.run("restore", "previous")
    assert (done.returncode, host.called(), host.unit()) == (1, [], "2")
    assert "which this host no longer has" in done.stderr


@pytest.mark.parametrize("broken", ["etc/dots-ocr/server/dots-ocr.json", "etc/systemd/system/dots-ocr.service"])
def test_what_is_broken_goes_back_to_good(host: Host, broken: str) -> None:
    host.install("1")
    host.ask("record")
    (host.root / broken).unlink()
    (host.root / "etc/dots-ocr/server/more.json").write_text("")
    host.ask("restore", "previous")
    assert host.ask("compare") == {"same": True}


def test_previous_is_put_back_without_a_good_one(host: Host) -> None:
    """A record that was cut off."""
    for version in "12":
        host.install(version)
        host.ask("record")
    shutil.rmtree(host.root / "var/lib/dots-ocr/states/good")
    host.ask("restore", "previous")
    assert (host.unit(), host.ask("compare")) == ("1", {"same": True})


def test_full_disk_stops_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.install("1")
    host.ask("record")
    host.install("2")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.shutil, "copytree", full)
    done = host.run("restore", "good")
    assert (done.returncode, host.called(), host.unit()) == (1, [], "2")
    assert "No space left on device" in done.stderr


def test_broken_settings_are_put_back(host: Host) -> None:
    host.install("1")
    host.ask("record")
    broken = host.root / "etc/dots-ocr/server/dots-ocr.json"
    broken.write_text("")
    host.ask("restore", "good")
    assert host.ask("compare") == {"same": True}
    assert host.stopped_units == ["dots-ocr.service is 1"]


def test_watchdog_that_was_off_stays_off(host: Host) -> None:
    host.install("unwatched")
    host.ask("record")
    host.ask("restore", "good")
    assert "restart dots-ocr.service" in host.called()


def test_a_way_back_takes_the_front_away_or_brings_it(host: Host) -> None:
    for version in ("on-demand", "2"):
        host.install(version)
        host.ask("record")
    host.ask("restore", "previous")
    called = host.called()
    assert called[-2:] == [f"{word} dots-ocr-front@dots-ocr.service" for word in ("enable", "restart")]
    assert not any("disable" in words for words in called)
    host.ask("restore", "previous")
    later = host.called()[len(called) :]
    assert later[:2] == ["disable --now dots-ocr-front@dots-ocr.service", "stop dots-ocr.service"]  # no page starts it
    assert not any("enable dots-ocr-front" in words for words in later)


def test_only_two_states_are_kept(host: Host) -> None:
    for version in "123":
        host.install(version)
        host.ask("record")
    assert host.ask("needs") == {
        "images": ["sha256:2", "sha256:3"],
        "repositories": ["mirror:5000/vllm/vllm-openai"],
        "weights": [host.weights("2"), host.weights("3")],
        "software": [],
    }


def test_server_on_the_cpu_needs_its_software_and_nothing_else(host: Host) -> None:
    host.install("1")
    host.ask("record")
    settings = {"profile": "cpu", "software": "/software/2", "watched": True}
    (host.root / "etc/dots-ocr/server/dots-ocr.json").write_text(json.dumps(settings))
    host.ask("record")
    assert host.ask("needs") == {
        "images": ["sha256:1"],
        "repositories": ["mirror:5000/vllm/vllm-openai"],
        "weights": [host.weights("1")],
        "software": ["/software/2"],
    }


def test_server_is_stopped_by_the_unit_that_started_it(host: Host) -> None:
    """A unit of another engine does not know how to stop it, a container least of all."""
    host.install("1")
    host.ask("record")
    host.install("2")
    host.ask("restore", "good")
    assert host.stopped_units == ["dots-ocr.service is 2"]


def test_server_that_the_state_does_not_have_is_stopped_and_removed(host: Host) -> None:
    host.install("1", "dots-ocr@0")
    host.ask("record")
    host.install("1", "dots-ocr@1")
    host.ask("restore", "good")
    assert "disable --now dots-ocr-watchdog@dots-ocr@1.timer dots-ocr@1.service" in host.called()
    assert not (host.root / "etc/systemd/system/dots-ocr@1.service").exists()
    assert not (host.root / "etc/dots-ocr/server/dots-ocr@1.json").exists()


def test_without_a_state_nothing_is_touched(host: Host) -> None:
    host.install("1")
    for name in ("good", "previous"):
        done = host.run("restore", name)
        assert done.returncode == 1
        assert f"There is no {name} state" in done.stderr
    assert host.called() == []
    assert host.unit() == "1"


def test_service_that_does_not_start_is_reported(host: Host) -> None:
    host.call = programs.run
    host.install("1")
    host.ask("record")
    done = host.run("restore", "good", fail="restart")
    assert done.returncode == 1
    assert "systemctl restart dots-ocr.service" in done.stderr


def test_nothing_installed_is_an_error(host: Host) -> None:
    done = host.run("record")
    assert done.returncode == 1
    assert "No server is installed" in done.stderr
    assert not (host.root / "var/lib/dots-ocr/states/good").exists()


def test_folder_that_is_put_back_can_be_read_as_before(host: Host) -> None:
    host.install("1")
    folder = host.root / "etc/dots-ocr/server"
    folder.chmod(0o755)
    host.ask("record")
    host.install("2")
    host.ask("restore", "good")
    assert folder.stat().st_mode & 0o777 == 0o755
