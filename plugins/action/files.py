"""The controller's side of the module files: it reads what lies here, and fills in templates."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.plugins.loader import lookup_loader

Entry = dict[str, Any]


class ActionModule(ActionBase):  # type: ignore[misc]
    """Give the module contents in place of names of files."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: Entry | None = None) -> Entry:
        """Return the module's result."""
        super().run(tmp, task_vars)
        wanted = self._task.args.get("files") or []
        files = [entry for one in wanted for entry in self.contents(one, task_vars or {})]
        arguments = {**self._task.args, "files": files}
        name = self._task.action
        result: Entry = self._execute_module(module_name=name, module_args=arguments, task_vars=task_vars)
        return result

    def contents(self, wanted: Entry, task_vars: Entry) -> Iterator[Entry]:
        """Yield the entry with its content; for a folder one for each file and folder in it."""
        entry = dict(wanted)
        source, template, extra = (entry.pop(name, None) for name in ("src", "template", "vars"))
        if template:
            lookup = lookup_loader.get("ansible.builtin.template", loader=self._loader, templar=self._templar)
            # It copies its variables deeply, which takes longer than to fill in the template; not template_vars.
            paths = {"ansible_search_path": task_vars.get("ansible_search_path", [])}
            filled = {**task_vars, **(extra or {})}
            (entry["content"],) = lookup.run([template], variables=paths, template_vars=filled)
        if not source:
            yield entry
            return
        place = Path(self._find_needle("files", source))
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            path = str(Path(entry["path"], file.relative_to(place)))
            if file.is_dir():
                yield {name: entry[name] for name in ("owner", "group") if name in entry} | {
                    **{"path": path, "state": "directory"}
                }
            else:
                yield {**entry, "path": path, "base64": base64.b64encode(file.read_bytes()).decode()}
