"""Packages that a single part of the tests needs: in a folder of their own, not in the controller's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from rehearsal.shell import REPOSITORY, fingerprint, run

LOCK = REPOSITORY / "requirements.lock"


def folder(requirements: Path) -> Path:
    """Return a folder with what a file requires, in the versions of the lock; install it unless it is there."""
    place = REPOSITORY / ".cache/packages" / f"{requirements.stem}-{fingerprint(requirements, LOCK, Path(__file__))}"
    if not place.exists():
        growing = place.with_suffix(".growing")
        run(sys.executable, "-m", "pip", "install", "-qq", "--upgrade", "--no-compile", "--target", growing,
            "--constraint", LOCK, "--requirement", requirements)  # fmt: skip
        growing.rename(place)
    return place
