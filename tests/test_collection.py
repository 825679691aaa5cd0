"""The collection as it is handed out: what is in it, and that all of it is valid under its full names."""

from __future__ import annotations

import re
import subprocess
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import collection

REPOSITORY = Path(__file__).resolve().parent.parent
ROLES = sorted(path.name for path in (REPOSITORY / "roles").iterdir())
PLAYBOOKS = sorted(path.stem for path in (REPOSITORY / "playbooks").glob("*.yml"))
# What a deployment needs, and who reads about it.
NEEDED = (
    "meta/*", "playbooks/*", "plugins/*", "roles/*", "requirements.lock",
    "client/hatch_build.py", "client/pyproject.toml", "client/LICENSE", "client/README.md", "client/src/*",
    "examples/*.md", "examples/*.py", "examples/*.txt", "examples/*.yml",
    "docs/*.md", "docs/images/*", "CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md",
)  # fmt: skip
# Groups of other names than the usual ones.
INVENTORY = (
    "[gpus]\none\n[edge]\ntwo\n[watch]\nthree\n[ocr_servers]\nfour\n[ocr_gateways]\nfour\n[ocr_monitors]\nfour\n"
)
GROUPS = "dots_ocr_servers_group=gpus dots_ocr_gateways_group=edge dots_ocr_monitors_group=watch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the repository with the installed collection."""
    folder = tmp_path_factory.mktemp("operator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", collection.environment(folder))
        collection.install(folder)
    (folder / "inventory").write_text(INVENTORY)
    return folder


def play(folder: Path, *words: str) -> str:
    """Return what ansible-playbook says, run as an operator; fail if it does."""
    done = subprocess.run(
        ["ansible-playbook", "--inventory=inventory", *words],
        cwd=folder, env=collection.environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def load(playbook: str) -> list[dict[str, Any]]:
    """Return the plays of a playbook, those that it imports as what they are."""
    plays: list[dict[str, Any]] = yaml.safe_load((REPOSITORY / f"playbooks/{playbook}.yml").read_text())
    return plays


def test_tarball_has_what_is_needed_and_nothing_else(folder: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    there = [name for name in tracked if (REPOSITORY / name).is_file()]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as tar:
        names = {member.name for member in tar.getmembers() if not member.isdir()}
    wanted = {name for name in there if any(fnmatch(name, pattern) for pattern in NEEDED)}
    assert names == wanted | {"MANIFEST.json", "FILES.json"}
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in NEEDED)


def test_every_playbook_is_valid_by_its_full_name_and_knows_groups_of_other_names(folder: Path) -> None:
    said = play(folder, "--list-hosts", f"--extra-vars={GROUPS}", *(f"dots_ocr.deploy.{name}" for name in PLAYBOOKS))
    patterns = re.findall(r"play #\d+ \(([^)]*)\)", said)
    assert len(patterns) > len(PLAYBOOKS)
    assert set(patterns) == {"all", "gpus", "localhost"}


def test_every_readme_has_an_example_that_is_valid_outside_of_the_repository(folder: Path) -> None:
    said = play(folder, "--syntax-check", "site.yml", *(f"{role}.yml" for role in ROLES))
    assert said.split() == [word for name in ["site", *ROLES] for word in ("playbook:", f"{name}.yml")]
    assert all(f"role: dots_ocr.deploy.{role}\n" in (folder / f"{role}.yml").read_text() for role in ROLES)


def test_every_play_says_whether_it_gathers_facts() -> None:
    """An operator's ansible.cfg may have another default."""
    plays = {f"{name}: {play['name']}": play for name in PLAYBOOKS for play in load(name) if "hosts" in play}
    assert [name for name, play in plays.items() if "gather_facts" not in play] == []
