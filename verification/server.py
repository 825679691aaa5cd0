"""How the tests talk to the server under test."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from testinfra.host import Host

UNIT = "dots-ocr.service"
CONTAINER = "dots-ocr"
DEFAULTS = yaml.safe_load((Path(__file__).parent.parent / "roles/dots_ocr_server/defaults/main.yml").read_text())


def setting(host: Host, name: str) -> Any:
    """Return what the inventory sets for a variable of dots_ocr_server, or the role's default."""
    return host.ansible.get_variables().get(name, DEFAULTS[name])


def port(host: Host) -> int:
    """Return the port of the API."""
    return int(setting(host, "dots_ocr_server_port"))


def ready(host: Host, *, wait: int) -> dict[str, Any]:
    """Run the readiness check on the host, waiting at most so many seconds; return its verdict."""
    model = setting(host, "dots_ocr_server_model_names")[0]
    likeness = setting(host, "dots_ocr_server_ready_likeness")
    options = [f"--url=http://127.0.0.1:{port(host)}", f"--model={model}", f"--likeness={likeness}"]
    options += [f"--unit={UNIT}", f"--wait={wait}"]
    verdict: dict[str, Any] = json.loads(host.run(shlex.join(["/usr/local/lib/dots-ocr/ready", *options])).stdout)
    return verdict


def get(host: Host, path: str) -> str:
    """Return the body of a GET request that the host sends to its own server; another status than 200 is an error."""
    url = f"http://127.0.0.1:{port(host)}{path}"
    program = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=30).read().decode())"
    return str(host.check_output("python3 -c %s", program))
