"""Where the server is, and its key: from the environment, or from the file that the role writes into the checkout."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Final

from ..credentials import bare
from ..errors import ConfigurationError

FILE: Final = ".dots-ocr.env"  # in the application's folder; readable by its owner alone

_folder: Path | None = None


def use(folder: Path) -> None:
    """Read the settings of an application in this folder from now on, at every use: a new key needs no restart."""
    global _folder
    _folder = folder


def folder() -> Path:
    """Return the application's folder; without `use`, the current one."""
    return _folder or Path()


def value(name: str) -> str | None:
    """Return a setting: that of the environment, or else that of the file; ``None`` if neither has one."""
    return os.environ.get(name) or (_read().get(name) if _folder else None)


def export() -> None:
    """Put what the file says into the environment, for a program that knows nothing but that."""
    for name in _read():
        os.environ[name] = value(name) or ""


def _read() -> dict[str, str]:
    try:
        lines = (folder() / FILE).read_text(encoding="utf-8-sig").splitlines()
        pairs = (line.partition("=") for line in map(bare, lines) if not line.startswith("#"))
        return {name.strip(): "".join(shlex.split(text)) for name, equals, text in pairs if equals}
    except OSError:
        return {}
    except ValueError:  # it quotes what it stands for
        raise ConfigurationError(
            f"{folder() / FILE} is not text in UTF-8, or lacks a quotation mark. Fix: write NAME=VALUE lines, the key "
            "without quotation marks, and save the file as UTF-8"
        ) from None
