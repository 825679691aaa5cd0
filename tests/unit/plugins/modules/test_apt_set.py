"""The module apt_set: what it makes of the words of apt and dpkg. Its work on hosts is tested there (molecule/*)."""

from __future__ import annotations

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
