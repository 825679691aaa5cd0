#!/usr/bin/python
"""Ansible module signed_packages: a folder of Debian packages, offered to apt as far as their vendors signed them."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: signed_packages
short_description: A folder of Debian packages, offered to apt as far as their vendors signed them
description:
  - The folder brings, below C(signed/REPOSITORY), the indexes of each vendor with their signature, laid out as in the
    vendor's repository, and the vendor's key as C(key.gpg) unless a keyring of the host has it.
  - The host's own apt checks them, without a network. A package is signed if such an index has its SHA-256. How old an
    index is does not matter, since nothing newer can be fetched.
  - Writes C(Packages) and C(Release) again, from the vendors' own words. Nothing else in the folder is offered to apt.
options:
  path: {description: The folder., type: path, required: true}
  suite: {description: Suite to offer the packages as., type: str, required: true}
  release:
    description: Code name of the host's release. A suite must be of it, or of one such as C(trixie-security).
    type: str
    required: true
  keyrings:
    description: Keyrings of the host, for the indexes that bring no key.
    type: list
    elements: path
    required: true
  fingerprints:
    description: The keys that are accepted among those that the folder brings, by their full fingerprints.
    type: list
    elements: str
    required: true
  unsigned:
    description: Names, or patterns of names, of packages that need no signature.
    type: list
    elements: str
    default: []
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Check the packages
  dots_ocr.deploy.signed_packages:
    path: /srv/packages
    suite: from-usb
    release: trixie
    keyrings: [/usr/share/keyrings/debian-archive-keyring.gpg]
    fingerprints: [9DC858229FC7DD38854AE2D88D81803C0EBFCD88]
"""

RETURN = r"""
signed: {description: How many packages a signature covers., returned: success, type: int}
unsigned: {description: "The others, each with its version.", returned: success, type: list, elements: str}
"""

import email.utils
import fnmatch
import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

from ..module_utils.common import Problem, answer, run, sha256

PLAIN = "A-Za-z0-9._+~/-"  # what a path may be made of to stand in a list of apt's
SIGNED_MESSAGE = "-----BEGIN PGP SIGNED MESSAGE-----\n"


def codename(release: Path) -> str:
    """Return the code name in a Release or InRelease that apt has checked; empty if it has none."""
    text = release.read_text(errors="replace")
    if text.startswith(SIGNED_MESSAGE):
        text = text.partition("\n\n")[2]  # what is before the empty line is not signed
    found = re.search(r"(?m)^Codename: *(\S+)", text)
    return found[1] if found else ""


class Folder:
    """The folder on this host."""

    def __init__(self, params: dict[str, Any], check: bool) -> None:
        """Take what is wanted, and whether it is only to be foreseen."""
        self.params = params
        self.check = check
        self.path = Path(self.params["path"])
        self.fingerprints = [text.replace(" ", "").upper() for text in self.params["fingerprints"]]
        for text in self.fingerprints:
            if not re.fullmatch("[0-9A-F]{40}|[0-9A-F]{64}", text):
                raise Problem(f"{text!r} is not the fingerprint of a key", "give all of its 40 or 64 digits")

    def source(self, root: Path, base: Path) -> str:
        """Return the apt source for one signed list of indexes, in deb822 form."""
        keys = [path for path in (root / f"key.{suffix}" for suffix in ("gpg", "asc", "pgp")) if path.exists()]
        signers = [*map(str, keys), *self.fingerprints] if keys else self.params["keyrings"]
        if keys and not self.fingerprints:
            raise Problem("no fingerprint is accepted")
        where = base.relative_to(root).parts
        suite, components = f"{'/'.join(where)}/", []
        if where[:1] == ("dists",):
            suite = "/".join(where[1:])
            indexes = [path.relative_to(base).parts for path in base.glob("**/binary-*/Packages")]
            components = [f"Components: {' '.join(sorted({'/'.join(parts[:-2]) for parts in indexes}))}"]
        lines = [
            "Types: deb",
            f"URIs: file:{root}",
            f"Suites: {suite}",
            *components,
            "Architectures: amd64",
            "Targets: Packages",
            "By-Hash: no",
            "PDiffs: no",
            "Check-Valid-Until: no",  # nothing newer can be fetched
            f"Signed-By: {' '.join(signers)}",
        ]
        if not all(re.fullmatch(rf"[A-Z][A-Za-z-]+: [: {PLAIN}]+", line) for line in lines):
            raise Problem("its path, or that of a keyring, has other characters than letters, digits and ._+~-")
        return "\n".join([*lines, ""])

    def indexes(self, root: Path, base: Path, work: Path) -> list[Path]:
        """Return the indexes below a folder of the bundle, as apt has checked them."""
        lists = work / "lists"
        (lists / "partial").mkdir(parents=True)
        source = work / "signed.sources"
        source.write_text(self.source(root, base))
        settings = (
            f"Dir::Etc::sourcelist={source}",
            "Dir::Etc::sourceparts=-",
            f"Dir::State::lists={lists}",
            "APT::Sandbox::User=root",
            # The host's own settings may be laxer.
            "Acquire::AllowInsecureRepositories=false",
            "Acquire::AllowWeakRepositories=false",
            "Acquire::GzipIndexes=false",
            "Acquire::IndexTargets::deb::Packages::CompressionTypes=uncompressed",
            "pkgCacheFile::Generate=false",
        )
        command = ["apt-get", "--quiet=2", "update", *(word for text in settings for word in ("-o", text))]
        status, output, errors = run(*command)
        if status != 0:
            raise Problem(" ".join((output + errors).split()).replace(f"file:{self.path}/", ""))
        if base.relative_to(root).parts[:1] == ("dists",):
            found = [codename(path) for path in lists.glob("*Release")]
            release = self.params["release"]
            if not all(name == release or name.startswith(f"{release}-") for name in found):
                raise Problem(f"it is of {', '.join(found)}, not of {release}")
        return sorted(lists.glob("*Packages"))

    def signed(self, sums: set[str]) -> tuple[dict[str, str], list[str]]:
        """Return {SHA-256: the vendor's description} of these packages, and why indexes were not taken."""
        found: dict[str, str] = {}
        refused = []
        for root in sorted((self.path / "signed").glob("*")):
            for base in sorted({path.parent for path in root.rglob("*Release") if path.is_file()}):
                with tempfile.TemporaryDirectory() as work:
                    try:
                        indexes = self.indexes(root, base, Path(work))
                    except Problem as problem:
                        refused.append(f"{base.relative_to(self.path)}: {problem}".rstrip("."))
                        continue
                    for index in indexes:
                        for text in index.read_text(errors="surrogateescape").split("\n\n"):
                            total = text.partition("\nSHA256: ")[2][:64]
                            if total in sums:
                                found[total] = text.strip("\n")
        return found, refused

    def description(self, package: Path) -> str:
        """Return what a package without a signature says of itself."""
        status, output, errors = run("dpkg-deb", "--field", str(package))
        if status != 0:
            raise Problem(f"{package.name} is not a package: {errors.strip()}", "make a new bundle")
        return f"{output.strip()}\nFilename: \nSize: {package.stat().st_size}\nSHA256: {sha256(package)}"

    def offer(self) -> dict[str, object]:
        """Check the packages, and write the lists that apt reads."""
        packages = {
            path: sha256(path) for path in sorted(self.path.glob("*.deb")) if re.fullmatch(f"[{PLAIN}]+", path.name)
        }
        found, refused = self.signed(set(packages.values()))
        texts, unsigned, complaints = [], [], []
        for package, total in packages.items():
            text = found.get(total) or self.description(package)
            texts.append(re.sub(r"(?m)^Filename:.*$", f"Filename: ./{package.name}", text))
            if total not in found:
                name, version = (re.findall(rf"(?m)^{field}: (\S+)", text) or [""] for field in ("Package", "Version"))
                unsigned.append(f"{name[0]} {version[0]}")
                if not any(fnmatch.fnmatchcase(name[0], pattern) for pattern in self.params["unsigned"]):
                    complaints.append(unsigned[-1])
        if complaints:
            raise Problem(
                f"no vendor's signature covers {', '.join(complaints)}; {'; '.join(refused) or 'no index was refused'}",
                "make a new bundle; if a mirror of yours signs, set its fingerprint (..._apt_fingerprint);"
                " what nobody signs, and you trust, name in airgap_unsigned_packages",
            )
        content = "".join(f"{text}\n\n" for text in texts).encode(errors="surrogateescape")
        total = f"{hashlib.sha256(content).hexdigest()} {len(content)} Packages"
        date = email.utils.formatdate(usegmt=True)
        if not self.check:
            (self.path / "Packages").write_bytes(content)
            (self.path / "Release").write_text(f"Suite: {self.params['suite']}\nDate: {date}\nSHA256:\n {total}\n")
        return {"changed": True, "signed": len(packages) - len(unsigned), "unsigned": unsigned}


def main() -> None:
    """Run the module."""
    text = {"type": "str", "required": True}
    texts = {"type": "list", "elements": "str"}
    options = {
        "path": {"type": "path", "required": True},
        "suite": text,
        "release": text,
        "keyrings": {"type": "list", "elements": "path", "required": True, "no_log": False},
        "fingerprints": {**texts, "required": True},
        "unsigned": {**texts, "default": []},
    }
    answer(options, lambda params, check: Folder(params, check).offer())


if __name__ == "__main__":
    main()
