"""The pages of the documentation: links, navigation, and that each command of the README is run or needs a card."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs/pages.py")
assert spec
assert spec.loader
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.splitlines()  # fmt: skip
PAGES = sorted(name for name in TRACKED if name.endswith(".md") and (ROOT / name).is_file())
README = (ROOT / "README.md").read_text()
MOST_WORDS = 20_000
# How each command of the README that needs no card is proven. `make` targets are asked of make besides.
PROVEN = {
    r"git clone \S+ dots-ocr && cd dots-ocr": "the tests run in a clone",
    r"make rehearse": "the part rehearse",
    r"make rehearse-down": "tests/__main__.py, after the chain",
    r"\.venv/bin/dots-ocr read roles/\S+ --engine tesseract --out read/": "run below",
    r"\.venv/bin/dots-ocr view read/page\.png\.json": "run below",
}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    for text in (piece for is_text, piece in pages.outside_of_code((ROOT / page).read_text()) if is_text):
        for link in pages.LINK.finditer(text):
            path = pages.target(page, link[1])
            if not (path in TRACKED and (ROOT / path).exists()) and not (ROOT / path).is_dir():
                wrong.append(f"{link[0]}: there is no {path}")
            elif link[2] and link[2][1:] not in pages.anchors(ROOT / path):
                wrong.append(f"{link[0]}: {path} has no such heading")
    assert wrong == []


def test_pages_that_programs_name_exist() -> None:
    wrong = []
    for name in TRACKED:
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or path.suffix in (".png", ".lock", ".safetensors"):
            continue
        for found in re.findall(r"(?<![\w./-])docs/[\w./-]+\.md\b(?!\.)", path.read_text(errors="replace")):
            if not (ROOT / found).is_file():
                wrong.append(f"{name}: {found}")
    assert wrong == []


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    def names(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from names(child)

    ours = [name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")]
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(names(nav)) == sorted([*ours, *pages.OUTSIDE.values()])


def test_documentation_is_short_enough_to_be_read() -> None:
    """Words outside of code and of what is generated."""
    counted = [name for name in PAGES if name.startswith("docs/") or name in ("README.md", "client/README.md")]
    words = 0
    for page in counted:
        text = "".join(piece for is_text, piece in pages.outside_of_code((ROOT / page).read_text()) if is_text)
        text = re.sub(r"<!-- BEGIN .*?<!-- END \w+ -->|<!-- Generated from .*", "", text, flags=re.DOTALL)
        words += sum(any(letter.isalnum() for letter in word) for word in text.split())
    assert words <= MOST_WORDS


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/contribute/testing.md", "docs/understand/how-it-works.md"])
def test_files_that_developers_are_sent_to_exist(page: str) -> None:
    """Of the names in code, those that begin with a folder of ours; NAME and … stand for what is not there yet."""
    folders = {name.split("/")[0] for name in TRACKED if "/" in name}
    text = (ROOT / page).read_text()
    named = [name.rstrip("/") for name in re.findall(r"`([\w.-]+/[\w./-]*)`", text) if name.split("/")[0] in folders]
    assert named
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_settings_that_the_documentation_names_exist() -> None:
    """Each must occur in a role, a playbook or an inventory: one that was renamed would be ignored in silence."""
    roles = "|".join(path.name for path in (ROOT / "roles").iterdir())
    setting = re.compile(rf"\b(?:{roles}|airgap|upgrade)_[a-z][a-z_]*\b")
    known: set[str] = set()
    for file in [path for place in ("roles", "playbooks", "rehearsal") for path in (ROOT / place).rglob("*.*")]:
        if file.suffix in (".yml", ".j2", ".py"):
            known |= set(setting.findall(file.read_text()))
    known |= {path.stem for path in ROOT.glob("playbooks/*.yml")}
    wrong = []
    for page in PAGES:
        named = set(re.findall(r"`[^`\n]*`", (ROOT / page).read_text()))
        wrong += [f"{page}: {name}" for code in named for name in setting.findall(code) if name not in known]
    assert sorted(wrong) == []


def test_readme_is_a_landing_page() -> None:
    assert len(README.splitlines()) < 150
    assert (ROOT / "docs/images/view.png").stat().st_size < 150_000


def test_every_command_of_the_readme_is_run_or_needs_a_card() -> None:
    blocks = re.findall(r"^```(?:sh|powershell)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    free = [block for block in blocks if not block.startswith("# needs a card\n")]
    commands = [line.split("  #")[0].strip() for block in free for line in block.splitlines()]
    assert len(blocks) == 3
    assert all(any(re.fullmatch(pattern, command) for command in commands) for pattern in PROVEN)
    assert [command for command in commands if not any(re.fullmatch(pattern, command) for pattern in PROVEN)] == []


# Windows PowerShell asks before it parses a page; the package is in no index; a base URL ends in /v1.
FAILING = re.compile(r"\biwr (?!.*-UseBasicParsing)|install '?dots-ocr-client\b|--base-url (?!https?://\S+/v1)")


def test_no_command_of_the_documentation_is_known_to_fail() -> None:
    lines = [(page, line) for page in PAGES for line in (ROOT / page).read_text().splitlines()]
    assert [f"{page}: {line}" for page, line in lines if FAILING.search(line)] == []


def test_targets_of_make_in_the_documentation_exist() -> None:
    known = set(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {word for words in known for word in words.split()}
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = set(re.findall(r"^(?:\$ |sudo )?make ([a-z][a-z-]*)", text, re.MULTILINE)) | set(
            re.findall(r"`make ([a-z][a-z-]*)", text)
        )
        assert named <= known, page


def test_the_first_page_is_read_and_shown_as_the_readme_says(tmp_path: Path) -> None:
    commands = [
        line for line in README.splitlines() if line.startswith(".venv/bin/dots-ocr") and "document" not in line
    ]
    assert len(commands) == 2
    (tmp_path / "roles").symlink_to(ROOT / "roles")
    for command in commands:
        words = shlex.split(command, comments=True)
        done = subprocess.run(
            [Path(sys.executable).with_name("dots-ocr"), *words[1:]],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "Northwind Paper Supply" in (tmp_path / "read/page.png.md").read_text()
    assert (tmp_path / "read/page.png.view.html").is_file()


def test_settings_of_the_readme_have_the_defaults_that_it_says() -> None:
    defaults: dict[str, Any] = {}
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        defaults |= yaml.safe_load(file.read_text())
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`|made on the host)", README, re.MULTILINE)
    assert [(name, yaml.safe_load(default) or "") for name, default in rows] == [
        (name, defaults[name] or "") for name, _ in rows
    ]
    assert len(rows) == 10
