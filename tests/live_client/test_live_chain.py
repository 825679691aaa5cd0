"""Pages through the chain without a pause, while the real vLLM in front goes, comes back as another, and hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dots_ocr_client import AsyncDotsOCR, Document, Page, TesseractEngine, VLLMEngine
from PIL import Image
from rapidfuzz import fuzz

from tests.live_client.conftest import OnHost

Sheets = list[tuple[Image.Image, str]]

PAGES = 200
"""At least so many."""
PAGES_PER_SECOND = 3.0
"""What two readers ask for together: less than the server manages, so that a fault costs time and not the queue."""
TIMEOUT = 18.0
"""For one page and both engines, in seconds: vLLM gets three quarters, which is less than it is frozen for."""
BACK_WITHIN = 20.0
"""Seconds until the server is used again when it reads again: the longest pause between two probes, and a page."""
DROP_IN = "/etc/systemd/system/dots-ocr.service.d/wrong-model.conf"
WRONG_MODEL = "facebook/opt-125m"


@dataclass(slots=True)
class Phase:
    """What was read from the beginning of one fault to that of the next.

    Attributes:
        name: The fault.
        readers: How many pages each engine read.
        latencies: Of the pages, in seconds of work.
        over_at: When the server read again by its own word (the role's readiness check), or was continued.
        back_after: Seconds from then until it read a page of ours.
    """

    name: str
    readers: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    over_at: float | None = None
    back_after: float | None = None

    def row(self) -> str:
        p95 = sorted(self.latencies)[int(0.95 * len(self.latencies))] if self.latencies else 0.0
        back = "" if self.back_after is None else f"{self.back_after:.1f}"
        return f"| {self.name} | {self.readers['vllm']} | {self.readers['tesseract']} | {p95:.1f} | {back} |"


class Host:
    """Does to the server what goes wrong."""

    def __init__(self, on_host: OnHost, base_url: str, api_key: str) -> None:
        self.on_host = on_host
        self._models = urllib.request.Request(f"{base_url}/models", headers={"Authorization": f"Bearer {api_key}"})

    def stop(self) -> None:
        self.on_host("systemctl", "stop", "dots-ocr.service")

    def start_with_another_model(self) -> None:
        unit = self.on_host("cat", "/etc/systemd/system/dots-ocr.service")
        start = unit[unit.index("ExecStart=") : unit.index("\n# Pages in flight")]
        command = start[: start.index("--served-model-name")] + f"--served-model-name {WRONG_MODEL}"
        drop_in = f"[Service]\nExecStart=\n{command}\n"
        write = 'mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1"'
        self.on_host("sh", "-c", write, "sh", DROP_IN, drop_in)
        self._restart()
        end = time.monotonic() + 120
        while self._served() != [WRONG_MODEL]:
            assert time.monotonic() < end, "the wrong model did not start"
            time.sleep(0.5)

    def start_with_the_right_model(self) -> None:
        self.on_host("rm", "-rf", str(Path(DROP_IN).parent))
        self._restart()
        self.wait()

    def wait(self) -> None:
        self.on_host("/usr/local/lib/dots-ocr/ready", "dots-ocr", "--wait=300")

    def watch(self, action: str) -> None:
        """Start or stop the watchdog, which would end a fault before we do."""
        self.on_host("systemctl", action, "dots-ocr-watchdog@dots-ocr.timer")

    def _restart(self) -> None:
        self.on_host("systemctl", "daemon-reload")
        self.on_host("systemctl", "restart", "dots-ocr.service")

    def _served(self) -> list[str]:
        try:
            with urllib.request.urlopen(self._models, timeout=5) as answer:
                return [card["id"] for card in json.load(answer)["data"]]
        except OSError:
            return []


@pytest.fixture
def host(on_host: OnHost, base_url: str, api_key: str) -> Iterator[Host]:
    host = Host(on_host, base_url, api_key)
    host.watch("stop")
    yield host
    with contextlib.suppress(AssertionError):  # what a test that failed has left behind
        on_host("docker", "unpause", "dots-ocr")
    on_host("rm", "-rf", str(Path(DROP_IN).parent))
    on_host("systemctl", "daemon-reload")
    on_host("systemctl", "start", "dots-ocr.service")
    host.wait()
    host.watch("start")


@pytest.fixture
def document(sheets: Sheets, tmp_path: Path) -> Path:
    first, *others = [image for image, _ in sheets]
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    return tmp_path / "pages.tif"


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_no_page_is_lost_while_the_server_is_stopped_replaced_restarted_frozen_and_slowed(
    host: Host, document: Path, sheets: Sheets, base_url: str, api_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [Phase("none")]
    documents: list[Document] = []
    over = asyncio.Event()

    def chain(**options: object) -> AsyncDotsOCR:
        engines = [VLLMEngine(base_url, api_key=api_key), TesseractEngine()]
        return AsyncDotsOCR(engines=engines, timeout=TIMEOUT, **options)  # type: ignore[arg-type]

    async def read(ocr: AsyncDotsOCR) -> None:
        while not over.is_set() or sum(len(one.pages) for one in documents) < PAGES:
            begin = time.monotonic()
            documents.append(await ocr.read(document, mode="text"))
            await asyncio.sleep(max(0.0, 2 * len(sheets) / PAGES_PER_SECOND - (time.monotonic() - begin)))

    async def watch(ocr: AsyncDotsOCR) -> None:
        """Read a page after the other, and note what becomes of each."""
        while not over.is_set():
            page = await ocr.read_page(sheets[0][0], mode="text")
            phase, now = phases[-1], time.monotonic()
            phase.readers[page.engine] += 1
            phase.latencies.append(page.seconds + sum(attempt.seconds for attempt in page.attempts))
            if page.engine == "vllm" and phase.over_at is not None and phase.back_after is None:
                phase.back_after = max(0.0, now - phase.over_at)
            await asyncio.sleep(0.5)

    async def back() -> None:
        phases[-1].over_at = time.monotonic()
        async with asyncio.timeout(BACK_WITHIN):
            while phases[-1].back_after is None:
                await asyncio.sleep(0.1)

    async def break_things(patient: AsyncDotsOCR) -> None:
        await patient.read_page(sheets[0][0], mode="text")  # so that it knows which model was there
        await asyncio.sleep(5)
        phases.append(Phase("stopped"))
        await asyncio.to_thread(host.stop)
        await asyncio.sleep(3)
        phases.append(Phase("another model in its place"))
        await asyncio.to_thread(host.start_with_another_model)
        await asyncio.sleep(4)
        phases.append(Phase("restarted with the right one"))
        restart = asyncio.create_task(asyncio.to_thread(host.start_with_the_right_model))
        waited = await patient.read(document, mode="text")
        await restart
        assert {page.engine for page in waited.pages if isinstance(page, Page)} == {"vllm"}
        assert not waited.failures
        await back()
        phases.append(Phase("frozen for 15 s"))
        await asyncio.to_thread(host.on_host, "docker", "pause", "dots-ocr")
        await asyncio.sleep(15)
        await asyncio.to_thread(host.on_host, "docker", "unpause", "dots-ocr")
        await back()
        phases.append(Phase("slowed to a tenth of its processors for 12 s"))
        quota = ("docker", "update", "--cpu-period=100000")
        await asyncio.to_thread(host.on_host, *quota, "--cpu-quota=20000", "dots-ocr")
        await asyncio.sleep(12)
        await asyncio.to_thread(host.on_host, *quota, "--cpu-quota=-1", "dots-ocr")
        await back()
        over.set()

    async def run() -> None:
        async with chain(max_wait=1.0) as ocr, chain(on_unavailable="wait") as patient, asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(read(ocr))
            group.create_task(watch(ocr))
            group.create_task(break_things(patient))

    begin = time.monotonic()
    asyncio.run(run())

    readers: Counter[str] = Counter()
    for one in documents:
        assert [page.number for page in one.pages] == list(range(1, len(sheets) + 1))
        for page, (_, text) in zip(one.pages, sheets, strict=True):
            assert isinstance(page, Page), page
            readers[page.engine] += 1
            if page.engine == "vllm":
                assert lines(page.text) == lines(text), page
            else:  # Tesseract errs now and then on letters that are stretched for the tiny model
                assert fuzz.ratio("\n".join(lines(page.text)), "\n".join(lines(text))) > 80, page
                assert page.attempts[0].engine == "vllm"
                assert page.attempts[0].error in ("ServerUnavailable", "CircuitOpen", "DeadlineExceeded", "Overloaded")
    with capsys.disabled():
        print(f"\n{sum(readers.values())} pages in {time.monotonic() - begin:.0f} s: {dict(readers)}")
        print("| fault | read by vLLM | by Tesseract | p95, s | used again after, s |\n|---|---|---|---|---|")
        print("\n".join(phase.row() for phase in phases))
    assert sum(readers.values()) >= PAGES
    assert min(readers["vllm"], readers["tesseract"]) > 10
    assert phases[1].readers["tesseract"]
    assert phases[2].readers["tesseract"]
    assert not phases[0].readers["tesseract"]
