"""Keys of vendors, made by the real gpg."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest


class Key:
    """A key of gpg, with a home of its own."""

    def __init__(self, home: Path) -> None:
        """Make it."""
        home.mkdir(mode=0o700)
        self.home = home
        self.gpg("--quick-generate-key", "Vendor <vendor@example.invalid>", "ed25519", "sign", "never")
        self.fingerprint = re.findall("(?m)^fpr:+([0-9A-F]+):", self.gpg("--with-colons", "--list-keys").decode())[0]
        self.public = self.gpg("--export")

    def gpg(self, *words: str, text: str = "") -> bytes:
        """Run the real gpg."""
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--passphrase", "", *words]
        return subprocess.run(command, check=True, capture_output=True, input=text.encode()).stdout


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Key]:
    """The vendor's key, and another one."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: Key(folder / name) for name in ("vendor", "other")}
