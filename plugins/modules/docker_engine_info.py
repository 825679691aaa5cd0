#!/usr/bin/python
"""Ansible module docker_engine_info: which Docker Engine is on a host, where it comes from, and what it runs."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: docker_engine_info
short_description: Which Docker Engine is on a host, and what it runs
description:
  - Looks without changing anything. What runs is asked of an engine that answers; what it keeps is counted in its
    folder, so that an engine that is stopped or broken does not look like an empty one.
  - Judges what an engine that answers says of itself (C(docker info)); C(problems) is why it cannot run the server.
options:
  set:
    description: Name of the set of packages with which M(dots_ocr.deploy.apt_set) installs an engine here.
    type: str
attributes:
  check_mode: {description: Foresees what it would change., support: full}
author: The dots-ocr-deploy founders !UNKNOWN
"""

EXAMPLES = r"""
- name: Look at the engine
  dots_ocr.deploy.docker_engine_info:
  register: engine
"""

RETURN = r"""
engine:
  description: The engine; C(origin) is package, snap, desktop, podman, other, or none.
  returned: always
  type: dict
  sample:
    program: /usr/bin/dockerd
    version: 28.5.2
    origin: package
    package: docker-ce
    package_version: 5:28.5.2-1~debian.13~trixie
    brought: true # by the set
    up: true # runs, and will at boot
    running: [web]
    containers: 2
    volumes: 1
    problems: [{problem: "Docker Engine runs rootless", fix: "use the engine of the host"}]
"""

from ..module_utils.common import answer
from ..module_utils.engine import look


def main() -> None:
    """Run the module."""
    answer({"set": {"type": "str"}}, lambda params, _: {"changed": False, "engine": look(params["set"])})


if __name__ == "__main__":
    main()
