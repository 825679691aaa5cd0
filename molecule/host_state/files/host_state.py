"""Note what a host is like, and later tell what of it is not as it was: what removing everything must not leave.

    host_state.py note FILE      write the state
    host_state.py compare FILE   print a JSON list, one line of text for each difference

Runs on the host, as root, with nothing but Python's standard library. The state is {what: how}, such as
{"package curl": "8.14.1 manual install", "file /etc/hosts": "file 0644 root:root 5d41…"}.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import re
import socket
import stat
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

State = dict[str, str]

# No files of an installation, or what changes by itself: the kernel's, a run's own, logs, and what apt and dpkg keep
# about packages, which are compared one by one.
OUTSIDE = (
    "/dev", "/proc", "/run", "/sys", "/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg",
    "/var/lib/systemd/timers", "/root/.ansible", "/lost+found",
)  # fmt: skip
# Compared line by line, or rewritten by tools with the same contents in another order.
REWRITTEN = re.compile(
    r"/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?|/etc/(\.pwd\.lock|ld\.so\.cache|mtab|machine-id|adjtime)"
    r"|/var/lib/systemd/(random-seed|catalog/database)|.*/__pycache__(/.*)?"
    r"|/var/backups/(alternatives|apt|dpkg)\..*"  # once a day
    r"|/etc/stand-in-gpu\.json"  # the tests' GPU, which they take away and put back
)
# Only there are contents compared; elsewhere packages say what belongs there.
CONTENTS = ("/etc/", "/usr/local/", "/opt/", "/root/", "/home/", "/boot/")
# Come and go by themselves.
ON_DEMAND = re.compile(r"(systemd-|user@|session-|init\.scope|.*\.(slice|scope|mount|automount|device))")
ACCOUNTS = ("passwd", "group", "subuid", "subgid")
SETTINGS = (
    "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/route_localnet",
    "net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables",
)  # fmt: skip

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
NETLINK_NETFILTER, NFNL_SUBSYS_NFTABLES = 12, 10
NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN, NFT_MSG_NEWRULE, NFT_MSG_GETRULE = 3, 4, 6, 7
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_RULE_TABLE, NFTA_RULE_CHAIN = 1, 3, 1, 2
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 0x1, 0x300, 2, 3
FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}


def output(*command: str) -> str:
    """Return what a program prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def packages() -> Iterator[tuple[str, str]]:
    """Yield packages that are not wholly gone: version, whether asked for by name, and what dpkg should do."""
    manual = set(output("apt-mark", "showmanual").split())
    fields = "${binary:Package}\\t${Version} ${db:Status-Want} ${db:Status-Status}\\n"
    for line in output("dpkg-query", "--show", f"--showformat={fields}").splitlines():
        name, how = line.split("\t")
        if not how.endswith(" not-installed"):
            yield f"package {name}", f"{how} {'manual' if {name, name.split(':')[0]} & manual else 'automatic'}"


def name_of(number: int, group: bool = False) -> str:
    """Return the name of a user or group, or the number of one that is not known."""
    try:
        return grp.getgrgid(number).gr_name if group else pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def without_own_address(hosts: bytes, name: str) -> bytes:
    """Return /etc/hosts without the host's own address, which may be another after a boot."""
    return re.sub(rb"^\S+(?=[ \t]+%s$)" % re.escape(name).encode(), b"", hosts, flags=re.MULTILINE)


def describe(path: str, found: os.stat_result) -> str:
    """Return what a file is: type, mode, owner, and its target or contents."""
    what = f"{stat.filemode(found.st_mode)} {name_of(found.st_uid)}:{name_of(found.st_gid, group=True)}"
    if stat.S_ISLNK(found.st_mode):
        return f"{what} to {Path(path).readlink()}"
    if stat.S_ISREG(found.st_mode) and path.startswith(CONTENTS):
        contents = Path(path).read_bytes()
        if path == "/etc/hosts":
            contents = without_own_address(contents, socket.gethostname())
        return f"{what} sha256 {hashlib.sha256(contents).hexdigest()[:16]}"
    if stat.S_ISREG(found.st_mode) and not path.startswith("/var/"):
        return f"{what} {found.st_size} bytes"
    return what


def files(root: str = "/") -> Iterator[tuple[str, str]]:
    """Yield every file and folder of the host itself."""
    for folder, names, others in os.walk(root):
        names[:] = [name for name in names if os.path.join(folder, name) not in OUTSIDE]  # noqa: PTH118
        for name in names + others:
            path = os.path.join(folder, name)  # noqa: PTH118
            if not REWRITTEN.fullmatch(path):
                try:
                    yield f"file {path}", describe(path, os.lstat(path))
                except FileNotFoundError:  # gone while we look
                    continue


def accounts() -> Iterator[tuple[str, str]]:
    """Yield users, groups and their ranges of numbers; not passwords."""
    for kind in ACCOUNTS:
        file = Path("/etc") / kind
        for line in file.read_text().splitlines() if file.exists() else []:
            name, rest = line.split(":", 1)
            yield f"{kind} {name}", rest


def units() -> Iterator[tuple[str, str]]:
    """Yield the files of units with their state, and the units that run or have failed."""
    for line in output("systemctl", "list-unit-files", "--no-legend", "--plain").splitlines():
        name, how, *_ = line.split()
        if how != "transient":
            yield f"unit {name}", how
    for line in output("systemctl", "list-units", "--no-legend", "--plain").splitlines():
        name, _, active, running, *_ = line.split()
        if name.endswith(".timer") and running == "running":  # what it starts is under way
            running = "waiting"
        if active == "failed" or (running in ("running", "listening", "waiting") and not ON_DEMAND.match(name)):
            yield f"state of {name}", f"{active} {running}"


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes of a netlink message by their type."""
    found, offset = {}, 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("HH", data, offset)
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += max(4, length + 3 & ~3)
    return found


def nftables(request: int, answer: int) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Yield what the kernel has of one kind in nftables, iptables' rules included: family and attributes.

    No program that could list them is left on a host whose packages were removed.

    Raises:
        OSError: the kernel refuses to tell.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as kernel:
        kind = NFNL_SUBSYS_NFTABLES << 8
        kernel.send(struct.pack("IHHIIBBH", 20, kind | request, NLM_F_REQUEST | NLM_F_DUMP, 1, 0, 0, 0, 0))
        while True:
            data, offset = kernel.recv(1 << 20), 0
            while offset + 16 <= len(data):
                length, what = struct.unpack_from("IH", data, offset)
                if what == NLMSG_DONE:
                    return
                if what == NLMSG_ERROR:
                    error = -struct.unpack_from("i", data, offset + 16)[0]
                    raise OSError(error, os.strerror(error))
                if what == kind | answer:
                    family = data[offset + 16]
                    yield FAMILIES.get(family, str(family)), attributes(data[offset + 20 : offset + length])
                offset += length + 3 & ~3


def text(data: bytes) -> str:
    """Return the text of an attribute."""
    return data.rstrip(b"\0").decode()


def network() -> Iterator[tuple[str, str]]:
    """Yield interfaces, chains of the packet filter with the number of their rules, and what lets packets through."""
    for interface in sorted(os.listdir("/sys/class/net")):  # noqa: PTH208
        yield f"interface {interface}", "there"
    rules = Counter(
        (family, text(rule[NFTA_RULE_TABLE]), text(rule[NFTA_RULE_CHAIN]))
        for family, rule in nftables(NFT_MSG_GETRULE, NFT_MSG_NEWRULE)
    )
    for family, chain in nftables(NFT_MSG_GETCHAIN, NFT_MSG_NEWCHAIN):
        key = (family, text(chain[NFTA_CHAIN_TABLE]), text(chain[NFTA_CHAIN_NAME]))
        policy = chain.get(5)  # NFTA_CHAIN_POLICY: 0 drops, 1 accepts
        yield f"chain {' '.join(key)}", f"{rules[key]} rules, policy {policy.hex() if policy else 'none'}"
    for setting in SETTINGS:
        file = Path("/proc/sys") / setting
        if file.exists():
            yield f"setting {setting.replace('/', '.')}", file.read_text().strip()


def mounts() -> Iterator[tuple[str, str]]:
    """Yield what is mounted, and swap."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if not where.startswith(("/dev", "/proc", "/sys", "/tmp", "/run/user", "/run/credentials")):
            yield f"mount {where}", kind
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        yield f"swap {line.split()[0]}", "there"


def state() -> State:
    """Return all of it."""
    return {what: how for part in (packages, files, accounts, units, network, mounts) for what, how in part()}


def differences(before: State, now: State) -> list[str]:
    """Return what was added, is missing or differs, without what lies below a folder that is named already."""
    found = []
    for what in sorted(before.keys() | now.keys()):
        old, new = before.get(what), now.get(what)
        if old == new:
            continue
        parents = [f"file {parent}" for parent in Path(what.removeprefix("file ")).parents]
        if what.startswith("file ") and any((parent in before) != (parent in now) for parent in parents):
            continue
        how = f"new: {new}" if old is None else f"missing: {old}" if new is None else f"was {old}, is {new}"
        found.append(f"{what} ({how})")
    return found


def main() -> None:
    """Do what the command line says."""
    command, file = sys.argv[1], Path(sys.argv[2])
    if command == "note":
        file.write_text(json.dumps(state(), indent=0))
    elif command == "compare":
        print(json.dumps(differences(json.loads(file.read_text()), state())))
    else:
        sys.exit(f"unknown: {command}")


if __name__ == "__main__":
    main()
