"""The output of a play: Ansible's own, but what failed is told once."""

DOCUMENTATION = r"""
name: once
type: stdout
short_description: Ansible's own output, with each failure told once
description: Of a failure that names its fix, only the message; of others, the result of the task. C(-v) shows all.
extends_documentation_fragment: [default_callback, result_format_callback]
author: The dots-ocr-deploy founders !UNKNOWN
"""

from typing import Any

from ansible.plugins.callback.default import CallbackModule as Default


class CallbackModule(Default):  # type: ignore[misc]
    """Shortens what Ansible's own says of a failure."""

    def _handle_exception(self, result: dict[str, Any], use_stderr: bool = False) -> None:
        own = str(result.get("msg")).startswith("Task failed: ") and not result.get("unreachable")
        if self._display.verbosity or own:
            super()._handle_exception(result, use_stderr)

    def _dump_results(self, result: dict[str, Any], *arguments: Any, **options: Any) -> str:
        said = str(result.get("msg", "")).strip()
        plain = "Fix:" in said and not self._display.verbosity and not result.get("_ansible_verbose_always")
        return said if plain else str(super()._dump_results(result, *arguments, **options))
