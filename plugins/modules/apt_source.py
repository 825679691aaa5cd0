#!/usr/bin/python
"""Ansible module apt_source: a vendor's apt repository, whose key is checked by its fingerprint."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: apt_source
short_description: A vendor's apt repository, whose key is checked by its fingerprint
description:
  - Writes C(/etc/apt/sources.list.d/NAME.sources) and C(/etc/apt/keyrings/NAME.gpg), and fetches the lists of this
    source alone when something changed or when there are none.
  - C(deb822_repository) takes any key that the URL yields, and needs python3-debian on the host; this needs nothing.
  - If anything fails, what was there before stays.
options:
  name:
    description: Names the files.
    type: str
    required: true
  state:
    description: Whether the source shall be there.
    type: str
    choices: [present, absent]
    default: present
  uri:
    description: Where the repository is.
    type: str
    default: ""
  suite:
    description: Suite, or C(/) for a repository without any.
    type: str
    default: /
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
    description: The keys that are accepted, by their full fingerprints. If it is empty, any key is.
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
  check_mode:
    support: full
author:
  - The dots-ocr-deploy founders
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
removed:
  description: Files of older entries that were removed.
  returned: always
  type: list
  elements: str
refreshed:
  description: Whether the lists of this source were fetched.
  returned: always
  type: bool
"""

import base64
import binascii
import fnmatch
import hashlib
import re
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_url

SOURCES = Path("/etc/apt/sources.list.d")
MAIN_SOURCE = Path("/etc/apt/sources.list")
KEYRINGS = Path("/etc/apt/keyrings")
ARMOR = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)
PUBLIC_KEY = 6  # RFC 9580, 5: the tag of a packet that holds a primary key
LOCK_SECONDS = 5  # between two tries for a lock
LOCKED = r"Could not get lock|is another process using it|locked by another process"
# What apt takes for no (StringToBool), of a source that is switched off.
DISABLED = r"(?im)^Enabled:\s*(?:no|false|without|off|disable|0)\s*$"
# Why lists do not come, from specific to general, and the fix; the first that fits is it.
CAUSES = (
    (LOCKED, "let the program that holds the lock end, then run again; apt_lock_timeout sets how long to wait"),
    (r"No space left|enough free space", "free some space ('df --human-readable /var /tmp'), then run again"),
    (
        r"[Rr]ead.only file ?system|read only lock file",
        "mount /var writable ('dmesg' tells why it is not), then run again",
    ),
    (r"not valid yet|is expired|has expired", "check the clock ('date'), and whether the mirror is kept up to date"),
    (
        r"Invalid response from proxy|\b40[137] +(?:Unauthorized|Forbidden|Proxy|authenticationrequired)",
        "the proxy or the server refuses it: check http_proxy, https_proxy, no_proxy, and what the proxy lets through",
    ),
    (
        r"[Cc]ertificate verif|NOT trusted|handshake|SSL connection failed",
        "check the clock ('date'), and that the host knows the authority of a proxy that looks into TLS"
        " ('update-ca-certificates'), then run again",
    ),
    ("", "check the network, the proxy and the address; a mirror is set with the same variable"),
)


class SourceError(Exception):
    """The source cannot be used; the message names the cause and the fix."""


def dearmor(key: bytes) -> bytes:
    """Return a key's packets: of an armored key the decoded ones, else the key itself (RFC 9580, 6.2).

    Raises:
        ValueError: the armor does not hold Base64.
    """
    blocks = ARMOR.findall(key)
    if not blocks:
        return key
    packets = b""
    for block in blocks:
        # Headers end with an empty line; the last line may be a checksum.
        body = re.split(rb"\r?\n[ \t]*\r?\n", b"\n" + block, maxsplit=1)[-1]
        lines = [line.strip() for line in body.splitlines() if not line.startswith(b"=")]
        packets += base64.b64decode(b"".join(lines), validate=True)
    return packets


def fingerprints_of(packets: bytes) -> list[str]:
    """Return the fingerprints of the primary keys, in hexadecimal digits (RFC 9580, 4.2 and 5.5.4).

    Raises:
        ValueError: these are no OpenPGP packets, or there is no public key among them.
    """
    found = []
    position = 0
    try:
        while position < len(packets):
            head = packets[position]
            if not head & 0x80:
                raise ValueError("no packet")
            position += 1
            if head & 0x40:
                tag, first = head & 0x3F, packets[position]
                if first < 192:
                    size, width = first, 1
                elif first < 224:
                    size, width = ((first - 192) << 8) + packets[position + 1] + 192, 2
                elif first == 255:
                    size, width = int.from_bytes(packets[position + 1 : position + 5], "big"), 5
                else:
                    raise ValueError("a packet in parts")
            else:
                tag, width = head >> 2 & 0x0F, 1 << (head & 3)
                if width == 8:
                    raise ValueError("a packet without a length")
                size = int.from_bytes(packets[position : position + width], "big")
            body = packets[position + width : position + width + size]
            if len(body) != size:
                raise ValueError("a packet that is cut off")
            position += width + size
            if tag == PUBLIC_KEY:
                found.append(fingerprint_of(body))
    except IndexError as error:
        raise ValueError("a packet that is cut off") from error
    if not found:
        raise ValueError("no public key")
    return found


def fingerprint_of(body: bytes) -> str:
    """Return the fingerprint of one public key's packet."""
    if body[0] == 4:
        return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False).hexdigest().upper()
    if body[0] == 6:
        return hashlib.sha256(b"\x9b" + len(body).to_bytes(4, "big") + body).hexdigest().upper()
    raise ValueError(f"a key of version {body[0]}")


def check_key(packets: bytes, accepted: list[str], origin: str) -> None:
    """Check that every key in a file is one of the accepted ones.

    Raises:
        SourceError: there is another one, or none.
    """
    try:
        found = fingerprints_of(packets)
    except ValueError as error:
        raise SourceError(
            f"{origin} is no OpenPGP key ({error}), perhaps a page of a proxy. Fix: look at it, and correct the"
            " address of the key"
        ) from error
    wanted = [text.replace(" ", "").upper() for text in accepted]
    others = [text for text in found if text not in wanted]
    if wanted and others:
        raise SourceError(
            f"the key at {origin} has the fingerprint {', '.join(others)}, accepted is {', '.join(wanted)}. Fix:"
            " somebody may have put another key there; if the vendor announces the new one, set it as the fingerprint"
        )


def render(params: dict[str, object], keyring: Path) -> str:
    """Return the source in apt's deb822 form."""
    components = params["components"]
    assert isinstance(components, list)
    lines = ["Types: deb", f"URIs: {params['uri']}", f"Suites: {params['suite']}"]
    lines += [f"Components: {' '.join(components)}"] if components else []
    lines += ["Architectures: amd64", f"Signed-By: {keyring}"]
    return "\n".join(["# Written by Ansible (module apt_source).", *lines, ""])


def entries(text: str, deb822: bool) -> list[str]:
    """Return the active entries of a file of sources, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    if not deb822:
        return [line for line in lines if line.strip()]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return [text for text in paragraphs if text.strip() and not re.search(DISABLED, text)]


def is_replaced(file: Path, replaces: list[str]) -> bool:
    """Tell whether a pattern names a file in sources.list.d, which may be written in either form."""
    names = [file.with_suffix(suffix).name for suffix in (".list", ".sources")]
    return file != MAIN_SOURCE and any(fnmatch.fnmatch(name, pattern) for name in names for pattern in replaces)


def fix_of(text: str) -> str:
    """Return the fix of the most specific cause that apt's words name."""
    return next(fix for pattern, fix in CAUSES if re.search(pattern, text))


def find_older(own: Path, conflicts: str, replaces: list[str]) -> list[Path]:
    """Return the files of older entries of the same repository, which this one takes the place of.

    Raises:
        SourceError: there is an entry in a file that is not ours to remove.
    """
    if not conflicts:
        return []
    older = []
    for file in [MAIN_SOURCE, *sorted(SOURCES.glob("*.list")), *sorted(SOURCES.glob("*.sources"))]:
        if file == own or not file.exists():
            continue
        found = entries(file.read_text(errors="replace"), file.suffix == ".sources")
        same = [text for text in found if re.search(conflicts, text)]
        if not same:
            continue
        if len(same) < len(found) or not is_replaced(file, replaces):
            raise SourceError(
                f"the repository is already an apt source: {file}. Fix: remove that entry, then run again; ours"
                f" follows, in {own}"
            )
        older.append(file)
    return older


class Source:
    """The source on this host."""

    def __init__(self, module: AnsibleModule) -> None:
        """Take what is wanted."""
        self.module = module
        self.params = module.params
        self.file = SOURCES / f"{self.params['name']}.sources"
        self.keyring = KEYRINGS / f"{self.params['name']}.gpg"
        self.alone = ["-o", f"Dir::Etc::sourcelist={self.file}", "-o", "Dir::Etc::sourceparts=-"]

    def fetch_key(self) -> bytes:
        """Return the key's packets, from where it is.

        Raises:
            SourceError: it is not there.
        """
        place = self.params["key"]
        if place.startswith("/"):
            try:
                key = Path(place).read_bytes()
            except OSError as error:
                raise SourceError(
                    f"cannot read the key {place}: {error.strerror}. Fix: correct the path of the key"
                ) from error
        else:
            response, info = fetch_url(self.module, place, timeout=60)
            if info["status"] != 200:
                raise SourceError(
                    f"cannot fetch the key {place}: {info['msg']}. Fix: check the network, the proxy and the"
                    " address of the key"
                )
            key = response.read()
        try:
            return dearmor(key)
        except (ValueError, binascii.Error) as error:
            raise SourceError(
                f"the key {place} is damaged. Fix: look at it, and correct the address of the key"
            ) from error

    def wanted_key(self) -> bytes:
        """Return the key's packets: what is there if it is accepted, else what is at the address."""
        if self.keyring.exists():
            packets = self.keyring.read_bytes()
            try:
                check_key(packets, self.params["fingerprints"], str(self.keyring))
            except SourceError:
                pass
            else:
                return packets
        packets = self.fetch_key()
        check_key(packets, self.params["fingerprints"], self.params["key"])
        return packets

    def lists(self) -> list[str]:
        """Return the files of lists that are there for this source."""
        command = ["apt-get", "indextargets", *self.alone, "--format", "$(FILENAME)"]
        return str(self.module.run_command(command, check_rc=True)[1]).split()

    def refresh(self) -> None:
        """Fetch the lists of this source.

        Raises:
            SourceError: the repository cannot be reached, or is not signed by the key.
        """
        command = ["apt-get", "update", *self.alone, "-o", "APT::Get::List-Cleanup=0", "-o", "Acquire::Retries=2"]
        # apt itself does not wait for the lock on its lists.
        end = time.monotonic() + self.params["lock_timeout"]
        while True:
            status, output, errors = self.module.run_command(command, environ_update={"LC_ALL": "C"})
            if status == 0 or not re.search(LOCKED, errors) or time.monotonic() + LOCK_SECONDS > end:
                break
            time.sleep(LOCK_SECONDS)
        # Older releases of apt end with 0 when a repository cannot be reached.
        complaints = [line for line in (output + errors).splitlines() if line.startswith(("E:", "W:", "Err:"))]
        text = " ".join(complaints)
        if status == 0 and not re.search(r"Failed to fetch|GPG error|NO_PUBKEY|not signed|signature", text):
            return
        uri = self.params["uri"]
        if re.search(r"SHA-?1 is not considered secure", text):
            raise SourceError(
                f"{uri} is signed by a key that apt no longer trusts, since the key's own signature is SHA-1: {text}."
                " Fix: take the vendor's newer key; set its address and its fingerprint"
            )
        if re.search(r"NO_PUBKEY|GPG error|OpenPGP|not signed|signature", text):
            raise SourceError(
                f"{uri} is not signed by the key in {self.keyring}: {text}. Fix: if the vendor announces another key,"
                " remove that file, set the new fingerprint, and run again"
            )
        raise SourceError(f"cannot fetch the lists of {uri}: {text or errors}. Fix: {fix_of(text or errors)}")

    def present(self) -> dict[str, object]:
        """Bring the source."""
        if not self.params["uri"] or not self.params["key"]:
            raise SourceError("uri and key are needed. Fix: set both")
        older = find_older(self.file, self.params["conflicts"], self.params["replaces"])
        wanted: dict[Path, bytes] = {self.file: render(self.params, self.keyring).encode()}
        if self.module.check_mode and not self.keyring.exists():
            return {"changed": True, "refreshed": False, "removed": [str(file) for file in older]}
        wanted[self.keyring] = self.wanted_key()
        before = {path: path.read_bytes() if path.exists() else None for path in [*wanted, *older]}
        changed = bool(older) or any(before[path] != content for path, content in wanted.items())
        refreshed = False
        if not self.module.check_mode:
            try:
                if changed:
                    for path, content in wanted.items():
                        self.write(path, content)
                    for path in older:
                        path.unlink()
                if changed or not self.lists():
                    self.refresh()
                    refreshed = True
            except SourceError:
                for path, old in before.items():
                    self.write(path, old)
                raise
        return {"changed": changed, "refreshed": refreshed, "removed": [str(file) for file in older]}

    def absent(self) -> dict[str, object]:
        """Remove the source, its key and its lists."""
        changed = self.file.exists() or self.keyring.exists()
        if changed and not self.module.check_mode:
            lists, releases = [], []
            if self.file.exists():
                lists = self.lists()
                # apt names its lists after the address; whatever stands for a colon there.
                for uri in re.findall(r"(?m)^URIs: *[a-z]+:/*(.+?)/*$", self.file.read_text()):
                    releases += Path("/var/lib/apt/lists").glob(
                        f"{re.sub('[:]', '*', uri).replace('/', '_')}_*Release*"
                    )
            for path in [*map(Path, lists), *releases, self.file, self.keyring]:
                path.unlink(missing_ok=True)
        return {"changed": changed, "refreshed": False, "removed": []}

    @staticmethod
    def write(path: Path, content: bytes | None) -> None:
        """Write a file that everybody may read, in one go; without content, remove it."""
        if content is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        growing = path.with_name(f".{path.name}.new")
        growing.write_bytes(content)
        growing.chmod(0o644)
        growing.replace(path)


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
    try:
        module.exit_json(**(source.present() if module.params["state"] == "present" else source.absent()))
    except SourceError as error:
        module.fail_json(msg=f"{error}.")


if __name__ == "__main__":
    main()
