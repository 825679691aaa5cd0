from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from rehearsal.engine import SOCKET
from rehearsal.rehearse import API, HOST

sys.path.append(str(Path(__file__).parents[2] / "rehearsal/tiny_model"))

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
def sheets() -> list[tuple[Image.Image, str]]:
    """Ten pages that the tiny model can read, and the text of each."""
    from page import render_page

    texts = [[f"Page {number} of 10", "", f"Order No. 2026-{number * 7919:05d}"] for number in range(1, 11)]
    return [(render_page(lines), "\n".join(lines)) for lines in texts]
