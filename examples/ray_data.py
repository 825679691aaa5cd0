"""Reads any number of documents with Ray Data: `python ray_data.py FOLDER --output FOLDER`; more with --help.

The output is JSON lines: document, page (0: the document cannot be opened), text, result (`Page.to_dict()` as JSON),
worker, and error, which is null for a page that was read. The same command again reads only what is missing or failed;
that a document has changed goes unnoticed. On a cluster the inputs and the output need the same path on all machines,
and `ray start` the key in its environment (DOTS_OCR_API_KEY): what Ray passes on itself, as it does the base URL with
a login in it, its logs may show.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import ray
from dots_ocr_client import DotsOCR, DotsOCRError, FailedPage, InputError, VLLMEngine, make_engines
from dots_ocr_client.batch import SUFFIXES
from dots_ocr_client.engines.vllm import DEFAULT_BASE_URL
from dots_ocr_client.rasterizer import open_document

BLOCK: Final = 32
"""Pages in a file of the output: what a worker that dies has to read again, and what one client sends at once."""
OBJECT_STORE_BYTES: Final = 100 * 2**20
"""Of a local Ray. Pages are drawn where they are read, so that only texts pass through it."""

Row = dict[str, Any]


class Reader:
    """Reads pages, in a process of its own that keeps its client."""

    def __init__(self, base_url: str) -> None:
        """Make the client. No other engine reads while the server is away, for a second run would leave its pages."""
        self.ocr = DotsOCR(engines=make_engines(["vllm"], base_url=base_url), on_unavailable="wait")
        self.worker = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, batch: dict[str, Iterable[Any]]) -> dict[str, list[Any]]:
        """Read all pages of a batch at once.

        Raises:
            ConfigurationError: The model or the key is wrong, for all pages.
        """
        wanted: dict[str, list[int]] = defaultdict(list)
        for document, page in zip(batch["document"], batch["page"], strict=True):
            wanted[str(document)].append(int(page))
        with ThreadPoolExecutor(len(wanted)) as threads:
            rows = [row for rows in threads.map(self._read, wanted, wanted.values()) for row in rows]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _read(self, document: str, numbers: list[int]) -> list[Row]:
        try:
            pages = list(self.ocr.stream(document, pages=numbers))
        except InputError as error:
            pages = [FailedPage(number, type(error).__name__, str(error)) for number in numbers]
        return [
            {
                "document": document,
                "page": page.number,
                "text": "" if isinstance(page, FailedPage) else utf8(page.text),
                "error": utf8(page.reason) if isinstance(page, FailedPage) else None,
                "result": json.dumps(page.to_dict()),
                "worker": self.worker,
            }
            for page in pages
        ]


def utf8(text: str) -> str:
    """Replace halves of surrogate pairs, on which the output could not be written."""
    return text.encode(errors="replace").decode()


def missing_pages(row: Row) -> Iterator[Row]:
    """Yield a row for each page of a document that is not read yet."""
    try:
        with open_document(row["document"]) as document:
            numbers = document.numbers
    except InputError:
        numbers = (0,)  # the reader will say why
    done = set(row["done"])
    yield from ({"document": row["document"], "page": number} for number in numbers if number not in done)


def find_documents(inputs: Iterable[Path]) -> list[str]:
    """List files, and the documents in folders, by their absolute paths.

    Raises:
        InputError: There are none, or one cannot be named.
    """
    found: set[Path] = set()
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} does not exist. Fix: correct the path.")
        inside = (file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
        found.update(file.absolute() for file in (inside if path.is_dir() else [path]))
    if not found:
        raise InputError(f"there are no PDFs or images in {', '.join(map(str, inputs))}. Fix: name another folder.")
    names = sorted(map(str, found))
    if wrong := [name for name in names if utf8(name) != name]:
        raise InputError(f"the name {wrong[0]!r} is not in UTF-8. Fix: rename it.")
    return names


def take_up(output: Path) -> dict[str, set[int]]:
    """Return the pages that are read, by document, and take out of the output whatever else earlier runs left there."""
    done: dict[str, set[int]] = defaultdict(set)
    for file in sorted(output.glob("*.json")):
        kept, lines = [], file.read_bytes().splitlines(keepends=True)
        for line in lines:
            with suppress(ValueError):  # a line that was cut off when its writer died
                row = json.loads(line)
                if row["error"] is None and row["page"] not in done[row["document"]]:
                    done[row["document"]].add(row["page"])
                    kept.append(line)
        if len(kept) < len(lines):
            rest = file.with_suffix(".tmp")
            rest.write_bytes(b"".join(kept))
            rest.replace(file)
    return done


async def check(base_url: str | None) -> str:
    """Return the server's address as it was given, a login included, if it is well and has the model.

    Raises:
        ConfigurationError, EngineError: It is not; the message says what to do.
    """
    base_url = base_url or os.environ.get("DOTS_OCR_BASE_URL") or DEFAULT_BASE_URL
    engine = VLLMEngine(base_url)
    try:
        await engine.models(seconds=30)  # says best what to do if there is no server, or another key is needed
        await engine.probe(seconds=30)
    finally:
        await engine.aclose()
    return base_url  # that of the engine has no login, which the workers need


def read(documents: list[str], output: Path, base_url: str, workers: int, address: str) -> int:
    """Read what is missing, and return how many pages failed.

    Raises:
        InputError: Another run has the output, or the cluster is too small.
        RayError: The job ended early; the same run again continues.
    """
    output.mkdir(parents=True, exist_ok=True)
    # Nobody else may open it: whoever can, can lock it.
    with os.fdopen(os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run writes to {output}. Fix: wait until it has ended.") from error
        done = take_up(output)
        local = {"num_cpus": workers + 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with ray.init(address, **(local if address == "local" else {})):
            # Each worker holds a CPU for good; without one more, nothing would list and write, and all would wait.
            if (cpus := int(ray.cluster_resources().get("CPU", 0))) <= workers:
                raise InputError(f"{workers} workers need {workers + 1} CPUs; Ray has {cpus}. Fix: fewer --workers.")
            (
                ray.data.from_items([{"document": name, "done": sorted(done[name])} for name in documents])
                .flat_map(missing_pages)
                .repartition(target_num_rows_per_block=BLOCK)
                .map_batches(
                    Reader,
                    fn_constructor_args=[base_url],
                    batch_size=BLOCK,
                    num_cpus=1,
                    # Two batches at once, so that the last page of one does not keep the server idle.
                    compute=ray.data.ActorPoolStrategy(
                        size=workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
                    ),
                )
                .write_json(str(output.absolute()))
            )
    rows = (json.loads(line) for file in output.glob("*.json") for line in file.open())
    return sum(row["error"] is not None for row in rows)


def main() -> None:
    """Run the command; exit status 0 if all pages are read, else 1."""
    parser = argparse.ArgumentParser(description="Read documents with Ray Data; a second run continues.")
    parser.add_argument("inputs", nargs="+", type=Path, help="PDFs, images, and folders of them")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results, as JSON lines")
    parser.add_argument("--base-url", help="of the server or gateway, with /v1; default: DOTS_OCR_BASE_URL")
    parser.add_argument("--workers", type=int, default=2, help="clients, each a process with a CPU of its own")
    parser.add_argument("--address", default="local", help="of a Ray cluster (auto: of this machine's); default: none")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    try:
        documents = find_documents(options.inputs)
        base_url = asyncio.run(check(options.base_url))
        failed = read(documents, options.output, base_url, options.workers, options.address)
    except (DotsOCRError, OSError) as error:
        sys.exit(f"ray_data: {error}")
    except ray.exceptions.RayError as error:
        sys.exit(f"{error}\nray_data: ended early, see above. Fix: remove the cause; the same command continues.")
    if failed:
        sys.exit(f"ray_data: {failed} pages failed; their rows in {options.output} say why. Fix: run the same again.")


if __name__ == "__main__":
    main()
