"""The module files: what it makes of files and folders, and what it leaves alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

PLACE = Path(__file__).resolve().parent.parent / "plugins/modules/files.py"
spec = importlib.util.spec_from_file_location("files", PLACE)
assert spec
assert spec.loader
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def run(capsys: pytest.CaptureFixture[str], *files: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """Run the module and return what it answers."""
    arguments = {"files": list(files), "_ansible_check_mode": check, "_ansible_diff": True}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        module.main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def mode(path: Path) -> int:
    """Return the mode of a file or folder."""
    return path.stat().st_mode & 0o7777


def test_makes_what_is_wanted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file, old = tmp_path / "a/b", tmp_path / "a/b/file", tmp_path / "old"
    old.mkdir()
    (old / "in it").touch()
    wanted = (
        {"path": str(folder), "state": "directory", "mode": "0750"},
        {"path": str(file), "content": "1\n", "mode": "0600"},
        {"path": str(old), "state": "absent"},
    )
    foreseen = run(capsys, *wanted, check=True)
    assert list(tmp_path.iterdir()) == [old]
    done = run(capsys, *wanted)
    assert foreseen["paths"] == done["paths"] == [str(folder), str(file), str(old)]
    assert (mode(folder), mode(file), file.read_text(), old.exists()) == (0o750, 0o600, "1\n", False)
    again = run(capsys, *wanted)
    assert (again["changed"], again["paths"]) == (False, [])
    assert list(folder.iterdir()) == [file]


@pytest.mark.parametrize("change", [{"content": "2\n"}, {"mode": "0640"}])
def test_says_which_file_has_changed_and_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str]
) -> None:
    wanted = [{"path": str(tmp_path / name), "content": "1\n"} for name in ("same", "other")]
    run(capsys, *wanted)
    wanted[1] |= change
    answer = run(capsys, *wanted)
    assert answer["paths"] == [wanted[1]["path"]]
    (difference,) = answer["diff"]
    assert (difference["before"], difference["after"]) == (
        ("1\n", "2\n") if "content" in change else ({"mode": "0644"}, {"mode": "0640"})
    )
    assert mode(tmp_path / "other") == int(change.get("mode", "0644"), 8)


def test_only_owner_and_mode_without_a_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key"
    file.write_text("secret")
    assert run(capsys, {"path": str(file), "mode": "0440"})["changed"]
    assert (mode(file), file.read_text()) == (0o440, "secret")
    file.unlink()
    assert not run(capsys, {"path": str(file), "mode": "0440"}, check=True)["changed"]
    assert "is missing. Fix:" in run(capsys, {"path": str(file), "mode": "0440"})["msg"]


def test_nothing_changes_if_one_content_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    answer = run(
        capsys,
        {"path": str(first), "content": "new"},
        {"path": str(second), "content": "bad\n", "validate": "grep -q good %s"},
    )
    assert answer["msg"] == f"'grep -q good {second}' refuses the new content, and nothing was replaced: "
    assert list(tmp_path.iterdir()) == []
    assert run(capsys, {"path": str(second), "content": "good\n", "validate": "grep -q good %s"})["changed"]


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_text("kept")
    link.symlink_to(kept)
    run(capsys, {"path": str(link), "content": "new"})
    assert (kept.read_text(), link.read_text(), link.is_symlink()) == ("kept", "new", False)
    folder = tmp_path / "folder"
    folder.mkdir()
    link.unlink()
    link.symlink_to(folder)
    run(capsys, {"path": str(link), "state": "absent"})
    assert (folder.exists(), link.is_symlink()) == (True, False)


@pytest.mark.parametrize(("state", "words"), [("file", "is a folder. Fix:"), ("directory", "is not a folder. Fix:")])
def test_what_is_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str, words: str
) -> None:
    there = tmp_path / "there"
    if state == "file":
        there.mkdir()
    else:
        there.touch()
    assert words in run(capsys, {"path": str(there), "state": state})["msg"]
