"""Finds out whether everything that reading needs works, and what to do about what does not."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib.util
import json
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

from PIL import Image, ImageDraw, ImageFont

from ..engines.base import Engine, Task
from ..engines.server import REHEARSAL, REHEARSES, SERVICE
from ..errors import NAMES, DotsOCRError, EngineError, EngineMissing, NotApplicable, Unauthorized, UnusableAnswer
from ..pages import images
from ..pages.documents import PageImage
from ..prompts import MODES
from ..results.store import FIRST_ENGINE

if TYPE_CHECKING:
    from ..engines.tesseract import TesseractEngine
    from ..engines.vllm import VLLMEngine

Status = Literal["ok", "warning", "failed", "skipped"]

A4_PIXELS: Final = (1654, 2339)  # an A4 page at 200 dpi, the resolution at which PDFs are drawn
ANSWER_TOKENS: Final = 4096  # room for the answer, in tokens (our own choice: a densely printed page with its layout)
SAMPLE: Final = "The quick brown fox jumps over 1234567890 lazy dogs."  # what the page says that is read as a test
# How alike the text that was read must be, from 0 to 1 as `difflib` counts (our own choice: a letter or two may be
# wrong, but without its number or its last two words the sentence comes to less).
ALIKE: Final = 0.9
PACKAGES: Final = ("dots-ocr-client", "openai", "pypdfium2", "pillow")
SET_KEY: Final = "set DOTS_OCR_API_KEY to the key that the server was started with"
QWEN_PACKAGES: Final = ("torch", "transformers")
# Where the role dots_ocr_server writes what it knows of the servers of a host.
DEPLOYED: Final = Path("/etc/dots-ocr/server")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str  # what, in a word or two
    # ``failed`` if reading with dots.ocr cannot work without it, ``warning`` if it can but something is amiss,
    # ``skipped`` if it was not or could not be looked at.
    status: Status
    detail: str  # what was found
    fix: str = ""  # what to do about it; empty for ``ok``
    seconds: float | None = None  # how long the server or another engine took, where it was asked


async def examine(
    engine: VLLMEngine, seconds: float = 120.0, *, ocr: bool = False, languages: str = "eng"
) -> list[Check]:
    """Check the server, its model, the other engines and the packages, in this order; with `ocr` have each read a page.

    A question to the server, and a page, may take so many seconds. PDFs' own text is not checked: it needs nothing but
    the packages. That a server of this very host only starts with a remedy, or found another KV cache on its card than
    planned, is a check of its own. Nothing is raised for what does not work.
    """
    from ..engines.qwen import QwenEngine
    from ..engines.tesseract import TesseractEngine

    tesseract = TesseractEngine(languages)
    checks = [*await _server(engine, seconds, ocr), *_adapted(engine.base_url), await _tesseract(tesseract)]
    if ocr:
        wrong = "put eng among the --languages, because the page is in English; else install tesseract-ocr-eng anew"
        fix = "allow more time (--timeout), or install it anew"
        checks.append(await _page("page by tesseract", tesseract, seconds, wrong, fix))
    if lacking := [name for name in QWEN_PACKAGES if importlib.util.find_spec(name) is None]:  # importing takes seconds
        detail = f"not installed: {', '.join(lacking)}; pip install 'dots-ocr-client[qwen]' adds this engine"
        checks.append(Check("qwen", "skipped", detail, "none needed unless pages are to be read by Qwen"))
    else:
        checks.append(Check("qwen", "ok", f"{' and '.join(QWEN_PACKAGES)} are installed"))
    if ocr:
        fix = "allow more time (--timeout), or leave this engine out"
        async with contextlib.aclosing(QwenEngine()) as qwen:
            wrong = "leave this engine out, or give it another model"
            checks.append(await _page("page by qwen", qwen, seconds, wrong, fix))
    return [*checks, _versions()]


async def _server(engine: VLLMEngine, seconds: float, ocr: bool) -> list[Check]:
    started = time.monotonic()
    try:
        cards = await asyncio.wait_for(engine.models(seconds), seconds)
    except Unauthorized as error:
        reached = Check("server", "ok", f"{engine.base_url} answers", seconds=time.monotonic() - started)
        refused = Check("key", "failed", str(error), SET_KEY)
        rest = _skipped("the server wants another key", "correct the key first", "model", "context", "page")
        return [reached, await _version(engine, seconds), rest[0], refused, *rest[1:]]
    except (DotsOCRError, TimeoutError) as error:
        fix = "start the server and wait until it has loaded the model, or correct --base-url (DOTS_OCR_BASE_URL)"
        detail = str(error) or f"{engine.base_url} did not answer within {seconds:g} s"
        rest = _skipped("no server", "reach the server first", "version", "model", "key", "context", "page")
        return [Check("server", "failed", detail, fix), *rest]
    reached = Check("server", "ok", f"{engine.base_url} answers", seconds=time.monotonic() - started)
    served = {str(card.get("id")): card for card in cards}
    accepted = Check("key", "ok", "the server lists its models to us")
    checks = [reached, await _version(engine, seconds, cards), _model(engine.model, served), accepted]
    if engine.model not in served or REHEARSAL in served:
        why, fix = "the model is not served", "choose a model that is served first"
        if engine.model in served:
            why, fix = REHEARSES, "none needed: a page of its own is read by the page that make rehearse names"
        return [*checks, *_skipped(why, fix, "context", "page")]
    context = _context(served[engine.model])
    if not ocr:
        return [*checks, context, *_skipped("none was read: --ocr has every engine read one", "add --ocr", "page")]
    wrong = "see whether the server runs the right model, with --chat-template-content-format string"
    fix = "look at the server's log and its load, or allow more time (--timeout)"
    return [*checks, context, await _page("page", engine, seconds, wrong, fix)]


def _skipped(why: str, fix: str, *names: str) -> list[Check]:
    return [Check(name, "skipped", why, fix) for name in names]


async def _version(engine: VLLMEngine, seconds: float, cards: Sequence[Mapping[str, Any]] = ()) -> Check:
    said = None
    with contextlib.suppress(DotsOCRError, TimeoutError):
        said = await asyncio.wait_for(engine.version(seconds), seconds)
    if said is None:
        return Check("version", "skipped", "the server does not tell its version", "none needed: some gateways hide it")
    service = any(card.get("owned_by") == SERVICE for card in cards)
    return Check("version", "ok", f"{'dots-ocr serve' if service else 'vLLM'} {said}")


def _model(model: str, served: Mapping[str, Mapping[str, Any]]) -> Check:
    more = f" and {len(served) - NAMES} more" * (len(served) > NAMES)
    names = (", ".join(repr(name[:200]) for name in [*served][:NAMES]) or "none") + more
    card = served.get(model, {})
    if card.get("owned_by") == SERVICE and FIRST_ENGINE not in str(card.get("root")).split(","):
        detail = f"dots-ocr serve answers to {model!r}, and has pages read by {card.get('root')}, not by dots.ocr"
        return Check("model", "warning", detail, "none if this is meant; else give the address of a host with a GPU")
    if REHEARSAL in served:
        fix = "none needed to rehearse; real pages need a server with the weights of dots.ocr (make deploy)"
        return Check("model", "warning", REHEARSES, fix)
    if model in served:
        return Check("model", "ok", f"{model!r} is served, of: {names}")
    fix = f"ask for one of these with --model, or start the server with --served-model-name {model}"
    return Check("model", "failed", f"{model!r} is not served; the server has: {names}", fix)


def _context(card: Mapping[str, Any]) -> Check:
    # Half a token for a letter is plenty: ordinary English takes a quarter.
    needed = images.image_tokens(*A4_PIXELS) + len(MODES["layout"].prompt) // 2 + ANSWER_TOKENS
    length = card.get("max_model_len")
    if not isinstance(length, int):
        fix = f"let it be {needed} (--max-model-len) or more"
        return Check("context", "skipped", "the server does not tell its context length", fix)
    if length < needed:
        detail = f"{length} tokens are too few for an A4 page at 200 dpi and its answer"
        return Check("context", "failed", detail, f"start the server with --max-model-len {needed} or more")
    return Check("context", "ok", f"{length} tokens; an A4 page at 200 dpi and its answer take up to {needed}")


def _adapted(base_url: str) -> list[Check]:
    asked = urlsplit(base_url)
    found = []
    for file in sorted(DEPLOYED.glob("*.json")):
        try:
            settings = json.loads(file.read_bytes())
            own = urlsplit(settings["url"])
            here = asked.port == own.port and asked.hostname in (own.hostname, "127.0.0.1", "localhost", "::1")
            entries = settings.get("adaptations", []) if here else []
            remedies = [f"{entry['reason']} Remedy: {json.dumps(entry['remedy'])}" for entry in entries]
            measured = settings.get("measured", {}).get("note") if here else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # not for us to judge: the readiness check of the host does
        if remedies:
            fix = "mend the cause (docs/operate/troubleshooting.md), then deploy with dots_ocr_server_adapt: false"
            found.append(Check("adapted", "warning", " ".join(remedies), fix))
        if measured:
            unless = "unless limits of your own say otherwise (docs/understand/tuning.md)"
            found.append(Check("measured", "warning", str(measured), f"deploy again, which plans with it, {unless}"))
    return found


async def _page(name: str, engine: Engine, seconds: float, wrong: str, fix: str) -> Check:
    """Have an engine read a page; `wrong` says what to do if it reads something else, and `fix` if nothing."""
    sheet = Image.new("RGB", (1120, 140), "white")
    ImageDraw.Draw(sheet).text((28, 42), SAMPLE, "black", font=ImageFont.load_default(36))
    page = await asyncio.to_thread(PageImage.of, 1, sheet)
    said, started = f"a test page that says {SAMPLE!r}", time.monotonic()
    try:
        async with engine.limiter:
            answer = await asyncio.wait_for(engine.read(page, Task("text"), seconds), seconds)
    except Unauthorized as error:
        return Check(name, "failed", str(error), SET_KEY)
    except (EngineMissing, NotApplicable) as error:
        fix = "install what is missing first, if pages are to be read by this engine"
        return Check(name, "skipped", str(error), fix)
    except UnusableAnswer as error:
        return Check(name, "warning", f"{said} got no useful answer: {error}", wrong, time.monotonic() - started)
    except (DotsOCRError, TimeoutError) as error:
        detail = f"a test page could not be read: {error or f'no answer within {seconds:g} s'}"
        return Check(name, "failed" if name == "page" else "warning", detail, fix)
    took = time.monotonic() - started
    letters, expected = (re.sub(r"\W", "", text).casefold() for text in (answer.text[:1000], SAMPLE))
    if difflib.SequenceMatcher(None, letters, expected, autojunk=False).ratio() < ALIKE:
        return Check(name, "warning", f"{said} was read as {answer.text[:200]!r}", wrong, took)
    if answer.engine not in (None, engine.name):
        why = "; ".join(map(str, answer.attempts)) or "the server does not say why"
        detail = f"a test page was read as it is, but by {answer.engine} ({answer.model}): {why}"
        fix = "none if this is meant; else see why dots.ocr did not read it"
        return Check(name, "warning", detail, fix, took)
    return Check(name, "ok", "a test page was read as it is", seconds=took)


async def _tesseract(engine: TesseractEngine) -> Check:
    try:
        async with asyncio.timeout(10):
            version, names = await engine.installed()
            await engine.probe(10)
    except (EngineError, TimeoutError) as error:
        detail, _, fix = str(error).partition(". Fix: ")
        fix = fix or "apt-get install tesseract-ocr tesseract-ocr-eng, to have a page read when the server cannot"
        return Check("tesseract", "warning", detail or "it does not answer", fix)
    return Check("tesseract", "ok", f"{version} with {', '.join(names)}")


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, by their names."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _versions() -> Check:
    found = installed(PACKAGES)
    detail = ", ".join((f"Python {platform.python_version()}", *map(" ".join, found.items())))
    if missing := [name for name in PACKAGES if name not in found]:
        fix = "pip install dots-ocr-client"
        return Check("packages", "warning", f"{detail}; not installed: {', '.join(missing)}", fix)
    return Check("packages", "ok", detail)
