"""What others have published to read documents with dots.ocr or its kind, as rows beside ours.

Each needs an environment of its own, whose Python runs this file: `python peers.py NAME FILE URL SLOTS`. It imports
nothing of this project, and prints one line of JSON.

upstream: `parser.py` of rednote-hilab/dots.ocr. ``pip install --no-deps`` its checkout, and install openai, requests,
numpy, tqdm, and pymupdf, which is AGPL and only measured here.
olmocr: ``pip install olmocr``, and pdftoppm. It draws its pages smaller than dots.ocr wants them, and as its own model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit


def upstream(file: str, base_url: str, slots: int) -> dict[str, float]:
    """Read a document with dots.ocr's own parser; ``ended`` is on the wall clock."""
    from dots_ocr.parser import DotsOCRParser

    address = urlsplit(base_url)
    with tempfile.TemporaryDirectory() as folder:
        parser = DotsOCRParser(
            ip=address.hostname, port=address.port, model_name="dots.ocr", num_thread=slots, output_dir=folder
        )
        pages = parser.parse_file(file)
        return {"pages": len(pages), "ended": time.time()}


def olmocr(file: str, base_url: str, slots: int) -> dict[str, float]:
    """Read a document with olmocr's pipeline, as its command does; when it ended, only the server knows."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--server", base_url, "--model", "olmocr", "--max_concurrent_requests", str(slots), "--pdfs", file]
        subprocess.run(
            [sys.executable, "-m", "olmocr.pipeline", folder, *options], check=True, stdout=sys.stderr, cwd=folder
        )
        results = [json.loads(line) for found in Path(folder).rglob("*.jsonl") for line in found.open()]
    return {"pages": sum(result["metadata"]["pdf-total-pages"] for result in results)}


PEERS = {"upstream": upstream, "olmocr": olmocr}


def peer_command(name: str, python: str) -> tuple[str, ...]:
    """Return the command that runs a peer; name, file, URL and slots come behind it.

    Raises:
        SystemExit: There is no such peer.
    """
    if name not in PEERS:
        raise SystemExit(f"there is no peer {name!r}. Fix: choose one of {', '.join(PEERS)}")
    return python, str(Path(__file__))


if __name__ == "__main__":
    peer, document, url, places = sys.argv[1:]
    print(json.dumps(PEERS[peer](document, url, int(places))))
