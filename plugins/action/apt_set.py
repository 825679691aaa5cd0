"""The controller's side of the module apt_set: an installation may take long, and most are in place already."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from . import watched

MODULE = Path(__file__).resolve().parent.parent / "modules/apt_set.py"
# What the module looks at: the settings of apt, its lists, what dpkg knows, and the record of what the module brought.
PLACES = ("/etc/apt", "/var/lib/apt/lists", "/var/lib/dpkg/status", "/var/lib/dots-ocr/installed/{}.json")
LAST = "/run/dots-ocr-apt-set-{}"  # gone after a boot


class ActionModule(watched.ActionModule):
    """Runs the module, unless it last found the same wishes met and nothing has changed since."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result, which may be the last one."""
        arguments = dict(self._task.args)
        if arguments.get("state", "present") != "present" or arguments.get("upgrade"):
            return super().run(tmp, task_vars)
        wishes = hashlib.sha256((json.dumps(arguments, sort_keys=True) + MODULE.read_text()).encode()).hexdigest()
        last, *places = (shlex.quote(name.format(arguments.get("id"))) for name in (LAST, *PLACES))
        look = f"find {' '.join(places)} -printf '%p %T@ %s %m %l\\n' 2>/dev/null | LC_ALL=C sort"
        command = f"{{ echo {wishes}; {look}; }} | sha256sum; cat {last} 2>/dev/null"
        seen, _, known = self._low_level_execute_command(command)["stdout"].strip().partition("\n")
        if seen and known.startswith(seen):
            return dict(json.loads(known.removeprefix(seen)))
        result = super().run(tmp, task_vars)
        if "installed" in result and not (result["changed"] or result.get("failed") or self._task.check_mode):
            kept = json.dumps({name: result[name] for name in ("changed", "installed", "kept")})
            self._low_level_execute_command(f"umask 022; echo {shlex.quote(seen + kept)} >{last}")
        return result
