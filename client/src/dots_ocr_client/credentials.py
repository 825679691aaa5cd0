"""Keys and passwords: checked where they come in, and hidden wherever the words of a server go out."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from .errors import ConfigurationError, InvalidKey

KEY_VARIABLE: Final = "DOTS_OCR_API_KEY"  # the environment's variable with the key of the server that is asked
KEY_FILE: Final = Path("/etc/dots-ocr/api-key")  # where the server's host has its key, for root alone
HIDDEN: Final = "***"  # what stands in the place of a secret
# A key of fewer characters is not hidden in what a page says (our own choice: ``test`` or ``none`` is a word, too).
SHORTEST: Final = 8
# How deeply JSON that a server says of itself may be nested (our own choice: that of vLLM has three levels).
DEEPEST: Final = 32

_AROUND: Final = re.compile(r"\A[\s\ufeff]+|[\s\ufeff]+\Z")
_QUOTED: Final = re.compile(r"""(["'])(.*)\1""", re.DOTALL)
_KEY: Final = re.compile(r"""(?!["'])[!-~]+(?<!["'])""")


def bare(text: str) -> str:
    """Return a setting without what editors and shells leave around it: line ends, spaces, a BOM, a pair of quotes."""
    text = _AROUND.sub("", text)
    quoted = _QUOTED.fullmatch(text)
    return text if quoted is None else _AROUND.sub("", quoted[2])


def read_key(text: str | None, origin: str = "the API key") -> str | None:
    """Return a key as it can be sent, without what stands around it (`bare`); ``None`` if there is none, or nothing.

    Raises:
        InvalidKey: It is not printable ASCII, or has spaces, lines or quotes in it, or nothing but these. The message
            says where it comes from (`origin`), and nothing of what it holds.
    """
    if text is None or text == "":
        return None
    key = bare(text) if isinstance(text, str) else ""
    if not _KEY.fullmatch(key):
        raise InvalidKey(
            f"{origin} is not one key: a key is printable ASCII without spaces, line breaks or quotation marks around "
            f"it. Fix: set {KEY_VARIABLE} (or api_key=) to the server's key alone, or to nothing if it has none"
        )
    return key


def key_of_this_host() -> str | None:
    """Return the key of the server on this host; ``None`` if there is none, or it is not for this user."""
    try:
        return read_key(KEY_FILE.read_text(encoding="utf-8", errors="replace"), str(KEY_FILE))
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    url: str  # with scheme and path, without user, password and a slash at the end: this may be shown
    host: str  # its name or number
    # User and password, if the base URL had them; they go as HTTP's basic authentication.
    login: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, base_url: str) -> Address:
        """Read a base URL.

        Raises:
            ConfigurationError: It is not an http or https URL, or has more than an address in it. The message shows no
                user, password or query.
        """
        text = bare(base_url)
        try:
            parts = urlsplit(text)
            scheme, host, _ = parts.scheme, parts.hostname, parts.port  # reading the port checks it
        except ValueError:
            scheme, host = "", None
        if scheme not in ("http", "https") or not host or not text.isprintable() or " " in text:
            raise ConfigurationError(
                f"{without_login(text)!r} is not a base URL: write it like http://127.0.0.1:8000/v1"
            )
        if "@" in parts.path or "?" in text or "#" in text:
            raise ConfigurationError(
                f"{without_login(text)!r} is not a base URL: it has a query, a fragment, or a password with one of "
                "/ ? # @ in it. Fix: write nothing behind the path, and these characters as %2F %3F %23 %40"
            )
        user, at, place = parts.netloc.rpartition("@")
        name, _, password = user.partition(":")
        login = (unquote(name), unquote(password)) if at else None
        return cls(parts._replace(netloc=place).geturl().rstrip("/"), host, login)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The login in the forms in which it may come back; a user without a password is a secret, too."""
        if self.login is None:
            return ()
        user, password = self.login
        pair = f"{user}:{password}"
        return pair, base64.b64encode(pair.encode()).decode(), *filter(None, (password or user,))


def without_login(url: str) -> str:
    """Return a base URL, sound or not, as it may be shown: without user, password, query and fragment."""
    before, at, rest = url.rpartition("@")
    if at:
        scheme, slashes, _ = before.partition("//")
        url = scheme + slashes + rest if slashes else rest
    return re.split("[?#]", url, maxsplit=1)[0]


class Secrets:
    """What must not be repeated, whoever repeats it."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """Take the keys and passwords, as they are sent."""
        found = tuple(secrets)
        self._in_words = _pattern(found)
        self._in_pages = _pattern(secret for secret in found if len(secret) >= SHORTEST)

    def hide(self, text: str) -> str:
        """Return what a server says of itself, or of a fault, without the secrets."""
        return self._in_words.sub(HIDDEN, text)

    def hide_in_page(self, text: str) -> str:
        """Return what a server says that a page says; secrets shorter than `SHORTEST` stay."""
        return self._in_pages.sub(HIDDEN, text)

    def hide_all(self, value: Any, depth: int = DEEPEST) -> Any:
        """Return JSON that a server says of itself without the secrets; short ones stay, since ids consist of words."""
        if isinstance(value, str):
            return self.hide_in_page(value)
        if not isinstance(value, dict | list):
            return value
        if depth == 0:
            raise ValueError("nested too deeply")
        if isinstance(value, list):
            return [self.hide_all(one, depth - 1) for one in value]
        return {self.hide_all(name): self.hide_all(one, depth - 1) for name, one in value.items()}


def _pattern(secrets: Iterable[str]) -> re.Pattern[str]:
    """Match the secrets as they are, and as JSON, Python, URLs and HTML write them; without any, nothing."""
    spelled = {
        form
        for secret in secrets
        for plain in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], html.escape(secret), quote(secret, safe=""))
        for form in (plain, plain.replace("/", r"\/"), quote(secret))
    }
    return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))) or "(?!)")
