"""Who reaches the API's port: the real packet filter, in a network of the test's own with a neighbour on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import programs

firewall = programs.load("firewall")

# In its own network: a server at port 8000 of every address, and a neighbour with two addresses who knocks.
NEIGHBOUR = """
import os
os.system("ip link set lo up")
print("ready", flush=True)
input()
"""
HOST = f"""
import socket
def listen():
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):
        for port in (8000, 8001):
            yield (listener := socket.socket(family))
            listener.bind((address, port))
            listener.listen()
{NEIGHBOUR.replace("print", "listeners = [*listen()]; print")}
"""
KNOCK = """
import socket, sys
source, target, port = sys.argv[1:]
try:
    socket.create_connection((target, int(port)), timeout=0.4, source_address=(source, 0)).close()
    print("in")
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Return what runs a command on a made-up host, or with `neighbour=True` beside it."""
    if os.geteuid() != 0:
        pytest.skip("a network of its own needs root")
    with ExitStack() as stack:
        pids = []
        for program in (HOST, "print('ready', flush=True); input()"):
            command = [
                "unshare",
                "--net",
                "--",
                sys.executable,
                "-c",
                f"import os; os.system('ip link set lo up')\n{program}",
            ]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdin
            stack.callback(process.stdin.close)
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            pids.append(process.pid)

        def run(*words: str, neighbour: bool = False, text: str = "") -> subprocess.CompletedProcess[str]:
            command = ["nsenter", f"--net=/proc/{pids[neighbour]}/ns/net", "--", *words]
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, input=text)

        setup = f"link add veth-host type veth peer name veth-peer netns {pids[1]}"
        assert run("ip", *setup.split()).returncode == 0
        for neighbour, name, addresses in (
            (False, "host", ("192.0.2.1/24",)),
            (True, "peer", ("192.0.2.7/24", "192.0.2.8/24")),
        ):
            for address in addresses:
                assert run("ip", "address", "add", address, "dev", f"veth-{name}", neighbour=neighbour).returncode == 0
            assert run("ip", "link", "set", f"veth-{name}", "up", neighbour=neighbour).returncode == 0
        yield run


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., None]:
    """Return what writes the settings of a server."""

    def write(*networks: str, port: int = 8000, **more: Any) -> None:
        known = {
            **{"unit": "dots-ocr.service", "url": "http://127.0.0.1:8000", "model": "dots.ocr", "likeness": 1.0},
            **{"api_key_file": "", "port": port, "allowed_networks": list(networks), **more},
        }
        (tmp_path / "dots-ocr.json").write_text(json.dumps(known))

    return write


def test_nobody_but_the_networks_and_the_host_itself_gets_in(
    inside: Callable[..., subprocess.CompletedProcess[str]], settings: Callable[..., None], tmp_path: Path
) -> None:
    program = [firewall.__file__, "close", "dots-ocr", f"--settings-folder={tmp_path}"]

    def reaches(source: str, target: str = "192.0.2.1", port: int = 8000) -> bool:
        neighbour = source not in ("127.0.0.1", "192.0.2.1", "::1")
        done = inside(sys.executable, "-c", KNOCK, source, target, str(port), neighbour=neighbour)
        assert done.stdout in ("in\n", "TimeoutError\n"), done.stderr + done.stdout
        return done.stdout == "in\n"

    def close(*networks: str, port: int = 8000) -> str:
        settings(*networks, port=port)
        done = inside(*program)
        assert (done.returncode, done.stderr) == (0, "")
        return inside("iptables", "--table", "mangle", "--list-rules").stdout

    before = close()
    assert "dots-ocr" not in before  # off by default: no rule at all
    assert reaches("192.0.2.7")
    rules = close("192.0.2.7/32", "2001:db8::/32", "198.51.100.9/24")
    assert "-A dots-ocr-api -s 198.51.100.0/24 -j RETURN" in rules
    assert reaches("192.0.2.7")
    assert not reaches("192.0.2.8")
    assert reaches("192.0.2.8", port=8001)  # another program's port
    assert reaches("127.0.0.1", "127.0.0.1")
    assert reaches("192.0.2.1", "192.0.2.1")
    assert reaches("::1", "::1")
    six = inside("ip6tables", "--table", "mangle", "--list-rules").stdout
    assert "-s 2001:db8::/32 -j RETURN" in six
    assert "-A dots-ocr-api -j DROP" in six
    assert close("192.0.2.7/32", "2001:db8::/32", "198.51.100.9/24") == rules  # a second time changes nothing

    assert inside("iptables", "--table", "mangle", "--flush").returncode == 0
    assert reaches("192.0.2.8")
    close("192.0.2.8")  # what was flushed comes back, with what changed
    assert reaches("192.0.2.8")
    assert not reaches("192.0.2.7")
    rules = close("192.0.2.8", port=8001)
    assert reaches("192.0.2.7")
    assert not reaches("192.0.2.7", port=8001)
    assert len(re.findall("-A PREROUTING", rules)) == 1

    assert inside(firewall.__file__, "open", "dots-ocr").returncode == 0
    assert inside("iptables", "--table", "mangle", "--list-rules").stdout == before
    assert "dots-ocr" not in inside("ip6tables", "--table", "mangle", "--list-rules").stdout
    assert inside(firewall.__file__, "open", "dots-ocr").returncode == 0
    close("192.0.2.8")
    assert close() == before  # an empty list takes it away


@pytest.mark.parametrize("network", ["lan", "192.0.2.0/33", "192.0.2.1-192.0.2.9", "", "192.0.2.0/24,198.51.100.0/24"])
def test_network_that_is_none_is_told(
    network: str, settings: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall, "run", lambda *_, **__: pytest.fail("the firewall was touched"))
    settings("192.0.2.0/24", network)
    done = programs.call(firewall, "close", "dots-ocr", f"--settings-folder={tmp_path}")
    assert done.returncode == 1
    assert "an invalid network" in done.stderr
    assert "Fix: write dots_ocr_server_allowed_networks as 192.0.2.0/24" in done.stderr


def test_host_without_iptables_is_told_what_to_do(
    settings: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall, "PROGRAMS", {4: "/nowhere/iptables", 6: "/nowhere/ip6tables"})
    settings("192.0.2.0/24")
    done = programs.call(firewall, "close", "dots-ocr", f"--settings-folder={tmp_path}")
    assert (done.returncode, "Fix: install the package iptables" in done.stderr) == (1, True), done.stderr
    done = programs.call(firewall, "open", "dots-ocr", f"--settings-folder={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")  # there is nothing to take away


def test_name_of_the_chain_is_short_enough() -> None:
    assert {len(firewall.chain_of(name)) <= 28 for name in ("dots-ocr", "dots-ocr@0", "x" * 99)} == {True}
    assert firewall.chain_of("dots-ocr@0") != firewall.chain_of("dots-ocr@1")
