"""The module apt_source: keys, entries of others. What apt makes of a source is tested on hosts (molecule/*)."""

from __future__ import annotations

import base64
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.apt_host import LISTS_LOCK, Locked

FILE = Path(__file__).resolve().parent.parent / "plugins/modules/apt_source.py"
spec = importlib.util.spec_from_file_location("apt_source", FILE)
assert spec
assert spec.loader
apt_source = importlib.util.module_from_spec(spec)
spec.loader.exec_module(apt_source)


def gpg(home: Path, *words: str) -> bytes:
    """Run the real gpg with a home of its own."""
    command = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", "", *words]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture(scope="module", params=["rsa2048", "ed25519"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A keyring of gpg with one key, which has a subkey."""
    folder = tmp_path_factory.mktemp("gnupg")
    folder.chmod(0o700)
    gpg(folder, "--quick-generate-key", "Vendor <vendor@example.invalid>", request.param, "sign", "never")
    gpg(folder, "--quick-add-key", listing(folder)[0], "rsa2048", "encr", "never")
    return folder


def listing(home: Path) -> list[str]:
    """Return the fingerprints of the primary keys as gpg sees them."""
    lines = gpg(home, "--with-colons", "--list-keys").decode().splitlines()
    return [lines[n + 1].split(":")[9] for n, line in enumerate(lines) if line.startswith("pub:")]


def test_fingerprint_is_what_gpg_says(home: Path) -> None:
    armored, binary = gpg(home, "--armor", "--export"), gpg(home, "--export")
    assert apt_source.dearmor(armored) == apt_source.dearmor(binary) == binary
    assert apt_source.fingerprints_of(binary) == listing(home)


def test_armor_with_a_comment_and_line_ends_of_windows(home: Path) -> None:
    lines = gpg(home, "--armor", "--comment", "a comment", "--export").splitlines()
    assert apt_source.dearmor(b"\r\n".join(lines) + b"\r\n") == gpg(home, "--export")


def test_accepted_key_may_be_written_with_spaces_and_in_small_letters(home: Path) -> None:
    text = listing(home)[0].lower()
    apt_source.check_key(gpg(home, "--export"), [f"{text[:20]} {text[20:]}"], "here")


def test_any_key_is_accepted_if_none_is_named(home: Path) -> None:
    apt_source.check_key(gpg(home, "--export"), [], "here")


def test_other_key_is_refused_with_both_fingerprints(home: Path) -> None:
    with pytest.raises(apt_source.SourceError, match=f"{listing(home)[0]}, accepted is AB12. Fix:"):
        apt_source.check_key(gpg(home, "--export"), ["AB12"], "https://vendor.example/key")


def test_second_key_beside_the_accepted_one_is_refused(home: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    gpg(tmp_path, "--quick-generate-key", "Other <other@example.invalid>", "ed25519", "sign", "never")
    both = gpg(home, "--export") + gpg(tmp_path, "--export")
    with pytest.raises(apt_source.SourceError, match=f"has the fingerprint {listing(tmp_path)[0]}, accepted"):
        apt_source.check_key(both, listing(home), "here")


@pytest.mark.parametrize(
    "text", [b"", b"<html>Sign in</html>", b"\x99\x01", b"\x99\x01\x0d\x04", b"\xc6\xff\x00\x00\x00\x01\x05"]
)
def test_what_is_no_key_is_refused(text: bytes) -> None:
    with pytest.raises(apt_source.SourceError, match="is no OpenPGP key"):
        apt_source.check_key(text, [], "here")


def test_secret_key_is_no_public_key(home: Path) -> None:
    with pytest.raises(ValueError, match="no public key"):
        apt_source.fingerprints_of(gpg(home, "--export-secret-keys"))


def test_damaged_armor_is_refused(home: Path) -> None:
    text = gpg(home, "--armor", "--export").replace(b"m", b"?")
    with pytest.raises(ValueError, match=r"[Bb]ase64|alphabet|padding|characters"):
        apt_source.dearmor(text)


def test_version_6_has_a_longer_fingerprint() -> None:
    # RFC 9580, A.3: a certificate of version 6 and its fingerprint.
    text = (
        b"xioGY4d/4xsAAAAg+U2nu0jWCmHlZ3BqZYfQMxmZu52JGggkLq2EVD34laPCsQYf"
        b"GwoAAABCBYJjh3/jAwsJBwUVCg4IDAIWAAKbAwIeCSIhBssYbE8GCaaX5NUt+mxy"
    )
    packet = base64.b64decode(text)[: 2 + 0x2A]
    wanted = "CB186C4F0609A697E4D52DFA6C722B0C1F1E27C18A56708F6525EC27BAD9ACC9"
    assert apt_source.fingerprints_of(packet) == [wanted]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty sources.list.d."""
    monkeypatch.setattr(apt_source, "SOURCES", tmp_path)
    monkeypatch.setattr(apt_source, "MAIN_SOURCE", tmp_path / "sources.list")
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
    with pytest.raises(apt_source.SourceError, match=f"already an apt source: .*/{name}. Fix: .* in .*/own.sources"):
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


def refresh(seconds: float, words: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Fetch the lists where apt fails for some seconds; return how many have passed."""
    host = Locked(seconds, words)
    source = object.__new__(apt_source.Source)
    monkeypatch.setattr(apt_source, "time", SimpleNamespace(monotonic=host.monotonic, sleep=host.sleep))
    monkeypatch.setattr(source, "module", host, raising=False)
    monkeypatch.setattr(source, "params", {"lock_timeout": 600, "uri": "https://vendor.example/deb"}, raising=False)
    monkeypatch.setattr(source, "keyring", Path("/k.gpg"), raising=False)
    monkeypatch.setattr(source, "alone", [], raising=False)
    source.refresh()
    return host.now


def test_lock_on_the_lists_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 45 <= refresh(45, LISTS_LOCK, monkeypatch) <= 50


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (LISTS_LOCK, "let the program that holds the lock end, then run again; apt_lock_timeout"),
        ("E: Write error - write (28: No space left on device)\nE: IO Error saving source cache\n", "free some space"),
        ("W: Not using locking for read only lock file /var/lib/apt/lists/lock\n", "mount /var writable"),
        ("E: Release file for http://a/InRelease is not valid yet (invalid for another 3h).\n", "check the clock"),
        ("W: Failed to fetch http://a/InRelease  403  Forbidden [IP: 10.0.0.1 3128]\n", "check http_proxy"),
        ("W: Failed to fetch https://a/x  Invalid response from proxy: HTTP/1.1 407 Proxy\n", "check http_proxy"),
        ("W: Failed to fetch https://a/x  Certificate verification failed: NOT trusted\n", "update-ca-certificates"),
        ("W: Failed to fetch http://a/x  Could not connect to a:80 (10.0.0.1)\n", "check the network"),
        ("W: GPG error: https://a / InRelease: NO_PUBKEY 7EA0A9C3F273FCD8\n", "set the new fingerprint"),
    ],
)
def test_lists_that_do_not_come_are_told_with_their_cause(
    words: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(apt_source.SourceError) as caught:
        refresh(1000, words, monkeypatch)
    assert words.splitlines()[0] in str(caught.value)
    assert fix in str(caught.value).split("Fix: ")[1]
    assert ("network" in str(caught.value)) == (fix == "check the network")
