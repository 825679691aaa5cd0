"""Running other programs, with their output visible, and fingerprints of what a build depends on."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class RehearsalError(Exception):
    """Something the rehearsal needs is missing or failed; the message says what to do."""


def say(text: str) -> None:
    """Print one line of progress at once, even into a pipe."""
    print(text, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Frame one long piece of work with its name and the seconds it took."""
    say(f"==> {title}")
    start = time.monotonic()
    yield
    say(f"    {title}: done in {time.monotonic() - start:.0f} s")


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    """Run a command with its output shown.

    Raises:
        RehearsalError: the command is not installed or exits with another status than 0.
    """
    words = [str(word) for word in command]
    try:
        subprocess.run(words, check=True, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise RehearsalError(f"{words[0]} is not installed: run 'make rehearse', which installs it") from error
    except subprocess.CalledProcessError as error:
        raise RehearsalError(f"failed with status {error.returncode}: {shlex.join(words)}") from error


def output(*command: str | Path) -> str:
    """Return what a command prints, without the last line break.

    Raises:
        RehearsalError: the command is not installed or exits with another status than 0; carries its error output.
    """
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        raise RehearsalError(f"{words[0]} is not installed: run 'make rehearse', which installs it")
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RehearsalError(f"failed with status {done.returncode}: {shlex.join(words)}\n{done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def succeeds(*command: str | Path) -> bool:
    """Tell whether a command exists and exits with status 0; its output is thrown away."""
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        return False
    return subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode == 0


def pins(lock: Path) -> dict[str, str]:
    """Return what a lock file with hashes pins: the lines of each package, by its name as the file spells it."""
    lines = "\n".join(line for line in lock.read_text().splitlines() if not line.startswith("#"))
    return {pin.partition("==")[0]: pin for pin in re.split(r"\n(?=\S)", lines.strip())}


def fingerprint(*sources: Path) -> str:
    """Return 12 hexadecimal digits that change when any of these files, or files in these folders, change."""
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            name = path.relative_to(REPOSITORY)
            if any(part == "__pycache__" or part.startswith(".") for part in name.parts):
                continue
            if path.is_symlink():
                digest.update(f"{name} -> {path.readlink()}\0".encode())
            elif path.is_file():
                digest.update(f"{name}\0{path.stat().st_mode & 0o111}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
