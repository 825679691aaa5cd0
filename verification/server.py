"""How the tests talk to the server under test."""

from __future__ import annotations

import json
import shlex
from typing import Any

from testinfra.host import Host

UNIT = "dots-ocr.service"
CONTAINER = "dots-ocr"


def ready(host: Host, *, wait: int) -> dict[str, Any]:
    """Run the readiness check on the host, waiting at most so many seconds; return its verdict."""
    options = ["--url=http://127.0.0.1:8000", "--model=dots.ocr", f"--unit={UNIT}", f"--wait={wait}"]
    verdict: dict[str, Any] = json.loads(host.run(shlex.join(["/usr/local/lib/dots-ocr/ready", *options])).stdout)
    return verdict


def get(host: Host, path: str) -> str:
    """Return the body of a GET request that the host sends to its own server; another status than 200 is an error."""
    program = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000{path}', timeout=30).read().decode())"
    return str(host.check_output("python3 -c %s", program))
