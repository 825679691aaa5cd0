"""The module files: what it makes of files and folders, and what it leaves alone."""

from __future__ import annotations

import base64
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible.template import Templar
from ansible_collections.dots_ocr.deploy.plugins.action import files as action
from ansible_collections.dots_ocr.deploy.plugins.module_utils import common
from ansible_collections.dots_ocr.deploy.plugins.modules import files as module

from tests.templating import data_loader


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


def test_what_has_run_since_before_its_file_takes_it_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [{"path": str(tmp_path / name), "content": "", "affects": [f"{name}.service"]} for name in "abcd"]
    run(capsys, *wanted)
    shown = (
        ("a", "active", "10:00:01.500000"),
        ("b", "active", "09:59:59.000001"),
        ("c", "inactive", "09:59:59.000001"),
        ("d", "active", ""),
    )
    blocks = [
        f"Id={unit}.service\nActiveState={state}\nExecMainStartTimestamp={time and f'Montag 2026-11-30 {time} UTC'}\n"
        for unit, state, time in shown
    ]
    monkeypatch.setattr(common, "ask", lambda *_: "\n".join(blocks))
    for name in "abcd":
        os.utime(tmp_path / name, (0, datetime(2026, 11, 30, 10, 0, 0, tzinfo=UTC).timestamp()))
    answer = run(capsys, *wanted, check=True)
    assert (answer["paths"], answer["affected"]) == ([], ["b.service"])


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
    assert run(capsys, {"path": str(link), "content": "kept"})["changed"]
    assert not link.is_symlink()
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


def test_secrets_are_written_and_shown_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = tmp_path / "original"
    original.write_text("of-the-host")
    wanted = [
        {"path": str(tmp_path / "given"), "secret": "of-the-task"},
        {"path": str(tmp_path / "copy"), "copy_of": str(original)},
        {"path": str(tmp_path / "made"), "token": "key=%s\n"},
    ]
    answer = run(capsys, *wanted)
    given, copy, made = (Path(one["path"]).read_text() for one in wanted)
    assert (given, copy) == ("of-the-task", "of-the-host")
    assert made.startswith("key=")
    assert len(made) > 40
    assert [one["after"] for one in answer["diff"]] == ["(secret)\n"] * 3
    refused = run(capsys, {**wanted[0], "secret": "other", "validate": "false %s"}, wanted[2])
    for secret in ("of-the-task", "of-the-host", made.strip(), "other"):
        assert secret not in json.dumps([answer, refused]).replace("another", "")
    assert run(capsys, *wanted)["paths"] == []
    assert (tmp_path / "made").read_text() == made


def test_a_missing_file_of_the_host_is_named_unless_nothing_is_wanted_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"path": str(tmp_path / "copy"), "copy_of": str(tmp_path / "missing")}
    assert "missing cannot be read: No such file or directory. Fix: bring it" in run(capsys, wanted)["msg"]
    assert not run(capsys, {**wanted, "state": "absent"})["changed"]


def test_says_once_what_has_to_take_a_change_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"a": ["one.service"], "b": ["one.service", "two.service"], "c": []}
    wanted = [{"path": str(tmp_path / name), "content": "1", "affects": units} for name, units in names.items()]
    assert run(capsys, *wanted)["affected"] == ["one.service", "two.service"]
    wanted[2]["content"] = "2"
    assert run(capsys, *wanted)["affected"] == []


def test_what_lies_on_the_controller_is_sent(tmp_path: Path) -> None:
    for name in ("files/pages/more", "templates"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "files/one").write_bytes(b"\0picture")
    (tmp_path / "files/pages/page").write_text("1")
    (tmp_path / "files/pages/more/page").write_text("2")
    (tmp_path / "templates/unit.j2").write_text('{"{{ item.name }}": "{{ of_the_task }}"}\n')
    files = [
        {"path": "/a/one", "src": "one", "mode": "0755"},
        {"path": "/a/pages", "src": "pages", "owner": "root", "mode": "0640"},
        {"path": "/a/unit", "template": "unit.j2", "vars": {"item": {"name": "x"}}},
        {"path": "/a/gone", "state": "absent"},
    ]
    task = MagicMock(
        args={"owner": "root", "files": files}, action="dots_ocr.deploy.files", async_val=0, check_mode=False
    )
    task.get_search_path.return_value = [str(tmp_path)]
    sent: dict[str, Any] = {}
    loader, variables = data_loader(), {"of_the_task": "y", "ansible_search_path": [str(tmp_path)]}
    plugin = action.ActionModule(task, MagicMock(), None, loader, Templar(loader=loader, variables=variables), None)
    plugin._execute_module = lambda **arguments: sent.update(arguments) or {}
    plugin.run(task_vars=variables)
    one, page = (base64.b64encode(content).decode() for content in (b"\0picture", b"1"))
    assert sent["module_name"] == "dots_ocr.deploy.files"
    assert sent["module_args"]["owner"] == "root"
    assert sent["module_args"]["files"] == [
        {"path": "/a/one", "base64": one, "mode": "0755"},
        {"path": "/a/pages/more", "state": "directory", "owner": "root"},
        {"path": "/a/pages/more/page", "base64": "Mg==", "owner": "root", "mode": "0640"},
        {"path": "/a/pages/page", "base64": page, "owner": "root", "mode": "0640"},
        {"path": "/a/unit", "content": '{"x": "y"}\n'},
        {"path": "/a/gone", "state": "absent"},
    ]
