"""How much memory `dots-ocr serve` takes for 16 hostile pictures at once: `python -m benchmarks.hostile`, some minutes.

The service believes in 16 processors and 16 GiB, what a host is given by default (``dots_ocr_server_memory``).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from PIL import Image

from .machine import BusyError, refuse_if_busy

PICTURES: Final = 16
SIDE: Final = 9400
"""Of a picture in pixels: the largest that is taken."""
SERVICE: Final = """
import os
from dots_ocr_client import TesseractEngine, cli, rasterizer, serve
os.sched_getaffinity = lambda _: range(16)
rasterizer.memory = serve.memory = lambda: 16 << 30
cli.main(["serve", "--port", "0", "--timeout", "60"])
"""


def pictures() -> dict[str, bytes]:
    """Return pictures that take much memory, and few bytes of a request."""
    noise = Image.effect_noise((SIDE // 8, SIDE // 8), 90).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "progressive JPEG": (Image.merge("RGB", [noise] * 3), "JPEG", {"progressive": True, "quality": 30}),
        "PNG with transparency": (Image.merge("RGBA", [noise] * 4), "PNG", {"compress_level": 1}),
        "PNG of one colour": (Image.new("1", (SIDE, SIDE)), "PNG", {}),
    }
    made = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[name] = buffer.getvalue()
    return made


def memory_of(group: int) -> int:
    """Return the bytes that the processes of a session take, shared ones counted once (PSS)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[3]) == group:
                lines = folder.joinpath("smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, IndexError):  # it has ended
            continue
    return total


def ask(url: str, picture: bytes) -> str:
    """Send a picture; return the status, and the beginning of the reason if it is refused."""
    text = {"type": "text", "text": "Extract the text content from this image."}
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}}
    body = json.dumps({"model": "dots.ocr", "messages": [{"role": "user", "content": [image, text]}]}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=900) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.loads(error.read())['error']['message'][:60]!r}"


def main() -> None:
    """Print a row for each kind of picture."""
    try:
        print(refuse_if_busy(), end="\n\n")
    except BusyError as error:
        sys.exit(f"nothing was measured: {error}")
    print("| 16 at once | answers | peak of all processes, MiB | seconds | `/health` beside them, s at most |")
    print("|---|---|---|---|---|")
    for name, picture in pictures().items():
        service = subprocess.Popen(
            [sys.executable, "-c", SERVICE],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert service.stderr is not None
        url = service.stderr.readline().split()[1].removesuffix("/v1")
        threading.Thread(target=service.stderr.read, daemon=True).start()
        begin, peak, slowest = time.monotonic(), 0, 0.0
        with ThreadPoolExecutor(PICTURES) as threads:
            answers = [threads.submit(ask, url, picture) for _ in range(PICTURES)]
            while not all(answer.done() for answer in answers):
                peak = max(peak, memory_of(service.pid))
                asked = time.monotonic()
                with contextlib.suppress(urllib.error.HTTPError):  # 503 is an answer, too
                    urllib.request.urlopen(f"{url}/health", timeout=60).close()
                slowest = max(slowest, time.monotonic() - asked)
                time.sleep(0.1)
        seconds = time.monotonic() - begin
        service.terminate()
        service.wait()
        counted = "; ".join(f"{count} x {text}" for text, count in Counter(one.result() for one in answers).items())
        print(f"| {name} | {counted} | {peak >> 20:,} | {seconds:.0f} | {slowest:.1f} |", flush=True)


if __name__ == "__main__":
    main()
