"""The module client_wheels: what it collects with the real pip, and what its fingerprint covers."""

from __future__ import annotations

import importlib.util
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from ansible_collections.dots_ocr.deploy.plugins.modules import client_wheels

REPOSITORY = Path(__file__).resolve().parents[4]

CLIENT = "dots_ocr_client-1.0-py3-none-any.whl"
COMPILED = "speedups-2.0-cp313-cp313-manylinux_2_28_x86_64.whl"
TARGET = client_wheels.Target("3.13.5", "x86_64", "2.41")


def fingerprint(folder: Path, *, is_checkout: bool, python: str = "3.13.5") -> str:
    target = client_wheels.Target(python, "x86_64", "2.41")
    name: str = client_wheels.Source(folder, is_checkout).fingerprint(target)
    return name


def write_wheel(folder: Path, file: str, *requirements: str) -> None:
    """Write a wheel without any code; pip looks at its metadata only."""
    name, version = file.split("-")[:2]
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: serve"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requirements]
    tag = file.removesuffix(".whl").split("-", 2)[2]
    with zipfile.ZipFile(folder / file, "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with the client, what its extra needs, and something else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, CLIENT, "speedups>=2; extra == 'serve'")
    write_wheel(folder, COMPILED)
    write_wheel(folder, "other-1.0-py3-none-any.whl")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of the repository as decides what is installed."""
    folder = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "client/src", folder / "client/src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "client/pyproject.toml", folder / "client")
    shutil.copy(REPOSITORY / "requirements.lock", folder)
    return folder


def test_what_the_service_needs_is_collected_for_the_other_python(wheels: Path, tmp_path: Path) -> None:
    archive = tmp_path / "wheels.tar"
    client_wheels.Source(wheels, is_checkout=False).collect(TARGET, archive)
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [CLIENT, COMPILED]


def test_only_files_that_the_lock_names_are_collected(
    checkout: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is a folder here, and the client has no code, so that nothing is built."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    real = client_wheels.pip

    def pip(*words: str | Path, path: Path | None = None) -> None:
        if words[0] == "wheel":
            built = Path(words[words.index("--wheel-dir") + 1])
            built.mkdir()
            shutil.copy(wheels / CLIENT, built)
        else:
            real(*words, "--find-links", wheels)

    monkeypatch.setattr(client_wheels, "pip", pip)
    source, archive = client_wheels.Source(checkout, is_checkout=True), tmp_path / "wheels.tar"
    lock = "speedups==2.0 \\\n    --hash=sha256:{}\n"
    (checkout / "requirements.lock").write_text(lock.format(client_wheels.sha256(wheels / COMPILED)))
    source.collect(TARGET, archive)
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [CLIENT, COMPILED]
    archive.unlink()

    write_wheel(wheels, COMPILED, "other; extra == 'never'")
    with pytest.raises(client_wheels.Problem, match=f"than requirements.lock pins: {COMPILED}; a mirror"):
        source.collect(TARGET, archive)
    assert not archive.exists()


def test_what_builds_the_client_comes_from_the_lock_where_ansible_has_it_not(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(wheels)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    write_wheel(wheels, "hatchling-1.0-py3-none-any.whl")
    lock, versions = tmp_path / "requirements.lock", tmp_path / "versions.txt"
    versions.write_text("hatchling==1.0\n")
    lock.write_text(f"hatchling==1.0 --hash=sha256:{client_wheels.sha256(wheels / 'hatchling-1.0-py3-none-any.whl')}\n")
    assert client_wheels.find_backend(tmp_path, lock, versions) is None, "the tests' own Python has it"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend = client_wheels.find_backend(tmp_path, lock, versions)
    assert (backend / "hatchling-1.0.dist-info").is_dir()
    lock.write_text("hatchling==1.0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(client_wheels.Problem, match=r"than requirements\.lock pins: hatchling-1\.0"):
        client_wheels.find_backend(tmp_path, lock, versions)


@pytest.mark.parametrize(("python", "glibc"), [("3.12", "2.41"), ("3.13", "2.27")])
def test_wheel_that_the_host_cannot_load_is_no_wheel(wheels: Path, tmp_path: Path, python: str, glibc: str) -> None:
    source, target = client_wheels.Source(wheels, is_checkout=False), client_wheels.Target(python, "x86_64", glibc)
    with pytest.raises(client_wheels.Problem, match="speedups"):
        source.collect(target, tmp_path / "wheels.tar")
    assert not (tmp_path / "wheels.tar").exists()


def test_folder_without_the_client_is_refused(wheels: Path) -> None:
    (wheels / CLIENT).unlink()
    with pytest.raises(client_wheels.Problem, match="there is no wheel of dots-ocr-client"):
        fingerprint(wheels, is_checkout=False)


def test_other_wheels_have_another_name(wheels: Path) -> None:
    before = fingerprint(wheels, is_checkout=False)
    assert fingerprint(wheels, is_checkout=False) == before
    write_wheel(wheels, CLIENT, "speedups>=2.0; extra == 'serve'")
    assert fingerprint(wheels, is_checkout=False) != before


@pytest.mark.parametrize("changed", ["client/src/dots_ocr_client/new.py", "client/pyproject.toml", "requirements.lock"])
def test_other_source_has_another_name(checkout: Path, changed: str) -> None:
    before = fingerprint(checkout, is_checkout=True)
    with (checkout / changed).open("a") as file:
        file.write("# changed\n")
    assert fingerprint(checkout, is_checkout=True) != before


def test_bytecode_and_tests_change_nothing(checkout: Path) -> None:
    before = fingerprint(checkout, is_checkout=True)
    for place in ("client/src/dots_ocr_client/__pycache__/cli.cpython-311.pyc", "client/tests/test_cli.py"):
        (checkout / place).parent.mkdir()
        (checkout / place).write_text("anything")
    assert fingerprint(checkout, is_checkout=True) == before


def test_name_is_that_of_one_minor_version_of_python(checkout: Path) -> None:
    before = fingerprint(checkout, is_checkout=True, python="3.13.5")
    assert fingerprint(checkout, is_checkout=True, python="3.13.9") == before
    assert fingerprint(checkout, is_checkout=True, python="3.12.5") != before


def test_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(client_wheels.Problem, match="lacks client/ or requirements"):
        fingerprint(tmp_path, is_checkout=True)
