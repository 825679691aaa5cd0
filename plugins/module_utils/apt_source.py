"""A vendor's apt repository, which counts only if an accepted key has signed it: what apt_set does about its source.

`deb822_repository` takes any key that the URL yields, and needs python3-debian on the host; `gpg` is not on every host
either. This needs nothing but apt.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any

from . import apt
from .common import Problem, read, write

KEYRINGS = Path("/etc/apt/keyrings")
LISTS = Path("/var/lib/apt/lists")
# RFC 9580, 6.2: headers end with an empty line, and the last line may be a checksum.
ARMOR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----(?:\r?\n.+)*\r?\n[ \t]*\r?\n([^-]+?)(?:\n=\S{4}\s*)?-----END PGP PUBLIC KEY"
)


def packets_of(key: bytes, origin: str) -> bytes:
    """Return a key's packets, which apt reads: of an armored key the decoded ones, else the key itself."""
    try:
        packets = b"".join(base64.b64decode(b"".join(block.split()), validate=True) for block in ARMOR.findall(key))
    except binascii.Error:
        packets = b""
    packets = packets or key
    # RFC 9580, 4.2 and 5.5: the first packet, in the old form or the new one, is a public key.
    if packets[:1] not in (b"\x98", b"\x99", b"\x9a", b"\xc6"):
        raise Problem(
            f"{origin} is not an OpenPGP key, perhaps a page of a proxy",
            "look at it, and correct the address of the key",
        )
    return packets


def is_replaced(file: Path, replaces: list[str]) -> bool:
    """Tell whether a pattern names a file in sources.list.d, which may be written in either form."""
    names = [file.with_suffix(suffix).name for suffix in (".list", ".sources")]
    return file != apt.MAIN_SOURCE and any(fnmatch.fnmatch(name, pattern) for name in names for pattern in replaces)


def find_older(own: Path, conflicts: str, replaces: list[str]) -> list[Path]:
    """Return the files of older entries of the same repository, which this one takes the place of."""
    older = []
    for file, entries in apt.sources() if conflicts else ():
        same = [entry for entry in entries if re.search(conflicts, entry)]
        if file == own or not same:
            continue
        if len(same) < len(entries) or not is_replaced(file, replaces):
            raise Problem(
                f"the repository is already an apt source: {file}",
                f"remove that entry, then run again; ours follows, in {own}",
            )
        older.append(file)
    return older


class Source:
    """The source on this host."""

    def __init__(self, params: dict[str, Any], lock_timeout: int, check: bool) -> None:
        """Take what is wanted, the seconds to wait for apt's locks, and whether it is only to be foreseen."""
        self.params = params
        self.lock_timeout = lock_timeout
        self.check = check
        self.file = apt.SOURCES / f"{self.params['name']}.sources"
        self.keyring = KEYRINGS / f"{self.params['name']}.gpg"
        self.fingerprints = [text.replace(" ", "").upper() for text in self.params["fingerprints"]]

    def render(self, packets: bytes) -> str:
        """Return the source in apt's deb822 form; the sum of the key's file makes a change of either one of both."""
        components = self.params["components"]
        lines = ["Types: deb", f"URIs: {self.params['uri']}", f"Suites: {self.params['suite']}"]
        lines += [f"Components: {' '.join(components)}"] if components else []
        lines += ["Architectures: amd64", f"Signed-By: {' '.join([str(self.keyring), *self.fingerprints])}"]
        total = hashlib.sha256(packets).hexdigest()
        return "\n".join([f"# Written by Ansible (module apt_source), for the key {total}.", *lines, ""])

    def fetch_key(self) -> bytes:
        """Return the key's packets, from where it is."""
        place = self.params["key"]
        if place.startswith("/"):
            try:
                return packets_of(Path(place).read_bytes(), place)
            except OSError as error:
                raise Problem(
                    f"cannot read the key {place}: {error.strerror}", "correct the path of the key"
                ) from error
        # A twentieth of a second of each run, for a key that is fetched once.
        from ansible.module_utils.urls import open_url

        try:
            key: bytes = open_url(place, timeout=60).read()
        except (OSError, HTTPException, ValueError) as error:
            fix = "check the network, the proxy and the address of the key"
            raise Problem(f"cannot fetch the key {place}: {error}", fix) from error
        return packets_of(key, place)

    def lists(self) -> list[Path]:
        """Return the lists of the repository in the source's file; apt names them after its address."""
        found = []
        for uri in re.findall(r"(?m)^URIs: *[a-z]+:(?://(?:[^/@]*@)?)?(.+?)/*$", (read(self.file) or b"").decode()):
            # Whatever stands there for a character such as a colon.
            found += LISTS.glob("_".join(re.sub(r"[^A-Za-z0-9.-]", "*", part) for part in uri.split("/")) + "_*")
        return found

    def refresh(self) -> None:
        """Fetch the lists of this source; a Problem tells whether nobody answers, or no accepted key has signed it."""
        alone = (f"Dir::Etc::sourcelist={self.file}", "Dir::Etc::sourceparts=-", "APT::Get::List-Cleanup=0")
        # What apt keeps of all sources stays: it takes it seconds to read them again.
        alone += ("Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
        command = ["apt-get", "update", *(word for text in (*alone, "Acquire::Retries=2") for word in ("-o", text))]
        status, text = apt.apt(command, self.lock_timeout)
        # Older releases of apt end with 0 when a repository cannot be reached.
        said = " ".join(line for line in text.splitlines() if line.startswith(("E:", "W:", "Err:")))
        uri = self.params["uri"]
        if re.search(r"SHA-?1 is not considered secure", said):
            raise Problem(
                f"{uri} is signed by a key that apt no longer trusts, since the key's own signature is SHA-1: {said}",
                "take the vendor's newer key; set its address and its fingerprint",
            )
        if re.search(r"NO_PUBKEY|GPG error|OpenPGP|not signed|signature", said):
            raise Problem(
                f"{uri} is not signed by a key in {self.params['key']} that is accepted: {said}; accepted is"
                f" {', '.join(self.fingerprints) or 'any'}",
                "somebody may have put another key there; if the vendor announces the new one, set it as the"
                " fingerprint",
            )
        if status != 0 or "Failed to fetch" in said:
            raise apt.explain(text, f"cannot fetch the lists of {uri}: apt-get update", warnings=True)

    def present(self) -> bool:
        """Bring the source, and its lists if there are none; tell whether that changes it."""
        if not self.params["uri"] or not self.params["key"]:
            raise Problem("uri and key are required", "set both")
        older = find_older(self.file, self.params["conflicts"], self.params["replaces"])
        packets = read(self.keyring) or b""
        changed = bool(older) or read(self.file) != self.render(packets).encode()
        if self.check or (not changed and self.lists()):
            return changed
        before = {path: read(path) for path in (self.file, self.keyring, *older)}
        try:
            if changed:
                packets = self.fetch_key()
                write(self.keyring, packets)
                write(self.file, self.render(packets))
                for path in older:
                    path.unlink()
            self.refresh()
        except Problem:
            for path, content in before.items():
                write(path, content)
            raise
        return changed

    def absent(self) -> bool:
        """Remove the source, its key and its lists; tell whether there was one."""
        files = [path for path in (self.file, self.keyring) if path.exists()]
        if not self.check:
            for path in [*self.lists(), *files]:
                path.unlink()
        return bool(files)
