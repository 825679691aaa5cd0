#!/usr/bin/python
"""Ansible module apt_source: a vendor's apt repository, which counts only if an accepted key has signed it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: apt_source
short_description: A vendor's apt repository, which counts only if an accepted key has signed it
description:
  - Writes C(/etc/apt/sources.list.d/NAME.sources) and C(/etc/apt/keyrings/NAME.gpg), and fetches the lists of this
    source alone when something changed or when there are none.
  - The source names the accepted fingerprints beside the key's file, so that apt itself takes no other key, whatever
    the file holds.
  - C(deb822_repository) takes any key that the URL yields, and needs python3-debian on the host; C(gpg) is not on every
    host either. This needs nothing but apt.
  - If anything fails, what was there before stays.
options:
  name: {description: Names the files., type: str, required: true}
  state: {description: Whether the source is to be present., type: str, choices: [present, absent], default: present}
  uri: {description: Where the repository is., type: str, default: ""}
  suite: {description: "Suite, or C(/) for a repository without any.", type: str, default: /}
  components: {description: Components; none for a repository without suites., type: list, elements: str, default: []}
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
      - Regular expression of the same repository in other entries. A file that O(replaces) names, and that has nothing
        else, is removed; any other is an error, since two entries with different keys keep apt from all work.
    type: str
    default: ""
  lock_timeout:
    description: Seconds to wait while another program holds the lock of apt's lists.
    type: int
    default: 600
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Add Docker's repository
  dots_ocr.deploy.apt_source:
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
removed: {description: Files of older entries that were removed., returned: always, type: list, elements: str}
refreshed: {description: Whether the lists of this source were fetched., returned: always, type: bool}
"""

import base64
import binascii
import fnmatch
import hashlib
import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_url

from ..module_utils import apt
from ..module_utils.common import Problem, answer, read, write

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

    def __init__(self, module: AnsibleModule) -> None:
        """Take what is wanted."""
        self.module = module
        self.params = module.params
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
        if not place.startswith("/"):
            response, info = fetch_url(self.module, place, timeout=60)
            if info["status"] != 200:
                raise Problem(
                    f"cannot fetch the key {place}: {info['msg']}",
                    "check the network, the proxy and the address of the key",
                )
            return packets_of(response.read(), place)
        try:
            return packets_of(Path(place).read_bytes(), place)
        except OSError as error:
            raise Problem(f"cannot read the key {place}: {error.strerror}", "correct the path of the key") from error

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
        status, text = apt.apt(command, self.params["lock_timeout"])
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

    def present(self) -> dict[str, Any]:
        """Bring the source."""
        if not self.params["uri"] or not self.params["key"]:
            raise Problem("uri and key are required", "set both")
        older = find_older(self.file, self.params["conflicts"], self.params["replaces"])
        packets = read(self.keyring) or b""
        changed = bool(older) or read(self.file) != self.render(packets).encode()
        result = {"changed": changed, "refreshed": False, "removed": [str(file) for file in older]}
        if self.module.check_mode or (not changed and self.lists()):
            return result
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
        return {**result, "refreshed": True}

    def absent(self) -> dict[str, Any]:
        """Remove the source, its key and its lists."""
        files = [path for path in (self.file, self.keyring) if path.exists()]
        if not self.module.check_mode:
            for path in [*self.lists(), *files]:
                path.unlink()
        return {"changed": bool(files), "refreshed": False, "removed": []}


def main() -> None:
    """Run the module."""
    text = {"type": "str", "default": ""}
    texts = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "uri": text,
            "suite": {"type": "str", "default": "/"},
            "components": texts,
            "key": {**text, "no_log": False},
            "fingerprints": texts,
            "replaces": texts,
            "conflicts": text,
            "lock_timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    source = Source(module)
    answer(module, source.present if module.params["state"] == "present" else source.absent)


if __name__ == "__main__":
    main()
