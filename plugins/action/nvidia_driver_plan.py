"""The controller's side of the module nvidia_driver_plan: a good driver that others installed needs no plan."""

from contextlib import suppress
from typing import Any

from ansible.plugins.action import ActionBase

from ..module_utils.common import Problem
from ..modules.nvidia_driver_plan import System, Wishes, has_driver, make_plan


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs the module, unless what was measured shows that there is nothing to do."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result."""
        super().run(tmp, task_vars)
        arguments = self._task.args
        host, wishes = arguments["host"], Wishes(*(str(arguments.get(name, "")) for name in Wishes._fields))
        if has_driver(host) and not host["driver"]["ours"]:
            system = System({}, frozenset(), frozenset(), False, tuple(host["driver"]["reboot_wanted_by"]), False)
            with suppress(Problem):  # which the module will tell
                plan = make_plan(host, system, wishes)
                if not plan["faults"] and not plan["reboot"]:
                    return {"changed": False, "machine_id": "", "persistenced": False, **plan}
        return dict(self._execute_module(task_vars=task_vars))
