"""The examples: inventories and playbooks are valid, a program runs. tests/examples has those with big libraries."""

from __future__ import annotations

import json
import runpy
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dots_ocr_client import DotsOCR, make_engines
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
INVENTORIES = sorted(path.parent.name for path in EXAMPLES.glob("*/hosts.yml"))


@pytest.fixture
def password(tmp_path: Path) -> str:
    """The option with the password of examples/vault, which examples/README.md tells."""
    file = tmp_path / "password"
    file.write_text("example")
    return f"--vault-password-file={file}"


def run(*words: str) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_example_is_listed_in_the_readme() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yml")}
    listed = (EXAMPLES / "README.md").read_text()
    assert [
        name for name in sorted(files | {f"{name}/" for name in INVENTORIES}) if f"| `{name}` |" not in listed
    ] == []


@pytest.mark.parametrize("name", INVENTORIES)
def test_inventory_is_valid_and_its_settings_exist(name: str, password: str) -> None:
    """A misspelt setting would be ignored in silence."""
    told = json.loads(run("ansible-inventory", f"--inventory=examples/{name}", password, "--list"))
    assert told["ocr_servers"]["hosts"]
    known: set[str] = set()
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        known |= {line.split(":")[0] for line in file.read_text().splitlines() if line[:1].isalpha()}
    settings: dict[str, Any] = {}
    for host in told["_meta"]["hostvars"].values():
        settings |= host
    own = ("ansible_", "vault_", "_")
    assert [name for name in settings if name not in known and not name.startswith(own)] == []


def test_servers_of_the_fleet_admit_their_gateway_only() -> None:
    told = json.loads(run("ansible-inventory", "--inventory=examples/fleet", "--list"))
    about = told["_meta"]["hostvars"]
    gateways = [about[name]["ansible_host"] for name in told["ocr_gateways"]["hosts"]]
    admitted = [about[name].get("dots_ocr_server_allowed_networks") for name in told["ocr_servers"]["hosts"]]
    assert admitted == [gateways] * 4


def test_key_of_the_vault_reaches_the_role(password: str) -> None:
    told = json.loads(run("ansible-inventory", "--inventory=examples/vault", password, "--host=gpu1"))
    assert told["vault_dots_ocr_server_api_key"].startswith("an-example-key")


@pytest.mark.parametrize("playbook", sorted(path.name for path in EXAMPLES.glob("*.yml")))
def test_playbook_is_valid(playbook: str) -> None:
    run("ansible-playbook", "--syntax-check", "--inventory=examples/one-pc", f"examples/{playbook}")


def test_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the engine that needs no server; one broken file costs nothing but itself."""
    page = Image.open(ROOT / "roles/dots_ocr_server/files/golden/page.png").convert("L")
    page.save(tmp_path / "invoice.pdf", resolution=200)
    (tmp_path / "broken.pdf").write_bytes(b"no PDF")
    example = runpy.run_path(str(EXAMPLES / "read_folder.py"))["main"]
    tesseract = partial(DotsOCR, engines=make_engines(["tesseract"]))
    monkeypatch.setitem(example.__globals__, "DotsOCR", tesseract)
    assert example(tmp_path) == 1
    assert "broken.pdf: " in capsys.readouterr().err
    assert "Northwind" in (tmp_path / "invoice.md").read_text()
