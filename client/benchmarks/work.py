"""What is measured, each as a process of its own: `python -m benchmarks.work draw FILE`, `… read FILE URL SLOTS`.

Prints one line of JSON; the times in it are seconds.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from contextlib import aclosing


def draw(file: str) -> dict[str, float]:
    """Draw and encode each page in one thread, with nothing around it: what no client can go below."""
    import pypdfium2

    start = time.perf_counter()
    pdf = pypdfium2.PdfDocument(file)
    for index in range(len(pdf)):
        page = pdf[index]
        page.render(scale=200 / 72).to_pil().convert("RGB").save(io.BytesIO(), "PNG", compress_level=1)
        page.close()
    return {"seconds": time.perf_counter() - start}


async def read(file: str, base_url: str, slots: int, start: int) -> dict[str, float]:
    """Read each page with the client, its limit between `start` and `slots`; ``ended`` is on the wall clock."""
    from dots_ocr_client import AsyncDotsOCR, Limiter, Page, VLLMEngine

    begin = time.perf_counter()
    first = None
    pages = 0
    ended = 0.0
    engine = VLLMEngine(base_url, limiter=Limiter(start, slots))
    async with AsyncDotsOCR(engines=[engine], timeout=600) as ocr, aclosing(ocr.stream(file)) as stream:
        async for page in stream:
            assert isinstance(page, Page), page
            first = first or time.perf_counter() - begin
            pages += 1
            ended = time.time()
    return {"seconds": time.perf_counter() - begin, "first": first or 0.0, "pages": pages, "ended": ended}


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        print(json.dumps(draw(sys.argv[2])))
    else:
        file, url, slots, start = sys.argv[2:]
        print(json.dumps(asyncio.run(read(file, url, int(slots), int(start)))))
