"""The client beside `vllm bench serve`, on the real server of the rehearsal: how many pages each gets through it."""

from __future__ import annotations

import base64
import json
import os
import re
import statistics
import subprocess
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


def compare_with_vllm(folder: Path, rounds: int) -> tuple[list[str], float]:
    """Return a table of both rates, and the ratio of ours to theirs; needs the host of `make rehearse`."""
    key = _on_host("cat", "/etc/dots-ocr/api-key").strip()
    golden = folder / "golden.png"
    golden.write_bytes(_run(*HOST, "cat", "/usr/local/lib/dots-ocr/golden/page.png"))
    found = [(_client(golden, folder / "pages.tif", key), _vllm_bench(golden.read_bytes(), key)) for _ in range(rounds)]
    client, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(one / other for one, other in found)
    return [
        "| on vLLM's CPU build, pages/s | `vllm bench serve` | the client | ratio |",
        "|---|---|---|---|",
        f"| {PAGES} pages, {AT_ONCE} at once | {theirs:.2f} | {client:.2f} | {ratio:.3f} |",
    ], ratio


def _client(golden: Path, document: Path, key: str) -> float:
    page = Image.open(golden)
    first = document.with_name("first.tif")
    for file, pages in ((first, 2), (document, PAGES)):
        page.save(file, save_all=True, append_images=[page] * (pages - 1), compression="tiff_deflate")
    engine = VLLMEngine(BASE_URL, api_key=key, limiter=Limiter(AT_ONCE, AT_ONCE))
    with DotsOCR(engines=[engine]) as ocr:
        # What starts with the first pages, on either side, `vllm bench serve` leaves out of its time, too.
        ocr.read(first, mode="text")
        start = time.perf_counter()
        result = ocr.read(document, mode="text")
        seconds = time.perf_counter() - start
    assert not result.failures, result.failures
    return len(result.pages) / seconds


def _vllm_bench(page: bytes, key: str) -> float:
    """Run it beside the server's container, whose memory is for the server alone."""
    # The server opens no files, so the page goes in as it does from the client.
    url = PICTURE + base64.b64encode(page).decode()
    line = json.dumps({"prompt": PLACEHOLDER + MODES["text"].prompt, "image_files": [url]})
    image = _on_host("docker", "inspect", "--format={{.Image}}", "dots-ocr").strip()
    script = 'cat >/tmp/pages.jsonl; exec python3 -m vllm.entrypoints.cli.main bench serve "$@"'
    report = _run(
        *(*HOST[:-1], "--interactive", HOST[-1], "docker", "run", "--rm", "--interactive", "--network=host"),
        *("--volumes-from=dots-ocr:ro", f"--env=OPENAI_API_KEY={key}", "--entrypoint=sh", image, "-c", script, "bench"),
        *("--backend=openai-chat", "--base-url=http://127.0.0.1:8000", "--endpoint=/v1/chat/completions"),
        *("--model=dots.ocr", "--tokenizer=/models/DotsOCR", "--dataset-name=custom_image"),
        *("--dataset-path=/tmp/pages.jsonl", f"--num-prompts={PAGES}", f"--max-concurrency={AT_ONCE}"),
        *(f"--custom-output-len={ANSWER_TOKENS}", "--temperature=0.1", "--top-p=0.9", "--disable-tqdm"),
        input_bytes=f"{line}\n".encode() * PAGES,
    ).decode()
    found = re.search(r"Request throughput \(req/s\):\s+([\d.]+)", report)
    if found is None or not re.search(rf"Successful requests:\s+{PAGES}\b", report):
        raise SystemExit(f"vllm bench serve did not read every page:\n{report[-3000:]}")
    return float(found[1])


def _on_host(*words: str) -> str:
    return _run(*HOST, *words).decode()


def _run(*words: str, input_bytes: bytes = b"") -> bytes:
    done = subprocess.run(words, input=input_bytes, capture_output=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.decode()[-2000:]}\nStart the server with `make rehearse`.")
    return done.stdout
