"""dots.ocr on a vLLM server, over the OpenAI API."""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import time
from dataclasses import dataclass, replace
from typing import Any, Final

from PIL import Image

from .. import errors
from ..credentials import KEY_VARIABLE, Address, key_of_this_host, read_key
from ..pages import images
from ..pages.documents import PageImage
from ..prompts import MODES, PLACEHOLDER, Mode, ModeSpec
from ..results import layout
from .admission import JITTER, Limiter
from .base import Answer, Task, place
from .server import MAX_COUNT, PICTURE, REHEARSAL, REHEARSES, SERVICE, Server, is_loopback

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000/v1"  # where the server of this project listens
# A PDF's page is shrunk to leave so much of the context for its answer (our own choice: a dense page takes it).
ANSWER_TOKENS: Final = 4_096
PAGE_TOKENS: Final = 4_956  # to no less than this: A4 at 200 dpi
# Asks vLLM to stop an answer that ends in 64 equal runs of 1 to 32 tokens. Loops are the model's most frequent fault.
# The count is high because dot leaders and ruled lines repeat too, a few tokens at a time.
REPETITION: Final = {"max_pattern_size": 32, "min_pattern_size": 1, "min_count": 64}
REPETITION_VERSION: Final = (0, 17)  # the first vLLM that knows the above (vllm-project/vllm#35451)
# Of a second try, which is to take another path (our own choice, the middle of what olmocr climbs through).
OTHER_TEMPERATURE: Final = 0.5
TRIES: Final = 3  # how often a request is sent at most, if the server is not there or fails
# The same, if it has too much to do: its queue moves on, and another engine would read the page worse. The waits come
# to 16 s at most.
OVERLOAD_TRIES: Final = 6
# Longest wait before the second try; it doubles for the next one. With a server that is not there, both waits together
# stay under 2 s, because another engine may be waiting for its turn.
WAIT_SECONDS: Final = 0.5
# A prompt in English takes at least one token for so many characters (our own bound; tokenizers need one for 4 or 5).
# What is missing up to that shows that the server shrank the page.
CHARACTERS_PER_TOKEN: Final = 6

WAKE_SECONDS: Final = 540.0  # for which the server's role holds a page while it starts (files/front)
LEAST_IDLE: Final = 60.0  # before which no server falls asleep (dots_ocr_server_idle_minutes)
STATE_SECONDS: Final = 2.0  # to say whether it sleeps
# A folder may be called DotsOCR whatever is in it, because older servers want a name without a dot.
_DOTS_OCR = re.compile(r"(^|/)dots\.ocr/?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Served:
    """What a server says about itself and the model."""

    context: int | None  # length in tokens, if it tells
    stops_loops: bool  # it knows `REPETITION`
    root: str  # where the model was loaded from, if it tells
    rehearses: bool  # its model reads only its own pages


class VLLMEngine:
    """Reads pages with dots.ocr on a server that speaks the OpenAI API."""

    name = "vllm"
    modes: frozenset[Mode] = frozenset(MODES)
    expected_seconds = 1.0
    """A page of a few lines on an idle GPU (our own choice: whoever allows less does not want to wait for a model)."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str = "dots.ocr",
        limiter: Limiter | None = None,
        stream: bool | None = None,
    ) -> None:
        """Say where the server is; nothing is sent yet.

        Args:
            base_url: With scheme and ``/v1``. Default: ``DOTS_OCR_BASE_URL`` of the environment, or `DEFAULT_BASE_URL`.
                Its ``user:password@``, if any, go in the key's place.
            api_key: The key that the server wants. Default: ``DOTS_OCR_API_KEY`` of the environment; where that is not
                set, for a server at a loopback address, the key of this host, if this user may read it (root may); or
                none. Line ends and quotation marks around it are taken off.
            model: One of the names in ``/v1/models``.
            limiter: How many pages it is given at once. Default: found out by trying.
            stream: Take answers piece by piece, which ends a loop early but costs about 0.1 ms for each token. Default:
                only if the server does not end loops by itself.

        Raises:
            ConfigurationError: The base URL is not an http or https URL.
            InvalidKey: The key can be none.
        """
        base_url = base_url or os.environ.get("DOTS_OCR_BASE_URL") or DEFAULT_BASE_URL
        key = read_key(api_key, "api_key=") or read_key(os.environ.get(KEY_VARIABLE), KEY_VARIABLE)
        if api_key is None and KEY_VARIABLE not in os.environ and is_loopback(Address.of(base_url).host):
            key = key_of_this_host()
        self._server = Server(base_url, key)
        self.base_url = self._server.base_url
        self.model = model
        self.limiter = limiter or Limiter()
        self._stream = stream
        self._served: _Served | None = None
        self._was_right = False
        self._text_tokens: dict[Mode, int] = {}
        self._learning = asyncio.Lock()
        self._max_pixels = images.MAX_PIXELS
        self._awake_until = -math.inf
        self._waking = asyncio.Lock()

    async def models(self, seconds: float) -> list[dict[str, Any]]:
        """Return the model cards of the server, as it sends them; each has an ``id``. Errors are those of `read`."""
        return await self._server.models(seconds)

    async def version(self, seconds: float) -> str | None:
        """Return vLLM's version, such as ``0.11.0``, or ``None`` if the server does not tell."""
        return await self._server.version(seconds)

    async def probe(self, seconds: float) -> None:
        """Ask the server for its health and its models; errors are those of `read`."""
        await self._server.health(seconds)
        self._served = None
        await self._know(time.monotonic() + seconds)

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page.

        A layout that repeats itself, is cut off or is none is asked for once more as plain text, any other answer that
        repeats itself or is cut off once more at `OTHER_TEMPERATURE`; a warning says so. A server that is not there or
        fails is asked up to `TRIES` times, one that has too much to do `OVERLOAD_TRIES` times.

        Raises:
            ModelNotServed: The server does not know the model, and never did. If it did, another model was started in
                its place, which is a fault of the server (`ServerUnavailable`) and not of the settings.
            Unauthorized: The server wants another API key.
            ConfigurationError: There is no OpenAI API at the base URL.
            ModeNotSupported: The server's model is dots.ocr, and only dots.mocr knows the mode.
            Overloaded: 429 or 503.
            ServerUnavailable: No connection, any other unexpected status, or nothing like an answer.
            DeadlineExceeded: A read or write took longer than `seconds`, or a streamed answer stopped.
            RequestRejected: 400, 413 or 422, or the page does not fit into the server's context.
            Repetition, CutOff, UnusableAnswer: The answer is of no use, and neither was the second.
        """
        deadline = time.monotonic() + seconds
        try:
            answer = await self._ask_twice(page, task, deadline)
        except errors.UnusableAnswer as error:
            if self._served is not None and self._served.rehearses:
                raise errors.UnusableAnswer(REHEARSES) from error
            raise
        self.limiter.succeeded()
        self._awake_until = time.monotonic() + LEAST_IDLE
        return answer

    async def more_seconds(self) -> float:
        """Return how much longer a page may take than usual: a server that left the GPU while idle starts for it."""
        async with self._waking:
            if time.monotonic() < self._awake_until:
                return 0.0
            if await self._server.state(STATE_SECONDS) in ("asleep", "waking"):
                return WAKE_SECONDS
            self._awake_until = time.monotonic() + LEAST_IDLE
            return 0.0

    async def aclose(self) -> None:
        """Close the connections."""
        await self._server.aclose()

    async def _ask_twice(self, page: PageImage, task: Task, deadline: float) -> Answer:
        """Ask, and once more in another way if the answer is of a kind that this may help."""
        temperature, is_layout = MODES[task.mode].temperature, task.mode == "layout"
        try:
            return await self._ask(page, task, temperature, deadline)
        except errors.UnusableAnswer as error:
            if not (is_layout or isinstance(error, errors.Repetition | errors.CutOff)):
                raise
            first = error
        if is_layout:
            task, temperature, how = Task("text"), MODES["text"].temperature, "as plain text"
        else:
            temperature = max(temperature, OTHER_TEMPERATURE)
            how = f"again at temperature {temperature:g}"
        try:
            answer = await self._ask(page, task, temperature, deadline)
        except errors.UnusableAnswer as error:
            if is_layout:
                raise errors.UnusableAnswer(f"the layout: {first}; as plain text: {error}") from error
            raise
        match first:
            case errors.Repetition():
                what = "repeated itself without end"
            case errors.CutOff():
                what = "was cut off"
            case _:
                what = f"was of no use ({first})"
        note = f"the {'layout' if is_layout else 'first'} answer {what}, so the page was read {how}"
        return replace(answer, warnings=(note, *answer.warnings))

    async def _ask(self, page: PageImage, task: Task, temperature: float, deadline: float) -> Answer:
        """Read a page in just one way."""
        spec = MODES[task.mode]
        answer, page = await self._complete(page, task, temperature, deadline)
        if not answer.text.strip():
            if await asyncio.to_thread(page.is_blank):
                return replace(answer, text="")
            raise errors.UnusableAnswer("the answer is empty, but the page is not blank")
        if spec.answer == "text":
            return answer
        seen, warnings = await self._seen(page, task.mode, answer.prompt_tokens, deadline)
        own = (page.width, page.height)
        found = await asyncio.to_thread(layout.parse, answer.text, seen, own, texts=spec.answer == "cells")
        if not found.cells and not await asyncio.to_thread(page.is_blank):
            raise errors.UnusableAnswer("the layout is empty, but the page is not blank")
        return replace(
            answer,
            text=layout.plain_text(found.cells),
            cells=found.cells,
            warnings=(*answer.warnings, *warnings, *found.repairs),
        )

    async def _complete(
        self, page: PageImage, task: Task, temperature: float, deadline: float
    ) -> tuple[Answer, PageImage]:
        """Send one request until the server answers it; return the page as it was sent, too."""
        for attempt in range(max(TRIES, OVERLOAD_TRIES)):
            try:
                return await self._complete_once(page, task, temperature, deadline)
            except errors.UnusableAnswer:
                raise
            except errors.ModelNotServed as error:
                self._served = None
                if self._was_right:
                    raise errors.ServerUnavailable(
                        f"another model was started in place of the right one: {error}"
                    ) from error
                raise
            except errors.ServerUnavailable as error:
                self._served = None  # it may come back as another one
                wait = WAIT_SECONDS * 2**attempt * (1 - JITTER * random.random())
                tries = TRIES
                if isinstance(error, errors.Overloaded):
                    if error.status == 503:  # also what a gateway says when there is nobody behind it
                        await self._server.health(_left(deadline))
                    tries = OVERLOAD_TRIES
                    self.limiter.overloaded()
                    wait = max(wait, error.retry_after or 0.0)
                if attempt + 1 >= tries or not error.passing or wait >= deadline - time.monotonic():
                    raise
            except (errors.EngineError, errors.ConfigurationError):
                self._served = None
                raise
            await asyncio.sleep(wait)
        raise AssertionError("the last try either returns or raises")

    async def _complete_once(
        self, page: PageImage, task: Task, temperature: float, deadline: float
    ) -> tuple[Answer, PageImage]:
        served = await self._know(deadline)
        spec = MODES[task.mode]
        if spec.mocr and _DOTS_OCR.search(served.root):
            raise errors.ModeNotSupported(f"{served.root} is dots.ocr, and only dots.mocr knows the mode {task.mode!r}")
        page, made = await self._with_room(page, served.context)
        prompt = self._render(spec, page, task)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(spec, prompt),
            "temperature": temperature,
            "top_p": spec.top_p,
        }
        if served.stops_loops:
            request["repetition_detection"] = REPETITION
        # Without a length (not vLLM, or a gateway that hides it) the server fills what is left by itself.
        # So it has to where a page seems to take the better part: it may shrink pages more than is known here.
        needed = images.image_tokens(page.sent_width, page.sent_height, max_pixels=self._max_pixels)
        needed += len(prompt.encode(errors="replace")) // 2 + 64  # twice what tokenizers take, and the template
        left = (served.context or 0) - needed
        answer = await self._server.complete(
            request,
            page.png,
            _left(deadline),
            stream=not served.stops_loops if self._stream is None else self._stream,
            limit=left if left >= needed else None,
        )
        return replace(answer, mode=task.mode, warnings=(*made, *answer.warnings)), page

    async def _with_room(self, page: PageImage, context: int | None) -> tuple[PageImage, tuple[str, ...]]:
        """Shrink a page of a PDF beside which the context would have no room for its answer."""
        if page.dpi is None or context is None:
            return page, ()
        sent = (page.sent_width, page.sent_height)
        room = max(context - ANSWER_TOKENS, min(PAGE_TOKENS, context * 2 // 3))
        if images.image_tokens(*sent, max_pixels=self._max_pixels) <= room:
            return page, ()
        width, height = size = images.smart_resize(*sent, max_pixels=room * images.FACTOR**2)
        png = await asyncio.to_thread(lambda: images.to_png(page.image.resize(size, Image.Resampling.BICUBIC)))
        note = f"the page was sent as {width} x {height} px, to leave its answer room in a context of {context} tokens"
        return replace(page, png=png, sent_width=width, sent_height=height), (note,)

    async def _know(self, deadline: float) -> _Served:
        """Return what the server says about itself; asked once, then remembered until something fails."""
        if self._served is None:
            cards = {card["id"]: card for card in await self._server.models(_left(deadline))}
            if self.model not in cards:
                raise errors.ModelNotServed(self.model, cards, self.base_url)
            self._was_right = True
            context, root = (cards[self.model].get(name) for name in ("max_model_len", "root"))
            numbers = re.match(r"v?(\d{1,9})\.(\d{1,9})", await self._server.version(_left(deadline)) or "")
            new = numbers is not None and tuple(map(int, numbers.groups())) >= REPETITION_VERSION
            self._served = _Served(
                context=context if type(context) is int and 0 < context < MAX_COUNT else None,
                stops_loops=new or cards[self.model].get("owned_by") == SERVICE,
                root=root if isinstance(root, str) else "",
                rehearses=REHEARSAL in cards,
            )
        return self._served

    def _render(self, spec: ModeSpec, page: PageImage, task: Task) -> str:
        box: list[int] = []
        if task.box is not None:
            place(page, task.box)
            seen = images.smart_resize(page.sent_width, page.sent_height, max_pixels=self._max_pixels)
            box = list(layout.to_seen(task.box, seen, (page.width, page.height)))
        question = (task.question or "").replace(PLACEHOLDER, "")
        return PLACEHOLDER + spec.prompt.format(
            box=box, width=page.sent_width, height=page.sent_height, question=question
        )

    async def _seen(
        self, page: PageImage, mode: Mode, prompt_tokens: int | None, deadline: float
    ) -> tuple[tuple[int, int], tuple[str, ...]]:
        """Find out at which size the model saw a page: a server may be told to shrink pages further than we do."""
        sent = (page.sent_width, page.sent_height)
        unshrunk, whole = images.smart_resize(*sent), images.image_tokens(*sent)
        if prompt_tokens is None:
            return unshrunk, ()
        if mode not in self._text_tokens:
            # Shrinking takes away at least a whole row or column, and so leaves too few tokens for the prompt.
            if prompt_tokens - whole >= len(MODES[mode].prompt) // CHARACTERS_PER_TOKEN:
                return unshrunk, ()
            await self._learn(mode, deadline)
        tokens = prompt_tokens - self._text_tokens.get(mode, prompt_tokens)
        if tokens == whole:
            return unshrunk, ()
        # A server that does not count images at all seems to give each of them the tokens of the smallest one.
        limit = images.server_limit(*sent, tokens) if tokens > _SMALLEST_TOKENS else None
        if limit is None:
            return unshrunk, ("the server does not tell at which size the model saw the page: boxes may be off",)
        self._max_pixels = limit if self._max_pixels == images.MAX_PIXELS else max(limit, self._max_pixels)
        seen = images.smart_resize(*sent, max_pixels=limit)
        return seen, (f"the server shrank the page to {seen[0]} x {seen[1]} px",)

    async def _learn(self, mode: Mode, deadline: float) -> None:
        """Find out how many tokens a mode's prompt takes without the image, with the smallest image there is."""
        async with self._learning:
            if mode in self._text_tokens:
                return
            smallest = PageImage.of(1, Image.new("RGB", (56, 56), "white"))
            spec = MODES[mode]
            request = {
                "model": self.model,
                "messages": _messages(spec, self._render(spec, smallest, Task(mode))),
                "max_completion_tokens": 1,
            }
            tokens = await self._server.count_prompt(request, smallest.png, _left(deadline))
            if tokens is not None:
                self._text_tokens[mode] = tokens - _SMALLEST_TOKENS


_SMALLEST_TOKENS: Final = images.image_tokens(56, 56)


def _messages(spec: ModeSpec, prompt: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": prompt}]
    system = [] if spec.system is None else [{"role": "system", "content": spec.system}]
    return [*system, {"role": "user", "content": parts}]


def _left(deadline: float) -> float:
    """Seconds until then; never nothing, which would mean at once or for ever, depending on who is asked."""
    return max(0.001, deadline - time.monotonic())
