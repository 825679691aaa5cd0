from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from rehearsal.engine import SOCKET
from rehearsal.rehearse import API, HOST

PAGE = Path(__file__).parents[2] / "rehearsal/tiny_model/page.py"

OnHost = Callable[..., str]


@pytest.fixture(scope="session")
def on_host() -> OnHost:
    """Run a command on the host and return what it prints."""

    def run(*words: str) -> str:
        command = ["docker", "--host", f"unix://{SOCKET}", "exec", HOST, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}\nIs it running? `make rehearse` starts it."
        return done.stdout

    return run


@pytest.fixture(scope="session")
def api_key(on_host: OnHost) -> str:
    return on_host("cat", "/etc/dots-ocr/api-key").strip()


@pytest.fixture(scope="session")
def base_url() -> str:
    return API


@pytest.fixture(scope="session")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Image.Image, str]]:
    """Ten pages that the tiny model can read, and the text of each."""
    file = tmp_path_factory.mktemp("sheets") / "page.png"
    sheets: list[tuple[Image.Image, str]] = []
    for number in range(1, 11):
        text = f"Page {number} of 10\n\nOrder No. 2026-{number * 7919:05d}"
        subprocess.run([sys.executable, PAGE, "render", file], input=text, text=True, check=True)
        sheets.append((Image.open(io.BytesIO(file.read_bytes())), text))
    return sheets
