"""The programs that the role puts on a host, called in this process: starting a Python takes longer than most tests."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

FILES = Path(__file__).resolve().parent.parent / "roles/dots_ocr_server/files"
LIMIT = 60  # seconds for a program, which only a hang reaches
Call = Callable[..., subprocess.CompletedProcess[str]]

sys.path.insert(0, str(FILES))


def load(name: str) -> Any:
    """Return a program, whose name has no extension, as a module."""
    loader = importlib.machinery.SourceFileLoader(name, str(FILES / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def _give_up(*_: object) -> None:
    raise TimeoutError(f"not ended after {LIMIT} s")


def call(program: Any, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call a program's main() as its command line would; return what a process of its own would leave."""
    mask = os.umask(0o022)
    # The certificates of the system are read for every request, which takes longer than all else; no test needs them.
    environment["SSL_CERT_FILE"] = os.devnull
    with (
        mock.patch.object(sys, "argv", [program.__file__, *words]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        before, timer = signal.signal(signal.SIGALRM, _give_up), signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            status = program.main() or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, *timer)  # pytest's, for the test
            os.umask(mask)
    return subprocess.CompletedProcess(words, status, output.getvalue(), errors.getvalue())


def run(program: Any, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a host does."""
    command = [program.__file__, *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LIMIT, env={**os.environ, **environment}
    )
