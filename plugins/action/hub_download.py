"""The controller's side of the module hub_download: call it until all is there, and show how far it has come."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def progress(name: str, done: int, total: int, rate: float) -> str:
    """Return one line on how far a transfer has come.

    Args:
        name: what is transferred.
        done: bytes that are there.
        total: bytes that shall be there.
        rate: bytes in a second.
    """
    unit, size = next((pair for pair in UNITS if total >= pair[1]), ("B", 1))
    digits = 0 if size == 1 else 1
    line = f"{name}: {done / size:.{digits}f} of {total / size:.{digits}f} {unit} ({100 * done // max(total, 1)} %)"
    if rate > 0:
        line += f", {rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s"
        line += f", {(total - done) / rate:.0f} s left" if done < total else ""
    return line


class ActionModule(ActionBase):  # type: ignore[misc]
    """Run the module in slices."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the last slice's result, with the bytes that all have received."""
        super().run(tmp, task_vars)
        arguments = self._task.args
        name = arguments.get("folder") or arguments.get("archive") or arguments.get("repository")
        host = (task_vars or {}).get("inventory_hostname", "")
        start, received = time.monotonic(), 0
        while True:
            result: dict[str, Any] = self._execute_module(
                module_name=self._task.action, module_args=arguments, task_vars=task_vars
            )
            received += result.get("bytes_received", 0)
            if result.get("bytes_received") and not self._task.no_log:
                rate = received / (time.monotonic() - start)
                line = progress(str(name), result["bytes_done"], result["bytes_total"], rate)
                Display().display(f"progress: [{host}] {line}")
            # Only a slice that has worked says that there is more to do: whatever else comes back ends it.
            if result.get("done", True):
                return {**result, "bytes_received": received}
