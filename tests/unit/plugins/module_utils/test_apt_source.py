"""The source of apt_set, with the real apt and keys made here: keys, entries of others, what apt says of lists."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.module_utils import apt_source

from tests.unit.plugins.conftest import Key


def test_armored_key_is_decoded(keys: dict[str, Key]) -> None:
    key = keys["vendor"]
    lines = key.gpg("--armor", "--comment", "a comment", "--export").splitlines()
    for armored in (key.gpg("--armor", "--export"), b"\r\n".join(lines) + b"\r\n", key.public):
        assert apt_source.packets_of(armored, "here") == key.public
    assert apt_source.packets_of(b"\n".join([*lines, *lines]), "here") == key.public * 2


def test_what_is_no_public_key_is_refused(keys: dict[str, Key]) -> None:
    damaged = keys["vendor"].gpg("--armor", "--export").replace(b"m", b"?")
    secret = keys["vendor"].gpg("--export-secret-keys")
    for text in (b"", b"<html>Sign in</html>", b"9DC858229FC7DD38\n", damaged, secret):
        with pytest.raises(apt_source.Problem, match=r"https://a/key is not an OpenPGP key.* Fix: .*address of"):
            apt_source.packets_of(text, "https://a/key")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty sources.list.d."""
    monkeypatch.setattr(apt_source.apt, "SOURCES", tmp_path)
    monkeypatch.setattr(apt_source.apt, "MAIN_SOURCE", tmp_path / "sources.list")
    return tmp_path


def older(sources: Path) -> list[str]:
    """Return the names of the files that our own source takes the place of."""
    found = apt_source.find_older(sources / "own.sources", r"vendor\.example", ["vendor*.list", "vendor.sources"])
    return [file.name for file in found]


ENTRY = "deb [signed-by=/k] https://vendor.example/deb /\n"
DEB822 = "Types: deb\nURIs: https://vendor.example/deb\nSuites: /\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vendor.list", f"# a comment\n\n{ENTRY}"),
        ("vendor-old.list", ENTRY * 2),
        ("vendor.sources", f"# x\n{DEB822}\n\n{DEB822}"),
        # The same in the other form than the pattern's.
        ("vendor-old.sources", DEB822),
        ("vendor.list", f"deb-src {ENTRY.removeprefix('deb ')}"),
    ],
)
def test_older_entry_is_replaced(sources: Path, name: str, content: str) -> None:
    (sources / name).write_text(content)
    assert older(sources) == [name]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vendor.list", f"{ENTRY}deb http://other.example stable main\n"),
        ("vendor.sources", f"{DEB822}\n{DEB822.replace('vendor', 'other')}"),
        ("mine.list", ENTRY),
        ("mine.sources", DEB822),
        ("vendor-old.sources", f"{DEB822}\n{DEB822.replace('vendor', 'other')}"),
        ("sources.list", ENTRY),
    ],
)
def test_entry_in_a_file_of_others_is_refused_by_name(sources: Path, name: str, content: str) -> None:
    (sources / name).write_text(content)
    with pytest.raises(apt_source.Problem, match=f"already an apt source: .*/{name}. Fix: .* in .*/own.sources"):
        older(sources)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.list", f"# {ENTRY}"),
        ("mine.sources", f"Enabled: no\n{DEB822}"),
        ("mine.sources", f"{DEB822}Enabled: False\n"),
        ("vendor.list", f"# {ENTRY}"),
        ("mine.list", "deb http://other.example stable main\n"),
        ("own.sources", DEB822),
    ],
)
def test_what_does_not_bite_is_left_alone(sources: Path, name: str, content: str) -> None:
    (sources / name).write_text(content)
    assert older(sources) == []


class Vendor:
    """A vendor's repository, and a host that takes it."""

    def __init__(self, folder: Path, keys: dict[str, Key]) -> None:
        """Make it, with the key's file in the repository."""
        self.folder, self.keys = folder, keys
        self.key = folder / "key"
        self.key.write_bytes(keys["vendor"].public)
        (folder / "repo").mkdir()
        (folder / "repo/Packages").write_text("Package: one\nVersion: 1\nArchitecture: all\nFilename: one.deb\n\n")
        self.sign("vendor")

    def sign(self, key: str) -> None:
        """Sign the list of indexes."""
        content = (self.folder / "repo/Packages").read_bytes()
        text = f"Suite: x\nSHA256:\n {hashlib.sha256(content).hexdigest()} {len(content)} Packages\n"
        (self.folder / "repo/InRelease").write_bytes(self.keys[key].gpg("--clearsign", text=text))

    def source(self, check: bool = False, **params: Any) -> Any:
        """Return the source as the module has it."""
        wanted = {
            "name": "vendor",
            "uri": f"file:{self.folder}/repo",
            "suite": "/",
            "components": [],
            "key": str(self.key),
            "fingerprints": [self.keys["vendor"].fingerprint],
            "replaces": [],
            "conflicts": "",
        }
        return apt_source.Source(wanted | params, 0, check)

    def refuse(self, complaint: str, **params: Any) -> None:
        """Check that the source is refused with these words, and that nothing of it stays."""
        before = self.files()
        with pytest.raises(apt_source.Problem, match=complaint):
            self.source(**params).present()
        assert self.files() == before

    def lists(self) -> list[Path]:
        """Return what apt has fetched."""
        return [file for file in self.folder.glob("lists/*repo*") if file.is_file()]

    def files(self) -> dict[str, bytes]:
        """Return the files of sources and keys."""
        return {path.name: path.read_bytes() for path in self.folder.glob("etc/*") if path.is_file()}


@pytest.fixture
def vendor(tmp_path: Path, keys: dict[str, Key], monkeypatch: pytest.MonkeyPatch) -> Vendor:
    """A vendor, and a host without its repository."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "lists/partial").mkdir(parents=True)
    settings = tmp_path / "apt.conf"
    settings.write_text(f'Dir::State::lists "{tmp_path}/lists"; APT::Sandbox::User "root"; Dir::Cache "{tmp_path}";')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    monkeypatch.setattr(apt_source.apt, "SOURCES", tmp_path / "etc")
    monkeypatch.setattr(apt_source, "KEYRINGS", tmp_path / "etc")
    monkeypatch.setattr(apt_source, "LISTS", tmp_path / "lists")
    return Vendor(tmp_path, keys)


def test_repository_that_an_accepted_key_has_signed_is_taken_once(vendor: Vendor) -> None:
    assert vendor.source(check=True).present()
    assert (vendor.files(), vendor.lists()) == ({}, [])
    assert vendor.source().present()
    assert vendor.lists()
    # The fingerprint may be written with spaces, and in small letters.
    text = vendor.keys["vendor"].fingerprint.lower()
    vendor.sign("other")  # nobody looks
    assert not vendor.source(fingerprints=[f"{text[:20]} {text[20:]}"]).present()
    vendor.sign("vendor")
    for file in vendor.lists():
        file.unlink()
    assert not vendor.source().present()
    assert vendor.lists()


def test_nothing_stays_of_a_source_that_is_removed(vendor: Vendor) -> None:
    vendor.source().present()
    assert vendor.source(check=True).absent()
    assert vendor.source().absent()
    assert (vendor.files(), list(vendor.folder.glob("lists/*repo*"))) == ({}, [])
    assert not vendor.source().absent()


def test_key_that_somebody_replaced_is_fetched_again(vendor: Vendor) -> None:
    vendor.source().present()
    keyring = vendor.folder / "etc/vendor.gpg"
    keyring.write_bytes(vendor.keys["other"].public)
    assert vendor.source().present()
    assert keyring.read_bytes() == vendor.keys["vendor"].public


@pytest.mark.attack("a vendor's key whose fingerprint nobody has accepted", "refused")
def test_other_key_is_refused_with_the_accepted_one(vendor: Vendor) -> None:
    accepted = "AB12" * 10
    vendor.refuse(f"is not signed by a key .* accepted is {accepted}. Fix: .*set it as the", fingerprints=[accepted])
    vendor.source(fingerprints=[]).present()
    vendor.refuse(f"accepted is {accepted}", fingerprints=[accepted])


@pytest.mark.attack("a vendor's key with a second one in its file, which signs", "refused")
def test_second_key_beside_the_accepted_one_does_not_count(vendor: Vendor) -> None:
    vendor.key.write_bytes(vendor.keys["vendor"].public + vendor.keys["other"].public)
    vendor.sign("other")
    vendor.refuse("is not signed by a key .* that is accepted")


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"key": "/nowhere/key"}, "cannot read the key /nowhere/key: No such file.* Fix: correct the path"),
        ({"uri": "file:/nowhere"}, "cannot fetch the lists of file:/nowhere.* Fix: check the network, the proxy and"),
        ({"uri": ""}, "uri and key are required"),
    ],
)
def test_source_that_cannot_be_had_is_refused(vendor: Vendor, params: dict[str, str], complaint: str) -> None:
    vendor.refuse(complaint, **params)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (
            "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 812 (apt-get)\n",
            "let the program that",
        ),
        ("E: Write error - write (28: No space left on device)\nE: IO Error saving source cache\n", "free some space"),
        ("W: Not using locking for read only lock file /var/lib/apt/lists/lock\n", "mount it writable"),
        ("E: Release file for http://a/InRelease is not valid yet (invalid for another 3h).\n", "check the clock"),
        ("W: Failed to fetch http://a/InRelease  403  Forbidden [IP: 10.0.0.1 3128]\n", "check http_proxy"),
        ("W: Failed to fetch https://a/x  Invalid response from proxy: HTTP/1.1 407 Proxy\n", "check http_proxy"),
        ("W: Failed to fetch https://a/x  Certificate verification failed: NOT trusted\n", "update-ca-certificates"),
        ("W: Failed to fetch http://a/x  Could not connect to a:80 (10.0.0.1)\n", "check the network"),
        ("E: The repository 'http://a trixie Release' does not have a Release file.\n", "check the network"),
        ("W: GPG error: https://a / InRelease: NO_PUBKEY 7EA0A9C3F273FCD8\n", "set it as the fingerprint"),
        ("W: OpenPGP signature: SHA1 is not considered secure since 2026-02-01\n", "take the vendor's newer key"),
    ],
)
def test_lists_that_do_not_come_are_told_with_their_cause(
    words: str, fix: str, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt_source.apt, "run", lambda *_, **__: (100, "", words))
    with pytest.raises(apt_source.Problem) as caught:
        vendor.source().refresh()
    assert words.splitlines()[0].rstrip(".") in str(caught.value)
    assert fix in str(caught.value).split("Fix: ")[1]
    assert ("the network" in str(caught.value)) == (fix == "check the network")
