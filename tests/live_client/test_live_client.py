from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from dots_ocr_client import (
    Answer,
    AsyncDotsOCR,
    Box,
    DotsOCR,
    Limiter,
    Mode,
    ModelNotServed,
    Page,
    PageImage,
    Task,
    Unauthorized,
    UnusableAnswer,
    VLLMEngine,
)
from dots_ocr_client.engines import vllm
from dots_ocr_client.engines.server import Server
from dots_ocr_client.pages import images
from dots_ocr_client.prompts import MODES, PLACEHOLDER
from PIL import Image

MAX_PIXELS = 1_003_520
"""What the rehearsal's server is told (inventory/rehearsal)."""
Sheets = list[tuple[Image.Image, str]]


@pytest.fixture
def engine(base_url: str, api_key: str) -> VLLMEngine:
    return VLLMEngine(base_url, api_key=api_key)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@pytest.mark.parametrize("mode", ["layout", "text"])
def test_the_pages_of_a_document_are_read_to_the_letter(
    mode: Mode, sheets: Sheets, engine: VLLMEngine, tmp_path: Path
) -> None:
    first, *others = [image for image, _ in sheets]
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    with DotsOCR(engines=[engine]) as ocr:
        document = ocr.read(tmp_path / "pages.tif", mode=mode)
    assert [lines(page.text) for page in document.pages if isinstance(page, Page)] == [lines(t) for _, t in sheets]
    for page in document.pages:
        assert isinstance(page, Page)
        assert (page.mode, page.warnings, page.finish_reason) == (mode, (), "stop")
        assert (page.prompt_tokens or 0) > images.image_tokens(page.width, page.height)
        assert [cell.box for cell in page.cells] == ([Box(0, 0, 784, 224)] if mode == "layout" else [])


def test_boxes_refer_to_the_page_and_not_to_what_was_sent(sheets: Sheets, engine: VLLMEngine) -> None:
    """The tiny model's box is always 784 x 224: all of a page of that size, and a part of a larger one."""
    page, _ = sheets[0]
    with DotsOCR(engines=[engine]) as ocr:
        assert ocr.read_page(page).cells[0].box == Box(0, 0, *page.size)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("size", [(28, 28), (784, 224), (1654, 2339)])
def test_no_mode_and_no_size_is_refused(mode: Mode, size: tuple[int, int], engine: VLLMEngine) -> None:
    """Whatever the tiny model makes of it: no request breaks a limit of the server."""
    task = Task(mode, Box(1, 2, 20, 20) if mode == "grounding" else None, "Why?" if mode == "general" else None)
    page = PageImage.of(1, Image.effect_noise(size, 90).convert("RGB"))

    async def read() -> None:
        try:
            async with asyncio.timeout(8):
                await engine.read(page, task, 8)
        finally:
            await engine.aclose()

    with contextlib.suppress(UnusableAnswer, TimeoutError):  # noise has no text
        asyncio.run(read())


def test_what_the_server_made_of_a_large_page_is_found_out(engine: VLLMEngine) -> None:
    """Not through `read`, since the tiny model has no layout for such a page."""
    size = (1654, 2339)
    page = PageImage.of(1, Image.new("RGB", size, "white"))
    request = {
        "model": engine.model,
        "messages": vllm._messages(MODES["layout"], PLACEHOLDER + MODES["layout"].prompt),
        "max_completion_tokens": 1,
    }

    async def find_out() -> tuple[tuple[int, int], tuple[str, ...]]:
        try:
            tokens = await engine._server.count_prompt(request, page.png, 60)
            return await engine._seen(page, "layout", tokens, time.monotonic() + 60)
        finally:
            await engine.aclose()

    seen, warnings = asyncio.run(find_out())
    assert seen == images.smart_resize(*size, max_pixels=MAX_PIXELS)
    assert f"{seen[0]} x {seen[1]} px" in warnings[0]


def test_a_wrong_key_and_a_wrong_model_are_told_apart(base_url: str, api_key: str, sheets: Sheets) -> None:
    with DotsOCR(base_url, api_key="wrong") as ocr, pytest.raises(Unauthorized, match="DOTS_OCR_API_KEY"):
        ocr.read(sheets[0][0])
    with DotsOCR(base_url, api_key=api_key, model="gpt") as ocr, pytest.raises(ModelNotServed, match=r"'dots\.ocr'"):
        ocr.read(sheets[0][0])


def running(base_url: str) -> int:
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\S* ([\d.]+)$", metrics, re.MULTILINE)
    assert counts
    return int(sum(map(float, counts)))


def test_cancelling_frees_the_server(
    engine: VLLMEngine, sheets: Sheets, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = Server.complete

    async def complete_at_length(
        self: Server, request: dict[str, Any], png: bytes, seconds: float, **options: Any
    ) -> Answer:
        return await complete(self, {**request, "ignore_eos": True}, png, seconds, **options)

    monkeypatch.setattr(Server, "complete", complete_at_length)

    async def until(number: int) -> int:
        end = time.monotonic() + 5
        while (count := await asyncio.to_thread(running, base_url)) != number and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return count

    async def read_and_cancel() -> tuple[int, int]:
        async with AsyncDotsOCR(engines=[engine]) as ocr:
            pages = [asyncio.create_task(ocr.read_page(sheets[0][0], mode="text")) for _ in range(3)]
            before = await until(3)
            for page in pages:
                page.cancel()
            await asyncio.gather(*pages, return_exceptions=True)
            start = time.monotonic()
            assert await until(0) == 0
            return before, round(time.monotonic() - start)

    assert asyncio.run(read_and_cancel()) == (3, 0)


def test_a_server_that_is_asked_for_too_much_is_asked_for_less(base_url: str, api_key: str, sheets: Sheets) -> None:
    """64 pages at once are more than the server's queue takes: it answers 503, and all are read all the same."""
    limiter = Limiter(64, 64)

    async def read() -> list[Page]:
        async with AsyncDotsOCR(engines=[VLLMEngine(base_url, api_key=api_key, limiter=limiter)]) as ocr:
            return await asyncio.gather(*(ocr.read_page(sheets[n % 10][0], mode="text") for n in range(64)))

    pages = asyncio.run(read())
    assert [lines(page.text) for page in pages] == [lines(sheets[n % 10][1]) for n in range(64)]
    assert limiter.limit < 64


def test_the_command_reads_a_folder_and_goes_on_where_it_was_killed(
    base_url: str, api_key: str, sheets: Sheets, tmp_path: Path
) -> None:
    first, *others = [image.copy() for image, _ in sheets * 5]
    (tmp_path / "in").mkdir()
    first.save(tmp_path / "in/pages.tif", save_all=True, append_images=others)
    command = ["dots-ocr", "read", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--mode=text"]
    command += [f"--base-url={base_url}", "--engine=vllm"]
    environment = {**os.environ, "DOTS_OCR_API_KEY": api_key}
    process = subprocess.Popen(command, env=environment)
    journal = tmp_path / "out/pages.tif.pages.jsonl"
    end = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "out/pages.tif.json").exists()
    subprocess.run(command, env=environment, check=True)
    done = json.loads((tmp_path / "out/pages.tif.json").read_text())
    assert [lines(page["text"]) for page in done["pages"]] == [lines(text) for _, text in sheets * 5]


def test_doctor_finds_what_the_rehearsal_lacks(base_url: str, api_key: str) -> None:
    """The tiny model reads no other page than its own, and that is said instead of what would follow from it."""
    environment = {**os.environ, "DOTS_OCR_API_KEY": api_key}
    command = ["dots-ocr", "doctor", "--ocr", "--json", f"--base-url={base_url}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    checks = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert {name for name, status in checks.items() if status == "ok"} >= {"server", "version", "key"}
    assert (checks["model"], checks["context"], checks["page"]) == ("warning", "skipped", "skipped")


def test_bench_puts_the_engines_side_by_side(base_url: str, api_key: str, sheets: Sheets, tmp_path: Path) -> None:
    """The tiny model makes no mistake on its own pages, and what is not there has a reason instead of numbers."""
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, (image, text) in zip(files, sheets, strict=False):
        image.save(file)
        file.with_suffix(".txt").write_text(text)
    command = ["dots-ocr", "bench", *map(str, files), "--json", "--mode=text", "--concurrency=1,4"]
    command += [f"--base-url={base_url}"]
    environment = {**os.environ, "DOTS_OCR_API_KEY": api_key}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engines = {engine["engine"]: engine for engine in json.loads(done.stdout)["engines"]}
    assert engines["vllm"]["character_errors"]["all"] == 0.0
    assert [load["read"] for load in engines["vllm"]["loads"]] == [3, 9]
    assert engines["tesseract"]["ratios"]["p50"] > 0
    assert "torch" in engines["qwen"]["unavailable"]
    assert "PDFs" in engines["textlayer"]["unavailable"]
