"""Run the test of the client's example for Ray Data: `python -m tests.ray REPORT`.

Ray is too large for the controller's environment, and only the example needs it: it comes into a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rehearsal.shell import REPOSITORY, fingerprint, run

REQUIREMENTS = REPOSITORY / "client/examples/requirements-ray.txt"
LOCK = REPOSITORY / "requirements.lock"


def packages() -> Path:
    """Return a folder with Ray and what it needs, in the versions of the lock; install them unless it is there."""
    folder = REPOSITORY / ".cache/ray" / fingerprint(REQUIREMENTS, LOCK, Path(__file__))
    if not folder.exists():
        growing = folder.with_suffix(".growing")
        run(sys.executable, "-m", "pip", "install", "-qq", "--upgrade", "--target", growing,
            "--constraint", LOCK, "--requirement", REQUIREMENTS)  # fmt: skip
        growing.rename(folder)
    return folder


def main() -> int:
    """Return pytest's exit status."""
    places = [REPOSITORY / "client/src", REPOSITORY / "client/tests", packages()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-m", "pytest", "tests/ray", f"--junitxml={Path(sys.argv[1]).resolve()}"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
