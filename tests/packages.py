"""Packages that a single part of the tests needs: in a folder of their own, not in the controller's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from rehearsal.shell import REPOSITORY, fingerprint, run


def folder(lock: Path) -> Path:
    """Return a folder with what a lock names, files of these hashes only; install it unless it is there."""
    place = REPOSITORY / ".cache/packages" / f"{lock.parent.name}-{fingerprint(lock, Path(__file__))}"
    if not place.exists():
        growing = place.with_suffix(".growing")
        run(sys.executable, "-m", "pip", "install", "-qq", "--upgrade", "--no-compile", "--no-deps",
            "--target", growing, "--require-hashes", "--requirement", lock)  # fmt: skip
        growing.rename(place)
    return place
