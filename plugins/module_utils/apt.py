"""What the modules that run apt share: its locks, its lists, the entries of its sources, and why it failed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .common import Problem, run

SOURCES = Path("/etc/apt/sources.list.d")
MAIN_SOURCE = Path("/etc/apt/sources.list")
REFRESHED = Path("/run/dots-ocr-apt-lists")  # when all lists were fetched; gone after a boot
FRESH_SECONDS = 600  # roles that follow each other need not fetch the same lists
LOCK_SECONDS = 5  # between two tries for a lock
# What apt takes for no (StringToBool), of a source that is switched off.
DISABLED = r"(?im)^Enabled:\s*(?:no|false|without|off|disable|0)\s*$"


class Cause(NamedTuple):
    """What may be behind a failure: how it shows in the words of apt, dpkg and the packages' scripts, and the fix."""

    pattern: str
    fix: str  # what in it stands in braces is what details() finds
    lines: str = ""  # regular expression of the lines that tell of it, besides those of apt itself


# What apt and dpkg say when another program is at work, but not while apt itself waits for it.
LOCKED = r"(?<!cache lock: )Could not get lock|is another process using it|locked by another process"
UNREADABLE = r"list of sources could not be read"
# Lines that tell of no failure, and may have any word in the name of a package.
PROGRESS = (
    r"(?:Get|Hit|Ign):|(?:Waiting|Reading|Building|Selecting|Preparing|Unpacking|Setting up|Processing|Removing|Purging"
    r"|Need to|Fetched|After this|The following|\(Reading|update-initramfs: Generating) |  \S"
)

# From specific to general; the first that fits is it. What another cause brings about comes after that one: dpkg fails
# because a module was not built, and anything may because a disk is full.
CAUSES = (
    Cause(r"are you root", "run it as root ('become: true'), then run again"),
    Cause(
        LOCKED,
        "let the program that holds the lock end{holder}, then run again; apt_lock_timeout sets how long to wait",
        r"locked by another",
    ),
    Cause(
        r"/boot/.*No space left|space (?:on disk|in) '?/boot|failed for /boot/(?s:.*)No space left"
        r"|No space left(?s:.*)failed for /boot/",
        "/boot is full: see 'df --human-readable /boot /var/tmp', remove kernels that do not run ('apt-get autoremove"
        " --purge'), then 'dpkg --configure -a', and run again",
        r"/boot/|No space left",
    ),
    Cause(
        r"No space left|enough free space",
        "free some space ('df --human-readable /var /usr /tmp'), then run again",
        r"No space left",
    ),
    Cause(
        r"[Rr]ead.only file ?system|read only lock file",
        "a file system is read-only: see why ('dmesg', 'findmnt --options ro'), mount it writable, then run again",
        r"[Rr]ead.only",
    ),
    Cause(
        r"dpkg was interrupted", "finish the installation that was interrupted ('dpkg --configure -a'), then run again"
    ),
    Cause(
        r"Conflicting values set for option \S+ regarding source (?P<uri>\S+).*?: (?P<one>.*) !=(?P<two>.*)",
        "two sources have {uri} with different keys ({one} and {two}): {files}; remove one of both, then run again",
    ),
    Cause(
        r"(?:in (?:source list|list file|sources file)|Unable to parse package file) (?P<source>/\S+)",
        "correct or remove {source}, which is no source that apt can read, then run again",
    ),
    Cause(
        r"make\.log|Bad return status for module|[Kk]ernel headers for|dkms autoinstall|during autoinstall",
        "the kernel module of {package} was not built; {log}, often for want of the kernel's headers ('apt-get install"
        " linux-headers-$(uname --kernel-release)') or of the compiler that built it; then 'dpkg --configure -a', and"
        " run again",
        r"make\.log|/var/lib/dkms/|^Error! ",
    ),
    Cause(
        r"trying to overwrite '(?P<path>[^']+)', which is also in package (?P<other>\S+)",
        "'apt-get remove {other}', which has {path} too, then 'apt-get --fix-broken install', and run again",
        r"trying to overwrite",
    ),
    Cause(
        r"Hash Sum mismatch|unexpected size|Mirror sync in progress|Clearsigned file isn't valid",
        "a mirror or a cache on the way gives other files than its lists name: 'apt-get clean', wait some minutes or"
        " take another mirror, then run again",
    ),
    Cause(
        r"not valid yet|is expired|has expired",
        "check the clock ('date'), and whether the mirror is still kept up to date, then run again",
    ),
    Cause(
        r"NO_PUBKEY|GPG error|OpenPGP|not signed|signature",
        "the repository is not signed by the key that apt has for it: bring the vendor's new key, then run again",
        r"GPG error|not signed|NO_PUBKEY",
    ),
    Cause(
        r"Invalid response from proxy|\b40[137] +(?:Unauthorized|Forbidden|Proxy|authenticationrequired)",
        "{server} refuses it: check http_proxy, https_proxy, no_proxy, and what the proxy lets through, then run again",
    ),
    Cause(
        r"[Cc]ertificate verif|NOT trusted|handshake|SSL connection failed",
        "check the clock ('date'), and that the host knows the authority of a proxy that looks into TLS"
        " ('update-ca-certificates'), then run again",
    ),
    Cause(
        r"Unable to locate|no installation candidate|was not found",
        "check that apt has the repository ('apt-cache policy') and that it serves this release",
    ),
    Cause(
        r"unmet dependencies|held broken|Held packages|Unable to correct|Conflicts",
        "see what stands in the way with 'apt-mark showhold' and 'apt-get --fix-broken install'",
    ),
    Cause(
        r"Failed to fetch|Could not (?:connect|resolve)|Cannot initiate|Temporary failure|Unable to (?:connect|fetch)"
        r"|not have a Release file",
        "check the network, the proxy and the address of the repository, then run again",
    ),
    Cause(
        r"error processing package",
        "see why {package} cannot be set up ('dpkg --configure -a', 'dpkg --audit'), correct that, then run again",
        r"script subprocess",
    ),
    Cause("", "look at 'apt-get --fix-broken install' and 'dpkg --audit', then run again"),
)


def sources() -> Iterator[tuple[Path, list[str]]]:
    """Yield every file of sources with its active entries, without comments."""
    for file in [MAIN_SOURCE, *sorted(SOURCES.glob("*.list")), *sorted(SOURCES.glob("*.sources"))]:
        text = file.read_text(errors="replace") if file.exists() else ""
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        if file.suffix == ".sources":
            paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
            yield file, [entry for entry in paragraphs if entry.strip() and not re.search(DISABLED, entry)]
        else:
            yield file, [line for line in lines if line.strip()]


def sources_of(uri: str) -> list[str]:
    """Return the files with an active entry of a repository, with or without the slash at the end of its address."""
    entry = re.compile(rf"(?<!\S){re.escape(uri.rstrip('/'))}/?(?!\S)")
    return [str(file) for file, entries in sources() if any(map(entry.search, entries))]


def details(text: str, match: re.Match[str]) -> dict[str, str]:
    """Return what a fix names: groups of the pattern, and what stands in other lines."""
    groups = {name: (value or "").strip() or "none of its own" for name, value in match.groupdict().items()}
    holder = re.search(r"held by process (\d+)(?: \(([^)]*)\))?|with pid (\d+)", text)
    # Packages that only wait for another one fail too.
    package = re.search(r"error processing package (\S+).*(?!\n\s*dependency problems)$", text, re.MULTILINE)
    module = re.search(r"/var/lib/dkms/([^/\s]+)", text)
    log = re.search(r"\S+/make\.log", text)
    folder = re.search(r"make\.log\b.*\s+(/var/lib/dkms/\S+)", text)
    place = log[0] if log else f"{folder[1]}/make.log" if folder else ""
    server = re.search(r"\[IP: (\S+) (\d+)\]", text)
    uri = groups.get("uri", "")
    return {
        "holder": f" (process {holder[1] or holder[3]}{f', {holder[2]}' if holder[2] else ''})" if holder else "",
        "package": package[1] if package else module[1] if module else "a package",
        "log": f"{place} says why" if place else "the words above say why",
        "server": f"the proxy or the server at {server[1]}:{server[2]}" if server else "the proxy or the server",
        "files": " and ".join(sources_of(uri)) or f"'grep --recursive --files-with-matches {uri.rstrip('/')} /etc/apt'",
        **groups,
    }


def explain(text: str, what: str, warnings: bool = False) -> Problem:
    """Return the words of apt and dpkg for what failed, and the fix of the most specific cause that they name.

    `what` was tried, as in "installing docker-ce". With `warnings` these tell of the failure too, as they do of lists
    that do not come.
    """
    told = "\n".join(line for line in text.splitlines() if not re.match(PROGRESS, line))
    cause, match = next((cause, match) for cause in CAUSES if (match := re.search(cause.pattern, told)))
    complaints = [
        line.strip()
        for line in told.splitlines()
        if line.startswith(("E:", "dpkg: error", *(("W:", "Err:") if warnings else ())))
        or re.match(r" \S+ : ", line)
        or (cause.lines and re.search(cause.lines, line))
    ]
    reason = " ".join(dict.fromkeys(complaints)) or text.strip()[-500:]
    return Problem(f"{what} failed: {reason.rstrip('.')}", cause.fix.format(**details(told, match)))


def apt(command: list[str], lock_timeout: int) -> tuple[int, str]:
    """Run a program of apt once the locks are free, within so many seconds; return its status and what it says.

    apt itself waits for dpkg's locks alone: for that on its lists and that on its archives it does not.
    """
    end = time.monotonic() + lock_timeout
    while True:
        left = max(0, int(end - time.monotonic()))
        status, output, errors = run(
            *command,
            *("-o", f"DPkg::Lock::Timeout={left}"),
            environment={"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"},
        )
        text = f"{output}\n{errors}"
        if status == 0 or not re.search(LOCKED, text) or time.monotonic() + LOCK_SECONDS > end:
            return status, text
        time.sleep(LOCK_SECONDS)


def refresh(lock_timeout: int) -> None:
    """Fetch all lists, unless we just did; lists that do not come show when the packages do not."""
    if REFRESHED.exists() and time.time() - REFRESHED.stat().st_mtime < FRESH_SECONDS:
        return
    status, text = apt(["apt-get", "update"], lock_timeout)
    if status == 0:
        REFRESHED.touch()
    elif re.search(f"{LOCKED}|{UNREADABLE}", text):
        raise explain(text, "fetching the package lists")
