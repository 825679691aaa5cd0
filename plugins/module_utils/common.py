"""What all modules share: the exception for what a person has to fix, files, and other programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

RECORDS = Path("/var/lib/dots-ocr/installed")  # what absent needs to know


class Problem(Exception):
    """What a person has to fix; the message names the cause and the fix."""

    def __init__(self, cause: str, fix: str = "") -> None:
        """Put cause and fix together; a cause may have its fix in it."""
        super().__init__(f"{cause}. Fix: {fix}." if fix else f"{cause}.")


def answer(options: dict[str, Any], work: Callable[[dict[str, Any], bool], dict[str, Any]]) -> None:
    """Run a module that takes these options: it ends with what the work returns, or with its Problem.

    The work is given the parameters, and whether it is only to be foreseen.
    """
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    try:
        result = work(module.params, module.check_mode)
    except Problem as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(**result)


def decode(data: bytes) -> str:
    """Return a program's words; what is no UTF-8 in them does not matter."""
    return data.decode(errors="replace")


def run(
    *command: str,
    data: bytes = b"",
    timeout: float | None = None,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    decode: Callable[[bytes], str] = decode,
) -> tuple[int, str, str]:
    """Run a program, in English, and return its status, output and errors.

    The status is -1 if it cannot be run or does not end within the timeout, in seconds; then the errors say why.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    words = {**os.environ, "PATH": path, "LC_ALL": "C", **(environment or {})}
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=timeout, check=False, cwd=cwd, env=words
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, "", str(error)
    return done.returncode, decode(done.stdout), decode(done.stderr)


def ask(*command: str, timeout: float | None = None) -> str:
    """Return what a program prints; nothing if it fails or is missing."""
    status, output, _ = run(*command, timeout=timeout)
    return output if status == 0 else ""


def begun(*units: str) -> dict[str, float]:
    """Return when the program of each of these units that is active was started, in seconds since 1970."""
    properties = "--property=Id,ActiveState,ExecMainStartTimestamp"
    said = ask("systemctl", "show", "--timestamp=us+utc", properties, *units) if units else ""
    found = {}
    for block in said.split("\n\n"):
        unit = dict(line.split("=", 1) for line in block.splitlines())
        _, _, date = unit.get("ExecMainStartTimestamp", "").partition(" ")  # the day's name is not of our language
        if unit.get("ActiveState") == "active" and date:
            found[unit["Id"]] = datetime.fromisoformat(date.replace(" UTC", "+00:00")).timestamp()
    return found


def is_newer(path: Path, began: float | None) -> bool:
    """Tell whether a file was written after a program was started, which then does not know it yet."""
    return began is not None and path.is_file() and began < path.stat().st_mtime <= time.time()


def together(*works: Callable[[], Any]) -> list[Any]:
    """Do work that waits for other programs at the same time, and return the results in this order."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def require(*command: str) -> str:
    """Return what a program prints; that it fails is a Problem."""
    status, output, errors = run(*command)
    if status != 0:
        said = " ".join((errors or output).split()) or f"status {status}"
        raise Problem(f"'{' '.join(command)}' failed: {said.rstrip('.')}", "correct that, then run again")
    return output


def read(path: Path) -> bytes | None:
    """Return what is in a file, or None without one."""
    return path.read_bytes() if path.exists() else None


def read_text(path: Path | str) -> str:
    """Return a file's text; nothing of one that cannot be read."""
    try:
        return decode(Path(path).read_bytes())
    except OSError:
        return ""


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def write(
    path: Path,
    content: bytes | str | None,
    mode: int = 0o644,
    *,
    keep: bool = False,
    own: Callable[[Path], object] | None = None,
    real: bool = True,
) -> bool:
    """Write a file in one go, or remove it without content; tell whether that changes it.

    Args:
        path: the file; its folder is made if need be.
        content: a text is written as UTF-8.
        mode: of a file that is new, or that is not kept as it is.
        keep: a file that is there keeps its mode, owner and attributes, and a link in its place stays.
        own: gives the new file its owner and mode instead, before it takes the place of the old one.
        real: whether anything is done, as it is not in check mode.
    """
    path = Path(os.path.realpath(path)) if keep else path
    data = content.encode() if isinstance(content, str) else content
    if read(path) == data and not path.is_symlink():
        return False
    if not real:
        return True
    if data is None:
        path.unlink()
        return True
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    new = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)  # or a power failure could leave it empty
        # On a drive of Windows there may be no owners and modes.
        with contextlib.suppress(PermissionError):
            if own:
                own(new)
            elif keep and path.exists():
                there = path.stat()
                os.chown(new, there.st_uid, there.st_gid)
                shutil.copystat(path, new)  # access lists and SELinux's label, too
                os.utime(new)
            else:
                new.chmod(mode)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return True


def remove_empty(*folders: Path) -> None:
    """Remove those of the folders that are there and empty, in this order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
