"""The program that compares a host with what it was (molecule/host_state/files/host_state.py)."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "molecule/host_state/files/host_state.py"
spec = importlib.util.spec_from_file_location("host_state", FILE)
assert spec
assert spec.loader
host_state = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host_state)

BEFORE = {"package curl": "8.1 install installed manual", "file /etc": "drwxr-xr-x root:root"}


def test_host_that_is_as_it_was() -> None:
    assert host_state.differences(BEFORE, dict(BEFORE)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"package jq": "1.7 install installed automatic"}, "package jq (new: 1.7 install installed automatic)"),
        (
            {"package curl": "8.1 hold installed manual"},
            "package curl (was 8.1 install installed manual, is 8.1 hold installed manual)",
        ),
        ({"group docker": "x:101:"}, "group docker (new: x:101:)"),
        ({"unit docker.service": "masked"}, "unit docker.service (new: masked)"),
        ({"interface docker0": "there"}, "interface docker0 (new: there)"),
    ],
)
def test_what_is_new_or_changed_is_named(change: dict[str, str], expected: str) -> None:
    assert host_state.differences(BEFORE, BEFORE | change) == [expected]


def test_what_is_gone_is_named() -> None:
    assert host_state.differences(BEFORE, {"file /etc": BEFORE["file /etc"]}) == [
        "package curl (missing: 8.1 install installed manual)"
    ]


def test_what_lies_in_a_folder_that_is_named_is_not() -> None:
    now = BEFORE | {
        "file /etc/docker": "drwxr-xr-x root:root",
        "file /etc/docker/daemon.json": "-rw-r--r-- root:root",
        "file /etc/docker.conf": "-rw-r--r-- root:root",
    }
    assert [line.split(" (")[0] for line in host_state.differences(BEFORE, now)] == [
        "file /etc/docker",
        "file /etc/docker.conf",
    ]
    assert [line.split(" (")[0] for line in host_state.differences(now, BEFORE)] == [
        "file /etc/docker",
        "file /etc/docker.conf",
    ]


@pytest.mark.parametrize(
    ("now", "same"),
    [
        (b"127.0.0.1\tlocalhost\n172.18.0.4\ttest-site\n", True),
        (b"127.0.0.2\tlocalhost\n172.18.0.5\ttest-site\n", False),
        (b"127.0.0.1\tlocalhost\n172.18.0.5\ttest-site\n127.0.1.1\ttest-site\n", False),
        (b"127.0.0.1\tlocalhost\n172.18.0.5\tmirror test-site\n", False),
        (b"127.0.0.1\tlocalhost\n", False),
    ],
)
def test_the_own_address_may_be_another_and_nothing_else_of_the_names(now: bytes, same: bool) -> None:
    before = b"127.0.0.1\tlocalhost\n172.18.0.5\ttest-site\n"
    found = [host_state.without_own_address(hosts, "test-site") for hosts in (before, now)]
    assert (found[0] == found[1]) == same


def test_files_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_state, "CONTENTS", (f"{tmp_path}/etc/",))
    monkeypatch.setattr(host_state, "OUTSIDE", (f"{tmp_path}/run",))
    for folder in ("etc", "usr", "run"):
        (tmp_path / folder).mkdir(mode=0o755)
        (tmp_path / folder / "file").write_text("text")
        (tmp_path / folder / "file").chmod(0o640)
    (tmp_path / "etc/link").symlink_to("file")
    (tmp_path / "usr/__pycache__").mkdir()
    found = {what.removeprefix(f"file {tmp_path}/"): how.split() for what, how in host_state.files(str(tmp_path))}
    assert sorted(found) == ["etc", "etc/file", "etc/link", "usr", "usr/file"]
    assert found["etc"][0] == "drwxr-xr-x"
    assert found["etc/link"][2:] == ["to", "file"]
    assert (found["etc/file"][0], found["etc/file"][2]) == ("-rw-r-----", "sha256")
    assert found["usr/file"][2:] == ["4", "bytes"]


def test_contents_count_where_no_package_vouches_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_state, "CONTENTS", (f"{tmp_path}/",))
    monkeypatch.setattr(host_state, "OUTSIDE", ())
    file = tmp_path / "daemon.json"
    file.write_text("{}")
    before = dict(host_state.files(str(tmp_path)))
    file.write_text("[]")
    assert len(host_state.differences(before, dict(host_state.files(str(tmp_path))))) == 1


def test_attributes_of_netlink_messages() -> None:
    data = struct.pack("HH", 9, 1) + b"nat\0\0\0\0\0" + struct.pack("HH", 8, 0x8000 | 3) + b"OUT\0"
    found = host_state.attributes(data)
    assert {kind: host_state.text(value) for kind, value in found.items()} == {1: "nat", 3: "OUT"}
