"""Stands in front of vLLM (--middleware=dots_ocr_gate.Gate): what reading pages needs, and nothing else.

vLLM's key guards only paths that begin with /v1, and some of what its API takes ends its engine or keeps it from every
other page. So each request is looked at before vLLM sees it: its path, its key, its headers, and all of its body.
dots_ocr_gate.settings, beside this file, has the paths (plugins/filter/api_paths.py), the largest body, and the page
at / (client/src/dots_ocr_client/apps/serve.html).

Needs nothing but Python's standard library (3.9 or newer), so that it runs in any image.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

SETTINGS = Path(__file__).with_name("dots_ocr_gate.settings")
MEMORY = Path("/sys/fs/cgroup/memory.max")

# Of a request, what vLLM gets to see. From others it takes ids, priorities and ranks.
HEADERS = {b"accept", b"authorization", b"connection", b"content-length", b"content-type", b"host", b"user-agent"}

# Of the page: a browser loads nothing else, runs nothing and keeps nothing.
PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]

# A body has so long, and a second more for each of these; what comes more slowly only keeps memory from others.
BODY_SECONDS, BYTES_PER_SECOND = 30, 4 << 10  # the least rate of the gateway, too
# Of the container's memory, what requests in flight may take: their bodies, and their pictures unpacked.
SHARE, UNKNOWN_MEMORY = 4, 16 << 30
BYTES_PER_PIXEL = 3

# Values in a body: vLLM makes objects of each, of 10 million more than 6 GiB. A page has some twenty.
VALUES = 100_000
MESSAGES, PARTS, PICTURES = 256, 256, 1
CHARACTERS = 1_000_000  # of all texts; ten times what fits into the longest context
# What Pillow, which vLLM opens pictures with, warns of (PIL.Image.MAX_IMAGE_PIXELS); A3 at 600 dpi has 70 million.
PIXELS = 89_478_485
# Progressive JPEGs have some ten. Each is drawn over the whole picture: thousands keep a processor busy for minutes.
SCANS, SCANNED_PIXELS = 100, 1_000_000_000

MARKERS = 10_000  # in front of a picture's data; photographs have some hundred

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MARKER = re.compile(rb"\xff+([\x01-\xfe])")  # JPEG's; what stands between segments Pillow passes over
DATA_URL = re.compile(r"data:[\w.+/=;-]{0,200};base64\Z", re.ASCII)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Rule = tuple[str, Callable[[Any], bool]]


class Refusal(Exception):
    """An answer instead of vLLM's, in the shape of OpenAI's errors."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        """Take the status, OpenAI's type, what is wrong and how to correct it, and the body's key that is to blame."""
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": status}


def bad(message: str, param: str | None = None) -> Refusal:
    """Return the refusal of a body."""
    return Refusal(400, "BadRequestError", message, param)


def is_text(value: Any, most: int) -> bool:
    """Tell whether a value is text that can be written; JSON can hold halves of characters, which vLLM cannot."""
    return isinstance(value, str) and len(value) <= most and not re.search("[\ud800-\udfff]", value)


def text(most: int) -> Rule:
    """Allow text of so many characters."""
    return f"text of at most {most} characters", lambda value: is_text(value, most)


def whole(least: int, most: int) -> Rule:
    """Allow whole numbers in a range."""
    return f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float, *, above: bool = False) -> Rule:
    """Allow numbers in a range; `above`, the least is not part of it."""

    def fits(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most and not (above and value == least)

    return f"a number {'above' if above else 'from'} {least:g} {'and' if above else 'to'} {most:g} at most", fits


def listed(most: int, rule: Rule) -> Rule:
    """Allow a list of so many that are allowed."""
    what, fits = rule
    return (
        f"a list of at most {most}, each {what}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(fits, value)),
    )


def either(one: Rule, other: Rule) -> Rule:
    """Allow what one of two rules allows."""
    return f"{one[0]}, or {other[0]}", lambda value: one[1](value) or other[1](value)


def fields(rules: dict[str, Rule]) -> Rule:
    """Allow an object with these keys, each as its rule allows, or null."""
    what = ", ".join(f"{name}: {rule[0]}" for name, rule in rules.items())
    return (
        f"an object with nothing but {what}",
        lambda value: (
            isinstance(value, dict)
            and all(name in rules and (entry is None or rules[name][1](entry)) for name, entry in value.items())
        ),
    )


def only(*allowed: Any) -> Rule:
    """Allow these values alone."""
    what = " or ".join(json.dumps(value) for value in allowed)
    return what, lambda value: any(type(value) is type(one) and value == one for one in allowed)


FLAG: Rule = "true or false", lambda value: isinstance(value, bool)
TOKENS = whole(1, 2**31 - 1)  # more than the context has is refused by vLLM, which says how much that is
VOCABULARY = 151_936  # of dots.ocr (vocab_size in its config.json); an id beyond it ends the engine of vLLM before 0.32
PLACE = "<|imgpad|>"  # where the picture goes; the demonstration of dots.ocr writes it into the prompt
STRING = "text of 1 to 1000 characters", lambda value: is_text(value, 1000) and value != ""

# Of OpenAI's and vLLM's keys, those that reading pages needs, and null for any; then those that may say no more than
# the default. The others end or stop the engine of some vLLM (logprobs, echo, use_beam_search, structured outputs),
# take more memory than was planned (mm_processor_kwargs), or are of no use to OCR.
KEYS: dict[str, Rule] = {
    "model": text(256),
    "user": text(1000),
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
    "min_tokens": whole(0, 2**31 - 1),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": whole(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 10, above=True),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": either(STRING, listed(16, STRING)),
    "stop_token_ids": listed(64, whole(0, VOCABULARY - 1)),
    "include_stop_str_in_output": FLAG,
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
    "spaces_between_special_tokens": FLAG,
    "stream": FLAG,
    "stream_options": fields({"include_usage": FLAG, "continuous_usage_stats": FLAG}),
    "repetition_detection": fields(
        {"max_pattern_size": whole(0, 1024), "min_pattern_size": whole(0, 1024), "min_count": whole(0, 1024)}
    ),
    "n": only(1),
    "best_of": only(1),
    "length_penalty": only(1, 1.0),
    "parallel_tool_calls": FLAG,
    "service_tier": only("auto", "default"),
    "tools": only([]),
    "top_logprobs": only(0),
    "add_generation_prompt": only(True),
    "tool_choice": only("none", "auto"),
    "response_format": only({"type": "text"}),
    **dict.fromkeys(("store", "logprobs", "use_beam_search", "echo", "continue_final_message"), only(False)),
    **dict.fromkeys(("logit_bias", "metadata", "chat_template_kwargs", "mm_processor_kwargs"), only({})),
}
ROLES = ("system", "developer", "user", "assistant")
PICTURE = fields({"url": ("a data URL", lambda value: isinstance(value, str)), "detail": text(16)})


def check(body: bytes) -> int:
    """Return the bytes of memory that a request takes; raises Refusal unless it asks for what reading pages needs."""
    if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
        raise bad(f"The body has more than {VALUES} values. Fix: send one page, a picture and a prompt.")
    try:
        request = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError):
        fix = "Fix: send the JSON object of OpenAI's chat API."
        raise bad(f"The body is not JSON, or nested too deeply. {fix}") from None
    if not isinstance(request, dict):
        raise bad("The body is not a JSON object. Fix: send the one of OpenAI's chat API.")
    for name, value in request.items():
        if name == "messages" or value is None:
            continue
        if name not in KEYS:
            shown = name[:64].encode("ascii", "replace").decode()
            raise bad(f"This server reads pages and does not take {shown!r}. Fix: leave it out.", shown)
        what, fits = KEYS[name]
        if not fits(value):
            raise bad(f"{name} must be {what}. Fix: send that, or leave it out.", name)
    return len(body) + BYTES_PER_PIXEL * sum(map(pixels, pictures(request.get("messages"))))


def no_number(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which are no JSON."""
    raise ValueError(name)


def pictures(messages: Any) -> list[str]:
    """Return the addresses of the pictures; raises Refusal unless the messages are texts and so many pictures."""
    known = isinstance(messages, list) and len(messages) <= MESSAGES
    if not known or not all(isinstance(message, dict) for message in messages):
        raise bad(f"messages must be a list of at most {MESSAGES} objects. Fix: send a user's message.", "messages")
    texts, urls = [], []
    for message in messages:
        given = {name for name, value in message.items() if value is not None}
        if not given <= {"role", "content", "name"} or message.get("role") not in ROLES:
            keys = f"role, one of {', '.join(ROLES)}, content and name"
            raise bad(f"A message has {keys}. Fix: leave all else out.", "messages")
        content = message.get("content")
        parts = content if isinstance(content, list) else [] if content is None else [{"type": "text", "text": content}]
        texts.append(message.get("name") or "")
        for part in parts:
            kind, rest = take_apart(part)
            (texts if kind == "text" else urls).append(rest)
    if len(urls) > PICTURES:
        raise bad(f"At most {PICTURES} image(s) may be provided in one prompt. Fix: send each page by itself.", "image")
    if sum(text.count(PLACE) for text in texts if isinstance(text, str)) > len(urls):
        raise bad(f"There are more {PLACE} than pictures. Fix: leave them out.", "messages")
    known = len(texts) <= MESSAGES + PARTS and all(is_text(one, CHARACTERS) for one in texts)
    if not known or sum(map(len, texts)) > CHARACTERS:
        most = f"at most {CHARACTERS} characters in at most {PARTS} parts"
        raise bad(f"The texts must be {most}. Fix: send a shorter prompt.", "messages")
    return urls


def take_apart(part: Any) -> tuple[str, Any]:
    """Return the type of a part and its text or the address of its picture; raises Refusal for any other."""
    if isinstance(part, dict):
        if set(part) == {"type", "text"} and part["type"] == "text":
            return "text", part["text"]
        if set(part) == {"type", "image_url"} and part["type"] == "image_url":
            picture = part["image_url"]
            picture = {"url": picture} if isinstance(picture, str) else picture
            if PICTURE[1](picture) and picture.get("url") is not None:
                return "image_url", picture["url"]
    raise bad("A part is a text, or an image_url with its url. Fix: send these two types of OpenAI's API.", "messages")


def pixels(url: str) -> int:
    """Return how many pixels a picture has; raises Refusal unless it comes with the request, and is no trap."""
    spec, _, payload = url.partition(",")
    if not DATA_URL.match(spec):
        fix = "Fix: send the picture itself, as data:image/png;base64,…"
        raise bad(f"Pictures are fetched from no domain. {fix}", "image_url")
    scans = 1
    try:
        data = base64.b64decode(payload, validate=True)
    except ValueError:
        raise bad("image_url is not base64. Fix: encode the picture, without line breaks.", "image_url") from None
    if data.startswith(PNG):
        width, height = png_size(data)
    elif data.startswith(JPEG):
        width, height = jpeg_size(data)
        scans = data.count(b"\xff\xda")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        width, height = webp_size(data)
    else:
        raise bad("The picture is not a PNG, JPEG or WebP. Fix: convert it.", "image_url")
    if width * height > PIXELS:
        raise bad(f"The picture has {width} x {height} pixels, more than {PIXELS}. Fix: scale it down.", "image_url")
    if scans > SCANS or scans * width * height > SCANNED_PIXELS:
        raise bad(f"The JPEG has too many scans ({scans}). Fix: save it again, or as a PNG.", "image_url")
    return width * height


def png_size(data: bytes) -> tuple[int, int]:
    """Return the largest width and height that a PNG names before its first data: Pillow goes by the last."""
    width = height = 0
    place = len(PNG)
    for _ in range(MARKERS):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind in (b"", b"IDAT"):
            return width, height
        if kind == b"IHDR":
            width = max(width, int.from_bytes(data[place + 8 : place + 12], "big"))
            height = max(height, int.from_bytes(data[place + 12 : place + 16], "big"))
        place += 12 + length
    raise bad(f"The PNG has more than {MARKERS} chunks before its picture. Fix: save it again.", "image_url")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return the largest width and height that a JPEG names before its first scan, however much stands between."""
    width = height = place = 0
    for _ in range(MARKERS):
        found = MARKER.search(data, place)
        if found is None or found[1] == b"\xda":
            return width, height
        place, kind = found.end(), found[1][0]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            width = max(width, int.from_bytes(data[place + 5 : place + 7], "big"))
            height = max(height, int.from_bytes(data[place + 3 : place + 5], "big"))
        if kind > 0x01 and not 0xD0 <= kind <= 0xD9:  # those that say how long they are
            place += int.from_bytes(data[place : place + 2], "big")
    raise bad(f"The JPEG has more than {MARKERS} segments before its picture. Fix: save it again.", "image_url")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP by its first 30 bytes (RFC 9649, RFC 6386)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


class Gate:
    """The ASGI application in front of another one."""

    def __init__(self, app: App, settings: Path = SETTINGS) -> None:
        """Read the settings and the key that the container's first program exported."""
        known = json.loads(settings.read_bytes())
        self.app = app
        self.paths = {(one["method"], one["path"]): one for one in known["paths"]}
        self.most = known["max_body_mib"] << 20
        self.page = known["page"]
        key = os.environ.get("VLLM_API_KEY")
        self.key = hashlib.sha256(key.encode()).digest() if key else None
        self.room, self.held = memory() // SHARE, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self.hand_on(scope, receive, send)
            except Refusal as refusal:
                await answer(send, refusal)
        else:  # a websocket, or what is invented after it
            await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})

    async def hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let vLLM see a request that is allowed; raises Refusal."""
        known = self.paths.get((scope["method"], scope["path"]))
        if known is None:
            there = ", ".join(f"{method} {path}" for method, path in self.paths)
            raise Refusal(404, "NotFoundError", f"There is only {there}. Fix: ask for one of these.")
        if known["key"]:
            self.check_key([value for name, value in scope["headers"] if name == b"authorization"])
        headers = [(name, value) for name, value in scope["headers"] if name in HEADERS]
        scope = {**scope, "headers": headers, "query_string": b""}
        if scope["path"] == "/":
            return await self.show(scope, receive, send)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if mine != self.held and self.held + size > self.room:
                raise Refusal(503, "ServiceUnavailableError", "Too many pages wait. Fix: send it again later.")
            mine, self.held = mine + size, self.held + size

        try:
            body = await self.read(scope, receive, take)
            take(check(body) - len(body))
            await self.app(scope, replay(body, receive), send)
        except ConnectionAbortedError:
            pass  # nobody waits for an answer
        finally:
            self.held -= mine

    async def show(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the page, and whether vLLM is healthy; it reads nothing for that."""
        said: list[Any] = []

        async def note(message: Message) -> None:
            said.append(message.get("status"))

        await self.app({**scope, "path": "/health", "raw_path": b"/health", "headers": []}, receive, note)
        state = "ready · готов" if 200 in said else "not ready · не готов"
        await respond(send, 200, self.page.replace("$state", state), PAGE_HEADERS)

    def check_key(self, given: Collection[bytes]) -> None:
        """Raise Refusal unless the request brings the key, where there is one."""
        if self.key is None:
            return
        scheme, _, key = b"".join(given).partition(b" ")
        right = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self.key)
        if len(given) != 1 or scheme.lower() != b"bearer" or not right:
            message = "The API key is missing or wrong. Fix: send Authorization: Bearer KEY."
            raise Refusal(401, "AuthenticationError", message)

    async def read(self, scope: Scope, receive: Receive, take: Callable[[int], None]) -> bytes:
        """Return the body; raises Refusal if it is too large or slow, ConnectionAbortedError if it breaks off."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or len(announced) > 18 or int(announced) > self.most:
            raise self.too_large()
        chunks: list[bytes] = []
        clock = asyncio.get_running_loop().time
        size, end = 0, clock() + BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end + size / BYTES_PER_SECOND - clock()))
            except asyncio.TimeoutError:
                raise Refusal(408, "RequestTimeout", "The body did not arrive. Fix: send it again, faster.") from None
            if message["type"] != "http.request":
                raise ConnectionAbortedError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.most:
                raise self.too_large()
            take(len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def too_large(self) -> Refusal:
        """Return the refusal of a body."""
        fix = "Fix: send a smaller picture, or raise dots_ocr_server_max_body_mib."
        return Refusal(413, "RequestTooLarge", f"The body is larger than {self.most >> 20} MiB. {fix}")


def memory() -> int:
    """Return the bytes that the container may have."""
    try:
        return int(MEMORY.read_text())
    except (OSError, ValueError):  # it is max where there is no limit
        return UNKNOWN_MEMORY


def replay(body: bytes, receive: Receive) -> Receive:
    """Return what receives a body that was read before, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def answer(send: Send, refusal: Refusal) -> None:
    """Send a refusal."""
    headers = [(b"content-type", b"application/json")]
    if refusal.status != 400:
        headers.append((b"connection", b"close"))  # of its body something may be on its way
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status == 503:
        headers.append((b"retry-after", b"5"))
    await respond(send, refusal.status, json.dumps({"error": refusal.error}), headers)


async def respond(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Send a whole answer."""
    content = text.encode()
    headers = [*headers, (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
