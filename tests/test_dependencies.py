"""The Python packages that are installed: each with its hash, and none in a release that is known to be bad."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
KNOWN = tomllib.loads((REPOSITORY / "tests/advisories.toml").read_text())
PLACES = ("*.lock", "[!.]*/**/*.lock", "tests/command_line/vllm-*.txt")
LOCKS = sorted(file for place in PLACES for file in REPOSITORY.glob(place))
# Named in the open, resolved elsewhere: by `make lock`, or by who installs them.
PINNED = [
    REPOSITORY / "requirements.txt",
    REPOSITORY / "docs/requirements.txt",
    REPOSITORY / "examples/requirements-ray.txt",
    REPOSITORY / "tests/examples/requirements.txt",
]
PROJECT = REPOSITORY / "client/pyproject.toml"


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def requirements(text: str) -> Iterator[Requirement]:
    """Yield what a requirements file asks for, without comments, options and hashes."""
    for line in text.replace("\\\n", " ").splitlines():
        words = re.split(r"\s--hash=|\s+#|^#", line, maxsplit=1)[0].strip()
        if words and not words.startswith("-"):  # of another file, which is looked at by itself
            yield Requirement(words)


def findings(file: str, asked: list[Requirement]) -> set[tuple[str, str, str]]:
    """Return (file, package, records) for each requirement whose lowest release is known to be bad."""
    found = set()
    for one in asked:
        lowest = [part.version for part in one.specifier if part.operator in ("==", ">=", "~=")]
        for known in KNOWN["advisory"]:
            if canonicalize_name(one.name) == known["package"] and (
                not lowest or any(bad.contains(lowest[0], prereleases=True) for bad in ranges(known["bad"]))
            ):
                found.add((file, known["package"], ", ".join(known["records"])))
    return found


def ranges(bad: str) -> list[SpecifierSet]:
    """Return the ranges of an advisory, each of which is bad by itself."""
    return [SpecifierSet(part) for part in bad.split(",")]


def unexplained(found: set[tuple[str, str, str]], accepted: list[dict[str, str]]) -> set[tuple[str, str, str]]:
    places = {(one["file"], one["package"]) for one in accepted}
    return {one for one in found if one[:2] not in places}


@pytest.fixture(scope="module")
def found() -> set[tuple[str, str, str]]:
    """What is known to be bad of all that this repository has installed."""
    project: dict[str, Any] = tomllib.loads(PROJECT.read_text())
    bounds = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    ours = [Requirement(text) for texts in [*bounds, project["build-system"]["requires"]] for text in texts]
    result = findings(name_of(PROJECT), [one for one in ours if one.name != project["project"]["name"]])
    for file in [*LOCKS, *PINNED]:
        result |= findings(name_of(file), list(requirements(file.read_text())))
    return result


def test_nothing_is_installed_that_is_known_to_be_bad(found: set[tuple[str, str, str]]) -> None:
    assert unexplained(found, KNOWN["accepted"]) == set(), "take a newer release, or accept it with a reason"


def test_nothing_is_accepted_that_is_not_there(found: set[tuple[str, str, str]]) -> None:
    assert {(one["file"], one["package"]) for one in KNOWN["accepted"]} <= {one[:2] for one in found}
    assert all(len(one["reason"].split()) > 5 for one in KNOWN["accepted"])


def test_releases_that_are_bad_are_found() -> None:
    asked = ["Pillow>=11,<14", "starlette==1.3.0", "ansible_core==2.17.14", "torch", "setuptools~=80.0"]
    assert {one[1] for one in findings("any", [Requirement(text) for text in asked])} == {
        "pillow", "starlette", "ansible-core", "torch", "setuptools"
    }  # fmt: skip
    good = ["pillow>=12.3,<14", "starlette==1.3.1", "ansible-core==2.19.14", "torch==2.13.0+cpu", "other==1"]
    assert findings("any", [Requirement(text) for text in good]) == set()
    accepted = [{"file": "here", "package": "torch", "reason": "any"}]
    torch = [Requirement("torch==2.9.1")]
    assert unexplained(findings("here", torch), accepted) == set()
    assert unexplained(findings("there", torch), accepted) == findings("there", torch)


@pytest.mark.parametrize("lock", LOCKS, ids=name_of)
def test_every_file_has_its_hash(lock: Path) -> None:
    pins = [line for line in lock.read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert pins
    pinned = re.compile(r"[\w.-]+==[\w.+-]+( ;.*?)?( +--hash=sha256:[0-9a-f]{64})+ *")
    assert [line for line in pins if not pinned.fullmatch(line)] == []


def test_lock_holds_what_is_asked_for() -> None:
    """And the release of it: a pin that is changed without `make lock` would not be installed."""
    files = (REPOSITORY / "requirements.lock", PINNED[0])
    locked, asked = (
        {canonicalize_name(one.name): one.specifier for one in requirements(file.read_text())} for file in files
    )
    assert {name: locked.get(name) for name in asked} == asked


def calls(text: str) -> list[str]:
    """Return the lines of a program that have pip install or download, with what continues them."""
    joined = re.sub(r"\\\n\s*|,\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if re.search(r"\bpip(\", \"| )(install|download)\b", line)]


def test_pip_takes_from_an_index_only_what_has_a_hash() -> None:
    """But for our own client, the resolver of `make lock`, and what an operator is told to do with an application.

    client_wheels has a test of its own.
    """
    programs = ["Makefile", "playbooks/*.yml", "roles/*/tasks/*.yml", "rehearsal/*.py", "rehearsal/vllm/install"]
    files = [file for pattern in programs for file in REPOSITORY.glob(pattern)]
    files += [file for file in REPOSITORY.glob("tests/**/*.py") if file != Path(__file__)]
    found = [call for file in files for call in calls(file.read_text())]
    assert len(found) >= 8
    others = re.compile("--require-hashes|--no-index|--editable client|uv==|^In {{ chatvlmllm_folder }}: ")
    assert [one for one in found if not others.search(one)] == []
