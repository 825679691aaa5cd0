"""The program that collects the client's wheels on the controller (roles/dots_ocr_server/files/client_wheels)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = REPOSITORY / "roles/dots_ocr_server/files/client_wheels"
CLIENT = "dots_ocr_client-1.0-py3-none-any.whl"
COMPILED = "speedups-2.0-cp313-cp313-manylinux_2_28_x86_64.whl"


def run(*words: str | Path, python: str = "3.13.5", glibc: str = "2.41") -> subprocess.CompletedProcess[str]:
    target = [f"--python={python}", "--machine=x86_64", f"--glibc={glibc}"]
    command = [sys.executable, str(PROGRAM), *target, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fingerprint(*words: str | Path, python: str = "3.13.5") -> str:
    done = run(*words, "fingerprint", python=python)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
    done = run("--wheels", wheels, "collect", archive)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [CLIENT, COMPILED]


@pytest.mark.parametrize(("python", "glibc"), [("3.12", "2.41"), ("3.13", "2.27")])
def test_wheel_that_the_host_cannot_load_is_no_wheel(wheels: Path, tmp_path: Path, python: str, glibc: str) -> None:
    done = run("--wheels", wheels, "collect", tmp_path / "wheels.tar", python=python, glibc=glibc)
    assert done.returncode == 1
    assert "speedups" in done.stderr
    assert not (tmp_path / "wheels.tar").exists()


def test_folder_without_the_client_is_refused(wheels: Path) -> None:
    (wheels / CLIENT).unlink()
    done = run("--wheels", wheels, "fingerprint")
    assert done.returncode == 1
    assert done.stderr.startswith("There is no wheel of dots-ocr-client")


def test_other_wheels_have_another_name(wheels: Path) -> None:
    before = fingerprint("--wheels", wheels)
    assert fingerprint("--wheels", wheels) == before
    write_wheel(wheels, CLIENT, "speedups>=2.0; extra == 'serve'")
    assert fingerprint("--wheels", wheels) != before


@pytest.mark.parametrize("changed", ["client/src/dots_ocr_client/new.py", "client/pyproject.toml", "requirements.lock"])
def test_other_source_has_another_name(checkout: Path, changed: str) -> None:
    before = fingerprint("--repository", checkout)
    with (checkout / changed).open("a") as file:
        file.write("# changed\n")
    assert fingerprint("--repository", checkout) != before


def test_bytecode_and_tests_change_nothing(checkout: Path) -> None:
    before = fingerprint("--repository", checkout)
    for place in ("client/src/dots_ocr_client/__pycache__/cli.cpython-311.pyc", "client/tests/test_cli.py"):
        (checkout / place).parent.mkdir()
        (checkout / place).write_text("anything")
    assert fingerprint("--repository", checkout) == before


def test_name_is_that_of_one_minor_version_of_python(checkout: Path) -> None:
    before = fingerprint("--repository", checkout, python="3.13.5")
    assert fingerprint("--repository", checkout, python="3.13.9") == before
    assert fingerprint("--repository", checkout, python="3.12.5") != before


def test_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    done = run("--repository", tmp_path, "fingerprint")
    assert done.returncode == 1
    assert "is no checkout" in done.stderr
