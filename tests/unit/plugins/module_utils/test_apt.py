"""What the modules that run apt share: its locks, and what they make of its words."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.dots_ocr.deploy.plugins.module_utils import apt
from ansible_collections.dots_ocr.deploy.plugins.module_utils.common import Problem

LISTS_LOCK = (
    "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 812 (apt-get)\n"
    "E: Unable to lock directory /var/lib/apt/lists/\n"
)


# Words of apt 2.6 to 3.0, of dpkg, DKMS 3 and initramfs-tools, as they stand in reports.
DPKG_FAILED = "E: Sub-process /usr/bin/dpkg returned an error code (1)"
MESSAGES = [
    ("E: Unable to locate package docker-ce", ["apt-cache policy"]),
    ("E: Package 'docker-ce' has no installation candidate", ["apt-cache policy"]),
    ("E: You don't have enough free space in /var/cache/apt/archives/.", ["free some space"]),
    ("dpkg: error processing archive x: No space left on device", ["free some space"]),
    (
        " docker-ce : Depends: iptables but it is not installable\nE: Unable to correct problems",
        ["apt-mark showhold"],
    ),
    ("E: Held packages were changed and -y was used without --allow-change-held-packages.", ["apt-mark showhold"]),
    ("E: Failed to fetch http://mirror/x.deb  404  Not Found", ["check the network"]),
    (
        "E: Failed to fetch http://mirror/x.deb  Could not resolve 'mirror'\nE: Unable to fetch some archives,"
        " maybe run"
        " apt-get update or try with --fix-missing?",
        ["check the network"],
    ),
    (DPKG_FAILED, ["dpkg --audit"]),
    (
        "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 2180 (unattended-upgr)\nE: Unable to"
        " acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process using it?",
        ["process 2180, unattended-upgr", "apt_lock_timeout"],
    ),
    (
        "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 812 (apt-get)\nE: Unable to lock"
        " directory"
        " /var/lib/apt/lists/",
        ["process 812, apt-get", "apt_lock_timeout"],
    ),
    (
        "E: Could not get lock /var/lib/dpkg/lock - open (11: Resource temporarily unavailable)",
        ["let the program that holds the lock end, then"],
    ),
    (
        "dpkg: error: dpkg frontend lock was locked by another process with pid 4711\n"
        "Note: removing the lock file is always wrong, and can end up damaging the\nlocked area and the entire system."
        f"\n{DPKG_FAILED}",
        ["process 4711", "apt_lock_timeout"],
    ),
    (
        "E: Could not open lock file /var/lib/dpkg/lock-frontend - open (13: Permission denied)\nE: Unable to"
        " acquire the"
        " dpkg frontend lock (/var/lib/dpkg/lock-frontend), are you root?",
        ["run it as root"],
    ),
    (
        "E: dpkg was interrupted, you must manually run 'sudo dpkg --configure -a' to correct the problem.",
        ["dpkg --configure -a"],
    ),
    (
        "E: Conflicting values set for option Signed-By regarding source"
        " https://download.docker.com/linux/ubuntu/ noble:"
        " /etc/apt/keyrings/docker.asc != /etc/apt/keyrings/docker.gpg\nE: The list of sources could not be read.",
        ["/etc/apt/keyrings/docker.asc and /etc/apt/keyrings/docker.gpg", "remove one of both"],
    ),
    (
        "E: Conflicting values set for option Signed-By regarding source http://x.invalid/ /: /k.asc != \n"
        "E: The list of sources could not be read.",
        ["/k.asc and none of its own"],
    ),
    (
        "E: Malformed entry 1 in list file /etc/apt/sources.list.d/nvidia-docker.list (URI parse)\n"
        "E: The list of sources could not be read.",
        ["/etc/apt/sources.list.d/nvidia-docker.list,"],
    ),
    (
        "E: Malformed stanza 1 in source list /etc/apt/sources.list.d/a.sources (type)",
        ["/etc/apt/sources.list.d/a.sources,"],
    ),
    (
        "E: Type '<!doctype' is not known on line 1 in source list /etc/apt/sources.list.d/b.list",
        ["/etc/apt/sources.list.d/b.list,"],
    ),
    ("E: Unable to parse package file /etc/apt/sources.list.d/c.sources (1)", ["/etc/apt/sources.list.d/c.sources,"]),
    (
        "Error! Bad return status for module build on kernel: 6.17.0-8-generic (x86_64)\n"
        "Consult /var/lib/dkms/nvidia/580.95.05/build/make.log for more information.\n"
        "dpkg: error processing package nvidia-dkms-580-open (--configure):\n"
        " installed nvidia-dkms-580-open package post-installation script subprocess returned error exit status 10\n"
        "dpkg: dependency problems prevent configuration of nvidia-driver-580-open:\n"
        f"dpkg: error processing package nvidia-driver-580-open (--configure):\n dependency problems -"
        f" leaving\n{DPKG_FAILED}",
        ["of nvidia-dkms-580-open", "/var/lib/dkms/nvidia/580.95.05/build/make.log says why"],
    ),
    (
        "Error! Build of nvidia.ko failed for: 6.12.57+deb13-amd64 (x86_64)\nMake sure the name of the"
        " generated module is"
        " correct and at the root of the\nbuild directory, or consult make.log in the build directory\n"
        "/var/lib/dkms/nvidia-current/550.163.01/build for more information.\n"
        "dpkg: error processing package nvidia-other (--configure):\n dependency problems - leaving unconfigured\n"
        f"dpkg: error processing package nvidia-kernel-dkms (--configure):\n{DPKG_FAILED}",
        ["of nvidia-kernel-dkms", "/var/lib/dkms/nvidia-current/550.163.01/build/make.log says why"],
    ),
    (
        "Error! Your kernel headers for kernel 6.17.0-8-generic cannot be found at"
        " /lib/modules/6.17.0-8-generic/build.\n"
        f"dpkg: error processing package nvidia-dkms-580-open (--configure):\n{DPKG_FAILED}",
        ["of nvidia-dkms-580-open", "linux-headers-"],
    ),
    (
        "dpkg: error processing archive /var/cache/apt/archives/libnvidia-compute-580.deb (--unpack):\n trying to"
        " overwrite '/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1', which is also in package"
        " libnvidia-compute-570 570.1",
        ["'apt-get remove libnvidia-compute-570'"],
    ),
    (
        "update-initramfs: failed for /boot/initrd.img-6.17.0-8-generic with 1.\nzstd: error 25 : Write error :"
        " No space"
        f" left on device (cannot write compressed block)\n{DPKG_FAILED}",
        ["/boot is full"],
    ),
    (
        "gzip: stdout: No space left on device\nE: mkinitramfs failure gzip 1\n"
        f"update-initramfs: failed for /boot/initrd.img-6.12.57+deb13-amd64 with 1.\n{DPKG_FAILED}",
        ["/boot is full"],
    ),
    (
        "dpkg: error processing archive /var/cache/apt/archives/linux-image.deb (--unpack):\n cannot copy"
        " extracted data"
        " for './boot/vmlinuz-6.17' to '/boot/vmlinuz-6.17.dpkg-new': failed to write (No space left on device)",
        ["/boot is full"],
    ),
    (
        "E: Failed to fetch https://download.docker.com/x.deb  403  Forbidden [IP: 10.0.0.1 3128]\nE: Unable to"
        " fetch some"
        " archives, maybe run apt-get update or try with --fix-missing?",
        ["10.0.0.1:3128", "https_proxy"],
    ),
    (
        "E: Failed to fetch https://a/x.deb  Invalid response from proxy: HTTP/1.1 407 Proxy Authentication Required",
        ["the proxy or the server refuses it", "https_proxy"],
    ),
    (
        "E: Failed to fetch http://archive.ubuntu.com/x.deb  Hash Sum mismatch\nE: Unable to fetch some archives, maybe"
        " run apt-get update or try with --fix-missing?",
        ["apt-get clean"],
    ),
    (
        "E: Release file for http://deb.example.org/debian/dists/trixie-updates/InRelease is not valid yet (invalid for"
        " another 3h 2min 1s). Updates for this repository will not be applied.",
        ["check the clock"],
    ),
    (
        "W: GPG error: https://a stable InRelease: The following signatures couldn't be verified because the"
        " public key is"
        " not available: NO_PUBKEY 7EA0A9C3F273FCD8\nE: The repository 'https://a stable InRelease' is not signed.",
        ["new key"],
    ),
    (
        "E: Failed to fetch https://a/x.deb  Certificate verification failed: The certificate is NOT trusted. The"
        " certificate issuer is unknown.  Could not handshake: Error in the certificate verification. [IP:"
        " 10.0.0.1 443]",
        ["update-ca-certificates"],
    ),
    (
        "W: Not using locking for read only lock file /var/lib/dpkg/lock-frontend\nE: Unable to write to"
        " /var/cache/apt/\n"
        "E: The package lists or status file could not be parsed or opened.",
        ["mount it writable"],
    ),
    (
        "dpkg: error processing package docker-ce (--configure):\n installed docker-ce package post-installation script"
        f" subprocess returned error exit status 1\n{DPKG_FAILED}",
        ["why docker-ce cannot be set up", "dpkg --audit"],
    ),
]

# Words that stand in every log, and must not be taken for a cause.
NOISE = (
    "Waiting for cache lock: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 99 (apt)...\n"
    "Reading package lists...\nGet:1 http://a/debian trixie/main amd64 libssl3 amd64 3.5 [2,000 kB]\n"
    "The following NEW packages will be installed:\n  ca-certificates dkms openssl python3-certificate-handshake\n"
    "Setting up ca-certificates-no-space-left ...\nupdate-initramfs: Generating /boot/initrd.img-6.17.0-8-generic\n"
)


@pytest.mark.parametrize(("words", "fixes"), MESSAGES)
@pytest.mark.parametrize("noise", ["", NOISE], ids=["alone", "in-a-log"])
def test_failure_is_told_in_the_words_of_apt_with_the_fix_of_its_cause(
    words: str, fixes: list[str], noise: str
) -> None:
    message = str(apt.explain(f"{noise}{words}\n", "installing docker-ce"))
    said, fix = message.split("Fix: ")
    assert words.splitlines()[0].strip() in said
    assert [text for text in fixes if text not in fix] == []
    assert ("the network" in fix) == (fixes == ["check the network"])


def test_every_cause_has_a_real_message() -> None:
    missed = list(apt.CAUSES)
    for words, _ in MESSAGES:
        cause = next(cause for cause in apt.CAUSES if re.search(cause.pattern, words))
        if cause in missed:
            missed.remove(cause)
    assert missed == []


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty sources.list.d."""
    monkeypatch.setattr(apt, "SOURCES", tmp_path)
    monkeypatch.setattr(apt, "MAIN_SOURCE", tmp_path / "sources.list")
    return tmp_path


def test_conflict_of_keys_names_both_files_as_apt_itself_tells_of_it(sources: Path) -> None:
    (sources / "docker.list").write_text("deb [signed-by=/k.asc] https://vendor.example/deb stable main\n")
    (sources / "vendor.sources").write_text(
        "Types: deb\nURIs: https://vendor.example/deb/\nSuites: stable\nComponents: main\nSigned-By: /k.gpg\n"
    )
    (sources / "z.list").write_text("# deb https://vendor.example/deb x y\ndeb https://vendor.example/debian x y\n")
    command = [
        "apt-get",
        "indextargets",
        "-o",
        "Dir::Etc::sourcelist=/dev/null",
        "-o",
        f"Dir::Etc::sourceparts={sources}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 100
    fix = str(apt.explain(done.stderr, "installing docker-ce")).split("Fix: ")[1]
    assert f"{sources}/docker.list and {sources}/vendor.sources;" in fix
    assert "/k.asc and /k.gpg" in fix


class Locked:
    """A host on which another program holds a lock for some time, by a clock of its own."""

    def __init__(self, seconds: float, words: str) -> None:
        """Take how long from now, in seconds, and what apt says meanwhile."""
        self.seconds = seconds
        self.words = words
        self.now = 0.0
        self.commands: list[tuple[str, ...]] = []

    def run(self, *words: str, **_: object) -> tuple[int, str, str]:
        """Return how a command ends now: status, output, errors."""
        self.commands.append(words)
        return (0, "done", "") if self.now >= self.seconds else (100, "", self.words)

    def monotonic(self) -> float:
        """Return the time of this clock, in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self.now += seconds


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Locked]:
    """What makes a host with a lock that is held."""

    def make(seconds: float, words: str = LISTS_LOCK) -> Locked:
        host = Locked(seconds, words)
        monkeypatch.setattr(apt, "time", SimpleNamespace(monotonic=host.monotonic, sleep=host.sleep))
        monkeypatch.setattr(apt, "REFRESHED", tmp_path / "refreshed")
        monkeypatch.setattr(apt, "run", host.run)
        return host

    return make


def test_lock_that_is_let_go_in_time_is_waited_for(locked: Callable[..., Locked]) -> None:
    host = locked(45)
    apt.refresh(600)
    assert 45 <= host.now <= 50
    assert apt.REFRESHED.exists()
    assert host.commands[0][-1] == "DPkg::Lock::Timeout=600"
    assert host.commands[-1][-1] == "DPkg::Lock::Timeout=555"


@pytest.mark.parametrize("words", [LISTS_LOCK, LISTS_LOCK.replace("lib/apt/lists", "cache/apt/archives")])
def test_lock_that_stays_is_named(words: str, locked: Callable[..., Locked]) -> None:
    host = locked(1000, words)
    _, said = apt.apt(["apt-get", "install", "x"], 600)
    assert "process 812, apt-get), then run again; apt_lock_timeout" in str(apt.explain(said, "installing x"))
    assert 590 <= host.now <= 600
    locked(1000, words)
    with pytest.raises(Problem, match=r"fetching the package lists failed: .*; apt_lock_timeout"):
        apt.refresh(600)


def test_wait_that_is_over_is_no_reason_to_wait(locked: Callable[..., Locked]) -> None:
    host = locked(1000, f"{NOISE}E: Unable to locate package x\n")
    apt.apt(["apt-get", "install", "x"], 600)
    assert host.now == 0


def test_sources_that_apt_cannot_read_are_told_at_once(locked: Callable[..., Locked]) -> None:
    words = "E: Malformed entry 1 in list file /etc/a.list (URI parse)\nE: The list of sources could not be read.\n"
    host = locked(1000, words)
    with pytest.raises(Problem, match=r"Fix: correct or remove /etc/a\.list,"):
        apt.refresh(600)
    assert host.now == 0


def test_mirror_that_is_down_is_left_to_the_installation(locked: Callable[..., Locked]) -> None:
    host = locked(1000, "E: Failed to fetch http://mirror/InRelease  Could not connect to mirror:80\n")
    apt.refresh(600)
    assert not apt.REFRESHED.exists()
    assert host.now == 0
