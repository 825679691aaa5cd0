"""What can be shown and written of texts that anybody may have written."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path


def printable(text: str) -> str:
    """Write what has no glyph (control characters, bytes of a name that is not UTF-8) as an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def encodable(text: str) -> str:
    """Replace what no UTF-8 file takes: halves of surrogate pairs, as far as they do not belong together; and NUL."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")


def count(number: int, noun: str) -> str:
    """Write a number and what it counts."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write(file: Path, parts: Iterable[str]) -> None:
    """Write a file that takes its name, and keeps its permissions, when it is whole; a pipe or device keeps its place.

    If it cannot be written (`OSError`), what was there still is.
    """
    file = file.resolve()
    if file.exists() and not file.is_file():
        unfinished = file
    else:  # short, because the name of the file itself may have all the 255 bytes that a name can have
        unfinished = file.with_name(f".dots-ocr-{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as output:
            output.writelines(parts)
        if file.is_file():
            unfinished.chmod(file.stat().st_mode)
        if unfinished != file:
            unfinished.replace(file)
    except BaseException:
        if unfinished != file:
            unfinished.unlink(missing_ok=True)
        raise
