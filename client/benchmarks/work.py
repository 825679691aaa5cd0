"""What is measured, each as a process of its own: `python -m benchmarks.work draw FILE`, `… read FILE URL …`.

FILE may be a folder of images. Prints one line of JSON; the times in it are seconds.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
import time
import zlib
from contextlib import aclosing
from pathlib import Path
from typing import Any

PROMPT = "Please output the layout information from the PDF image, as JSON."


def draw(file: str) -> dict[str, float]:
    """Draw each page and compress its pixels in one thread, with nothing around it: what no client can go below.

    The fastest lossless way that is known: the grey levels of a page without colour, no filter, ISA-L's level 1.
    """
    import pypdfium2
    from isal import isal_zlib
    from PIL import Image, ImageChops

    start = time.perf_counter()
    pdf = pypdfium2.PdfDocument(file)
    for index in range(len(pdf)):
        page = pdf[index]
        red, green, blue = page.render(scale=200 / 72).to_pil().split()
        assert not any(ImageChops.difference(green, other).getbbox() for other in (red, blue))
        rows = Image.new("L", (green.width + 1, green.height))
        rows.paste(green, (1, 0))
        data = isal_zlib.compress(rows.tobytes(), 1)
        zlib.crc32(data)
        page.close()
    return {"seconds": time.perf_counter() - start}


async def read(file: str, base_url: str, slots: int, start: int) -> dict[str, float]:
    """Read each page with the client, its limit between `start` and `slots`; ``ended`` is on the wall clock."""
    from dots_ocr_client import AsyncDotsOCR, Limiter, Page, VLLMEngine

    begin = time.perf_counter()
    first = None
    pages = 0
    ended = 0.0

    async def take(document: Path) -> None:
        nonlocal first, pages, ended
        async with aclosing(ocr.stream(document)) as stream:
            async for page in stream:
                assert isinstance(page, Page), page
                first = first or time.perf_counter() - begin
                pages += 1
                ended = time.time()

    engine = VLLMEngine(base_url, limiter=Limiter(start, slots))
    async with AsyncDotsOCR(engines=[engine], timeout=600, max_in_flight=slots) as ocr:
        await asyncio.gather(*map(take, _documents(file)))
    return {"seconds": time.perf_counter() - begin, "first": first or 0.0, "pages": pages, "ended": ended}


async def script(file: str, base_url: str, slots: int) -> dict[str, float]:
    """Do the same as a plain script with openai and pypdfium2 does, which knows the server's slots."""
    import openai
    import pypdfium2

    begin = time.perf_counter()
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=600)
    turns, pdfium = asyncio.Semaphore(slots), threading.Lock()

    def picture(document: Any, index: int) -> str:
        if isinstance(document, Path):
            png = document.read_bytes()
        else:
            with pdfium:
                image = document[index].render(scale=200 / 72).to_pil()
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            png = buffer.getvalue()
        return "data:image/png;base64," + base64.b64encode(png).decode()

    async def take(document: Any, index: int) -> None:
        async with turns:
            url = await asyncio.to_thread(picture, document, index)
            parts: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
            answer = await client.chat.completions.create(
                model="dots.ocr", messages=[{"role": "user", "content": parts}], temperature=0.1, max_tokens=16384
            )
            json.loads(answer.choices[0].message.content or "")

    documents: list[Any] = _documents(file)
    if not Path(file).is_dir():
        documents = [pypdfium2.PdfDocument(file)]
    pages = [(one, index) for one in documents for index in range(1 if isinstance(one, Path) else len(one))]
    await asyncio.gather(*(take(*page) for page in pages))
    return {"seconds": time.perf_counter() - begin, "pages": len(pages), "ended": time.time()}


def _documents(file: str) -> list[Path]:
    return sorted(Path(file).iterdir()) if Path(file).is_dir() else [Path(file)]


if __name__ == "__main__":
    job, *words = sys.argv[1:]
    if job == "draw":
        print(json.dumps(draw(*words)))
    else:
        file, url, *numbers = words
        print(json.dumps(asyncio.run((read if job == "read" else script)(file, url, *map(int, numbers)))))
