#!/usr/bin/python
"""Ansible module apt_set: packages that belong together, installed, pinned, held, and removed without a trace."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: apt_set
short_description: Packages that belong together, removable without a trace
description:
  - Installs packages, and remembers which ones, with those that they depend on, were not there before. Absent purges
    exactly these, except what others came to need meanwhile, so that the list of packages is what it was.
  - Pins versions in C(/etc/apt/preferences.d), holds the packages, and keeps unattended-upgrades off them.
  - C(ansible.builtin.apt) does the first half only. Nothing is needed on the host but apt.
options:
  id:
    description: Names the files.
    type: str
    required: true
  name:
    description: The packages; with C(absent) all that were recorded if it is empty.
    type: list
    elements: str
    default: []
  state:
    description: Whether they shall be there.
    type: str
    choices: [present, absent]
    default: present
  version:
    description:
      - Per package the version to have, also if that is a downgrade; a pattern such as C(5:28.5.*) means its newest.
    type: dict
    default: {}
  hold:
    description: Whether nobody else shall change their versions.
    type: bool
    default: false
  blacklist:
    description: Regular expressions of packages that unattended-upgrades shall leave alone.
    type: list
    elements: str
    default: []
  release:
    description: Release to install from; empty for what apt prefers.
    type: str
    default: ""
  refresh:
    description: Whether all lists are fetched before something is installed.
    type: bool
    default: true
  replace:
    description: Packages that are removed in the same go if they are installed.
    type: list
    elements: str
    default: []
  upgrade:
    description: Whether packages that are there are brought to apt's candidate.
    type: bool
    default: false
  lock_timeout:
    description: Seconds to wait while another program holds a lock of apt or dpkg.
    type: int
    default: 600
attributes:
  check_mode:
    support: full
author:
  - The dots-ocr-deploy founders
"""

EXAMPLES = r"""
- name: Install Docker Engine
  dots_ocr.deploy.apt_set:
    id: docker-engine
    name: [docker-ce, docker-ce-cli, containerd.io]
    version:
      docker-ce: "5:28.5.*"
    hold: true
    blacklist: ["^docker-ce", "^containerd[.]io$"]
"""

RETURN = r"""
installed:
  description: The packages of the set that are installed, with their versions.
  returned: always
  type: dict
would_install:
  description: In check mode, the packages that an installation would begin with.
  returned: always
  type: list
  elements: str
kept:
  description: With C(absent), packages of the set that were there before and stay.
  returned: always
  type: list
  elements: str
"""

import fnmatch
import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

RECORDS = Path("/var/lib/dots-ocr/installed")
PREFERENCES = Path("/etc/apt/preferences.d")
SETTINGS = Path("/etc/apt/apt.conf.d")
SOURCES = Path("/etc/apt/sources.list.d")
MAIN_SOURCE = Path("/etc/apt/sources.list")
REFRESHED = Path("/run/dots-ocr-apt-lists")  # when all lists were fetched; gone after a boot
FRESH_SECONDS = 600  # roles that follow each other need not fetch the same lists
PIN_PRIORITY = 1001  # apt_preferences(5): above 1000, a downgrade too
APT = ("apt-get", "--yes", "--no-install-recommends")
LOCK_SECONDS = 5  # between two tries for a lock
KEEP_CONFIGURATION = ("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold")

Packages = dict[str, dict[str, str]]


class SetError(Exception):
    """The packages cannot be brought to the wanted state; the message names the cause and the fix."""


def parse_status(text: str) -> Packages:
    """Return {package: {version, want, status}} from dpkg-query's lines of package, version, want and status."""
    found = {}
    for line in text.splitlines():
        package, version, want, status = line.split("\t")
        found[package] = {"version": version, "want": want, "status": status}
    return found


def parse_removals(text: str) -> list[str]:
    """Return the packages that a simulation of apt-get would remove."""
    return re.findall(r"(?m)^(?:Remv|Purg) (\S+)", text)


def parse_madison(text: str) -> dict[str, list[str]]:
    """Return {package: versions}, newest first, from `apt-cache madison`."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        package, version, *_ = (word.strip() for word in line.split("|"))
        found.setdefault(package, []).append(version)
    return found


def parse_candidates(text: str) -> dict[str, str]:
    """Return {package: candidate} from `apt-cache policy`; packages without one are left out."""
    found = re.findall(r"(?m)^(\S+):\n  Installed: .*\n  Candidate: (\S+)", text)
    return {package: candidate for package, candidate in found if candidate != "(none)"}


def render_pins(versions: dict[str, str]) -> str:
    """Return the preferences that pin versions."""
    paragraphs = [
        f"Package: {package}\nPin: version {version}\nPin-Priority: {PIN_PRIORITY}\n"
        for package, version in sorted(versions.items())
    ]
    return "\n".join(["# Written by Ansible (module apt_set).", *paragraphs])


def render_blacklist(patterns: list[str]) -> str:
    """Return the settings that keep unattended-upgrades off packages."""
    lines = [f'\t"{pattern}";' for pattern in patterns]
    head = "// Written by Ansible (module apt_set).\nUnattended-Upgrade::Package-Blacklist {"
    return "\n".join([head, *lines, "};", ""])


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
        r"Failed to fetch|Could not (?:connect|resolve)|Cannot initiate|Temporary failure|Unable to (?:connect|fetch)",
        "check the network and the proxy, then run again",
    ),
    Cause(
        r"error processing package",
        "see why {package} cannot be set up ('dpkg --configure -a', 'dpkg --audit'), mend that, then run again",
        r"script subprocess",
    ),
    Cause("", "look at 'apt-get --fix-broken install' and 'dpkg --audit', then run again"),
)


def sources_of(uri: str) -> list[str]:
    """Return the files with an active entry of a repository, with or without the slash at the end of its address."""
    found = []
    for file in [MAIN_SOURCE, *sorted(SOURCES.glob("*.list")), *sorted(SOURCES.glob("*.sources"))]:
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        active = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        if re.search(rf"(?<!\S){re.escape(uri.rstrip('/'))}/?(?!\S)", active):
            found.append(str(file))
    return found


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


def explain(text: str, what: str) -> str:
    """Return the words of apt and dpkg for what failed, and the fix of the most specific cause that they name."""
    told = "\n".join(line for line in text.splitlines() if not re.match(PROGRESS, line))
    cause, match = next((cause, match) for cause in CAUSES if (match := re.search(cause.pattern, told)))
    complaints = [
        line.strip()
        for line in told.splitlines()
        if line.startswith(("E:", "dpkg: error"))
        or re.match(r" \S+ : ", line)
        or (cause.lines and re.search(cause.lines, line))
    ]
    reason = " ".join(dict.fromkeys(complaints)) or text.strip()[-500:]
    return f"{what} failed: {reason} Fix: {cause.fix.format(**details(told, match))}"


class Set:
    """The packages on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take what is wanted, and look at what is there."""
        self.module = module
        self.params = module.params
        identity = self.params["id"]
        self.record_file = RECORDS / f"{identity}.json"
        self.pins = PREFERENCES / f"dots-ocr-{identity}"
        self.blacklist = SETTINGS / f"52dots-ocr-{identity}"
        self.record: dict[str, list[str]] = {"packages": [], "held": []}
        if self.record_file.exists():
            self.record = json.loads(self.record_file.read_text())
        self.packages = self.status()

    def status(self) -> Packages:
        """Ask dpkg for every package that it knows."""
        fields = "${Package}\\t${Version}\\t${db:Status-Want}\\t${db:Status-Status}\\n"
        return parse_status(
            self.module.run_command(["dpkg-query", "--show", f"--showformat={fields}"], check_rc=True)[1]
        )

    def is_installed(self, package: str) -> bool:
        """Tell whether a package is wholly installed."""
        return self.packages.get(package, {}).get("status") == "installed"

    def apt(self, *words: str, what: str, options: tuple[str, ...] = ()) -> str:
        """Run apt-get.

        Raises:
            SetError: it fails.
        """
        status, text = self.wait([*APT, *options, *words])
        if status != 0:
            raise SetError(explain(text, what))
        return text

    def wait(self, command: list[str]) -> tuple[int, str]:
        """Run apt-get once the locks are free; return its status and what it says.

        apt itself waits for dpkg's locks alone: for that on its lists and that on its archives it does not.
        """
        environment = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", "NEEDRESTART_SUSPEND": "1"}
        end = time.monotonic() + self.params["lock_timeout"]
        while True:
            left = max(0, int(end - time.monotonic()))
            words = [*command, "-o", f"DPkg::Lock::Timeout={left}"]
            status, output, errors = self.module.run_command(words, environ_update=environment)
            text = f"{output}\n{errors}"
            if status == 0 or not re.search(LOCKED, text) or time.monotonic() + LOCK_SECONDS > end:
                return status, text
            time.sleep(LOCK_SECONDS)

    def wanted_versions(self, names: list[str]) -> dict[str, str]:
        """Return the version to have of each package with a pin.

        Raises:
            SetError: there is none.
        """
        pinned = [name for name in names if self.params["version"].get(name)]
        if not pinned:
            return {}
        offered = parse_madison(self.module.run_command(["apt-cache", "madison", *pinned], check_rc=True)[1])
        chosen = {}
        for name in pinned:
            pattern = str(self.params["version"][name])
            fitting = [version for version in offered.get(name, []) if fnmatch.fnmatchcase(version, pattern)]
            if not fitting:
                there = ", ".join(offered.get(name, [])) or "none"
                raise SetError(f"there is no version {pattern} of {name}; there are: {there}. Fix: change the pin")
            chosen[name] = fitting[0]
        return chosen

    def outdated(self) -> list[str]:
        """Return the packages whose version is not the one to have."""
        names = [name for name in self.params["name"] if self.is_installed(name)]
        versions = {name: self.packages[name]["version"] for name in names}
        wrong = [
            name
            for name in names
            if self.params["version"].get(name)
            and not fnmatch.fnmatchcase(versions[name], str(self.params["version"][name]))
        ]
        if self.params["upgrade"] and names:
            if self.params["refresh"] and not self.module.check_mode:
                self.refresh()
            candidates = parse_candidates(self.module.run_command(["apt-cache", "policy", *names], check_rc=True)[1])
            wrong += [name for name in names if candidates.get(name, versions[name]) != versions[name]]
        return sorted(set(wrong))

    def refresh(self) -> None:
        """Fetch all lists, unless we just did; lists that do not come show when the packages do not.

        Raises:
            SetError: a lock is not let go, or no source can be read.
        """
        if REFRESHED.exists() and time.time() - REFRESHED.stat().st_mtime < FRESH_SECONDS:
            return
        status, text = self.wait(["apt-get", "update"])
        if status == 0:
            REFRESHED.touch()
        elif re.search(f"{LOCKED}|{UNREADABLE}", text):
            raise SetError(explain(text, "fetching the package lists"))

    def present(self) -> dict[str, Any]:
        """Bring the packages."""
        pins = {name: str(version) for name, version in self.params["version"].items() if version}
        blacklist = self.params["blacklist"]
        files = {
            self.pins: render_pins(pins) if pins else None,
            self.blacklist: render_blacklist(blacklist) if blacklist else None,
        }
        before = {path: path.read_text() if path.exists() else None for path in files}
        changed = [self.write(path, content) for path, content in files.items()]
        try:
            missing = [name for name in self.params["name"] if not self.is_installed(name)]
            unwanted = [name for name in self.params["replace"] if self.is_installed(name)]
            to_install = missing + self.outdated()
            if (to_install or unwanted) and not self.module.check_mode:
                self.install(to_install, unwanted)
        except SetError:
            for path, content in before.items():
                self.write(path, content)
            raise
        changed += [bool(to_install or unwanted), self.hold()]
        return {"changed": any(changed), "would_install": to_install if self.module.check_mode else []}

    def install(self, names: list[str], unwanted: list[str]) -> None:
        """Install packages, and record what came with them, also if it fails half-way."""
        if self.params["refresh"]:
            self.refresh()
        versions = self.wanted_versions(names)
        words = [f"{name}={versions[name]}" if name in versions else name for name in names]
        words += [f"{name}-" for name in unwanted]
        options = (*KEEP_CONFIGURATION, "--allow-downgrades", "--allow-change-held-packages")
        options += ("--target-release", self.params["release"]) if self.params["release"] else ()
        before = self.packages
        try:
            self.apt("install", *words, what=f"installing {' '.join(names)}", options=options)
        finally:
            self.packages = self.status()
            new = {name for name in self.packages if name not in before or before[name]["status"] == "config-files"}
            if new:
                self.record["packages"] = sorted({*self.record["packages"], *new})
                self.save()

    def hold(self) -> bool:
        """Hold the packages, or let those go that were held before."""
        wanted = [name for name in self.params["name"] if self.params["hold"] and self.is_installed(name)]
        to_hold = [name for name in wanted if self.packages[name]["want"] != "hold"]
        to_free = [name for name in self.record["held"] if name not in wanted and name in self.packages]
        if not self.module.check_mode:
            for command, names in (("hold", to_hold), ("unhold", to_free)):
                if names:
                    self.module.run_command(["apt-mark", command, *names], check_rc=True)
            held = sorted({*to_hold, *self.record["held"]} & set(wanted))
            if held != self.record["held"]:
                self.record["held"] = held
                self.save()
        return bool(to_hold or to_free)

    def absent(self) -> dict[str, Any]:
        """Remove what was brought."""
        there = [name for name in self.record["packages"] if name in self.packages]
        held = [name for name in self.record["held"] if name in self.packages]
        asked = [name for name in self.params["name"] or there if name in there]
        kept = [name for name in self.params["name"] if self.is_installed(name) and name not in there]
        changed = any([there, held, self.record_file.exists(), self.pins.exists(), self.blacklist.exists()])
        if changed and not self.module.check_mode:
            # Before the simulation, which a hold would end without a word of what would go.
            if held:
                self.module.run_command(["apt-mark", "unhold", *held], check_rc=True)
            others = [name for name in self.simulate("purge", *asked) if name not in there] if asked else []
            if others:
                if held:
                    self.module.run_command(["apt-mark", "hold", *held], check_rc=True)
                raise SetError(f"{', '.join(others)} would go too. Fix: remove those first, if nobody needs them")
            if asked:
                self.apt("purge", *asked, what=f"removing {' '.join(asked)}")
            self.purge_what_came_along(there)
            for path in (self.record_file, self.pins, self.blacklist):
                path.unlink(missing_ok=True)
            for folder in (RECORDS, RECORDS.parent):
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        return {"changed": changed, "kept": kept}

    def purge_what_came_along(self, recorded: list[str]) -> None:
        """Purge recorded packages that nothing depends on any more, and the configuration of those that are gone."""
        while True:
            self.packages = self.status()
            idle = [name for name in self.simulate("autoremove") if name in recorded]
            idle += [name for name in recorded if self.packages.get(name, {}).get("status") == "config-files"]
            if not idle:
                idle = self.replaceable(recorded)
            if not idle:
                return
            self.apt("purge", *idle, what=f"removing {' '.join(idle)}")

    def replaceable(self, recorded: list[str]) -> list[str]:
        """Return recorded packages that apt keeps for the sake of others which did without them before.

        They are the second choice in a dependency on alternatives: `adduser` is one.
        """
        there = [name for name in recorded if self.is_installed(name)]
        automatic = self.module.run_command(["apt-mark", "showauto", *there])[1].split() if there else []
        for name in automatic:
            removals = self.simulate("purge", name)
            if set(removals) <= set(automatic):  # none that somebody has asked for meanwhile
                return removals
        return []

    def simulate(self, *words: str) -> list[str]:
        """Return the packages that apt-get would remove."""
        return parse_removals(self.apt("--simulate", "--allow-change-held-packages", *words, what="a simulation"))

    def save(self) -> None:
        """Keep the record."""
        self.write(self.record_file, json.dumps(self.record, indent=2) + "\n")

    def write(self, path: Path, content: str | None) -> bool:
        """Write a file in one go, or remove it without content; tell whether that changes it, in check mode too."""
        if (path.read_text() if path.exists() else None) == content:
            return False
        if not self.module.check_mode:
            if content is None:
                path.unlink()
            else:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                growing = path.with_name(f".{path.name}.new")
                growing.write_text(content)
                growing.chmod(0o644)
                growing.replace(path)
        return True


def main() -> None:
    """Run the module."""
    texts = {"type": "list", "elements": "str", "default": []}
    flag = {"type": "bool", "default": False}
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str", "required": True},
            "name": texts,
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "version": {"type": "dict", "default": {}},
            "hold": flag,
            "blacklist": texts,
            "release": {"type": "str", "default": ""},
            "refresh": {"type": "bool", "default": True},
            "replace": texts,
            "upgrade": flag,
            "lock_timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    packages = Set(module)
    try:
        result = packages.present() if module.params["state"] == "present" else packages.absent()
    except SetError as error:
        module.fail_json(msg=f"{error}.")
    names = [name for name in module.params["name"] if packages.is_installed(name)]
    installed = {name: packages.packages[name]["version"] for name in names}
    module.exit_json(**{"would_install": [], "kept": [], "installed": installed, **result})


if __name__ == "__main__":
    main()
