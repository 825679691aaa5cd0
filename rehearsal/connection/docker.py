"""Ansible's connection `docker` for hosts of the rehearsal: it enters a host's namespaces itself.

The usual plugin of that name starts `docker exec` for each of the thousands of commands of a scenario, at 43 ms of CPU.
Ansible takes this file where ANSIBLE_CONNECTION_PLUGINS names its folder (rehearsal/engine.py). Without it, and for
testinfra, the same inventories are reached by `docker exec`.
"""

from __future__ import annotations

import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: docker
short_description: enter the namespaces of a rehearsal host
description: Runs commands in the namespaces of a container's first process, as any user that the container has.
options:
  host:
    description: name of the container
    default: inventory_hostname
    vars: [{name: inventory_hostname}, {name: ansible_host}]
  remote_user:
    description: who the commands run as, unless they become somebody else
    default: root
    vars: [{name: ansible_user}]
    cli: [{name: user}]
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


def let_go_on(process: subprocess.Popen[bytes]) -> None:
    """Continue a process whenever it is stopped, until it has ended.

    A host that shuts down stops all that runs on it. nsenter then stops itself and would never look after its child
    again, and the kernel lets no host end before the last process that entered it is gone.
    """

    def watch() -> None:
        try:
            while True:
                os.waitid(os.P_PID, process.pid, os.WSTOPPED)
                os.kill(process.pid, signal.SIGCONT)
        except (ChildProcessError, ProcessLookupError):
            return

    threading.Thread(target=watch, daemon=True).start()


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

    def _run(self, command: list[str], data: bytes | None = None, ask: bool = False) -> tuple[int, bytes, bytes]:
        self._connect()
        user, environment = self.get_option("remote_user"), ENVIRONMENT
        if user != "root":
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--", *command]
            environment = {**ENVIRONMENT, "HOME": f"/home/{user}"}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [*self._nsenter, *command], stdin=pipe, stdout=pipe, stderr=pipe, env=environment
        ) as running:
            let_go_on(running)
            before = self._answer(running) if ask else (b"", b"")
            output, errors = map(bytes.__add__, before, running.communicate(data or b""))
        if running.returncode and errors.startswith(b"nsenter: "):
            self._connected = False
            raise AnsibleConnectionFailure(f"the host has ended: {errors.decode(errors='replace')}")
        return running.returncode, output, errors

    def _answer(self, running: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """Give the password when it is asked for; return output and errors so far, with the word that it was taken.

        Nothing else may be sent before that word: sudo-rs takes with the password whatever is there.
        """
        said: dict[Any, bytes] = {running.stdout: b"", running.stderr: b""}
        asked = False
        with selectors.DefaultSelector() as streams:
            for stream in said:
                streams.register(stream, selectors.EVENT_READ)
            while streams.get_map() and not self.become.check_success(said[running.stdout]):
                for key, _ in streams.select():
                    data = os.read(key.fd, 1 << 16)
                    said[key.fileobj] += data
                    if not data:
                        streams.unregister(key.fileobj)
                errors = said[running.stderr]
                if self.become.check_incorrect_password(errors):
                    running.kill()
                    raise AnsibleConnectionFailure(f"the password is wrong: {errors.decode(errors='replace')}")
                if not asked and self.become.check_password_prompt(errors):
                    asked = True
                    os.write(running.stdin.fileno(), self.become.get_option("become_pass").encode() + b"\n")
        return said[running.stdout], self.become.strip_become_prompt(said[running.stderr])

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:
        """Run a command line of the shell; return its status, output and error output."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        ask = bool(sudoable and self.become and self.become.expect_prompt())
        return self._run(["/bin/sh", "-c", cmd], in_data, ask)

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
