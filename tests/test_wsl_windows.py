"""windows/Prepare-DotsOcr.ps1, as far as it can be tested without Windows: its grammar, the shell script in it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_powershell
import yaml

SCRIPT = Path(__file__).resolve().parent.parent / "windows/Prepare-DotsOcr.ps1"


def faults(node: Any) -> Iterator[str]:
    """Yield where a tree of syntax has something that is no PowerShell."""
    if node.type == "ERROR" or node.is_missing:
        yield f"line {node.start_point[0] + 1}: {node.text[:60]!r}"
    for child in node.children:
        yield from faults(child)


def parsed(text: str) -> list[str]:
    """Return the faults of a PowerShell script."""
    language = tree_sitter.Language(tree_sitter_powershell.language())
    tree = tree_sitter.Parser(language).parse(text.encode())
    return list(faults(tree.root_node))


def test_script_is_powershell() -> None:
    assert parsed(SCRIPT.read_text()) == []


def test_a_missing_brace_is_found() -> None:
    assert parsed(SCRIPT.read_text().replace("function Test-Driver {", "function Test-Driver")) != []


def test_script_is_plain_ascii() -> None:
    # Windows PowerShell reads a file without a mark in the code page of the machine.
    assert SCRIPT.read_text().isascii()


def test_everything_that_changes_windows_can_be_asked_first() -> None:
    text = SCRIPT.read_text()
    for change in (
        "--install --dist",
        "--install --no-dist",
        "& $Wsl --update",
        "::WriteAllText",
        "Register-Sched",
        "Invoke-Script 'systemd'",
        "Invoke-Script 'deploy'",
        "& $Wsl --shutdown",
    ):
        function = text[: text.index(change)].rsplit("\nfunction ", 1)[1]
        assert "$PSCmdlet.ShouldProcess(" in function, change


def test_script_and_role_agree() -> None:
    root = SCRIPT.parent.parent
    script, module = SCRIPT.read_text(), (root / "plugins/modules/wsl_settings.py").read_text()
    floor = re.search(r"_wsl_floor: (\S+)", (root / "roles/wsl/vars/main.yml").read_text())
    assert floor
    assert f"[version] '{floor[1]}'" in script
    assert f'OLDEST_WSL = "{floor[1]}"' in (root / "plugins/modules/gpu_host.py").read_text()
    assert '"dots-ocr-$Distribution"' in script
    assert 'TASK_PREFIX = "dots-ocr-"' in module
    assert '"-d $Distribution -u root --exec /bin/true"' in script
    assert 'f"-d {self.distribution} -u root --exec /bin/true"' in module
    address = yaml.safe_load((root / "galaxy.yml").read_text())["repository"]
    assert f"$Repository = '{address}'" in script


def test_drive_has_room_before_the_distribution_is_installed() -> None:
    """The preflight inside sees WSL's virtual disk alone, which claims a terabyte."""
    text = SCRIPT.read_text()
    needed = yaml.safe_load((SCRIPT.parent.parent / "roles/preflight/defaults/main.yml").read_text())
    assert f"$LeastDisk = {sum(part['gib'] for part in needed['preflight_disk_free'])}\n" in text
    assert text.index("if ($free -lt $LeastDisk)") < text.index("--install --distribution")


def test_documentation_gives_the_same_commands() -> None:
    root = SCRIPT.parent.parent
    names = ("README.md", "docs/start/windows.md", "docs/start/windows.ru.md")
    blocks = [re.findall(r"```powershell\n(?:# .*\n)?((?:.+\n){4})", (root / name).read_text())[0] for name in names]
    assert blocks == [blocks[0]] * 3
    assert (root / re.findall(r"dots-ocr read (\S+)", blocks[0])[0]).is_file()


@pytest.mark.parametrize("cloned", [False, True], ids=["the first time", "again"])
@pytest.mark.parametrize("status", [0, 3], ids=["deploys", "stops"])
def test_shell_script_clones_once_and_deploys(tmp_path: Path, cloned: bool, status: int) -> None:
    script = re.search(r"\$script = @'\n(set -eu\nexport DEBIAN.*?)\n'@", SCRIPT.read_text(), re.DOTALL)
    assert script
    calls, programs, checkout = tmp_path / "calls", tmp_path / "bin", tmp_path / "checkout"
    programs.mkdir()
    for name in ("git", "make", "python3"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\n' + f"exit {status}\n" * (name == "make"))
        (programs / name).chmod(0o755)
    if cloned:
        (checkout / ".git").mkdir(parents=True)
    text = script[1].replace("CHECKOUT", str(checkout)).replace("REPOSITORY", "https://git.example.org/x")
    done = subprocess.run(["sh", "-c", text], env={"PATH": f"{programs}:/usr/bin:/bin"}, check=False)
    assert done.returncode == status
    fetched = f"git -C {checkout} pull --ff-only" if cloned else f"git clone https://git.example.org/x {checkout}"
    assert calls.read_text().splitlines() == ["python3 -c import ensurepip", fetched, f"make -C {checkout} deploy"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "\n[boot]\nsystemd=true\n"),
        ("[user]\ndefault=me\n", "[user]\ndefault=me\n\n[boot]\nsystemd=true\n"),
        ("[boot]\ncommand=x\n[user]\ndefault=me\n", "[boot]\nsystemd=true\ncommand=x\n[user]\ndefault=me\n"),
        ("[Boot]\nsystemd = false\n# mine\n", "[Boot]\nsystemd=true\n# mine\n"),
        ("[user]\nsystemd=mine\n[boot]\nsystemd=false", "[user]\nsystemd=mine\n[boot]\nsystemd=true\n"),
    ],
    ids=["no file", "no section", "a section", "switched off", "no newline at the end"],
)
def test_shell_script_lets_systemd_run(tmp_path: Path, before: str | None, after: str) -> None:
    script = re.search(r"\$script = @'\n(.*?)\n'@", SCRIPT.read_text(), re.DOTALL)
    assert script
    file = tmp_path / "wsl.conf"
    if before is not None:
        file.write_text(before)
    merging = script[1].replace("/etc/wsl.conf", str(file)).split("if ! [ -x /sbin/init ]")[0]
    subprocess.run(["sh", "-c", merging], check=True)
    assert file.read_text().rstrip("\n") == after.rstrip("\n")
