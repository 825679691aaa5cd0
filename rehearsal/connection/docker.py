"""Ansible's connection `docker` for hosts of the rehearsal: it enters a host's namespaces itself.

The usual plugin of that name starts `docker exec` for each of the thousands of commands of a scenario, at 43 ms of CPU.
Ansible takes this file where ANSIBLE_CONNECTION_PLUGINS names its folder (rehearsal/engine.py). Without it, and for
testinfra, the same inventories are reached by `docker exec`.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: docker
short_description: enter the namespaces of a rehearsal host
description: Runs commands in the namespaces of a container's first process, as root of this machine.
options:
  host:
    description: name of the container
    default: inventory_hostname
    vars: [{name: inventory_hostname}, {name: ansible_host}]
  remote_user:
    description: who the commands run as; there is no other
    default: root
    vars: [{name: ansible_user}]
"""

# As `docker exec` sets it; the controller's own environment stays outside.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "container": "docker",
}


class Engine(http.client.HTTPConnection):
    """The API of the engine that carries the hosts."""

    def connect(self) -> None:
        """Connect to the socket that DOCKER_HOST names."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.environ["DOCKER_HOST"].removeprefix("unix://"))


class Connection(ConnectionBase):
    """One host."""

    transport = "docker"
    has_pipelining = True

    def _connect(self) -> Connection:
        if not self._connected:
            name = self.get_option("host")
            try:
                engine = Engine("engine")
                engine.request("GET", f"/containers/{name}/json")
                container = json.load(engine.getresponse())
                engine.close()
                process = container.get("State", {}).get("Pid", 0)
                # An engine in another virtual machine tells numbers of its own: never enter a process of this one.
                runs = process and container["Id"] in Path(f"/proc/{process}/cgroup").read_text()
            except (OSError, ValueError) as error:
                raise AnsibleConnectionFailure(f"the host {name} cannot be found: {error}") from error
            if not runs:
                raise AnsibleConnectionFailure(f"the host {name} does not run on this machine")
            namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")
            self._nsenter = ["nsenter", f"--target={process}", *namespaces, "--"]
            self._connected = True
        return self

    def _run(self, command: list[str], data: bytes | None = None) -> tuple[int, bytes, bytes]:
        self._connect()
        done = subprocess.run([*self._nsenter, *command], input=data or b"", capture_output=True, env=ENVIRONMENT)
        if done.returncode and done.stderr.startswith(b"nsenter: "):
            self._connected = False
            raise AnsibleConnectionFailure(f"the host has ended: {done.stderr.decode(errors='replace')}")
        return done.returncode, done.stdout, done.stderr

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:
        """Run a command line of the shell; return its status, output and error output."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        return self._run(["/bin/sh", "-c", cmd], in_data)

    def put_file(self, in_path: str, out_path: str) -> None:
        """Copy a file to the host."""
        super().put_file(in_path, out_path)
        status, _, error = self._run(["dd", f"of={out_path}", "bs=1M", "status=none"], Path(in_path).read_bytes())
        if status:
            raise AnsibleConnectionFailure(f"{out_path} cannot be written: {error.decode(errors='replace')}")

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Copy a file from the host."""
        super().fetch_file(in_path, out_path)
        status, content, error = self._run(["cat", in_path])
        if status:
            raise AnsibleConnectionFailure(f"{in_path} cannot be read: {error.decode(errors='replace')}")
        Path(out_path).write_bytes(content)

    def close(self) -> None:
        """Forget the host's process: it may be another after a reboot."""
        self._connected = False
