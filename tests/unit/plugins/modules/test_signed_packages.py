"""The module signed_packages, with the real apt and keys made here; a whole bundle is unpacked by molecule/airgap."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.modules import signed_packages

from tests.unit.plugins.conftest import Key

INDEX = "main/binary-amd64/Packages"


def make_package(folder: Path, name: str) -> Path:
    """Make a real package."""
    work = folder / f"work-{name}"
    (work / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.invalid>\n"
    (work / "DEBIAN/control").write_text(f"{control}Description: a package of the tests\n")
    file = folder / f"{name}_1.0_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(work), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file


def describe(file: Path) -> str:
    """Return a package's paragraph in an index of its vendor."""
    total = hashlib.sha256(file.read_bytes()).hexdigest()
    name = file.name.partition("_")[0]
    return (
        f"Package: {name}\nVersion: 1.0\nFilename: pool/{file.name}\nSize: {file.stat().st_size}\nSHA256: {total}\n\n"
    )


class Bundle:
    """The folder of packages in a bundle, with two packages and one vendor's signed index of both."""

    def __init__(self, path: Path, keys: dict[str, Key], base: str) -> None:
        """Make it; base is where in the vendor's repository the signed list of indexes lies."""
        self.path, self.keys = path, keys
        self.root = path / "signed/vendor.example"
        self.base = self.root / base
        self.index = self.base / (INDEX if base.startswith("dists") else "Packages")
        self.index.parent.mkdir(parents=True)
        (self.root / "key.gpg").write_bytes(keys["vendor"].public)
        self.packages = [make_package(path, name) for name in ("one", "two")]
        self.index.write_text("".join(map(describe, self.packages)))
        self.sign()

    def sign(self, key: str = "vendor", codename: str = "trixie", detached: bool = False) -> None:
        """Sign the index. The list is years old, and names a form of the index that is not in the bundle."""
        content = self.index.read_bytes()
        name = self.index.relative_to(self.base)
        text = (
            f"Suite: stable\nCodename: {codename}\nDate: Mon, 01 Jan 2024 00:00:00 +0000\n"
            "Valid-Until: Mon, 08 Jan 2024 00:00:00 +0000\nAcquire-By-Hash: yes\nSHA256:\n"
            f" {hashlib.sha256(content).hexdigest()} {len(content)} {name}\n {'0' * 64} 77 {name}.xz\n"
        )
        for file in self.base.glob("*Release*"):
            file.unlink()
        if detached:
            (self.base / "Release").write_text(text)
            (self.base / "Release.gpg").write_bytes(self.keys[key].gpg("--armor", "--detach-sign", text=text))
        else:
            (self.base / "InRelease").write_bytes(self.keys[key].gpg("--clearsign", text=text))

    def offer(self, **params: Any) -> dict[str, Any]:
        """Return what the module returns on a host whose own settings are lax."""
        settings = self.path.parent / "apt.conf"
        settings.write_text(
            f'Dir::Etc::Parts "{settings.parent}/none"; Acquire {{ Check-Valid-Until "true"; GzipIndexes "true";'
            ' AllowInsecureRepositories "true"; AllowWeakRepositories "true"; };'
        )

        wanted = {
            "path": str(self.path),
            "suite": "from-usb",
            "release": "trixie",
            "keyrings": [str(self.path.parent / "keyring.gpg")],
            "fingerprints": ["AB12" * 10, self.keys["vendor"].fingerprint],
            "unsigned": [],
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("APT_CONFIG", str(settings))
            found: dict[str, Any] = signed_packages.Folder(wanted | params, check=False).offer()
        return found

    def refuse(self, complaint: str, packages: str = "one 1.0, two 1.0", **params: Any) -> None:
        """Check that the module refuses packages with these words, and writes nothing."""
        with pytest.raises(signed_packages.Problem, match=f"(?s)signature covers {packages}; .*{complaint}.* Fix: "):
            self.offer(**params)
        assert not (self.path / "Packages").exists()


@pytest.fixture
def bundle(request: pytest.FixtureRequest, tmp_path: Path, keys: dict[str, Key]) -> Bundle:
    """A good bundle; a parameter tells where its signed list lies."""
    return Bundle(tmp_path / "packages", keys, getattr(request, "param", "dists/trixie"))


@pytest.mark.parametrize("bundle", ["dists/trixie", "", "stable/deb"], indirect=True)
def test_what_a_vendor_signed_is_offered_in_the_words_of_the_vendor(bundle: Bundle) -> None:
    assert bundle.offer() == {"changed": True, "signed": 2, "unsigned": []}
    wanted = bundle.index.read_text().replace("Filename: pool/", "Filename: ./")
    assert (bundle.path / "Packages").read_text() == wanted
    total = hashlib.sha256(wanted.encode()).hexdigest()
    assert f"\nSHA256:\n {total} {len(wanted)} Packages\n" in (bundle.path / "Release").read_text()
    assert (bundle.path / "Release").read_text().startswith("Suite: from-usb\nDate: ")


def test_detached_signature_will_do(bundle: Bundle) -> None:
    bundle.sign(detached=True)
    assert bundle.offer()["signed"] == 2


def test_update_of_the_release_will_do(bundle: Bundle) -> None:
    bundle.sign(codename="trixie-security")
    assert bundle.offer()["signed"] == 2


def test_index_without_a_key_is_checked_with_the_keyring_of_the_host(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.root / "key.gpg").unlink()
    (tmp_path / "keyring.gpg").write_bytes(bundle.keys["vendor"].public)
    assert bundle.offer(fingerprints=[])["signed"] == 2
    (tmp_path / "keyring.gpg").write_bytes(bundle.keys["other"].public)
    (bundle.path / "Packages").unlink()
    bundle.refuse("signatures", fingerprints=[])


@pytest.mark.parametrize("bring", [False, True])
@pytest.mark.attack("packages of a bundle signed by another key, which the bundle brings", "refused")
def test_other_key_is_refused_even_if_the_bundle_brings_it(bundle: Bundle, bring: bool) -> None:
    bundle.sign("other")
    if bring:
        (bundle.root / "key.gpg").write_bytes(bundle.keys["vendor"].public + bundle.keys["other"].public)
    bundle.refuse("signed/vendor.example/dists/trixie: .*signatures")


@pytest.mark.attack("a bundle's key whose fingerprint nobody has accepted", "refused")
def test_without_an_accepted_fingerprint_no_key_of_the_bundle_counts(bundle: Bundle) -> None:
    bundle.refuse("signed/vendor.example/dists/trixie: no fingerprint is accepted", fingerprints=[])


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.attack("a signed index of another release", "refused")
def test_index_of_another_release_is_refused(bundle: Bundle, detached: bool) -> None:
    bundle.sign(codename="bullseye", detached=detached)
    bundle.refuse("it is of bullseye, not of trixie")


@pytest.mark.attack("words before the signed ones", "not believed")
def test_name_before_the_signed_words_does_not_count(bundle: Bundle) -> None:
    bundle.sign(codename="bullseye")
    file = bundle.base / "InRelease"
    file.write_text(file.read_text().replace("\nHash: ", "\nCodename: trixie\nHash: ", 1))
    bundle.refuse("signed/vendor.example/dists/trixie: ")


@pytest.mark.attack("an index without a signature, on a host whose apt allows it", "refused")
def test_index_without_a_signature_is_refused_whatever_the_host_allows(bundle: Bundle) -> None:
    bundle.sign(detached=True)
    (bundle.base / "Release.gpg").unlink()
    bundle.refuse("signed/vendor.example/dists/trixie: .*(not signed|signature)")


@pytest.mark.attack("an altered index", "refused")
def test_altered_index_is_refused(bundle: Bundle) -> None:
    bundle.index.write_text(bundle.index.read_text().replace("Version: 1.0", "Version: 9.9"))
    bundle.refuse("signed/vendor.example/dists/trixie: .*Hash Sum mismatch")


@pytest.mark.parametrize("file", ["InRelease", INDEX])
def test_missing_part_is_refused(bundle: Bundle, file: str) -> None:
    (bundle.base / file).unlink()
    bundle.refuse("" if file == "InRelease" else "signed/vendor.example/dists/trixie: ")


@pytest.mark.attack("an altered package", "refused")
def test_altered_package_is_refused(bundle: Bundle) -> None:
    with bundle.packages[1].open("ab") as file:
        file.write(b"\n")
    bundle.refuse("no index was refused", packages="two 1.0")


@pytest.mark.attack("a package that no signature covers", "named and refused")
def test_package_without_a_signature_is_refused_unless_it_is_named(bundle: Bundle) -> None:
    make_package(bundle.path, "ours-tool")
    bundle.refuse("no index was refused", packages="ours-tool 1.0")
    assert bundle.offer(unsigned=["ours-*"]) == {"changed": True, "signed": 2, "unsigned": ["ours-tool 1.0"]}
    assert (
        "Description: a package of the tests\nFilename: ./ours-tool_1.0_all.deb\nSize: "
        in (bundle.path / "Packages").read_text()
    )


@pytest.mark.attack("a forged list of packages", "not used")
def test_list_of_the_bundle_is_written_anew(bundle: Bundle) -> None:
    (bundle.path / "Packages").write_text("Package: evil\nVersion: 1\nFilename: ../evil.deb\n")
    bundle.offer()
    assert "evil" not in (bundle.path / "Packages").read_text()


def test_what_is_no_package_is_refused(bundle: Bundle) -> None:
    (bundle.path / "three.deb").write_bytes(b"no package")
    with pytest.raises(signed_packages.Problem, match=r"three.deb is not a package: .* Fix: "):
        bundle.offer()


@pytest.mark.attack("a path that would write into apt's source", "refused")
def test_path_cannot_write_into_the_source(bundle: Bundle) -> None:
    bundle.root.rename(bundle.root.with_name("a\nTrusted: yes\nX: b"))
    bundle.refuse("has other characters")


def test_fingerprint_is_whole(bundle: Bundle) -> None:
    with pytest.raises(signed_packages.Problem, match=r"'0EBFCD88' is not the fingerprint of a key. Fix: "):
        bundle.offer(fingerprints=["0EBF CD88"])
