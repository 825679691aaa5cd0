"""The containers' closed network: what becomes of it when others change the firewall, on a host that is made up."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import programs

isolated = programs.load("firewall")

OURS = "-A PREROUTING -i dots-ocr0 -m conntrack ! --ctstate RELATED,ESTABLISHED"


class Host:
    """Docker and the kernel's packet filter as far as the program asks them."""

    def __init__(self) -> None:
        """Begin with an engine that has just started, before any server."""
        self.networks: set[str] = set()
        self.ipv6 = False
        self.driver = "iptables"
        self.chains = True  # Docker's own
        self.accepting = False  # a rule of somebody before ours
        self.attached = False  # the container, to another network
        self.rules: dict[str, int] = {}  # by program: what ours dropped
        self.container = ""
        self.engine = 0  # the id of its process
        self.refusal = ""  # of the kernel, to set a rule
        self.asked: list[tuple[str, ...]] = []

    def flush(self) -> None:
        """Do what 'nft flush ruleset' does."""
        self.rules, self.chains, self.accepting = {}, False, False

    def run(self, *command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        """Answer a command."""
        self.asked.append(command)
        status, output = self.answer(command)
        return subprocess.CompletedProcess(command, status, output, output if status else "")

    def answer(self, command: tuple[str, ...]) -> tuple[int, str]:
        """Return the status and what is printed."""
        match command:
            case ("docker", "info", *_):
                return 0, self.driver
            case ("nft", "list", "table", *_):
                return int(not self.chains), ""
            case ("iptables", "--wait", "--numeric", "--list", "DOCKER", *_):
                return int(not self.chains or self.driver == "nftables"), ""
            case ("docker", "network", "inspect", "--format", *_):
                return 0, str(self.ipv6).lower()
            case ("docker", "network", "inspect", name):
                return int(name not in self.networks), ""
            case ("docker", "network", "create", *_, name):
                self.networks.add(name)
                return 0, ""
            case ("docker", "network", "rm", name):
                self.networks.remove(name)
                return 0, ""
            case ("docker", "inspect", *_):
                return (0, self.container) if self.container else (1, "")
            case ("docker", "ps", *_):
                return 0, "web\nours\n"
            case ("nsenter", *_):
                for program, sent in (("iptables", 2), ("ip6tables", 1)):
                    if program in self.rules and not self.accepting:
                        self.rules[program] += sent - self.attached
                return 0, f"2\n{int(self.ipv6)}\n"
            case (program, "--wait", "--table", "mangle", action, "PREROUTING", *rule):
                return self.change(program, action, rule)
        return 0, ""

    def change(self, program: str, action: str, rule: list[str]) -> tuple[int, str]:
        """Answer iptables."""
        if action == "--list-rules":
            lines = [f"{OURS} -c {self.rules[program]} 9 -j DROP"] if program in self.rules else []
            return 0, "\n".join(["-P PREROUTING ACCEPT -c 0 0", *lines])
        assert rule == [*isolated.RULE]
        if action == "--insert":
            if self.refusal:
                return 2, self.refusal
            self.rules[program], self.accepting = 0, False
        elif program not in self.rules:
            return 1, ""
        elif action == "--delete":
            del self.rules[program]
        return 0, ""

    def asked_for(self, *words: str) -> int:
        """Return how often commands with these words were run."""
        return sum(set(words) <= set(command) for command in self.asked)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a host on which the network was brought and a server runs."""
    made_up = Host()
    monkeypatch.setattr(isolated, "run", made_up.run)
    monkeypatch.setattr(isolated, "MENDED", tmp_path / "mended")
    monkeypatch.setattr(isolated, "DAEMON", tmp_path / "daemon.json")
    monkeypatch.setattr(isolated.ocr_probe, "unit_properties", lambda *_: {"MainPID": str(made_up.engine)})
    monkeypatch.setattr(isolated, "RESTART_SECONDS", 0)
    monkeypatch.setattr(isolated, "COUNT_SECONDS", 0)
    isolated.create()
    made_up.container = "4711 dots-ocr"
    return made_up


def test_network_is_closed_once(host: Host) -> None:
    assert host.networks == {"dots-ocr"}
    isolated.create()
    isolated.create()
    assert (list(host.rules), host.asked_for("--insert"), host.asked_for("create")) == (["iptables"], 1, 1)
    isolated.prove("dots-ocr")


def test_nobody_else_can_open_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "LOCK", tmp_path / "lock")
    with isolated.alone():
        assert isolated.LOCK.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("number", "proves"), [(errno.ENETUNREACH, True), (errno.EHOSTUNREACH, True), (errno.EPERM, False)]
)
def test_what_somebody_forbids_proves_nothing(number: int, proves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "it cannot be sent")

    sender = contextlib.nullcontext(SimpleNamespace(sendto=refuse))
    monkeypatch.setattr(socket, "socket", lambda *_: sender)
    with contextlib.nullcontext() if proves else pytest.raises(OSError, match="cannot be sent"):
        exec(isolated.PROBE, {})


def test_network_with_ipv6_is_closed_for_both(host: Host) -> None:
    host.ipv6 = True
    assert isolated.escaped("4711") == 1
    isolated.create()
    assert sorted(host.rules) == ["ip6tables", "iptables"]
    isolated.prove("dots-ocr")


def test_rule_of_docker_has_no_say(host: Host) -> None:
    host.chains = False
    isolated.prove("dots-ocr")


def test_flush_is_mended_by_the_next_check(host: Host, tmp_path: Path) -> None:
    note = tmp_path / "dots-ocr.open"
    host.flush()
    isolated.watch("dots-ocr", note)
    assert (host.rules, note.exists()) == ({"iptables": 2}, False)
    # What reads keeps reading: Docker is left alone until it has to start a container.
    assert not host.asked_for("systemd-run")


@pytest.mark.parametrize("driver", ["iptables", "iptables+firewalld", "nftables"])
def test_start_after_a_flush_restarts_docker_and_only_once(driver: str, host: Host) -> None:
    host.driver = driver
    for times in (1, 2):
        isolated.create()
        host.flush()
        with pytest.raises(isolated.Failed, match="flushed the firewall"):
            isolated.create()
        # Docker does not make them again: to restart it each time would help nobody.
        isolated.create()
        assert host.asked_for("systemd-run", "mend") == times
        host.chains = True


@pytest.mark.parametrize("text", ['{"iptables": false}', '\ufeff{"iptables": false}'])
def test_docker_that_makes_no_rules_was_not_flushed(text: str, host: Host) -> None:
    isolated.DAEMON.write_text(text, encoding="utf-8")
    host.flush()
    isolated.create()
    assert not host.asked_for("systemd-run")
    isolated.prove("dots-ocr")


def test_docker_that_is_told_so_by_a_flag_makes_none_either(host: Host) -> None:
    command = ["/bin/sh", "-c", "echo; read _", "--iptables=false"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout
        engine.stdout.readline()  # the kernel shows the command line only when the program is there
        host.engine = engine.pid
        host.flush()
        isolated.create()
        engine.communicate(b"\n")
    assert not host.asked_for("systemd-run")


def test_mending_starts_what_ran(host: Host) -> None:
    isolated.mend()
    assert [command for command in host.asked if command[1] in ("restart", "start")] == [
        ("systemctl", "restart", "docker.service"),
        ("docker", "start", "web"),
        ("docker", "start", "ours"),
    ]


def test_rule_of_somebody_before_ours_is_overtaken(host: Host) -> None:
    host.accepting = True
    isolated.prove("dots-ocr")
    assert host.asked_for("--delete") == 1


def test_way_out_that_stays_open_is_noted_for_the_watchdog(host: Host, tmp_path: Path) -> None:
    note = tmp_path / "dots-ocr.open"
    host.attached = True
    with pytest.raises(isolated.Failed) as caught:
        isolated.watch("dots-ocr", note)
    problem, fix = caught.value.args
    assert note.read_text() == problem
    assert problem == "The container of dots-ocr is not isolated: 1 of the datagrams that it began were not dropped."
    assert "'docker inspect dots-ocr'" in fix
    host.attached = False
    isolated.watch("dots-ocr", note)
    assert not note.exists()


def test_rule_that_cannot_be_set_says_what_to_do_and_never_to_give_up(host: Host, tmp_path: Path) -> None:
    host.flush()
    host.refusal = "iptables: No chain/target/match by that name."
    with pytest.raises(isolated.Failed, match="cannot be closed: iptables: No chain") as caught:
        isolated.watch("dots-ocr", tmp_path / "note")
    assert "egress" not in " ".join(caught.value.args)
    assert (tmp_path / "note").read_text().startswith("The containers' way out cannot be closed")


@pytest.mark.parametrize("container", ["", "0 dots-ocr", "4711 bridge"])
def test_server_that_is_not_in_the_network_is_left_alone(container: str, host: Host, tmp_path: Path) -> None:
    host.container = container
    host.flush()
    isolated.watch("dots-ocr", tmp_path / "note")
    assert not host.rules
    with pytest.raises(isolated.Failed, match="does not run in the network dots-ocr"):
        isolated.prove("dots-ocr")


def test_server_of_one_gpu_has_a_container_of_its_own(host: Host) -> None:
    isolated.prove("dots-ocr@0")
    assert host.asked_for("inspect", "dots-ocr-0")


def test_nothing_is_left(host: Host) -> None:
    host.ipv6 = True
    isolated.create()
    isolated.remove()
    assert (host.rules, host.networks) == ({}, set())
