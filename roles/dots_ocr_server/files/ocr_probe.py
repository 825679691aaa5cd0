"""What the programs beside this file share: a server's settings, requests to it, reading a page, its metrics, its unit.

Needs nothing but Python's standard library (3.9 or newer), so that any host can run it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import ssl
import subprocess
import urllib.parse
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

SETTINGS = Path("/etc/dots-ocr/server")
WATCHDOG = Path("/var/lib/dots-ocr/watchdog")
FRONT = Path("/run/dots-ocr-front")

# The page whose text is known, and the tokens that its answer may have; it takes some 250.
GOLDEN = Path(__file__).resolve().parent / "golden/page.png"
GOLDEN_TOKENS = 1024

# dots.ocr's trained prompt for plain text, behind the image's placeholder, which must stand there exactly once.
PROMPT = "<|img|><|imgpad|><|endofimg|>Extract the text content from this image."

IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
ANSWER_BYTES = 64 << 20
# No page has more; the time that compare() takes grows with the square.
TEXT_CHARACTERS = 200_000
# A shorter key may be a word that JSON needs; those that Ansible makes are longer.
SHORTEST_HIDDEN = 8
SYSTEMCTL_SECONDS = 15
DIAGNOSES = Path(__file__).resolve().parent / "diagnoses.json"
EVIDENCE_LENGTH = 300  # characters
RESTART_SCHEDULED = "5eb03494b6584870a536b337290809b3"  # systemd's id of that message (sd-messages.h)

REDEPLOY = "run 'ansible-playbook site.yml'."
FOREIGN = "find out which program listens at this port."
WAIT = "wait; if it lasts, look at the unit's journal."


class Problem(Exception):
    """What is wrong and what fixes it: (problem, fix)."""


class NotYet(Problem):
    """It may pass by itself."""


class Busy(NotYet):
    """The server takes no more requests for now."""


class TimedOut(NotYet):
    """The server took too long."""


class Failed(Problem):
    """Waiting will not help; if the journal says why, there is more: (problem, fix, diagnosis)."""


class Refused(Failed):
    """The server does not accept the API key, which says nothing about its health."""


@dataclass(frozen=True)
class Server:
    """One server instance, as Ansible wrote it down."""

    name: str
    unit: str
    url: str
    model: str
    likeness: float
    api_key_file: str
    key: str = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    file: Path


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a server on the command line."""
    parser.add_argument("name", type=server_name, metavar="NAME", help="of the server, such as dots-ocr or dots-ocr@0")
    parser.add_argument("--settings-folder", type=Path, default=SETTINGS, help="where Ansible wrote NAME.json")


def server_name(text: str) -> str:
    """Return the text if a server may have that name."""
    if not re.fullmatch(r"[A-Za-z0-9_.@:-]+", text):
        raise ValueError(text)
    return text


def load_server(name: str, folder: Path, *, keyless: bool = False) -> Server:
    """Return the settings of a server, with its key unless it is not needed; raises Failed.

    Of one that runs on demand, the URL is that behind its front: to ask it neither wakes it nor counts as use.
    """
    file = folder / f"{name}.json"
    try:
        settings = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        others = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
        raise Failed(f"There is no {file}; servers on this host: {others}.", REDEPLOY) from error
    except OSError as error:
        raise Failed(f"{file} cannot be read ({error.strerror}).", "run this as root.") from error
    except ValueError as error:
        raise Failed(f"{file} is not JSON.", "run '/usr/local/lib/dots-ocr/state restore good'.") from error
    on_demand = settings.get("on_demand") if isinstance(settings, dict) else None
    url = setting(file, *((on_demand, "behind") if on_demand else (settings, "url")), str).rstrip("/")
    if not re.match(r"https?://[^/]", url):
        raise Failed(f"{file} has no usable 'url'.", REDEPLOY)
    key_file = setting(file, settings, "api_key_file", str)
    return Server(
        name=name,
        unit=setting(file, settings, "unit", str),
        url=url,
        model=setting(file, settings, "model", str),
        likeness=setting(file, settings, "likeness", float),
        api_key_file=key_file,
        key=load_key(Path(key_file)) if key_file and not keyless else "",
        settings=settings,
        file=file,
    )


def setting(file: Path, settings: Any, name: str, kind: type) -> Any:
    """Return one setting of the kind str, list, dict, int or float, numbers not negative; raises Failed."""
    value = settings.get(name) if isinstance(settings, dict) else None
    usable = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if usable and isinstance(value, (int, float)):
        usable = 0 <= value < math.inf
    if not usable:
        raise Failed(f"{file} has no usable '{name}'.", REDEPLOY)
    return value


def load_key(file: Path) -> str:
    """Return the API key; raises Failed, which never quotes it."""
    try:
        key = file.read_text(encoding="ascii").strip()
    except OSError as error:
        fix = f"run this as root; if root cannot read it either, {REDEPLOY}"
        raise Failed(f"The API key in {file} cannot be read ({error.strerror}).", fix) from None
    except ValueError:
        key = ""
    if not re.fullmatch(r"[!-~]+", key):
        raise Failed(f"{file} does not hold one API key, printable and without spaces.", REDEPLOY)
    return key


def connect(url: urllib.parse.SplitResult) -> http.client.HTTPConnection:
    """Return a connection to a server: no proxy has a say, and the key follows no redirect."""
    if url.scheme == "http":
        return http.client.HTTPConnection(url.netloc)
    context = ssl.create_default_context()
    # The server's own certificate need not name this address, and what goes to this very machine passes no network.
    if is_own_address(url.hostname or ""):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(url.netloc, context=context)


def is_own_address(host: str) -> bool:
    """Tell whether a host is this machine: only then can a socket be bound to its address."""
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimedOut when the body takes longer; a socket's own timeout would start again with each byte."""

    def expire(_signal: int, _frame: FrameType | None) -> None:
        raise TimedOut(f"{what} does not answer within {seconds:.0f} s.", WAIT)

    before = signal.signal(signal.SIGALRM, expire)
    # Again each second, should the first one hit where Python ignores exceptions.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # the tests have one


def ask(server: Server, path: str, seconds: float, body: Any = None) -> bytes:
    """Return the answer to a GET, or to a POST of a body as JSON; raises NotYet or Failed."""
    url = server.url + path
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    try:
        parts = urllib.parse.urlsplit(url)
        with time_limit(seconds, url), contextlib.closing(connect(parts)) as connection:
            connection.request(method, parts.path, data, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read(ANSWER_BYTES)
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = hide(server, repr(error).encode()).decode()[:500]
        raise NotYet(f"{url} does not answer: {why}.", WAIT) from error
    if 200 <= status < 300:
        return hide(server, answer) if len(server.key) >= SHORTEST_HIDDEN else answer
    said = " ".join(hide(server, answer).decode(errors="replace").split())[:500]
    if status in (401, 403):
        sent = f"the API key in {server.api_key_file}" if server.key else "a request without an API key"
        fix = f"{REDEPLOY[:-1]}, which starts the server with the key that is in the file."
        raise Refused(f"{url} answers {status}: the server refuses {sent}.", fix)
    if status in (429, 503):
        raise Busy(f"{url} answers {status}: {said}.", WAIT)
    if status >= 500:
        raise NotYet(f"{url} answers {status}: {said}.", WAIT)
    fix = f"look at 'journalctl -u {server.unit}'; another program may listen at this port."
    raise Failed(f"{url} answers {status}: {said}.", fix)


def hide(server: Server, said: bytes) -> bytes:
    """Return what a server said without the API key, as it is and as JSON and Python write it."""
    written = json.dumps(server.key)[1:-1]
    for form in (server.key, written, written.replace("/", "\\/"), repr(server.key)[1:-1]) if server.key else ():
        said = said.replace(form.encode(), b"***")
    return said


def ask_json(server: Server, path: str, seconds: float, body: Any = None) -> Any:
    """Return the answer as JSON; raises NotYet or Failed."""
    try:
        return json.loads(ask(server, path, seconds, body))
    except (ValueError, RecursionError) as error:
        raise Failed(f"{server.url}{path} does not answer in JSON.", FOREIGN) from error


@contextlib.contextmanager
def openai_api(server: Server) -> Iterator[None]:
    """Raise Failed for an answer that has not the parts that OpenAI's API has."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        why = repr(error)[:500]
        raise Failed(f"{server.url} answers in JSON, but not as OpenAI's API does: {why}.", FOREIGN) from error


def check_model(server: Server, seconds: float) -> int | None:
    """Raise NotYet or Failed unless the server serves the model; return its context length if the server tells."""
    listing = ask_json(server, "/v1/models", seconds)
    with openai_api(server):
        served = {str(entry["id"]): entry.get("max_model_len") for entry in listing["data"]}
    if server.model not in served:
        other = "an image that ignores its arguments, or that was started without a model, serves some other one"
        fix = f"check dots_ocr_server_image and dots_ocr_server_model_names; {other}."
        found = f"serves {', '.join(served)[:500]} instead of {server.model}"
        raise Failed(f"The server at {server.url} is healthy but {found}.", fix)
    length = served[server.model]
    return length if isinstance(length, int) else None


def data_url(image: Path) -> str:
    """Return a PNG or JPEG file as a data URL; raises Failed."""
    try:
        data = image.read_bytes()
    except OSError as error:
        raise Failed(f"{image} cannot be read ({error.strerror}).", "make it readable.") from error
    for magic, kind in IMAGE_TYPES.items():
        if data.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    raise Failed(f"{image} is neither PNG nor JPEG.", "convert it.")


def read_page(server: Server, image: Path, tokens: int, seconds: float) -> tuple[str, bool]:
    """Return what the model reads on a page, and whether so many tokens cut it off; raises NotYet or Failed."""
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": content}]
    body = {"model": server.model, "messages": messages, "temperature": 0.0, "max_completion_tokens": tokens}
    answer = ask_json(server, "/v1/chat/completions", seconds, body)
    with openai_api(server):
        choice = answer["choices"][0]
        # JSON can hold halves of characters, which no file can.
        text = str(choice["message"]["content"] or "").encode(errors="replace").decode()
        return text[:TEXT_CHARACTERS], choice.get("finish_reason") == "length"


def read_golden_page(server: Server, least_likeness: float, seconds: float) -> float:
    """Return the likeness of what the model reads on the built-in golden page; raises NotYet or Failed."""
    text, _ = read_page(server, GOLDEN, GOLDEN_TOKENS, seconds)
    likeness = compare(text, GOLDEN.with_suffix(".txt").read_text(encoding="utf-8"))
    if likeness < least_likeness:
        raise Failed(
            f"{server.model} misreads the golden page: likeness {likeness:.3f} of {least_likeness}."
            f" It read: {text[:2000]!r}.",
            "check that weights and image belong together and that --chat-template-content-format is string; if what it"
            " read is good enough, lower dots_ocr_server_ready_likeness.",
        )
    return likeness


def compare(text: str, expected: str) -> float:
    """Return the likeness of two texts, 0.0 to 1.0; white space is layout and does not count.

    Twice the length of the longest common subsequence, by the length of both together, as difflib's ratio() estimates.
    """
    first, second = "".join(text.split()), "".join(expected.split())
    if not first and not second:
        return 1.0
    # Hyyrö's bit-parallel algorithm (2004): a page of 30,000 characters takes a tenth of a second, difflib minutes.
    places: dict[str, int] = {}
    for index, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for character in second:
        matches = row & places.get(character, 0)
        row = ((row + matches) | (row - matches)) & everything
    common = bin(row ^ everything).count("1")
    return 2 * common / (len(first) + len(second))


class Sample(NamedTuple):
    """One line of Prometheus' text format."""

    name: str
    labels: dict[str, str]
    value: float


def parse_metrics(text: str) -> list[Sample]:
    """Return the samples of a page of metrics; lines that are none are left out."""
    samples = []
    for line in text.splitlines():
        match = re.fullmatch(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*", line)
        if not match:
            continue
        with contextlib.suppress(ValueError):
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            samples.append(Sample(match[1], labels, float(match[3])))
    return samples


def total(samples: list[Sample], name: str, without: Collection[str] = ()) -> float | None:
    """Return a metric's sum over its labels, leaving out these reasons to finish; None if there is no such metric."""
    values = [
        sample.value
        for sample in samples
        if sample.name == name and sample.labels.get("finished_reason") not in without and math.isfinite(sample.value)
    ]
    return sum(values) if values else None


def unit_properties(unit: str, *names: str) -> dict[str, str]:
    """Return properties of a systemd unit; none if systemd does not answer."""
    lines = run("systemctl", "show", f"--property={','.join(names)}", unit).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


class Entry(NamedTuple):
    """One entry of the journal, with the invocation of the unit that it belongs to."""

    text: str
    invocation: str
    message_id: str
    time: float  # since 1970, in seconds


def journal(unit: str, since: str, until: str = "", *more: str) -> list[Entry]:
    """Return a unit's entries, oldest first, between times as journalctl takes them; none if there is no journal."""
    entries: list[Entry] = []
    words = ["--since", since, *["--until", until] * bool(until), *more]
    for line in run("journalctl", "--unit", unit, *words, "--output=json", "--all", "--no-pager").splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            found = json.loads(line)
            # A list of bytes where it is no plain text, such as a progress bar.
            text = found.get("MESSAGE") or ""
            text = bytes(text).decode(errors="replace") if isinstance(text, list) else text
            # What systemd says of the unit has the first, what the unit itself says the second; what a process said
            # that ended at once may have neither.
            invocation = found.get("INVOCATION_ID") or found.get("_SYSTEMD_INVOCATION_ID")
            before = entries[-1].invocation if entries else ""
            time = int(found.get("__REALTIME_TIMESTAMP", 0)) / 1e6
            entries.append(Entry(text, invocation or before, found.get("MESSAGE_ID", ""), time))
    return entries


def diagnose(
    server: Server, entries: list[Entry], problem: str, *, late: bool = False, sure: bool = True
) -> Failed | None:
    """Return what the first entry of diagnoses.json says that knows what the journal of a run says, if one does.

    A run that is late continues, all others have failed; sure is what failed often enough not to pass by itself.
    """
    said = "\n".join(entry.text for entry in entries)
    for known in json.loads(DIAGNOSES.read_text(encoding="utf-8")):
        found = re.search(known["pattern"], said) if late or not known.get("late") else None
        if not found:
            continue
        if known.get("may_pass") and not sure:
            return None
        # A pattern may begin far above the line that tells what went wrong, which is where it ends.
        line = said[: found.end()].rpartition("\n")[2] + said[found.end() :].partition("\n")[0]
        evidence = line.strip()[:EVIDENCE_LENGTH]
        diagnosis = {"server": server.name, "name": known["name"], "evidence": evidence}
        problem = f"{problem} {known['cause']}. {known['meaning']} The journal says: {evidence}"
        return Failed(problem, known["advice"], diagnosis)
    return None


def run(*command: str) -> str:
    """Return what a command prints, whatever its status; nothing if there is no such command or it hangs."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=SYSTEMCTL_SECONDS
        ).stdout
    return ""


def systemctl(*words: str, seconds: float | None = None, fix: str = "correct what it names.") -> None:
    """Run systemctl, for as long as it may take; raises Failed."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"systemctl {' '.join(words)}: {error}", fix) from error
    if done.returncode != 0:
        raise Failed(f"systemctl {' '.join(words)}: {done.stderr.strip()}", fix)


def boot_id() -> str:
    """Return the id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def watchdog_gave_up(server: Server, folder: Path) -> str:
    """Return a sentence if the watchdog gave up on the server as it runs now, or nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((folder / f"{server.name}.json").read_bytes())
        if (state["state"], state["boot"]) == ("gave_up", boot_id()):
            running = unit_properties(server.unit, "InvocationID").get("InvocationID")
            if running == state["invocation"]:
                return f"The watchdog gave up restarting it at {state['since']}: {state['reason']}"
    return ""


def open_lock(file: Path) -> IO[str]:
    """Open a file for locking, made if need be; raises OSError.

    Whoever can open a file can lock it, read-only too, and keep us waiting: nobody else can open this one.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)  # of an earlier release
    return os.fdopen(descriptor, "w", encoding="utf-8")


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    draft = file.with_name(f".{file.name}.new")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
