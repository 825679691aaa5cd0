#!/usr/bin/python
"""Ansible module apt_set: packages that belong together and their source, pinned, held, and removed without a trace."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: apt_set
short_description: Packages that belong together, removable without a trace
description:
  - Installs packages, and remembers which ones, with those that they depend on, were not there before. Absent purges
    exactly these, except what others came to need meanwhile, so that the list of packages is what it was.
  - Pins versions in C(/etc/apt/preferences.d), holds the packages, and keeps unattended-upgrades off them.
  - Brings the vendor's repository that they come from, which counts only if an accepted key has signed it.
  - Checks a set that was in place again only after a boot, or a change of packages or of apt's settings or lists.
  - C(ansible.builtin.apt) does the first half only. Nothing is needed on the host but apt.
options:
  id: {description: Names the files., type: str, required: true}
  name:
    description: The packages; if it is empty, with C(absent) all that were recorded, with C(present) O(source) alone.
    type: list
    elements: str
    default: []
  state: {description: Whether they are to be present., type: str, choices: [present, absent], default: present}
  version:
    description:
      - Per package the version to have, also if that is a downgrade; a pattern such as C(5:28.5.*) means its newest.
    type: dict
    default: {}
  hold: {description: Whether nobody else should change their versions., type: bool, default: false}
  blacklist:
    description: Regular expressions of packages that unattended-upgrades should leave alone.
    type: list
    elements: str
    default: []
  release: {description: Release to install from; empty for what apt prefers., type: str, default: ""}
  refresh: {description: Whether all lists are fetched before something is installed., type: bool, default: true}
  replace:
    description: Packages that are removed in the same go if they are installed.
    type: list
    elements: str
    default: []
  upgrade: {description: "Whether packages that are there are brought to apt's candidate.", type: bool, default: false}
  source:
    description:
      - Repository to bring first, or to remove last. It is written to C(/etc/apt/sources.list.d/NAME.sources) and
        C(/etc/apt/keyrings/NAME.gpg), and its lists alone are fetched when something changed or when there are none.
      - It names the accepted fingerprints beside the key's file, so that apt itself takes no other key, whatever the
        file holds. If anything fails, what was there before stays.
    type: dict
    suboptions:
      name: {description: Names the files., type: str, required: true}
      uri: {description: Where the repository is., type: str, default: ""}
      suite: {description: "Suite, or C(/) for a repository without any.", type: str, default: /}
      components:
        description: Components; none for a repository without suites.
        type: list
        elements: str
        default: []
      key:
        description: The public key, armored or not, as a URL or as a path on the host. It is fetched once.
        type: str
        default: ""
      fingerprints:
        description: The keys that are accepted, by their full fingerprints. If it is empty, any in the key's file is.
        type: list
        elements: str
        default: []
      replaces:
        description:
          - Patterns of file names in C(sources.list.d), of entries that this one takes the place of. One that ends in
            C(.list) stands for C(.sources) too, and the other way round, since an entry may be written in either form.
        type: list
        elements: str
        default: []
      conflicts:
        description:
          - Regular expression of the same repository in other entries. A file that O(source.replaces) names, and that
            has nothing else, is removed; any other is an error, since two entries with different keys keep apt from
            all work.
        type: str
        default: ""
  lock_timeout:
    description: Seconds to wait while another program holds a lock of apt or dpkg.
    type: int
    default: 600
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
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
    source:
      name: docker
      uri: https://download.docker.com/linux/debian
      suite: trixie
      components: [stable]
      key: https://download.docker.com/linux/debian/gpg
      fingerprints: [9DC858229FC7DD38854AE2D88D81803C0EBFCD88]
      replaces: ["docker*.list"]
      conflicts: download\.docker\.com
"""

RETURN = r"""
installed:
  description: The packages of the set that are installed, with their versions.
  returned: always
  type: dict
kept:
  description: With C(absent), packages of the set that were there before and stay.
  returned: always
  type: list
  elements: str
"""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from ..module_utils import apt
from ..module_utils.apt_source import Source
from ..module_utils.common import RECORDS, Problem, answer, ask, read, remove_empty, require, write

PREFERENCES = Path("/etc/apt/preferences.d")
SETTINGS = Path("/etc/apt/apt.conf.d")
PIN_PRIORITY = 1001  # apt_preferences(5): above 1000, a downgrade too
APT = ("apt-get", "--yes", "--no-install-recommends")
KEEP_CONFIGURATION = ("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold")

Packages = dict[str, dict[str, str]]


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
    text = "# Written by Ansible (module apt_set)."
    for package, version in sorted(versions.items()):
        text += f"\nPackage: {package}\nPin: version {version}\nPin-Priority: {PIN_PRIORITY}\n"
    return text


def render_blacklist(patterns: list[str]) -> str:
    """Return the settings that keep unattended-upgrades off packages."""
    lines = [f'\t"{pattern}";' for pattern in patterns]
    head = "// Written by Ansible (module apt_set).\nUnattended-Upgrade::Package-Blacklist {"
    return "\n".join([head, *lines, "};", ""])


class Set:
    """The packages on this host."""

    def __init__(self, params: dict[str, Any], check: bool) -> None:
        """Take what is wanted, and whether it is only to be foreseen, and look at what is there."""
        self.params = params
        self.check = check
        identity = params["id"]
        self.record_file = RECORDS / f"{identity}.json"
        self.pins = PREFERENCES / f"dots-ocr-{identity}"
        self.blacklist = SETTINGS / f"52dots-ocr-{identity}"
        self.record: dict[str, list[str]] = {"packages": [], "held": []}
        if self.record_file.exists():
            self.record = json.loads(self.record_file.read_text())
        self.packages = self.status()
        source, patience = params["source"], params["lock_timeout"]
        self.source = Source(source, patience, check) if source else None

    def status(self) -> Packages:
        """Ask dpkg for every package that it knows."""
        fields = "${Package}\\t${Version}\\t${db:Status-Want}\\t${db:Status-Status}\\n"
        return parse_status(require("dpkg-query", "--show", f"--showformat={fields}"))

    def is_installed(self, package: str) -> bool:
        """Tell whether a package is wholly installed."""
        return self.packages.get(package, {}).get("status") == "installed"

    def apt(self, *words: str, what: str, options: tuple[str, ...] = ()) -> str:
        """Run apt-get."""
        status, text = apt.apt([*APT, *options, *words], self.params["lock_timeout"])
        if status != 0:
            raise apt.explain(text, what)
        return text

    def wanted_versions(self, names: list[str]) -> dict[str, str]:
        """Return the version to have of each package with a pin."""
        patterns = {name: str(self.params["version"][name]) for name in names if self.params["version"].get(name)}
        offered = parse_madison(require("apt-cache", "madison", *patterns)) if patterns else {}
        chosen = {}
        for name, pattern in patterns.items():
            fitting = [version for version in offered.get(name, []) if fnmatch.fnmatchcase(version, pattern)]
            if not fitting:
                there = ", ".join(offered.get(name, [])) or "none"
                raise Problem(f"there is no version {pattern} of {name}; there are: {there}", "change the pin")
            chosen[name] = fitting[0]
        return chosen

    def outdated(self) -> list[str]:
        """Return the packages whose version is not the one to have."""
        names = [name for name in self.params["name"] if self.is_installed(name)]
        versions = {name: self.packages[name]["version"] for name in names}
        pins = {name: str(self.params["version"].get(name) or "*") for name in names}
        wrong = [name for name in names if not fnmatch.fnmatchcase(versions[name], pins[name])]
        if self.params["upgrade"] and names:
            if self.params["refresh"] and not self.check:
                apt.refresh(self.params["lock_timeout"])
            candidates = parse_candidates(require("apt-cache", "policy", *names))
            wrong += [name for name in names if candidates.get(name, versions[name]) != versions[name]]
        return sorted(set(wrong))

    def present(self) -> dict[str, Any]:
        """Bring the source and the packages."""
        changed = [self.source.present() if self.source else False]
        if self.source and not self.params["name"]:
            return {"changed": any(changed)}
        pins = {name: str(version) for name, version in self.params["version"].items() if version}
        blacklist = self.params["blacklist"]
        files = {
            self.pins: render_pins(pins) if pins else None,
            self.blacklist: render_blacklist(blacklist) if blacklist else None,
        }
        before = {path: read(path) for path in files}
        changed += [self.write(path, content) for path, content in files.items()]
        try:
            missing = [name for name in self.params["name"] if not self.is_installed(name)]
            unwanted = [name for name in self.params["replace"] if self.is_installed(name)]
            to_install = missing + self.outdated()
            if (to_install or unwanted) and not self.check:
                self.install(to_install, unwanted)
        except Problem:
            for path, content in before.items():
                self.write(path, content)
            raise
        changed += [bool(to_install or unwanted), self.hold()]
        return {"changed": any(changed)}

    def install(self, names: list[str], unwanted: list[str]) -> None:
        """Install packages, and record what came with them, also if it fails half-way."""
        if self.params["refresh"]:
            apt.refresh(self.params["lock_timeout"])
        versions = self.wanted_versions(names)
        words = [f"{name}={versions[name]}" if name in versions else name for name in names]
        words += [f"{name}-" for name in unwanted]
        options = (*KEEP_CONFIGURATION, "--allow-downgrades", "--allow-change-held-packages")
        options += ("--target-release", self.params["release"]) if self.params["release"] else ()
        before, recorded = self.packages, self.record["packages"]
        what = f"installing {' '.join(names)}"
        # First what absent needs: a power failure, or the end of the host, would lose it.
        planned = self.apt("--simulate", "install", *words, what=what, options=options)
        self.remember(recorded, before, re.findall(r"(?m)^Inst ([^ :]+)", planned))
        try:
            self.apt("install", *words, what=what, options=options)
        finally:
            self.packages = self.status()
            self.remember(recorded, before, [*self.packages])

    def remember(self, recorded: list[str], before: Packages, names: list[str]) -> None:
        """Record those of the packages that were not there before, beside what was recorded."""
        new = {name for name in names if name not in before or before[name]["status"] == "config-files"}
        if {*recorded, *new} != {*self.record["packages"]}:
            self.record["packages"] = sorted({*recorded, *new})
            self.save()

    def hold(self) -> bool:
        """Hold the packages, or let those go that were held before."""
        wanted = [name for name in self.params["name"] if self.params["hold"] and self.is_installed(name)]
        to_hold = [name for name in wanted if self.packages[name]["want"] != "hold"]
        to_free = [name for name in self.record["held"] if name not in wanted and name in self.packages]
        if not self.check:
            for command, names in (("hold", to_hold), ("unhold", to_free)):
                if names:
                    require("apt-mark", command, *names)
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
        if changed and not self.check:
            # Before the simulation, which a hold would end without a message about what would go.
            if held:
                require("apt-mark", "unhold", *held)
            others = [name for name in self.simulate("purge", *asked) if name not in there] if asked else []
            if others:
                if held:
                    require("apt-mark", "hold", *held)
                raise Problem(f"{', '.join(others)} would be removed too", "remove those first, if nobody needs them")
            if asked:
                self.apt("purge", *asked, what=f"removing {' '.join(asked)}")
            self.purge_what_came_along(there)
            for path in (self.record_file, self.pins, self.blacklist):
                path.unlink(missing_ok=True)
            remove_empty(RECORDS, RECORDS.parent)
        if self.source:
            changed |= self.source.absent()
        return {"changed": changed, "kept": kept}

    def purge_what_came_along(self, recorded: list[str]) -> None:
        """Purge recorded packages that nothing depends on, and the configuration of those that are gone."""
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
        automatic = ask("apt-mark", "showauto", *there).split() if there else []
        for name in automatic:
            removals = self.simulate("purge", name)
            if set(removals) <= set(automatic):  # none that somebody has asked for meanwhile
                return removals
        return []

    def simulate(self, *words: str) -> list[str]:
        """Return the packages that apt-get would remove."""
        return parse_removals(self.apt("--simulate", "--allow-change-held-packages", *words, what="a simulation"))

    def save(self) -> None:
        """Keep the record, if there is anything to remember."""
        self.write(self.record_file, json.dumps(self.record, indent=2) + "\n" if any(self.record.values()) else None)
        remove_empty(RECORDS, RECORDS.parent)

    def write(self, path: Path, content: bytes | str | None) -> bool:
        """Write a file, or remove it without content, but not in check mode; tell whether that changes it."""
        return write(path, content, real=not self.check)


def main() -> None:
    """Run the module."""
    texts = {"type": "list", "elements": "str", "default": []}
    flag = {"type": "bool", "default": False}
    source = {
        "name": {"type": "str", "required": True},
        "uri": {"type": "str", "default": ""},
        "suite": {"type": "str", "default": "/"},
        "components": texts,
        "key": {"type": "str", "default": "", "no_log": False},
        "fingerprints": texts,
        "replaces": texts,
        "conflicts": {"type": "str", "default": ""},
    }
    options = {
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
        "source": {"type": "dict", "options": source},
        "lock_timeout": {"type": "int", "default": 600},
    }

    def work(params: dict[str, Any], check: bool) -> dict[str, Any]:
        packages = Set(params, check)
        result = packages.present() if params["state"] == "present" else packages.absent()
        names = [name for name in params["name"] if packages.is_installed(name)]
        installed = {name: packages.packages[name]["version"] for name in names}
        return {"kept": [], "installed": installed, **result}

    answer(options, work)


if __name__ == "__main__":
    main()
