"""What the role writes."""

from __future__ import annotations

import hashlib
import re
import subprocess

import pytest

from tests.gateway.conftest import ALICE, CLIENTS, Fleets
from tests.gateway.support import HAPROXY, SERVER_KEY


def server_lines(fleets: Fleets, gateway: str) -> dict[str, str]:
    """Return the rest of each server's line by its name."""
    return dict(re.findall(r"(?m)^    server (\S+) (.*)$", fleets.config(gateway)))


@pytest.mark.parametrize("gateway", ["main", "small", "tls", "wide", "nobody", "alone"])
def test_haproxy_takes_the_configuration_without_a_warning(fleets: Fleets, gateway: str) -> None:
    (fleets.folder(gateway) / "state").write_text("1\n")
    done = subprocess.run(
        [HAPROXY, "-c", "-f", fleets.folder(gateway) / "haproxy.cfg"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_weight_and_limit_follow_the_plan(fleets: Fleets) -> None:
    lines = server_lines(fleets, "wide")
    assert re.match(r"127\.0\.0\.1:8000 weight 16 maxconn 20( |$)", lines["twin:0"])
    assert re.match(r"127\.0\.0\.1:8001 weight 16 maxconn 20( |$)", lines["twin:1"])
    assert lines["far"] == "192.0.2.7:8000 weight 256 maxconn 375"
    assert lines["v6"] == "[2001:db8::7]:8000 weight 2 maxconn 2", "never more than the server admits"


def test_server_that_was_not_asked_stays_as_it_was_known(fleets: Fleets) -> None:
    lines = server_lines(fleets, "wide")
    assert lines["silent"] == "127.0.0.1:9000 weight 8 maxconn 10"
    assert set(lines) == {"twin:0", "twin:1", "far", "v6", "silent"}, "nothing of a host that has left the inventory"
    assert "taken as they were known, since they were not or could not be asked: silent." in fleets.output


def test_server_that_was_never_known_is_left_out_with_a_warning(fleets: Fleets) -> None:
    assert "they could not be asked and are not known yet: never." in fleets.output


def test_server_on_the_loopback_of_another_host_is_warned_of(fleets: Fleets) -> None:
    assert "out of reach for main: cpu1." in fleets.output


def test_default_limit_of_a_key_leaves_room_unless_it_is_the_only_one(fleets: Fleets) -> None:
    limit = re.compile(r"set-var\(txn\.concurrent\) int\((\d+)\) if { var\(txn\.client\) -m str (\w+) }")
    limits = {name: int(most) for most, name in limit.findall(fleets.config("main"))}
    assert limits == {"bob": 4, "slow": 4, "narrow": 1}, "two servers that read two pages each"
    assert limit.findall(fleets.config("alone")) == [("80", "bob")], "sixteen pages that are read, and the queue"


def test_cpu_service_is_a_backup(fleets: Fleets) -> None:
    lines = server_lines(fleets, "main")
    assert lines["cpu1"].endswith(" backup")
    assert "backup" not in lines["gpu1"] + lines["gpu2"]


def test_configuration_has_no_key_but_sums(fleets: Fleets) -> None:
    folder = fleets.folder("main")
    config, clients = fleets.config("main"), (folder / "clients.map").read_text()
    for client in CLIENTS:
        key = client["key"]
        assert f"{hashlib.sha256(key.encode()).hexdigest()} {client['name']}\n" in clients
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".sock":
                assert key not in file.read_text(), file.name
    assert SERVER_KEY not in config
    assert (folder / "server-key.map").read_text().endswith(f"\nauthorization Bearer {SERVER_KEY}\n")
    for name in ("clients.map", "server-key.map", "haproxy.cfg"):
        assert (folder / name).stat().st_mode & 0o777 == 0o640


def test_no_key_is_in_what_ansible_says(fleets: Fleets) -> None:
    assert SERVER_KEY not in fleets.output
    assert ALICE not in fleets.output


def test_key_is_made_where_no_client_is_given(fleets: Fleets) -> None:
    folder = fleets.folder("refused")
    assert (folder / "api-key").stat().st_mode & 0o777 == 0o600
    key = (folder / "api-key").read_text().strip()
    assert len(key) > 40
    assert f"{hashlib.sha256(key.encode()).hexdigest()} default\n" in (folder / "clients.map").read_text()
    assert key not in fleets.output


@pytest.mark.parametrize(
    ("gateway", "complaint"),
    [
        ("two-keys", "The servers have 2 different API keys.*Fix: set dots_ocr_server_api_key once"),
        ("two-models", "different models: dots.ocr, another.*Fix: the same dots_ocr_server_model_names"),
        ("refused", "HAProxy refuses the new .*, and nothing was replaced: .*ALERT.*Fix: change the variable"),
        ("bad-name", "dots_ocr_gateway_clients cannot be used. Fix: "),
        ("short-key", "dots_ocr_gateway_clients cannot be used. Fix: "),
        ("no-rate", "dots_ocr_gateway_least_rate is 0.* Fix: a rate above 0"),
        ("taken-port", "Port [0-9]+ is taken: .*Fix: stop that program"),
    ],
)
def test_what_cannot_work_is_refused(fleets: Fleets, gateway: str, complaint: str) -> None:
    failure = fleets.output.partition(f"<{gateway}>")[2].partition(f"</{gateway}>")[0]
    assert re.search(complaint, failure), failure
    assert "hunter2" not in fleets.output


def test_refused_configuration_replaces_nothing(fleets: Fleets) -> None:
    assert fleets.config("refused") == "the one that works\n"
