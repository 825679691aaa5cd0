"""Fleets: one run of Ansible writes the files of every gateway that the tests start."""

from __future__ import annotations

import datetime
import getpass
import grp
import ipaddress
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.gateway.support import SERVER_KEY, Backend, Gateway, free_ports, wait_until
from tests.gateway.templates import render

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

ALICE = "alice-may-send-all-she-likes"
BOB = "bob-may-do-what-all-may-do"
SLOW = "slow-may-send-two-in-a-minute"
NARROW = "narrow-may-have-one-in-flight"
CLIENTS: list[dict[str, Any]] = [
    {"name": "alice", "key": ALICE, "concurrent": 0},
    {"name": "bob", "key": BOB},
    {"name": "slow", "key": SLOW, "requests_per_minute": 2},
    {"name": "narrow", "key": NARROW, "concurrent": 1},
]
QUICK: dict[str, Any] = {
    "dots_ocr_gateway_check_interval": 1,
    "dots_ocr_gateway_check_timeout": 1,
    "dots_ocr_gateway_check_failures": 2,
    "dots_ocr_gateway_slowstart": 1,
    "dots_ocr_gateway_max_body_mib": 1,
    "dots_ocr_gateway_max_connections": 500,
    "dots_ocr_gateway_server_queue": 0.01,
    "dots_ocr_gateway_clients": CLIENTS,
}
SMALL: dict[str, Any] = {
    "dots_ocr_gateway_max_queue": 2,
    "dots_ocr_gateway_retry_after": 1,
    "dots_ocr_gateway_queue_timeout": 15,  # long enough for a busy machine to be asked meanwhile
    "dots_ocr_gateway_check_failures": 10,  # on such a machine a check may take longer than its second
    "_dots_ocr_gateway_body_grace": 1,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep these tests in one process of pytest-xdist: each that had some of them would run Ansible for all fleets."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("gateway"))


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for the gateway at 127.0.0.1 and for the server called secure, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway.example.org")])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("secure")]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@dataclass
class Fleets:
    """What Ansible has written, and the servers that it was told of."""

    root: Path
    backends: dict[str, Backend]
    ports: dict[str, tuple[int, int]]
    certificate: Path
    output: str

    def folder(self, gateway: str) -> Path:
        """Return the folder of a gateway's files."""
        return self.root / gateway

    def config(self, gateway: str) -> str:
        """Return a gateway's configuration."""
        return (self.folder(gateway) / "haproxy.cfg").read_text()

    def render(self, name: str, fleet: dict[str, Any], **variables: Any) -> None:
        """Write a gateway's files by the templates."""
        folder = self.folder(name)
        folder.mkdir(exist_ok=True)
        everything = {
            **QUICK,
            "inventory_hostname": name,
            "dots_ocr_gateway_address": "127.0.0.1",
            "dots_ocr_gateway_port": self.ports[name][0],
            "dots_ocr_gateway_metrics_port": self.ports[name][1],
            "_dots_ocr_gateway_config": str(folder),
            "_dots_ocr_gateway_run": str(folder),
            "_dots_ocr_gateway_log": str(folder / "log.sock"),
            "_dots_ocr_gateway_clients": CLIENTS,
            "_dots_ocr_gateway_server_keys": [SERVER_KEY],
            "_dots_ocr_gateway_fleet": fleet,
            **variables,
        }
        for file in ("haproxy.cfg", "clients.map", "server-key.map", "page.html"):
            (folder / file).write_text(render(f"{file}.j2", everything))

    def gateway(self, name: str) -> Gateway:
        """Return an HAProxy with these files; start it yourself."""
        tls = ssl.create_default_context(cafile=str(self.certificate)) if name == "tls" else None
        return Gateway(self.folder(name), *self.ports[name], tls=tls)


def known(name: str, port: int, **more: Any) -> dict[str, Any]:
    """Return what a gateway knows of a server."""
    return {
        "name": name,
        "address": "127.0.0.1",
        "local_address": "127.0.0.1",
        "port": port,
        "tls": False,
        "tls_name": name,
        "model": "dots.ocr",
        "engine": "vllm",
        "capacity": 2,
        "limit": 10,
        "loopback": False,
        **more,
    }


class Inventory:
    """What Ansible is told of servers and gateways."""

    def __init__(self, root: Path) -> None:
        """Begin with nothing."""
        self.root = root
        self.servers: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.gateways: dict[str, Any] = {}

    def ask(self, name: str, *settings: dict[str, Any]) -> None:
        """Add a server's host, with the files that the role dots_ocr_server writes, for the role to ask."""
        folder = self.root / "settings" / name
        folder.mkdir(parents=True)
        (folder / "key").write_text(f"{SERVER_KEY}\n")
        for each in settings:
            (folder / f"{each['name']}.json").write_text(json.dumps({"api_key_file": str(folder / "key"), **each}))
        self.servers[name] = {"test_settings": str(folder), "ansible_host": "127.0.0.1"}

    def found(self, name: str, *servers: dict[str, Any], key: str = SERVER_KEY) -> None:
        """Add a server's host as if it had been asked."""
        self.others[name] = {"dots_ocr_gateway_found": [*servers], "_dots_ocr_gateway_found_keys": [key] if key else []}

    def gateway(self, name: str, ports: tuple[int, int], **variables: Any) -> None:
        """Add a gateway with a folder of its own."""
        (self.root / name).mkdir(exist_ok=True)
        self.gateways[name] = {
            "dots_ocr_gateway_port": ports[0],
            "dots_ocr_gateway_metrics_port": ports[1],
            "dots_ocr_gateway_address": "127.0.0.1",
            "test_folder": str(self.root / name),
            "test_owner": getpass.getuser(),
            "test_group": grp.getgrgid(os.getgid()).gr_name,
            **variables,
        }

    def write(self) -> Path:
        """Write it down."""
        local = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
        groups = {"servers": self.servers, "others": self.others, "gateways": self.gateways}
        children = {group: {"hosts": hosts} for group, hosts in groups.items()}
        file = self.root / "inventory.yml"
        file.write_text(yaml.safe_dump({"all": {"vars": local, "children": children}}))
        return file


def describe(inventory: Inventory, backends: dict[str, Backend], ports: dict[str, tuple[int, int]]) -> None:
    """Describe the fleets that Ansible is to look at."""
    root = inventory.root
    vllm = backends["gpu1"].settings()
    wide = {"plan": {"max_num_seqs": 16, "max_num_queued_reqs": 80}}
    inventory.ask("cpu1", backends["cpu1"].settings())
    inventory.ask("twin", *({**vllm, **wide, "name": f"dots-ocr@{gpu}", "port": 8000 + gpu} for gpu in (0, 1)))
    inventory.found("gpu1", known("gpu1", backends["gpu1"].port, on_demand=True))
    inventory.found("gpu2", known("gpu2", backends["gpu2"].port))
    inventory.found("far", known("far", 8000, address="192.0.2.7", capacity=300, limit=0))
    inventory.found("v6", known("v6", 8000, address="2001:db8::7", limit=2), key="")
    inventory.found("empty", key="")
    inventory.found("other-key", known("other-key", 8000), key="a-key-of-its-own-0123456789")
    inventory.found("other-model", known("other-model", 8000, model="another"))
    inventory.found("odd", known("odd", 8000, address="no address"))
    inventory.gateway("main", ports["main"], **QUICK, test_servers=["gpu1", "gpu2", "cpu1"])
    hosts = ["twin", "far", "v6", "empty", "silent", "never"]
    inventory.gateway("wide", ports["wide"], test_servers=hosts, test_steps=["plan"])
    remembered = {"silent": [known("silent", 9000, capacity=8, limit=0)], "gone": [known("gone", 9001)], "far": []}
    (root / "wide/servers.json").write_text(json.dumps(remembered))
    inventory.gateway("two-keys", ports["wide"], test_servers=["gpu2", "other-key"], test_steps=["plan"])
    inventory.gateway("two-models", ports["wide"], test_servers=["gpu2", "other-model"], test_steps=["plan"])
    inventory.gateway("refused", ports["wide"], test_servers=["odd"])
    (root / "refused/haproxy.cfg").write_text("the one that works\n")
    bad_name, short_key = {"name": "a b", "key": "k" * 30}, {"name": "ab", "key": "hunter2"}
    inventory.gateway("bad-name", ports["wide"], dots_ocr_gateway_clients=[bad_name], test_steps=["validate"])
    inventory.gateway("short-key", ports["wide"], dots_ocr_gateway_clients=[short_key], test_steps=["validate"])
    inventory.gateway("no-rate", ports["wide"], dots_ocr_gateway_least_rate=0, test_steps=["validate"])
    inventory.gateway("taken-port", (backends["gpu1"].port, ports["wide"][1]), test_steps=["validate"])


@pytest.fixture(scope="session")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    """Write the files of all gateways: of one by the whole role, of the others by its templates alone, to be quick."""
    root = tmp_path_factory.mktemp("fleets")
    certificate, key = make_certificate(root)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    backends = {
        "gpu1": Backend("gpu1"),
        "gpu2": Backend("gpu2"),
        "cpu1": Backend("cpu1", engine="cpu"),
        "one": Backend("one"),
        "secure": Backend("secure", tls=server_side),
    }
    names = ("main", "wide", "small", "tls", "nobody", "alone")
    free = iter(free_ports(2 * len(names)))
    ports = {name: (next(free), next(free)) for name in names}
    inventory = Inventory(root)
    describe(inventory, backends, ports)
    done = subprocess.run(
        ["ansible-playbook", "-i", inventory.write(), "--forks", "2", HERE / "render.yml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = Fleets(root, backends, ports, certificate, " ".join(done.stdout.split()))
    one = known("one", backends["one"].port, capacity=1, limit=1)
    secure = known("secure", backends["secure"].port, tls=True)
    found.render("wide", json.loads((root / "wide/plan.json").read_text()), dots_ocr_gateway_server_queue=0.25)
    found.render("nobody", {})
    found.render("alone", {"gpu": [known("gpu", 8000, capacity=16)]}, _dots_ocr_gateway_clients=CLIENTS[1:2])
    found.render("small", {"one": [one]}, **SMALL)
    found.render(
        "tls",
        {"secure": [secure], "stranger": [{**secure, "name": "stranger", "tls_name": "stranger"}]},
        dots_ocr_gateway_tls_certificate=str(certificate),
        dots_ocr_gateway_tls_key=str(key),
        dots_ocr_gateway_server_ca=str(certificate),
    )
    (root / "tls/tls.pem").write_text(certificate.read_text() + "\n" + key.read_text())
    yield found
    for backend in backends.values():
        backend.stop()


def running(fleets: Fleets, name: str) -> Iterator[Gateway]:
    """Run a gateway."""
    gateway = fleets.gateway(name)
    gateway.start()
    yield gateway
    assert gateway.stop() == 0


@pytest.fixture(scope="session")
def running_main(fleets: Fleets) -> Iterator[Gateway]:
    """Run a gateway in front of two servers and a backup."""
    yield from running(fleets, "main")


@pytest.fixture(scope="session")
def running_small(fleets: Fleets) -> Iterator[Gateway]:
    """Run a gateway in front of a server that reads one page at a time."""
    yield from running(fleets, "small")


@pytest.fixture(scope="session")
def running_tls(fleets: Fleets) -> Iterator[Gateway]:
    """Run a gateway with TLS on both sides."""
    yield from running(fleets, "tls")


@pytest.fixture
def backends(fleets: Fleets) -> Iterator[dict[str, Backend]]:
    """Return the servers, all of them well."""
    for backend in fleets.backends.values():
        backend.reset_script()
    yield fleets.backends
    for backend in fleets.backends.values():
        backend.reset_script()


def ready(gateway: Gateway, *names: str) -> Gateway:
    """Forget what tests before did."""
    gateway.command("clear table clients")
    for name in names:
        gateway.command(f"set server ocr/{name} state ready")
    wait_until(lambda: all(gateway.status(name) == "UP" for name in names), "all servers up")
    gateway.log.clear()
    return gateway


@pytest.fixture
def main(running_main: Gateway, backends: dict[str, Backend]) -> Gateway:
    """Return the gateway in front of gpu1, gpu2 and cpu1, all of them up."""
    return ready(running_main, "gpu1", "gpu2", "cpu1")


@pytest.fixture
def small(running_small: Gateway, backends: dict[str, Backend]) -> Gateway:
    """Return the gateway in front of `one`, which reads one page while one more waits there and two at the gateway."""
    return ready(running_small, "one")


@pytest.fixture
def tls(running_tls: Gateway, backends: dict[str, Backend]) -> Gateway:
    """Return the gateway with TLS; of its servers the stranger has been found out."""
    wait_until(lambda: running_tls.status("stranger") == "DOWN", "the stranger down")
    return ready(running_tls, "secure")
