"""Run the test of the client's example for Ray Data: `python -m tests.ray REPORT`.

Ray is too large for the controller's environment, and only the example needs it: it comes into a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rehearsal.shell import REPOSITORY

from .. import packages

LOCK = Path(__file__).with_name("requirements.lock")


def main() -> int:
    """Return pytest's exit status."""
    places = [REPOSITORY / "client/src", REPOSITORY / "client/tests", packages.folder(LOCK)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-m", "pytest", "tests/ray", f"--junitxml={Path(sys.argv[1]).resolve()}"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
