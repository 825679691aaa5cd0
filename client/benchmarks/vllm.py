"""The client beside `vllm bench serve`, which runs on the host of `make rehearse`: how many pages each gets through."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from PIL import Image

from dots_ocr_client import DotsOCR, VLLMEngine
from dots_ocr_client.engines.admission import Limiter
from dots_ocr_client.engines.server import PICTURE
from dots_ocr_client.prompts import MODES, PLACEHOLDER

HOST: Final = ("docker", "--host", "unix:///run/dots-ocr-rehearsal/docker.sock", "exec", "dots-ocr-rehearsal-host")
BASE_URL: Final = "http://127.0.0.1:18000/v1"
PAGES: Final = 96
AT_ONCE: Final = 4
"""As many as the rehearsal's server reads at once."""
ANSWER_TOKENS: Final = 256
"""An answer of the tiny model has 225."""


def compare_with_vllm(rounds: int) -> tuple[list[str], float]:
    """Return a row of both rates on the server of the rehearsal, and the ratio of ours to theirs."""
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder, "pages.tif")
        found = [(_client(document), vllm_bench("http://127.0.0.1:8000/v1", PAGES, AT_ONCE)) for _ in range(rounds)]
    client, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(one / other for one, other in found)
    row = f"| vLLM's CPU build, pages/s | {PAGES} | {AT_ONCE} | {theirs:.2f} | {client:.2f} | {ratio:.3f} |"
    return [row], ratio


def gateway() -> str:
    """Return the address of this machine as the host of the rehearsal sees it."""
    return _on_host("ip", "-4", "route", "show", "default").split()[2]


def _key() -> str:
    return _on_host("cat", "/etc/dots-ocr/api-key").strip()


def _golden_page() -> bytes:
    return _run(*HOST, "cat", "/usr/local/lib/dots-ocr/golden/page.png")


def _client(document: Path) -> float:
    page = Image.open(io.BytesIO(_golden_page()))
    first = document.with_name("first.tif")
    for file, pages in ((first, 2), (document, PAGES)):
        page.save(file, save_all=True, append_images=[page] * (pages - 1), compression="tiff_deflate")
    engine = VLLMEngine(BASE_URL, api_key=_key(), limiter=Limiter(AT_ONCE, AT_ONCE))
    with DotsOCR(engines=[engine]) as ocr:
        # What starts with the first pages, on either side, `vllm bench serve` leaves out of its time, too.
        ocr.read(first, mode="text")
        start = time.perf_counter()
        result = ocr.read(document, mode="text")
        seconds = time.perf_counter() - start
    assert not result.failures, result.failures
    return len(result.pages) / seconds


def vllm_bench(base_url: str, pages: int, at_once: int) -> float:
    """Return its requests per second; it runs beside the server's container, whose memory is for the server alone."""
    # The server opens no files, so the page goes in as it does from the client.
    url = PICTURE + base64.b64encode(_golden_page()).decode()
    line = json.dumps({"prompt": PLACEHOLDER + MODES["text"].prompt, "image_files": [url]})
    image = _on_host("docker", "inspect", "--format={{.Image}}", "dots-ocr").strip()
    script = 'cat >/tmp/pages.jsonl; exec python3 -m vllm.entrypoints.cli.main bench serve "$@"'
    report = _run(
        *(*HOST[:-1], "--interactive", HOST[-1], "docker", "run", "--rm", "--interactive", "--network=host"),
        *(
            "--volumes-from=dots-ocr:ro",
            f"--env=OPENAI_API_KEY={_key()}",
            "--entrypoint=sh",
            image,
            "-c",
            script,
            "bench",
        ),
        *("--backend=openai-chat", f"--base-url={base_url.removesuffix('/v1')}", "--endpoint=/v1/chat/completions"),
        *("--model=dots.ocr", "--tokenizer=/models/DotsOCR", "--dataset-name=custom_image"),
        *("--dataset-path=/tmp/pages.jsonl", f"--num-prompts={pages}", f"--max-concurrency={at_once}"),
        *(f"--custom-output-len={ANSWER_TOKENS}", "--temperature=0.1", "--top-p=0.9", "--disable-tqdm"),
        input_bytes=f"{line}\n".encode() * pages,
    ).decode()
    found = re.search(r"Request throughput \(req/s\):\s+([\d.]+)", report)
    if found is None or not re.search(rf"Successful requests:\s+{pages}\b", report):
        raise SystemExit(f"vllm bench serve did not read every page:\n{report[-3000:]}")
    return float(found[1])


def _on_host(*words: str) -> str:
    return _run(*HOST, *words).decode()


def _run(*words: str, input_bytes: bytes = b"") -> bytes:
    done = subprocess.run(words, input=input_bytes, capture_output=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.decode()[-2000:]}\nStart the server with `make rehearse`.")
    return done.stdout
