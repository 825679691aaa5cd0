"""Ends an installation on Windows with the sentence that the package itself would end with."""

import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs before a wheel is built, which pip does of a checkout and of a source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Refuse Windows.

        Raises:
            RuntimeError: This is Windows.
        """
        if sys.platform == "win32":
            raise RuntimeError(
                "dots-ocr-client runs on Linux: install it inside WSL, together with the application that uses it"
            )
