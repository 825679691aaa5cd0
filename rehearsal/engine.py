"""The Docker Engine that carries the rehearsal: the machine's own if one runs, else one of ours beside it.

Ours keeps its data, socket and process id away from the places of a system engine, so that neither can touch the
other. Whichever it is, it is always reached through SOCKET, so that inventories need not know.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rehearsal.shell import RehearsalError, output, run, say, step, succeeds

STATE = Path("/var/lib/dots-ocr-rehearsal")
RUN = Path("/run/dots-ocr-rehearsal")
SOCKET = RUN / "docker.sock"
SYSTEM_SOCKET = Path("/var/run/docker.sock")
NETWORK = "dots-ocr-rehearsal-hosts"
LABEL = "dots-ocr-rehearsal"
FONT = Path("/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf")  # pages of the tests are drawn with it
PID_FILE = RUN / "docker.pid"
FIREWALL_BEFORE = STATE / "firewall-before.json"
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_BEFORE = STATE / "inotify-before"
INOTIFY_INSTANCES = 512  # each host's systemd takes five; the kernel's 128 suffice for some 20 hosts
LOG = STATE / "dockerd.log"
START_SECONDS = 60
POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICES = "#!/bin/sh\n# Of dots.ocr's rehearsal, while it installs packages.\nexit 101\n"

# Everything below the project talks to this engine and no other, and Ansible to its hosts in the cheaper way.
os.environ["DOCKER_HOST"] = f"unix://{SOCKET}"
os.environ["ANSIBLE_CONNECTION_PLUGINS"] = str(Path(__file__).resolve().parent / "connection")


def packages(*, tests: bool = False) -> list[str]:
    """Return the Debian/Ubuntu packages that the rehearsal, or else the whole test suite, needs and does not have."""
    needed = {
        "mmdebstrap": shutil.which("mmdebstrap") is not None,
        "debian-archive-keyring": Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists(),
        "binutils": shutil.which("strip") is not None,
        "gpg": shutil.which("gpg") is not None,  # mmdebstrap looks at keys with it
        "iptables": shutil.which("iptables") is not None,
        "docker.io": shutil.which("docker") is not None and (_dockerd() is not None or _system_engine_runs()),
        "tesseract-ocr": shutil.which("tesseract") is not None,
    }
    if tests:
        languages = output("tesseract", "--list-langs").split() if needed["tesseract-ocr"] else []
        snap = platform.freedesktop_os_release()["ID"] == "ubuntu"  # where no package has the browser itself
        needed |= {
            "haproxy": Path("/usr/sbin/haproxy").exists(),
            "prometheus": shutil.which("promtool") is not None,
            "fonts-dejavu-core": FONT.exists(),
            "fonts-wqy-microhei": Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc").exists(),
            "tesseract-ocr-rus": "rus" in languages,
            "tesseract-ocr-chi-sim": "chi_sim" in languages,
            "poppler-utils": shutil.which("pdftotext") is not None,
            "chromium": snap or shutil.which("chromium") is not None,
            "chromium-driver": snap or shutil.which("chromedriver") is not None,
        }
    return [name for name, present in needed.items() if not present]


def install_packages(*, tests: bool = False) -> None:
    """Install what packages() names, through apt; services that come along neither start nor are left enabled."""
    missing = packages(tests=tests)
    if not missing:
        return
    with step(f"install {' '.join(missing)}"):
        apt = ("apt-get", "-o", "DPkg::Lock::Timeout=600", "-qq")
        run(*apt, "update")
        # Debian 13 splits the command-line client off; the other releases have no such package.
        if "docker.io" in missing and succeeds("apt-cache", "show", "docker-cli"):
            missing.append("docker-cli")
        with _no_new_services():
            run(*apt, "install", "-y", "--no-install-recommends", *missing, env={"DEBIAN_FRONTEND": "noninteractive"})


@contextmanager
def _no_new_services() -> Iterator[None]:
    """Keep packages from starting services, as Debian's policy-rc.d allows, and disable what they enabled."""
    before = _enabled_units()
    ours = not POLICY.exists() or POLICY.read_text() == NO_SERVICES
    if ours:
        POLICY.write_text(NO_SERVICES)
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink()
        if new := _enabled_units() - before:
            output("systemctl", "disable", "--quiet", *sorted(new))


def _enabled_units() -> set[str]:
    if shutil.which("systemctl") is None:
        return set()
    listing = output("systemctl", "list-unit-files", "--state=enabled", "--plain", "--no-legend")
    return {line.split()[0] for line in listing.splitlines()}


def ensure() -> None:
    """Make SOCKET answer: link it to the running system engine, or start an engine of our own.

    Raises:
        RehearsalError: the engine does not answer within START_SECONDS.
    """
    RUN.mkdir(parents=True, exist_ok=True)
    STATE.mkdir(parents=True, exist_ok=True)
    before = INOTIFY.read_text()
    if int(before) < INOTIFY_INSTANCES:
        with suppress(OSError):  # where it cannot be raised, fewer hosts run at once
            INOTIFY.write_text(str(INOTIFY_INSTANCES))
            INOTIFY_BEFORE.write_text(before)
    if not succeeds("docker", "version"):
        SOCKET.unlink(missing_ok=True)
        if _system_engine_runs():
            say("==> use the Docker Engine that runs on this machine")
            SOCKET.symlink_to(SYSTEM_SOCKET)
        else:
            _start()
    if not succeeds("docker", "network", "inspect", NETWORK):
        create = ("docker", "network", "create", "--label", LABEL, "--opt", f"com.docker.network.driver.mtu={_mtu()}")
        # A container may choose its address only where somebody chose the subnet: first let the engine choose one.
        trial = output(*create, f"{NETWORK}-trial-{os.getpid()}")
        subnet = str(_subnet(trial))
        output("docker", "network", "rm", trial)
        output(*create, "--subnet", subnet, NETWORK)


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Keep another process of the rehearsal, such as a scenario beside this one, from making the same thing."""
    with (RUN / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def address(host: str) -> str:
    """Return the address that a host of this name may keep."""
    subnet = _subnet(NETWORK)
    upper_half = subnet.num_addresses // 2  # where the engine, which counts from below, puts no other
    digest = int.from_bytes(hashlib.sha256(host.encode()).digest()[:8])
    return str(subnet[upper_half + digest % (upper_half - 1)])


def _subnet(network: str) -> ipaddress.IPv4Network:
    described = json.loads(output("docker", "network", "inspect", network))[0]["IPAM"]["Config"]
    return ipaddress.IPv4Network(described[0]["Subnet"])


def stop() -> None:
    """Remove every container, volume, network and image of the rehearsal, and our own engine with all its data."""
    own = PID_FILE.exists()
    if succeeds("docker", "version"):
        for kind, remove in (("container", ("rm", "--force", "--volumes")), ("volume", ("rm",)), ("network", ("rm",))):
            listing = ["docker", kind, "ls", "--quiet", "--filter", f"label={LABEL}"]
            names = output(*listing, *(["--all"] if kind == "container" else [])).split()
            if names:
                output("docker", kind, *remove, *names)
        images = output("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
        ours = [name for name in images if name.startswith(f"{LABEL}/")]
        if ours and not own:
            output("docker", "image", "rm", "--force", *ours)
    if own:
        process = Path("/proc") / PID_FILE.read_text()
        if process.exists() and (process / "comm").read_text() == "dockerd\n":
            os.kill(int(process.name), signal.SIGTERM)
            _wait_until(lambda: not process.exists(), "our Docker Engine does not stop")
        succeeds("umount", STATE / "docker")  # an engine that ended in haste leaves this mount of its own behind
        _restore_firewall()
    if INOTIFY_BEFORE.exists():
        INOTIFY.write_text(INOTIFY_BEFORE.read_text())
    shutil.rmtree(STATE, ignore_errors=True)
    shutil.rmtree(RUN, ignore_errors=True)
    left = [place for place in (STATE, RUN) if place.exists()]
    if left:
        raise RehearsalError(f"could not remove {', '.join(map(str, left))}: something still uses it (see 'findmnt')")


def _system_engine_runs() -> bool:
    return succeeds("docker", "--host", f"unix://{SYSTEM_SOCKET}", "version")


def _dockerd() -> str | None:
    return shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _mtu() -> int:
    """Return the MTU of the interface with the default route: packets of containers must fit through it."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        interface, destination = line.split()[:2]
        if destination == "00000000":
            return int(Path(f"/sys/class/net/{interface}/mtu").read_text())
    return 1500


def _start() -> None:
    dockerd = _dockerd()
    if dockerd is None:
        raise RehearsalError("no Docker Engine runs and dockerd is not installed: apt-get install docker.io")
    with step("start a Docker Engine of our own"):
        _remember_firewall()
        command = [dockerd, "--host", f"unix://{SOCKET}", "--pidfile", str(PID_FILE), "--mtu", str(_mtu())]
        command += ["--data-root", str(STATE / "docker"), "--exec-root", str(RUN / "exec"), "--bridge", "none"]
        with LOG.open("ab") as log:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        _wait_until(lambda: succeeds("docker", "version"), f"our Docker Engine does not answer: see {LOG}")


def _remember_firewall() -> None:
    """Note what an engine changes for the whole machine: forwarding, and the policy for it."""
    if not FIREWALL_BEFORE.exists():  # else an engine of ours died, and what is now is its work
        policy = next(line.split()[1] for line in _rules("iptables", "filter") if line.startswith(":FORWARD "))
        FIREWALL_BEFORE.write_text(json.dumps({"ip_forward": IP_FORWARD.read_text(), "policy": policy}))


def _restore_firewall() -> None:
    """Take back what our engine changed; rules that others made meanwhile stay.

    An engine leaves its chains behind. All that name Docker are ours, since ours runs only where no other does.
    """
    bridge = re.compile(r"DOCKER|docker0|\bbr-[0-9a-f]{12}\b")
    for program in ("iptables", "ip6tables"):
        for table in ("filter", "nat", "raw"):
            rules = _rules(program, table)
            kept = [rule for rule in rules if not bridge.search(rule)]
            if kept != rules:
                text = "\n".join([*kept, ""])
                subprocess.run([f"{program}-restore", "--table", table], input=text, text=True, check=True)
    if FIREWALL_BEFORE.exists():
        before = json.loads(FIREWALL_BEFORE.read_text())
        output("iptables", "--policy", "FORWARD", before["policy"])
        IP_FORWARD.write_text(before["ip_forward"])


def _rules(program: str, table: str) -> list[str]:
    """Return the rules of a table as iptables-save writes them; none where the kernel lacks the table."""
    # The listing creates the table's chains if they do not exist yet.
    if not succeeds(program, "--table", table, "--list", "--numeric"):
        return []
    return output(f"{program}-save", "--table", table).splitlines()


def _wait_until(condition: Callable[[], bool], complaint: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RehearsalError(complaint)
        time.sleep(0.5)
