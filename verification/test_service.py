"""The service: a hardened container in the foreground of a systemd unit."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from testinfra.host import Host

from server import Settings, python, servers

LARGEST_EXPOSURE = 3.0  # our units have 1.2 to 2.4; versions of systemd differ by some tenths


def test_services_run_now_and_at_boot(host: Host) -> None:
    for server in servers(host):
        service = host.service(server["unit"])
        assert service.is_running
        assert service.is_enabled
        assert service.systemd_properties["Restart"] == "always"


def test_watchdog_runs_now_and_at_boot(host: Host) -> None:
    for server in servers(host):
        timer = host.service(f"dots-ocr-watchdog@{server['name']}.timer")
        assert timer.is_running
        assert timer.is_enabled
        assert not host.check_output("systemctl list-units --failed --plain --no-legend 'dots-ocr*'")


def test_owner_sees_that_it_runs(host: Host) -> None:
    with host.sudo():
        done = host.run("dots-ocr-server status --json")
    assert done.rc == 0, done.stdout
    seen = {
        one["name"]: (one["state"], one["model"], one["fault"] is None) for one in json.loads(done.stdout)["servers"]
    }
    assert seen == {server["name"]: ("running", server["model"], False) for server in servers(host)}


def test_port_is_open_on_loopback_only(host: Host, server: Settings) -> None:
    assert host.socket(f"tcp://127.0.0.1:{server['port']}").is_listening
    assert not host.socket(f"tcp://0.0.0.0:{server['port']}").is_listening


def test_container_is_hardened(container: dict[str, Any]) -> None:
    settings = container["HostConfig"]
    assert container["Config"]["User"] == "2000:0"
    assert settings["ReadonlyRootfs"] is True
    assert settings["CapDrop"] == ["ALL"]
    assert settings["CapAdd"] is None
    assert settings["SecurityOpt"] == ["no-new-privileges"]
    assert settings["Privileged"] is False
    assert settings["PidsLimit"] == 4096
    assert settings["Memory"] > 0


def test_systemd_alone_restarts_the_container(container: dict[str, Any]) -> None:
    assert container["HostConfig"]["RestartPolicy"]["Name"] in ("", "no")
    assert container["HostConfig"]["AutoRemove"] is True


def test_journal_is_the_only_log(container: dict[str, Any]) -> None:
    assert container["HostConfig"]["LogConfig"]["Type"] == "none"


def test_container_reaches_nobody(host: Host, server: Settings) -> None:
    """Neither this host at any of its addresses, nor a name, nor another network."""
    found = python(
        host,
        """
        import subprocess
        addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        program = '''
        import errno, json, socket, sys
        def opens(address, port):
            try:
                socket.create_connection((address, port), 2).close()
            except OSError as error:
                unreachable = isinstance(error, (TimeoutError, socket.gaierror)) or error.errno == errno.ENETUNREACH
                return not unreachable and str(error)
            return True
        print(json.dumps({a: opens(a, 22) for a in sys.argv[1:]}))
        '''
        import textwrap
        targets = [a for a in addresses if ":" not in a] + ["example.org", "192.0.2.1"]
        command = ["docker", "exec", container, "python3", "-c", textwrap.dedent(program), *targets]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout or json.dumps(done.stderr))
        """,
        container=server["container"],
    )
    assert len(found) >= 4
    assert not any(found.values()), found


def test_weights_are_mounted_read_only(container: dict[str, Any]) -> None:
    mounts = {mount["Destination"]: mount for mount in container["Mounts"]}
    assert mounts["/models/DotsOCR"]["RW"] is False
    assert mounts["/models/DotsOCR/configuration_dots.py"]["RW"] is False


def test_container_can_leave_nothing_for_its_next_start(
    host: Host, server: Settings, container: dict[str, Any]
) -> None:
    """Compiled code is loaded without a check: what somebody in the container can write must end with it."""
    assert [mount["Destination"] for mount in container["Mounts"] if mount["RW"]] == []
    assert sorted(container["HostConfig"]["Tmpfs"]) == ["/home/vllm", "/tmp"]
    assert "PYTHONNOUSERSITE=1" in container["Config"]["Env"]
    assert host.check_output("find %s ! -user root -o ! -type l -perm /022", server["compiled"]["kept"]) == ""


def test_systemd_finds_little_to_say_against_our_units(host: Host) -> None:
    """Of 10.0 an unprotected service has about 9.6; README.md of the role says what is left, and why."""
    loaded = host.check_output("systemctl list-units --all --plain --no-legend --type=service 'dots-ocr*'").splitlines()
    units = {line.split()[0] for line in loaded}
    for server in servers(host):
        units |= {server["unit"], f"dots-ocr-watchdog@{server['name']}.service"}
    said = host.check_output(
        f"for unit in {' '.join(units)}; do systemd-analyze security --no-pager $unit | tail -n 1; done"
    )
    exposed = {unit: float(level) for unit, level in re.findall(r"for (\S+): ([0-9.]+)", said)}
    assert set(exposed) == units
    assert {unit: level for unit, level in exposed.items() if level > LARGEST_EXPOSURE} == {}


def test_image_is_pinned(container: dict[str, Any], server: Settings) -> None:
    assert "sha256:" in server["image"]["pin"]
    assert container["Config"]["Image"] == server["image"]["pin"]


def test_container_sees_the_gpu(host: Host, server: Settings) -> None:
    with host.sudo():
        assert host.check_output("docker exec %s nvidia-smi -L", server["container"]).startswith("GPU 0: ")


@pytest.mark.parametrize(
    "argument",
    [
        "--trust-remote-code",
        "--chat-template-content-format=string",
        "--allowed-media-domains=invalid.invalid",
        "--middleware=dots_ocr_gate.Gate",
    ],
)
def test_vllm_runs_with(arguments: list[str], argument: str) -> None:
    assert argument in arguments


def test_limits_are_those_of_the_plan(arguments: list[str], server: Settings) -> None:
    plan = server["plan"]
    assert plan["explanation"]
    for name in ("gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_queued_reqs", "api_server_count"):
        assert f"--{name.replace('_', '-')}={plan[name]}" in arguments


def test_weights_match_their_manifest(host: Host, server: Settings) -> None:
    with host.sudo():
        assert host.run("cd %s && sha256sum --check --strict --quiet SHA256SUMS", server["weights"]).rc == 0


def test_what_vllm_found_is_recorded_with_the_plan_that_it_belongs_to(server: Settings) -> None:
    measured = server["measured"]
    assert measured["kv_tokens"] >= server["plan"]["max_model_len"]
    assert {name: server["plan"][name] for name in measured["planned"]} == measured["planned"]
