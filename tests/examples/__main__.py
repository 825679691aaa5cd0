"""Run the tests of the client's examples and of its plugin for OCRmyPDF: `python -m tests.examples REPORT`.

Their packages are too many for the controller's environment: they are installed into a folder of their own.
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
    command = [sys.executable, "-m", "pytest", "tests/examples", f"--junitxml={Path(sys.argv[1]).resolve()}"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
