"""Ansible filter api_paths: what the OCR API answers, and nothing beside it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: api_paths
short_description: Name the paths that the OCR API answers
version_added: 0.1.0
description:
  - The one list of what may be asked. The server's container has it in front of vLLM, the gateway in front of the
    servers; each answers 404 to all else.
options:
  _input:
    description: Who answers, C(server) or C(gateway). What only the server's own host needs, the gateway does not have.
    type: str
    choices: [server, gateway]
    required: true
"""

EXAMPLES = r"""
- name: Show the paths
  ansible.builtin.debug:
    msg: "{{ 'gateway' | dots_ocr.deploy.api_paths | map(attribute='path') }}"
"""

RETURN = r"""
_value:
  description: C(name), C(method) and C(path) of each, and whether it needs the API C(key).
  type: list
  elements: dict
"""

from typing import Any

from ansible.errors import AnsibleFilterError

PATHS = (
    {"name": "pages", "method": "POST", "path": "/v1/chat/completions", "key": True},
    {"name": "models", "method": "GET", "path": "/v1/models", "key": True},
    {"name": "health", "method": "GET", "path": "/health", "key": False},
    {"name": "start", "method": "GET", "path": "/", "key": False},
)
# The monitoring and the watchdog read the metrics; the client looks at the version for what the server can do.
OF_SERVERS = (
    {"name": "metrics", "method": "GET", "path": "/metrics", "key": False},
    {"name": "version", "method": "GET", "path": "/version", "key": False},
)
BY = {"gateway": PATHS, "server": PATHS + OF_SERVERS}


def api_paths(who: str) -> list[dict[str, Any]]:
    """Return what `server` or `gateway` answers; raises AnsibleFilterError for anybody else."""
    if who not in BY:
        raise AnsibleFilterError(f"api_paths: nobody is called {who!r}. Fix: {' or '.join(BY)}.")
    return [dict(path) for path in BY[who]]


class FilterModule:
    """Hands the filter to Ansible."""

    def filters(self) -> dict[str, Any]:
        """Return the filters of this file."""
        return {"api_paths": api_paths}
