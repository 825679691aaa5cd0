"""Pages at a constant rate, whatever becomes of them, and what came of each."""

from __future__ import annotations

import asyncio
import base64
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

GOLDEN = Path(__file__).resolve().parents[2] / "roles/dots_ocr_server/files/golden"
PROMPT = "<|img|><|imgpad|><|endofimg|>Extract the text content from this image."
TIMEOUT = 120.0  # seconds, longer than anything here may take
RETRIED = {429, 500, 502, 503, 504}  # the statuses that OpenAI's client and ours come back after


@dataclass(frozen=True)
class Page:
    """What came of one page.

    Attributes:
        start: when it was sent, seconds of the monotonic clock.
        end: when its answer was there.
        server: which server read it, by the gateway's header; empty if it does not say.
        engine: `vllm` or `cpu`, by the gateway's header.
        fault: why it is lost; empty if it was read.
        retried: whether a client comes back by itself after this fault.
    """

    start: float
    end: float
    server: str
    engine: str
    fault: str
    retried: bool = True

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


def percentile(values: list[float]) -> float:
    """Return the 95th percentile; of fewer than two values the greatest, of none 0."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else max(values, default=0.0)


class Load:
    """Has the golden page's first line read at a constant rate, over a connection each, and never again if lost."""

    def __init__(self, url: str, key: str, rate: float) -> None:
        """Begin; `url` is the gateway's, `rate` in pages per second."""
        self.url, self.key, self.rate = url, key, rate
        self.pages: list[Page] = []
        self._sent: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send no more, and wait for what is in flight."""
        self._end.set()
        self._thread.join(TIMEOUT)

    def in_flight(self) -> int:
        """Return how many pages have no answer yet."""
        return len(self._sent) - len(self.pages)

    def wait_for(self, count: int) -> None:
        """Wait until so many more pages have been sent, and all that were sent before have their answer."""
        begin = len(self._sent)
        while len(self._sent) < begin + count:
            time.sleep(0.1)
        moment = time.monotonic()
        while sum(start < moment for start in self._sent) > sum(page.start < moment for page in self.pages):
            assert time.monotonic() < moment + TIMEOUT, "pages have no answer"
            time.sleep(0.1)

    async def _send(self) -> None:
        image = base64.b64encode((GOLDEN / "page.png").read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": PROMPT},
        ]
        body = {
            "model": "dots.ocr",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_completion_tokens": 1024,
            "stop": ["\n"],  # after the first line: the machine has more to do than to read
        }
        headers = {"Authorization": f"Bearer {self.key}", "Connection": "close"}
        expected = (GOLDEN / "page.txt").read_text().splitlines()[0].split()
        async with (
            httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            due = time.monotonic()
            while not self._end.is_set():
                tasks.create_task(self._read(client, body, expected))
                due += 1 / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _read(self, client: httpx2.AsyncClient, body: dict[str, object], expected: list[str]) -> None:
        start = time.monotonic()
        self._sent.append(start)
        server = engine = ""
        retried = True
        try:
            answer = await client.post("/v1/chat/completions", json=body)
            server, engine = (answer.headers.get(f"X-Dots-Ocr-{name}", "") for name in ("Server", "Engine"))
            if answer.status_code != 200:
                fault, retried = f"{answer.status_code} {answer.text[:200]}", answer.status_code in RETRIED
            else:
                text = answer.json()["choices"][0]["message"]["content"]
                # Tesseract reads this page, too, if not quite.
                right = text.split() == expected or engine == "cpu"
                fault, retried = ("", True) if right else (f"misread {text!r}", False)
        except httpx2.TransportError as error:
            fault = f"{type(error).__name__} {error}"
        self.pages.append(Page(start, time.monotonic(), server, engine, fault, retried))


@dataclass(frozen=True)
class Event:
    """What an event did to the pages of its time.

    Attributes:
        name: what happened.
        planned: whether an operator meant it.
        pages: those that had no answer when it began, or were sent before it ended.
        begin: when it began, seconds of the monotonic clock.
        usual: p95 of pages while nothing happens, seconds.
    """

    name: str
    planned: bool
    pages: list[Page]
    begin: float
    usual: float

    @property
    def lost(self) -> list[Page]:
        """The pages that were not read."""
        return [page for page in self.pages if page.fault]

    @property
    def p95(self) -> float:
        """95th percentile of the seconds of the pages that were read."""
        return percentile([page.seconds for page in self.pages if not page.fault])

    @property
    def steady(self) -> float:
        """Seconds from the beginning until no page was lost or took more than twice the usual p95."""
        disturbed = [page.end for page in self.pages if page.fault or page.seconds > 2 * self.usual]
        return max(disturbed, default=self.begin) - self.begin

    def row(self) -> str:
        """Return its line of the table."""
        kind = "planned" if self.planned else "unplanned"
        cells = [self.name, kind, str(len(self.pages)), str(len(self.lost)), f"{self.p95:.1f}", f"{self.steady:.0f}"]
        return f"| {' | '.join(cells)} |"
