"""The client beside `vllm bench serve`, on the real server of the rehearsal: how many pages each gets through it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Final

from PIL import Image

from dots_ocr_client import DotsOCR, VLLMEngine
from dots_ocr_client.limiter import Limiter
from dots_ocr_client.prompts import MODES, PLACEHOLDER

HOST: Final = ("docker", "--host", "unix:///run/dots-ocr-rehearsal/docker.sock", "exec", "dots-ocr-rehearsal-host")
BASE_URL: Final = "http://127.0.0.1:18000/v1"
PAGES: Final = 96
AT_ONCE: Final = 4
"""As many as the rehearsal's server reads at once."""
ANSWER_TOKENS: Final = 256
"""An answer of the tiny model has 225."""


def compare_with_vllm(folder: Path) -> None:
    """Print both rates; needs the host of `make rehearse`."""
    key = _on_host("cat", "/etc/dots-ocr/api-key").strip()
    golden = folder / "golden.png"
    golden.write_bytes(_run(*HOST, "cat", "/usr/local/lib/dots-ocr/golden/page.png"))
    client = _client(golden, folder / "pages.tif", key)
    theirs = _vllm_bench(golden.read_bytes(), key)
    print("\n| on vLLM's CPU build, pages/s | `vllm bench serve` | the client | ratio |\n|---|---|---|---|")
    print(f"| {PAGES} pages, {AT_ONCE} at once | {theirs:.2f} | {client:.2f} | {client / theirs:.3f} |", flush=True)


def _client(golden: Path, document: Path, key: str) -> float:
    page = Image.open(golden)
    page.save(document, save_all=True, append_images=[page] * (PAGES - 1), compression="tiff_deflate")
    engine = VLLMEngine(BASE_URL, api_key=key, limiter=Limiter(AT_ONCE, AT_ONCE))
    with DotsOCR(engines=[engine]) as ocr:
        ocr.read_page(golden, mode="text")  # the server's first page takes longer
        start = time.perf_counter()
        result = ocr.read(document, mode="text")
        seconds = time.perf_counter() - start
    assert not result.failures, result.failures
    return len(result.pages) / seconds


def _vllm_bench(page: bytes, key: str) -> float:
    host = (*HOST[:-1], "--interactive", HOST[-1])
    inside = ("docker", "exec", "--interactive", "--env", f"OPENAI_API_KEY={key}", "dots-ocr")
    _run(*host, *inside, "sh", "-c", "cat >/tmp/page.png", input_bytes=page)
    line = json.dumps({"prompt": PLACEHOLDER + MODES["text"].prompt, "image_files": ["/tmp/page.png"]})
    lines = (line + "\n") * PAGES
    _run(
        *HOST[:-1], "--interactive", HOST[-1], *inside, "sh", "-c", "cat >/tmp/pages.jsonl", input_bytes=lines.encode()
    )
    report = _on_host(
        *(*inside, "sh", "-c", 'cd /tmp && exec python3 -m vllm.entrypoints.cli.main bench serve "$@"', "bench"),
        *("--backend=openai-chat", "--base-url=http://127.0.0.1:8000", "--endpoint=/v1/chat/completions"),
        *("--model=dots.ocr", "--tokenizer=/models/DotsOCR", "--dataset-name=custom_image"),
        *("--dataset-path=/tmp/pages.jsonl", f"--num-prompts={PAGES}", f"--max-concurrency={AT_ONCE}"),
        *(f"--custom-output-len={ANSWER_TOKENS}", "--temperature=0.1", "--top-p=0.9", "--disable-tqdm"),
    )
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
