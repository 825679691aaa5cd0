"""The module wsl_settings: settings merged into a user's files and taken out again, and what Windows says."""

from __future__ import annotations

import codecs
import copy
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.modules import wsl_settings as wsl

KEYS = {"general": {"instanceIdleTimeout": "-1"}, "wsl2": {"vmIdleTimeout": "-1", "memory": "24GB"}}
OURS = "[general]\ninstanceIdleTimeout=-1\n\n[wsl2]\nvmIdleTimeout=-1\nmemory=24GB\n"

# What users have, as text with plain line ends.
FILES = {
    "empty": "",
    "comments": "# mine\n",
    "no newline at the end": "[wsl2]\nprocessors=4",
    "an empty line at the end": "[wsl2]\nprocessors=4\n\n",
    "sections apart": "[wsl2]\nprocessors=4\n\n[experimental]\nsparseVhd=true\n",
    "other case, spaces, comment": "[WSL2]\n  Memory = 6GB  # enough\n",
    "twice": "[wsl2]\nmemory=4GB\nmemory=6GB\n",
    "a section twice": "[wsl2]\nmemory=4GB\n[general]\n[wsl2]\nprocessors=4\n",
    "the same key elsewhere": "[experimental]\nmemory=4GB\n",
    "ours by hand": OURS,
}
ENCODINGS = {"utf-8": b"", "utf-8 with its mark": codecs.BOM_UTF8, "utf-16": codecs.BOM_UTF16_LE}


def merged(data: bytes, keys: dict[str, dict[str, str]], record: dict[str, Any], new_line: str = "\n") -> bytes:
    """Merge keys into a file."""
    text = wsl.Text(data, new_line)
    wsl.merge(text, keys, record)
    result: bytes = text.data()
    return result


def encoded(text: str, new_line: str, mark: bytes) -> bytes:
    """Return a file as an editor would write it."""
    return mark + text.replace("\n", new_line).encode("utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-8")


@pytest.mark.parametrize("mark", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("new_line", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_file_is_the_same_to_the_byte_after_all_is_taken_out(text: str, new_line: str, mark: bytes) -> None:
    before, record = encoded(text, new_line, mark), {}  # type: ignore[var-annotated]
    with_ours = merged(before, KEYS, record)
    assert merged(with_ours, {}, record) == before
    assert wsl.forget_if_empty(record) == {}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_second_merge_changes_nothing(text: str) -> None:
    record: dict[str, Any] = {}
    once = merged(text.encode(), KEYS, record)
    known = copy.deepcopy(record)
    assert merged(once, KEYS, record) == once
    assert record == known


def test_new_file_has_the_line_ends_of_windows() -> None:
    assert merged(b"", KEYS, {}, "\r\n") == OURS.replace("\n", "\r\n").encode()


def test_key_is_added_to_its_section() -> None:
    assert merged(FILES["sections apart"].encode(), {"wsl2": {"memory": "8GB"}}, {}) == (
        b"[wsl2]\nprocessors=4\nmemory=8GB\n\n[experimental]\nsparseVhd=true\n"
    )


def test_case_spaces_and_comment_stay() -> None:
    assert merged(FILES["other case, spaces, comment"].encode(), {"wsl2": {"memory": "8GB"}}, {}) == (
        b"[WSL2]\n  Memory = 8GB  # enough\n"
    )


def test_value_that_a_user_set_since_stays() -> None:
    record: dict[str, Any] = {}
    text = merged(b"", KEYS, record).replace(b"memory=24GB", b"memory=12GB")
    assert merged(text, {}, record).strip() == b"[wsl2]\nmemory=12GB"


def test_key_that_is_no_longer_asked_for_gets_its_old_value() -> None:
    record: dict[str, Any] = {}
    text = merged(b"[wsl2]\nmemory=6GB\n", KEYS, record)
    text = merged(text, {**KEYS, "wsl2": {"vmIdleTimeout": "-1"}}, record)
    assert b"memory=6GB\nvmIdleTimeout=-1\n" in text


def test_value_of_before_is_remembered_over_changes() -> None:
    record: dict[str, Any] = {}
    text = merged(b"[wsl2]\nmemory=6GB\n", {"wsl2": {"memory": "8GB"}}, record)
    text = merged(text, {"wsl2": {"memory": "16GB"}}, record)
    assert merged(text, {}, record) == b"[wsl2]\nmemory=6GB\n"


def test_what_was_there_already_is_not_ours() -> None:
    record: dict[str, Any] = {}
    assert merged(OURS.encode(), KEYS, record) == OURS.encode()
    assert record == {}


def test_bytes_that_are_no_text_stay() -> None:
    assert merged(b"# J\xfcrgen\n", {"boot": {"systemd": "true"}}, {}) == b"# J\xfcrgen\n\n[boot]\nsystemd=true\n"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\r\n", "plain\n"),
        ("Jürgen\r\n".encode("utf-16-le"), "Jürgen\n"),
        (codecs.BOM_UTF16_LE + "Wörter\r\n".encode("utf-16-le"), "Wörter\n"),
        (codecs.BOM_UTF8 + b"marked", "marked"),
    ],
)
def test_windows_is_understood(data: bytes, text: str) -> None:
    assert wsl.decode(data) == text


def test_empty_values_are_left_out() -> None:
    assert wsl.clean({"general": {"a": ""}, "wsl2": {"b": -1, "c": None}}) == {"wsl2": {"b": "-1"}}


@pytest.mark.parametrize("size", ["24GB", "8 gb", "0", "512MB", "8589934592"])
def test_size_is_understood(size: str) -> None:
    assert not wsl.check_wishes({"config": {"wsl2": {"swap": size}}, "floor": "", "update": False})


@pytest.mark.parametrize("size", ["50%", "a lot", "-1", "24G"])
def test_size_that_wsl_would_ignore_is_refused(size: str) -> None:
    with pytest.raises(wsl.Problem, match=r"which WSL does not understand.*Fix: write wsl_memory: 24GB"):
        wsl.check_wishes({"config": {"wsl2": {"memory": size}}, "floor": "", "update": False})


@pytest.mark.parametrize(("found", "update"), [("2.5.9.0", True), ("2.5.10.0", False), ("2.6.1.0", False), ("", False)])
def test_floor_of_wsl(monkeypatch: pytest.MonkeyPatch, found: str, update: bool) -> None:
    monkeypatch.setattr(wsl, "installed_wsl", lambda: found)
    assert wsl.check_wishes({"config": {}, "floor": "2.5.10", "update": True}) == update


def test_file_is_replaced_as_a_whole_with_its_mode(tmp_path: Path) -> None:
    file = tmp_path / ".wslconfig"
    file.write_text("before")
    file.chmod(0o640)
    wsl.write_file(file, b"after", backup=True)
    wsl.write_file(file, b"later", backup=True)
    assert file.read_text() == "later"
    assert file.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / ".wslconfig.before-dots-ocr").read_text() == "before"
    assert {entry.name for entry in tmp_path.iterdir()} == {".wslconfig", ".wslconfig.before-dots-ocr"}
