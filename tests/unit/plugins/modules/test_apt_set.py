"""The module apt_set: what it makes of the words of apt and dpkg. Its work on hosts is tested there (molecule/*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.modules import apt_set


def test_status_tells_held_and_half_removed_packages() -> None:
    found = apt_set.parse_status("docker-ce\t5:28.5.2-1\thold\tinstalled\njq\t1.7\tdeinstall\tconfig-files\n")
    assert found["docker-ce"] == {"version": "5:28.5.2-1", "want": "hold", "status": "installed"}
    assert found["jq"]["status"] == "config-files"


def test_removals_of_a_simulation() -> None:
    text = "Reading package lists...\nRemv docker-ce [5:28.5.2] [x:amd64 ]\nPurg jq [1.7]\nInst libc6 [2.41]\n"
    assert apt_set.parse_removals(text) == ["docker-ce", "jq"]


def test_versions_of_madison_newest_first() -> None:
    text = " docker-ce | 5:28.5.2-1~x | http://m stable/amd64\n docker-ce | 5:28.3.3-1~x | http://m stable/amd64\n"
    assert apt_set.parse_madison(text) == {"docker-ce": ["5:28.5.2-1~x", "5:28.3.3-1~x"]}


def test_candidates_of_policy() -> None:
    text = (
        "jq:\n  Installed: 1.6\n  Candidate: 1.7\n  Version table:\nghost:\n  Installed: (none)\n  Candidate: (none)\n"
    )
    assert apt_set.parse_candidates(text) == {"jq": "1.7"}


@pytest.mark.parametrize(("there", "kept"), [({"jq", "libjq1"}, ["jq", "libjq1"]), ({"jq"}, ["jq"]), (set(), None)])
def test_what_will_come_is_recorded_before_it_comes(
    there: set[str], kept: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may end in the middle."""
    packages = object.__new__(apt_set.Set)
    monkeypatch.setattr(apt_set, "RECORDS", tmp_path / "lib/records")
    file = packages.record_file = apt_set.RECORDS / "test.json"
    packages.params, packages.check = {"refresh": False, "version": {}, "release": ""}, False
    packages.record = {"packages": [], "held": []}
    packages.packages = {"libc6": {"status": "installed"}}

    def recorded() -> Any:
        return json.loads(file.read_text())["packages"] if file.exists() else None

    def apt(*words: str, **_: Any) -> str:
        if words[0] == "--simulate":
            return "Inst libc6 [2.36] (2.37)\nInst libjq1:amd64 (1.7)\nInst jq (1.7)\nConf jq (1.7)\n"
        assert recorded() == ["jq", "libjq1"]
        return ""

    monkeypatch.setattr(packages, "apt", apt)
    monkeypatch.setattr(packages, "status", lambda: {name: {"status": "installed"} for name in {"libc6", *there}})
    packages.install(["jq"], [])
    assert recorded() == kept


def test_pins_outweigh_what_is_installed() -> None:
    text = apt_set.render_pins({"docker-ce": "5:28.5.*"})
    assert "Package: docker-ce\nPin: version 5:28.5.*\nPin-Priority: 1001\n" in text


@pytest.mark.parametrize(
    ("goes_too", "expected"),
    [([], ["adduser"]), (["libsecond"], ["adduser", "libsecond"]), (["asked-for"], []), (["of-others"], [])],
)
def test_second_choice_goes_unless_something_that_somebody_asked_for_would_go_too(
    goes_too: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = object.__new__(apt_set.Set)
    monkeypatch.setattr(apt_set, "ask", lambda *words: "\n".join({"adduser", "libsecond"} & set(words)))
    monkeypatch.setattr(packages, "is_installed", lambda name: name != "haproxy")
    monkeypatch.setattr(
        packages, "simulate", lambda action, name: [name, *goes_too] if name == "adduser" else ["libc6"]
    )
    assert packages.replaceable(["adduser", "asked-for", "haproxy", "libsecond"]) == expected
