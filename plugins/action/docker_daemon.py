"""The controller's side of the module docker_daemon: most configurations are in place already."""

from typing import Any

from ansible.plugins.action import normal

from ..plugin_utils.seen import Seen

UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


class ActionModule(Seen, normal.ActionModule):  # type: ignore[misc]
    """Runs the module where it may have to change something."""

    places = (
        *("/etc/docker", "/var/lib/dots-ocr/installed/docker-daemon.json"),
        *(f"{folder}/docker.service{end}" for folder in UNITS for end in ("", ".d")),
    )
    returns = ("restart",)

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result, which may be the last one."""
        given = self._task.args.get("registry_ca", {})
        if not isinstance(given, dict):  # words, of which the module makes one
            return dict(normal.ActionModule.run(self, tmp, task_vars))
        self.places += tuple(path for path in map(str, given.values()) if path.startswith("/"))
        return super().run(tmp, task_vars)
