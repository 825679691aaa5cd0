"""WSL and Windows are told what a server needs, the user's own settings stay, and nothing is done elsewhere."""

import base64
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from testinfra.host import Host

NAMESPACE = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"
CONFIG = {
    "16": (
        "/mnt/c/Users/me/.wslconfig",
        "[general]\r\ninstanceIdleTimeout=-1\r\n\r\n[wsl2]\r\nvmIdleTimeout=-1\r\nmemory=24GB\r\nswap=8GB\r\n",
    ),
    "12": ("/mnt/c/Users/me/.wslconfig", None),
    "own": (
        "/win/c/Users/Jürgen/.wslconfig",
        "\ufeff# Jürgen's\r\n[wsl2]\r\nMemory = 24GB # enough\r\nprocessors=4\r\nvmIdleTimeout=-1\r\n\r\n"
        "[experimental]\r\nsparseVhd=true\r\n\r\n[general]\r\ninstanceIdleTimeout=-1",
    ),
}
CONF = {
    "16": "[boot]\nsystemd=true\n",
    "12": "[boot]\nsystemd=true\n",
    "own": "# mine\n[automount]\nroot = /win\n\n[Boot]\nSystemd = true  # for a reason\ncommand = echo up",
    "bare": None,
}


@pytest.fixture
def machine(host: Host) -> str:
    """Return which machine the host plays."""
    return str(host.check_output("hostname")).removeprefix("test-wsl-")


def contents(host: Host, path: str) -> str | None:
    """Return a file with its line ends, and None if there is none."""
    done = host.run("base64 %s", path)
    if done.rc != 0:
        return None
    return base64.b64decode(done.stdout).decode()


def calls(host: Host) -> list[list[str]]:
    """Return the calls of programs of Windows."""
    lines = host.check_output("cat /var/lib/stand-in/calls").splitlines()
    return [json.loads(line) for line in lines]


def tasks(host: Host) -> dict[str, Any]:
    """Return the scheduled tasks of Windows."""
    found: dict[str, Any] = json.loads(host.check_output("cat /var/lib/stand-in/windows.json"))["tasks"]
    return found


def test_distribution_runs_systemd(host: Host, machine: str) -> None:
    assert contents(host, "/etc/wsl.conf") == CONF[machine]


def test_windows_keeps_it_running_with_the_users_own_keys(host: Host, machine: str) -> None:
    if machine in CONFIG:
        path, expected = CONFIG[machine]
        assert contents(host, path) == expected


def test_first_state_of_the_users_file_is_kept(host: Host, machine: str) -> None:
    path = f"{CONFIG['own'][0]}.before-dots-ocr"
    assert ("Memory = 6GB # enough\r\n" in (contents(host, path) or "")) == (machine == "own")


def test_distribution_starts_when_the_user_logs_on(host: Host, machine: str) -> None:
    expected = {"16": ("Debian", "PC\\me"), "own": ("Ubuntu-24.04", "FIRMA\\Jürgen")}
    if machine == "bare":
        return
    if machine not in expected:
        assert tasks(host) == {}
        return
    distribution, user = expected[machine]
    tree = ElementTree.fromstring(tasks(host)[f"dots-ocr-{distribution}"].split("?>", 1)[1])
    texts = {element.tag.removeprefix(NAMESPACE): element.text for element in tree.iter()}
    assert texts["Command"] == "C:\\Windows\\System32\\wsl.exe"
    assert texts["Arguments"] == f"-d {distribution} -u root --exec /bin/true"
    assert texts["UserId"] == user
    assert texts["RunLevel"] == "LeastPrivilege"


def test_file_for_the_task_is_gone(host: Host, machine: str) -> None:
    if machine in CONFIG:
        folder = CONFIG[machine][0].removesuffix("/.wslconfig")
        assert not host.file(f"{folder}/.dots-ocr-task.xml").exists


def test_windows_is_only_looked_at_unless_it_may_be_changed(host: Host, machine: str) -> None:
    called = {tuple(call[:2]) for call in calls(host) if call[0].endswith(".exe")} if machine != "bare" else set()
    look = {("cmd.exe", "/u"), ("schtasks.exe", "/query")}
    assert (look if machine != "bare" else set()) <= called
    assert bool(called - look) == (machine in ("16", "own"))


def test_no_driver_is_installed(host: Host, machine: str) -> None:
    assert host.run("dpkg-query --show '*nvidia*' | grep .").rc != 0
    assert host.file("/usr/bin/nvidia-smi").exists == (machine == "bare")
