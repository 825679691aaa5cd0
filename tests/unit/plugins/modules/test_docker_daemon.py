"""The modules docker_daemon and docker_engine_info: merging options, and what they make of the engine's words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.dots_ocr.deploy.plugins.module_utils import engine
from ansible_collections.dots_ocr.deploy.plugins.modules import docker_daemon as daemon

REQUIRED = {"features": {"cdi": True}, "live-restore": False}
LOGS: dict[str, Any] = {"log-driver": "local", "log-opts": {"max-size": "50m"}}
POOLS: dict[str, Any] = {"default-address-pools": [{"base": "10.201.0.0/16", "size": 24}]}


def merge(existing: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Merge with what the role requires and sets where nobody has."""
    merged: dict[str, Any] = daemon.merge(existing, REQUIRED, [LOGS, POOLS], options)
    return merged


def test_without_a_file_all_of_ours_is_set() -> None:
    assert merge({}) == {**REQUIRED, **LOGS, **POOLS}


def test_foreign_options_stay_at_every_depth() -> None:
    merged = merge({"mtu": 1400, "features": {"buildkit": True}})
    assert merged["mtu"] == 1400
    assert merged["features"] == {"buildkit": True, "cdi": True}


@pytest.mark.parametrize("theirs", [{"log-driver": "json-file"}, {"log-opts": {"max-size": "1g"}}])
def test_group_of_defaults_is_all_or_nothing(theirs: dict[str, Any]) -> None:
    merged = merge(theirs)
    assert {key: merged[key] for key in LOGS if key in merged} == theirs


def test_option_of_the_user_takes_the_place_of_a_default() -> None:
    assert "log-opts" not in merge({}, **{"log-driver": "journald"})


def test_what_is_required_outweighs_the_file_but_is_not_contradicted() -> None:
    assert merge({"live-restore": True})["live-restore"] is False
    with pytest.raises(daemon.Problem, match=r"sets live-restore, which has to be false here. Fix: leave it out"):
        merge({}, **{"live-restore": True})


def test_option_beside_a_required_one_is_no_contradiction() -> None:
    assert merge({}, features={"buildkit": False})["features"] == {"buildkit": False, "cdi": True}


def test_second_merge_changes_nothing() -> None:
    once = merge({"features": {"buildkit": True}}, mtu=1400)
    assert merge(once, mtu=1400) == once


class Host:
    """A host with files of its own; the engine finds no fault in them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the module look there."""
        self.file, self.record = folder / "etc/docker/daemon.json", folder / "lib/dots-ocr/installed/docker-daemon.json"
        self.file.parent.mkdir(parents=True)
        monkeypatch.setattr(daemon, "DAEMON", self.file)
        monkeypatch.setattr(daemon, "RECORD", self.record)
        monkeypatch.setattr(daemon, "PROXY", folder / "etc/systemd/proxy.conf")
        monkeypatch.setattr(daemon, "CERTIFICATES", folder / "etc/docker/certs.d")
        monkeypatch.setattr(daemon, "UNITS", ())
        monkeypatch.setattr(daemon.shutil, "which", lambda *_, **__: None)

    def present(self, **options: Any) -> bool:
        """Bring the role's options; return whether anything changed."""
        params = {"required": REQUIRED, "defaults": [LOGS, POOLS], "options": options, "proxy": {}, "registry_ca": {}}
        configuration = daemon.Configuration(params, check=False)
        self.restart = configuration.present()
        return bool(configuration.changed)

    def absent(self) -> bool:
        """Take them away; return whether the engine has to be restarted."""
        return bool(daemon.Configuration({}, check=False).absent())

    @property
    def options(self) -> dict[str, Any]:
        """What is in the file."""
        found: dict[str, Any] = json.loads(self.file.read_bytes())
        return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a host without a configuration."""
    return Host(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "theirs",
    [
        b'{"mtu": 1400}',
        b"",
        b"{ }\n\n",
        b"null",
        b'{"live-restore": false, "log-driver": "local", "log-opts": {"max-size": "50m"}}',
        b'{"live-restore": true, "features": {"cdi": false, "buildkit": true}}',
        b'{"features": {}, "features": {"buildkit": true}}',
        b'{"insecure-registries": ["own:5000", "mirror:5000"], "dns": []}',
        b'\xef\xbb\xbf{"mtu": 1400}',
        '{"labels": ["Ort=Köln"]}'.encode("utf-16"),
        '{"labels": ["город=Тверь"]}'.encode(),
    ],
)
def test_absent_puts_back_what_was_there_to_the_byte(theirs: bytes, host: Host) -> None:
    host.file.write_bytes(theirs)
    assert host.present(**{"insecure-registries": ["mirror:5000"]})
    assert host.options["live-restore"] is False
    assert not host.present(**{"insecure-registries": ["mirror:5000"]})
    assert host.absent()
    assert host.file.read_bytes() == theirs
    assert not host.record.parent.parent.exists()
    assert not host.absent()


def test_engine_that_has_run_since_before_its_file_was_written_is_restarted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.present()
    written = json.loads(host.record.read_text())["since"]
    os.utime(host.file, (0, written + 60))  # what others do to it is not looked at
    for later, restart in ((-1, True), (1, False)):  # a run was cut off before the restart, or after it
        began = written + later
        monkeypatch.setattr(daemon, "begun", lambda *units, began=began: dict.fromkeys(units, began))
        assert (host.present(), host.restart) == (False, restart)


def test_all_of_it_was_there_before(host: Host) -> None:
    theirs = json.dumps(merge({}))
    host.file.write_text(theirs)
    host.present()
    assert not host.absent()
    assert host.file.read_text() == theirs


def test_without_a_file_before_there_is_none_after(host: Host) -> None:
    host.present()
    assert host.absent()
    assert not host.file.exists()


def test_what_others_changed_since_stays(host: Host) -> None:
    host.file.write_text('{"mtu": 1400, "dns": ["10.0.0.1"]}')
    host.present(dns=["10.0.0.2"])
    assert host.options["dns"] == ["10.0.0.2", "10.0.0.1"]
    changed = {**host.options, "debug": True, "live-restore": True, "dns": ["10.0.0.2", "10.0.0.1", "10.0.0.3"]}
    host.file.write_text(json.dumps(changed))
    host.present(dns=["10.0.0.2"])
    assert host.options["live-restore"] is False
    host.absent()
    assert host.options == {"mtu": 1400, "debug": True, "live-restore": True, "dns": ["10.0.0.1", "10.0.0.3"]}


def test_option_that_is_not_wanted_any_more_goes(host: Host) -> None:
    host.present(mtu=1400)
    assert host.present()
    assert "mtu" not in host.options


@pytest.mark.parametrize("theirs", ['{"live-restore": false}', '{"live-restore": '])
def test_absent_touches_no_file_that_was_never_ours(theirs: str, host: Host) -> None:
    host.file.write_text(theirs)
    assert not host.absent()
    assert host.file.read_text() == theirs


def test_mode_and_link_stay(host: Host, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.json"
    real.write_text('{"mtu": 1400}')
    real.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(real, 12, 34)
    owner = (real.stat().st_uid, real.stat().st_gid)
    host.file.symlink_to(real)
    host.present()
    assert (real.stat().st_mode & 0o777, host.file.is_symlink()) == (0o640, True)
    assert (real.stat().st_uid, real.stat().st_gid) == owner
    # It may hold a proxy's password.
    assert host.record.stat().st_mode & 0o777 == 0o600
    host.absent()
    assert (real.stat().st_mode & 0o777, host.file.is_symlink(), real.read_text()) == (0o640, True, '{"mtu": 1400}')


def test_documented_example_works(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    [task] = yaml.safe_load(daemon.EXAMPLES)
    with patch_module_args(task["dots_ocr.deploy.docker_daemon"]), pytest.raises(SystemExit):
        daemon.main()
    assert json.loads(capsys.readouterr().out)["restart"] is True
    assert host.options["insecure-registries"] == ["mirror:5000"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'{"features": ', "not valid JSON"),
        (b'{"mtu": NaN}', "not valid JSON"),
        (b'{"labels": ["Ort=K\xf6ln"]}', "not valid JSON"),
        (b'{"mtu": 1400} // ours', "not valid JSON"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_broken_file_is_reported(text: bytes, complaint: str) -> None:
    with pytest.raises(daemon.Problem, match=f"{complaint}.*nothing was changed. Fix: correct it or move it away"):
        daemon.parse(text)


def test_empty_file_has_no_options() -> None:
    assert daemon.parse(b" \n") == {}


def test_objects_that_stand_there_twice_are_merged_as_the_engine_does() -> None:
    twice = b'{"features": {"a": true, "b": true}, "mtu": 1, "features": {"b": false}, "mtu": 2}'
    assert daemon.parse(twice) == {"features": {"a": True, "b": False}, "mtu": 2}


UNIT = "[Service]\nExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd.sock $OPTS\n"


def test_flags_of_the_unit() -> None:
    assert daemon.flags_of(UNIT) == {"hosts", "containerd"}


def test_drop_in_replaces_the_command_line() -> None:
    drop_in = "[Service]\nExecStart=\nExecStart=/usr/bin/dockerd \\\n  --mtu 1400 --registry-mirror http://m\n"
    assert daemon.flags_of(UNIT + drop_in) == {"mtu", "registry-mirrors"}


def test_option_that_is_a_flag_too_is_refused() -> None:
    with pytest.raises(daemon.Problem, match=r"hosts is set in .* and as a flag of docker.service.*Fix: remove one"):
        daemon.check({"hosts": ["fd://"]}, daemon.flags_of(UNIT), wsl=False)


def test_options_in_another_file_are_refused() -> None:
    start = "[Service]\nExecStart=/usr/bin/dockerd --config-file={}\n"
    daemon.check({}, daemon.flags_of(start.format(daemon.DAEMON)), wsl=False)
    with pytest.raises(daemon.Problem, match=r"a file of its own .*Fix: move them"):
        daemon.check({}, daemon.flags_of(start.format("/etc/dockerd.json")), wsl=False)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        # The configuration that CIS' benchmark recommends.
        ({"userns-remap": "default", "no-new-privileges": True, "icc": False}, "userns-remap is on"),
        ({"iptables": False, "userland-proxy": False}, "iptables and userland-proxy are both false"),
    ],
)
def test_option_that_the_server_cannot_live_with_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(daemon.Problem, match=f"{complaint}.*Nothing was changed. Fix: remove"):
        daemon.check(options, set(), wsl=False)
    daemon.check({**options, "userns-remap": "", "userland-proxy": True}, set(), wsl=False)


def test_flag_that_the_server_cannot_live_with_is_refused() -> None:
    flags = daemon.flags_of("[Service]\nExecStart=/usr/bin/dockerd --userns-remap=default\n")
    with pytest.raises(daemon.Problem, match="userns-remap is on"):
        daemon.check({}, flags, wsl=False)


def test_runtime_that_is_not_defined_is_refused() -> None:
    runtime = {"default-runtime": "nvidia"}
    for known in ({**runtime, "runtimes": {"nvidia": {"path": "x"}}}, {"default-runtime": "io.containerd.runc.v2"}):
        daemon.check(known, set(), wsl=False)
    with pytest.raises(daemon.Problem, match=r"default-runtime is nvidia, .* Fix: remove default-runtime"):
        daemon.check(runtime, set(), wsl=False)


def test_userland_proxy_stays_on_wsl() -> None:
    daemon.check({"userland-proxy": False}, set(), wsl=False)
    with pytest.raises(daemon.Problem, match="userland-proxy is false"):
        daemon.check({"userland-proxy": False}, set(), wsl=True)


def test_proxy_keeps_its_percent_signs_from_systemd() -> None:
    text = daemon.render_proxy({"http": "http://user:p%40ss@proxy:3128", "https": None, "no_proxy": "mirror"})
    assert text is not None
    assert 'Environment="HTTP_PROXY=http://user:p%%40ss@proxy:3128"\nEnvironment="NO_PROXY=mirror"\n' in text
    assert daemon.render_proxy({}) is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Docker version 28.5.2, build ecc6942", "28.5.2"),
        ("Docker version 26.1.5+dfsg1, build a72d7cd", "26.1.5"),
        ("5:28.3.3-1~debian.13~trixie", "28.3.3"),
        ("26.1.5+dfsg1-9+b9", "26.1.5"),
        ("28.2.2-0ubuntu1~24.04.1", "28.2.2"),
        ("", ""),
    ],
)
def test_version_of_the_engine(text: str, version: str) -> None:
    assert engine.parse_version(text) == version


def test_data_is_counted_without_the_engine(tmp_path: Path) -> None:
    for name in ("containers/1", "volumes/a", "volumes/b", "100000.100000/volumes/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "volumes/metadata.db").touch()
    assert engine.kept_in({tmp_path, tmp_path / "nowhere"}) == {"containers": 1, "volumes": 3}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ('{"data-root": "/srv/docker"}', {"data-root": "/srv/docker"}),
        ('\ufeff{"data-root": "/srv/docker"}', {"data-root": "/srv/docker"}),
        ("{}", {}),
        ('{"data-root": ', {}),
        ("[]", {}),
    ],
)
def test_settings_of_the_engine(text: str, options: dict[str, str], tmp_path: Path) -> None:
    daemon_file = tmp_path / "daemon.json"
    assert engine.settings(daemon_file) == {}
    daemon_file.write_text(text)
    assert engine.settings(daemon_file) == options


@pytest.mark.parametrize(
    ("content", "result"),
    [
        (b'#!/bin/sh\nexec /usr/bin/podman "$@"\n', True),
        (b"#!/bin/sh\nexec sudo docker\n", False),
        (b"\x7fELF podman", False),
    ],
)
def test_podman_in_the_place_of_docker(content: bytes, result: bool, tmp_path: Path) -> None:
    command = tmp_path / "docker"
    assert not engine.is_podman(command)
    command.write_bytes(content)
    assert engine.is_podman(command) is result


def container(name: str, *, running: bool = True, remove: bool = False, policy: str = "no") -> dict[str, Any]:
    """Return what `docker inspect` says of a container, as far as it matters."""
    return {
        "Name": f"/{name}",
        "State": {"Running": running},
        "HostConfig": {"AutoRemove": remove, "RestartPolicy": {"Name": policy}},
    }


def test_only_what_nobody_else_starts_again_is_started_again() -> None:
    inspected = [
        container("keeper"),
        container("stopped", running=False),
        container("of-a-unit", remove=True),
        container("policy", policy="unless-stopped"),
    ]
    assert engine.running_containers(inspected) == ["keeper"]


INFO: dict[str, Any] = {
    "ServerVersion": "29.9.0",
    "OperatingSystem": "Debian GNU/Linux 13 (trixie)",
    "DockerRootDir": "/var/lib/docker",
    "FirewallBackend": {"Driver": "iptables"},
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns", "name=no-new-privileges"],
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"SecurityOptions": None},
        {"FirewallBackend": {"Driver": "nftables"}},
        {"FirewallBackend": {"Driver": "iptables+firewalld"}},
    ],
)
def test_engine_that_can_run_the_server(changes: dict[str, Any]) -> None:
    assert list(engine.judge({**INFO, **changes}, "Engine containerd runc docker-init", has_iptables=True)) == []


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"SecurityOptions": ["name=seccomp,profile=builtin", "name=userns"]}, "remaps users", "remove userns-remap"),
        ({"SecurityOptions": ["name=rootless", "name=userns"]}, "runs rootless", "'docker context use default'"),
        ({"DockerRootDir": "/var/snap/docker/common/var-lib-docker"}, "a snap", "'snap remove docker'"),
        ({"OperatingSystem": "Docker Desktop"}, "asks Docker Desktop", "'docker context use default'"),
    ],
)
def test_engine_that_cannot_run_the_server_is_named_with_the_fix(
    changes: dict[str, Any], problem: str, fix: str
) -> None:
    [found] = engine.judge({**INFO, **changes}, "Engine containerd", has_iptables=True)
    assert problem in found["problem"]
    assert fix in found["fix"]


@pytest.mark.parametrize(
    ("said", "components"),
    [
        ({"host": {"os": "linux"}, "store": {}, "version": {}}, ""),
        ({**INFO, "ServerVersion": "5.4.2"}, "Podman Engine "),
    ],
)
def test_podman_is_not_taken_for_docker(said: dict[str, Any], components: str) -> None:
    [found] = engine.judge(said, components, has_iptables=True)
    assert "podman answers" in found["problem"]


def test_program_that_closes_the_network_is_needed() -> None:
    nftables = {**INFO, "FirewallBackend": {"Driver": "nftables"}}
    [found] = engine.judge(nftables, "Engine", has_iptables=False)
    assert found["fix"].startswith("'apt-get install iptables'")
    assert list(engine.judge({}, "", has_iptables=False)) == []


class Commands:
    """What a host's programs answer the module."""

    def __init__(self, **units: str) -> None:
        """Take the states of docker.service and docker.socket."""
        self.units = units
        self.asked: list[str] = []

    def ask(self, *command: str, timeout: float | None = None) -> str:
        """Answer one of them."""
        self.asked.append(" ".join(command[:2]))
        if command[:2] == ("systemctl", "is-active"):
            state = self.units.get(command[2].removeprefix("docker."), "inactive")
            return f"{state}\n" if state == "active" else ""
        if command[:2] == ("systemctl", "is-enabled"):
            return self.units.get("boot", "disabled")
        return json.dumps({**INFO, "SecurityOptions": ["name=userns"]}) if command[:2] == ("docker", "info") else ""


@pytest.mark.parametrize(
    ("units", "asked"),
    [({"service": "active", "socket": "active"}, True), ({"socket": "active"}, False), ({}, True)],
)
def test_engine_that_is_stopped_is_not_started_by_asking(
    units: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    commands = Commands(**units)
    monkeypatch.setattr(engine, "ask", commands.ask)
    problems = engine.look()["problems"]
    assert ("docker info" in commands.asked, len(problems)) == (asked, int(asked))


@pytest.mark.parametrize(
    ("units", "up"),
    [
        ({"service": "active", "boot": "enabled"}, True),
        ({"service": "active", "boot": "masked"}, False),
        ({"boot": "enabled"}, False),
    ],
)
def test_tells_whether_there_is_anything_to_start_and_who_brought_it(
    units: dict[str, str], up: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "ask", Commands(**units).ask)
    monkeypatch.setattr(engine, "RECORDS", tmp_path)
    (tmp_path / "docker-engine.json").touch()
    found = engine.look("docker-engine")
    assert (found["up"], found["brought"], engine.look("other")["brought"]) == (up, True, False)
