"""The client's example for Ray Data: a local Ray with two workers, and a server that reads pages by their size."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dots_ocr_client import Page
from dots_ocr_client.engines.admission import START
from PIL import Image
from pytest_httpserver import HTTPServer
from support import FakeServer, pdf_of, reply, sent_image
from werkzeug import Request, Response

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples/ray_data.py"
PATIENCE = 600.0  # seconds: a Ray that starts on a busy machine has taken over 120

Pages = dict[tuple[str, int], str]


class SizeServer(FakeServer):
    """Reads from every page its size in pixels.

    Attributes:
        refused: Sizes of pages that are refused.
        held: Sizes of pages that get no answer as long as they are here.
        crowd: So many requests have to be there before the first is answered.
    """

    def __init__(self, http: HTTPServer) -> None:
        super().__init__(http)
        self.refused: set[str] = set()
        self.held: set[str] = set()
        self.crowd = 0

    def _complete(self, request: Request) -> Response:
        if size_of(json.loads(request.get_data())) in self.refused:
            return reply({"error": {"message": "this page is refused"}}, 400)
        return super()._complete(request)

    def _wrap(self, body: dict[str, Any]) -> str:
        size = size_of(body)
        wait_until(lambda: len(self.requests) >= self.crowd and size not in self.held)
        return json.dumps([{"bbox": [0, 0, 28, 28], "category": "Text", "text": size}])


class Example:
    """Runs the example, with the home that Ray gets for what it leaves behind."""

    def __init__(self, base_url: str, home: str) -> None:
        self.environment = {**os.environ, "HOME": home, "RAY_TMPDIR": home, "DOTS_OCR_BASE_URL": base_url}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, EXAMPLE, *words]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.started.append(subprocess.Popen(command, env=self.environment, stdout=null, stderr=pipe, text=True))
        return self.started[-1]

    def run(self, *words: str | Path) -> tuple[int, str]:
        """Return its exit status and what it said."""
        process = self.start(*words)
        said = process.communicate(timeout=PATIENCE)[1]
        return process.returncode, said

    def processes(self) -> list[str]:
        """What is there of its processes and those of Ray."""
        mark, found = f"RAY_TMPDIR={self.environment['RAY_TMPDIR']}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text())
        return found


@pytest.fixture
def server() -> Iterator[SizeServer]:
    with HTTPServer(threaded=True) as http:
        yield SizeServer(http)
        http.check_assertions()


@pytest.fixture
def example(server: SizeServer) -> Iterator[Example]:
    home = tempfile.mkdtemp(prefix="ray-")  # not tmp_path, which is too long for Ray's sockets
    example = Example(server.base_url, home)
    yield example
    server.held.clear()
    for process in example.started:
        process.kill()
        process.communicate(timeout=PATIENCE)
    wait_until(lambda: not example.processes())
    shutil.rmtree(home)


@pytest.fixture
def documents(tmp_path: Path) -> tuple[Path, Pages]:
    """A folder of 200 pages, each of a size of its own, and the text of each."""
    folder = tmp_path / "documents é"
    (folder / "inner").mkdir(parents=True)
    pages: Pages = {}
    sizes = ((25 * across, 25 * down) for down in range(10, 30) for across in range(10, 30))
    for name, count in (("a.pdf", 150), ("inner/b.PDF", 45)):
        some = list(itertools.islice(sizes, count))
        (folder / name).write_bytes(pdf_of(*((0.36 * width, 0.36 * height) for width, height in some)))  # 200 dpi
        pages |= {(str(folder / name), page): f"{w} x {h}" for page, (w, h) in enumerate(some, start=1)}
    for width in range(101, 106):
        Image.new("RGB", (width, 100), "white").save(folder / f"{width}.png")
        pages[(str(folder / f"{width}.png"), 1)] = f"{width} x 100"
    (folder / "notes.txt").write_text("no document")
    return folder, pages


def size_of(body: dict[str, Any]) -> str:
    width, height = sent_image(body).size
    return f"{width} x {height}"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in output.glob("*.json") for line in file.read_text().splitlines()]


def texts(output: Path) -> list[tuple[str, int, str]]:
    """Every row that is no error, sorted: one that is there twice shows."""
    return sorted((row["document"], row["page"], row["text"]) for row in rows(output) if row["error"] is None)


def expected(pages: Pages) -> list[tuple[str, int, str]]:
    return sorted((*key, text) for key, text in pages.items())


def test_every_page_is_read_once_by_two_workers_and_later_what_failed(
    server: SizeServer, example: Example, documents: tuple[Path, Pages], tmp_path: Path
) -> None:
    folder, pages = documents
    output = tmp_path / "output"
    broken = folder / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7 and nothing else")
    refused = (str(folder / "a.pdf"), 7)
    server.refused = {pages[refused]}
    server.crowd = 2 * START - 1  # more than one client begins with

    status, said = example.run(folder, "--output", output, "--workers", "2")
    assert status == 1
    assert "2 pages failed" in said
    assert texts(output) == expected({key: text for key, text in pages.items() if key != refused})
    failed = {(row["document"], row["page"]): row["error"] for row in rows(output) if row["error"] is not None}
    assert failed.keys() == {refused, (str(broken), 0)}
    assert "this page is refused" in failed[refused]
    assert "broken.pdf" in failed[str(broken), 0]
    assert len({row["worker"] for row in rows(output)}) == 2
    first = next(row for row in rows(output) if row["error"] is None)
    assert Page.from_dict(json.loads(first["result"])).text == first["text"]

    server.refused = set()
    server.requests.clear()
    server.crowd = 0
    broken.unlink()
    assert example.run(folder, "--output", output)[0] == 0
    assert [size_of(body) for body in server.bodies] == [pages[refused]]
    assert texts(output) == expected(pages)
    assert len(rows(output)) == len(pages)


def test_killed_run_goes_on(
    server: SizeServer, example: Example, documents: tuple[Path, Pages], tmp_path: Path
) -> None:
    folder, pages = documents
    output = tmp_path / "output"
    server.held = {pages[str(folder / "a.pdf"), 150]}
    killed = example.start(folder, "--output", output)
    wait_until(lambda: any(output.glob("*.json")))
    status, said = example.run(folder, "--output", output)
    assert status == 1
    assert "another run writes to" in said
    killed.kill()
    killed.wait(PATIENCE)
    wait_until(lambda: not example.processes())
    file = next(output.glob("*.json"))
    file.write_bytes(file.read_bytes()[:-20])  # as when the machine dies
    found = sum(path.read_bytes().count(b"\n") for path in output.glob("*.json"))
    assert 0 < found < len(pages) - 1
    server.held.clear()
    server.requests.clear()

    assert example.run(folder, "--output", output)[0] == 0
    assert len(server.requests) == len(pages) - found
    assert texts(output) == expected(pages)
    assert len(rows(output)) == len(pages)


def test_wrong_key_ends_the_job(
    server: SizeServer, example: Example, documents: tuple[Path, Pages], tmp_path: Path
) -> None:
    server.fail_with(401)  # pages only: the list of models is still given
    status, said = example.run(documents[0], "--output", tmp_path / "output")
    assert status == 1
    assert "set DOTS_OCR_API_KEY" in said
    assert said.endswith("the same command continues.\n")
    assert rows(tmp_path / "output") == []


def test_folder_without_documents(example: Example, tmp_path: Path) -> None:
    status, said = example.run(tmp_path, "--output", tmp_path / "output")
    assert status == 1
    assert "there are no PDFs or images in" in said


def test_server_out_of_reach(example: Example, documents: tuple[Path, Pages], tmp_path: Path) -> None:
    status, said = example.run(documents[0], "--output", tmp_path / "output", "--base-url", "http://127.0.0.1:9/v1")
    assert status == 1
    assert said.startswith("ray_data: cannot reach http://127.0.0.1:9/v1")
    assert "start the server" in said
    assert not (tmp_path / "output").exists()
