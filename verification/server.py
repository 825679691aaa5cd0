"""How the tests talk to the servers under test."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

import yaml
from testinfra.host import Host

DEFINITIONS = "/etc/dots-ocr/server"
PROGRAMS = "/usr/local/lib/dots-ocr"
DEFAULTS = yaml.safe_load((Path(__file__).parent.parent / "roles/dots_ocr_server/defaults/main.yml").read_text())

Settings = dict[str, Any]


def variable(host: Host, name: str) -> Any:
    """Return what the inventory sets for a variable of dots_ocr_server, or the role's default."""
    return host.ansible.get_variables().get(name, DEFAULTS[name])


def servers(host: Host) -> list[Settings]:
    """Return the settings of every server on the host, one for each GPU in use."""
    files = host.check_output("ls %s", DEFINITIONS).split()
    return [
        json.loads(host.check_output("cat %s", f"{DEFINITIONS}/{file}")) for file in files if file.endswith(".json")
    ]


def ready(host: Host, name: str, *, wait: int) -> Settings:
    """Run the readiness check on the host, waiting at most so many seconds; return its verdict."""
    with host.sudo():
        verdict: Settings = json.loads(host.run(shlex.join([f"{PROGRAMS}/ready", name, f"--wait={wait}"])).stdout)
    return verdict


def python(host: Host, program: str, **values: Any) -> Any:
    """Run a program on the host as root, with these values as its variables; return what it prints as JSON."""
    assignments = "\n".join(f"{name} = json.loads({json.dumps(json.dumps(value))})" for name, value in values.items())
    text = f"import json\n{assignments}\n{textwrap.dedent(program)}"
    with host.sudo():
        return json.loads(host.check_output("python3 -c %s", text))


def ask(host: Host, server: Settings, path: str, *, body: Settings | None = None, key: bool = True) -> tuple[int, str]:
    """Return status and body of a request that the host sends to its own server, with the API key or without."""
    status, text = python(
        host,
        """
        import pathlib, ssl, urllib.error, urllib.request
        headers = {"Content-Type": "application/json"}
        if key and server["api_key_file"]:
            headers["Authorization"] = "Bearer " + pathlib.Path(server["api_key_file"]).read_text().strip()
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(server["url"] + path, data, headers)
        try:
            answer = urllib.request.urlopen(request, timeout=300, context=ssl._create_unverified_context())
        except urllib.error.HTTPError as error:
            answer = error
        print(json.dumps([answer.status, answer.read().decode()]))
        """,
        server=server,
        path=path,
        body=body,
        key=key,
    )
    return status, text
