"""Runs what may take long, and shows now and then how far it is."""

import copy
import shlex
import threading
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

SECONDS = 20  # until the first word, and from each to the next
APT = (
    'echo "$(du -ch /var/cache/apt/archives /var/lib/apt/lists/partial | tail -n 1 | cut -f 1) fetched;'
    ' last in dpkg.log: $(tail -n 1 /var/log/dpkg.log)"'
)
# How far programs have read the large files that they have open.
READS = (
    "for process in $(pgrep --exact '{}'); do for open in $(find -L /proc/$process/fd -type f -size +1M); do"
    " set -- $(cat /proc/$process/fdinfo/${{open##*/}});"
    ' echo "$(basename "$(readlink $open)"): $((100 * $2 / $(stat --dereference --format %s $open))) %"; done; done'
)


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs a shell's command, or a module."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result."""
        super().run(tmp, task_vars)
        arguments, ended = dict(self._task.args), threading.Event()
        name = arguments.pop("module", self._task.action)
        reads = arguments.pop("reads", None)
        watch = READS.format(reads) if reads else arguments.pop("watch", APT)
        plain = set(arguments) <= {"cmd", "chdir"}
        if "cmd" in arguments and not plain:
            name = "ansible.legacy.command"
            arguments |= {"_raw_params": arguments.pop("cmd"), "_uses_shell": True}
        beside = threading.Thread(target=self.show, args=(watch, task_vars, ended), daemon=True)
        beside.start()
        try:
            if plain:
                return self.shell(**arguments)
            return dict(self._execute_module(module_name=name, module_args=arguments, task_vars=task_vars))
        finally:
            ended.set()
            beside.join(SECONDS)

    def shell(self, cmd: str, chdir: str | None = None) -> dict[str, Any]:
        """Run the command without a module, whose Python takes longer to start than most commands to run."""
        if self._task.check_mode:
            return {"changed": True, "skipped": True, "rc": 0, "msg": "Command would have run if not in check mode"}
        words = f"{self._compute_environment_string()} /bin/sh -c {shlex.quote(cmd)}"
        # With data, if only a line, ssh asks for no terminal, on which errors would be among the output.
        done = self._low_level_execute_command(words, in_data=b"\n", chdir=chdir and shlex.quote(chdir))
        failed = {"failed": True, "msg": "non-zero return code"} if done["rc"] else {}
        return {"changed": True, "cmd": cmd, **done, **failed}

    def show(self, watch: str, known: dict[str, Any], ended: threading.Event) -> None:
        """Show how far it is until it has ended, through a connection that shares no state with the module's."""
        other, began = copy.copy(self), time.monotonic()
        other._connection = copy.copy(self._connection)
        other._connection.become = copy.copy(self._connection.become)
        while not ended.wait(float(known.get("_dots_ocr_watch_seconds", SECONDS))):
            said = " ".join(other._low_level_execute_command(watch)["stdout"].split())
            passed = f"{time.monotonic() - began:.0f} s so far"
            Display().display(f"{known['inventory_hostname']}: {self._task.get_name()}: {passed}. {said}")
