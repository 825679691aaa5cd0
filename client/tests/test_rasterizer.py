from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support import children, jpeg_of_scans, pdf_of

from dots_ocr_client import ConfigurationError, InputError
from dots_ocr_client.pages import documents, rasterizer
from dots_ocr_client.pages.documents import OpenDocument, PageImage, Source, draw, open_document
from dots_ocr_client.pages.rasterizer import WORKER_MEMORY, Rasterizer


def has_ended(pid: int, seconds: float) -> bool:
    """Wait for the end of somebody else's process."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def no_process_is_left_over() -> Iterator[None]:
    before = children()
    gc.freeze()  # what was there before takes most of the time of a collection
    yield
    gc.collect()
    gc.unfreeze()
    assert children() - before == set()


@pytest.fixture
def document() -> Iterator[OpenDocument]:
    with open_document(pdf_of((72, 72), (144, 72), (72, 144))) as document:
        yield document


def draw_all(rasterizer: Rasterizer, document: OpenDocument) -> list[PageImage | BaseException]:
    async def run() -> list[PageImage | BaseException]:
        draws = (rasterizer.draw(document.reference(number)) for number in document.numbers)
        return await asyncio.gather(*draws, return_exceptions=True)

    return asyncio.run(run())


def hanging_pdf() -> bytes:
    """PDFium takes minutes over the second of its three pages, which fills the same area again and again."""
    content = b"0 0 m 9 9 9 0 0 9 c S " * 200
    form = b"<< /Type /XObject /Subtype /Form /BBox [0 0 72 72] /Resources << /XObject << /F %d 0 R >> >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R 4 0 R 3 0 R] /Count 3 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] /Contents 6 0 R"
        b" /Resources << /XObject << /F 6 0 R >> >> >>",
        b"null",
    ]
    for number in range(6, 12):  # each shows the next one a hundred times
        shows = b"/F Do " * 100 if number < 11 else content
        objects.append((form % (number + 1)) + b" /Length %d >>\nstream\n%s\nendstream" % (len(shows), shows))
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, text) for number, text in enumerate(objects, 1))
    return b"%PDF-1.4\n" + body + b"trailer << /Root 1 0 R /Size 12 >>\n%%EOF"


def test_pages_are_the_same_whoever_draws_them(document: OpenDocument) -> None:
    expected = [draw(document.reference(number)) for number in document.numbers]
    assert draw_all(Rasterizer(2), document) == expected


def test_there_are_never_more_processes_than_workers(document: OpenDocument) -> None:
    rasterizer = Rasterizer(1)
    before = children()
    draw_all(rasterizer, document)
    assert len(children() - before) == 1


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may decode nothing, as if decoders would end it."""

    def crash(*_: object) -> None:
        raise AssertionError("decoded here")

    for name in ("_opened_image", "_open_pdf", "_tiff_pages", "_page_of"):
        monkeypatch.setattr(documents, name, crash)


def sources(sheet: Image.Image, folder: Path) -> Iterator[tuple[Source, tuple[int, ...]]]:
    """Documents of every kind, and the widths of their pages."""
    for kind, more in (("png", []), ("tiff", [sheet])):
        path = folder / f"sheet.{kind}"
        sheet.save(path, save_all=bool(more), append_images=more)
        widths = (sheet.width,) * (1 + len(more))
        yield path, widths
        yield path.read_bytes(), widths
    yield pdf_of((72, 72), (144, 72)), (200, 400)


@pytest.mark.usefixtures("no_decoder")
@pytest.mark.attack("files of every kind from strangers", "decoded in no process but a worker's")
def test_nothing_is_decoded_in_this_process(sheet: Image.Image, tmp_path: Path) -> None:
    own = Rasterizer(1)

    async def run() -> None:
        for source, widths in sources(sheet, tmp_path):
            with await own.open(source) as document:
                assert tuple([(await own.draw(document.reference(one))).width for one in document.numbers]) == widths

    asyncio.run(run())
    own.close()
    for source, widths in sources(sheet, tmp_path):
        with rasterizer.open_document(source) as document:
            assert tuple(rasterizer.draw(document.reference(one)).width for one in document.numbers) == widths
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)


@pytest.mark.parametrize("data", [b"hello", b"%PDF-1.7 rubbish", b""])
def test_what_cannot_be_opened_fails_for_the_same_reason_everywhere(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        open_document(data)
    reason = f"^{re.escape(str(caught.value))}$"
    with pytest.raises(InputError, match=reason):
        asyncio.run(Rasterizer(1).open(data))
    with pytest.raises(InputError, match=reason):
        rasterizer.open_document(data)
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)


@pytest.mark.attack("a picture that takes too long to decode", "its worker ends; only its page fails")
def test_an_image_that_takes_too_much_of_the_processor_ends_its_worker_only(
    sheet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rasterizer, "IMAGE_SECONDS", 0.5)
    slow = jpeg_of_scans(300, 3000)

    async def run() -> None:
        own = Rasterizer(1)
        reason = r"<bytes> cannot be drawn: it takes longer than 0\.5 s"
        with await own.open(slow) as document, pytest.raises(InputError, match=reason):
            await own.draw(document.reference(1))
        with await own.open(sheet_file) as document:
            assert (await own.draw(document.reference(1))).width == 784

    asyncio.run(run())


def test_it_tells_for_how_long_no_worker_has_been_free(sheet: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    finish: queue.Queue[None] = queue.Queue()
    monkeypatch.setattr(rasterizer, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(documents, "draw", lambda _: finish.get(timeout=20))

    async def run() -> None:
        nonlocal now
        own = Rasterizer(2)
        found: list[tuple[int, float]] = []

        async def begin(*numbers: int) -> list[asyncio.Task[PageImage]]:
            nonlocal now
            draws = [asyncio.create_task(own.draw(opened.reference(1))) for _ in numbers]
            await asyncio.sleep(0)
            now += 5
            found.append((own.busy, own.full_for))
            return draws

        draws = [*await begin(), *await begin(1), *await begin(2, 3)]
        finish.put(None)
        await asyncio.wait(draws, return_when=asyncio.FIRST_COMPLETED)
        while own.busy < 2:  # the third one's turn
            await asyncio.sleep(0)
        await begin()
        for _ in range(2):
            finish.put(None)
        await asyncio.gather(*draws)
        await begin()
        assert found == [(0, 0), (1, 0), (2, 5), (2, 5), (0, 0)]

    with open_document(sheet) as opened:
        asyncio.run(run())


def test_images_of_pil_need_no_process(sheet: Image.Image) -> None:
    rasterizer = Rasterizer(1)
    before = children()
    with open_document(sheet) as document:
        (page,) = draw_all(rasterizer, document)
    assert isinstance(page, PageImage)
    assert page.image.tobytes() == sheet.tobytes()
    assert children() == before


def test_by_default_there_is_a_worker_for_each_processor_up_to_eight() -> None:
    assert Rasterizer().workers == min(len(os.sched_getaffinity(0)), 8, rasterizer.memory() // 2 // WORKER_MEMORY)
    with pytest.raises(ValueError, match="at least one worker"):
        Rasterizer(0)


@pytest.mark.parametrize(
    ("limits", "gib", "processors", "workers"),
    [
        ({}, 64, 16, 8),
        ({}, 64, 3, 3),
        ({}, 1, 16, 1),
        ({"": "max", "a": 2**34, "a/b": "max"}, 64, 16, 4),
        ({"a/b": 2**32, "a": 2**34}, 64, 16, 1),
        ({"a": 2**34}, 64, 16, 4),
        ({"a/b": 2**40}, 16, 16, 4),
    ],
)
def test_there_are_as_many_workers_as_fit_into_the_memory_of_the_group(
    limits: dict[str, int | str],
    gib: int,
    processors: int,
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, limit in limits.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(rasterizer, "CGROUPS", tmp_path)
    monkeypatch.setattr(rasterizer, "_group", lambda: "a/b")
    monkeypatch.setattr(rasterizer, "_processors", lambda: processors)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gib * 2**18}.__getitem__)
    assert Rasterizer().workers == workers


def test_an_input_error_keeps_its_message_and_its_worker(tmp_path: Path) -> None:
    path = tmp_path / "line\nbreak.pdf"
    path.write_bytes(pdf_of((72, 72), (14_000, 20), (72, 72)))
    rasterizer = Rasterizer(1)
    with open_document(path) as document:
        first, second, third = draw_all(rasterizer, document)
        with pytest.raises(InputError) as caught:
            draw(document.reference(2))
    assert isinstance(second, InputError)
    assert str(second) == str(caught.value)
    assert "page 2 of" in str(second)
    assert isinstance(first, PageImage)
    assert isinstance(third, PageImage)


def test_a_killed_worker_fails_its_page_only(document: OpenDocument) -> None:
    rasterizer = Rasterizer(1)

    async def run() -> None:
        before = children()
        await rasterizer.draw(document.reference(1))
        (worker,) = children() - before
        os.kill(worker, signal.SIGSTOP)  # so that it is in the middle of the page
        page = asyncio.create_task(rasterizer.draw(document.reference(2)))
        await asyncio.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(InputError, match=r"^page 2 of <bytes> cannot be drawn: its process ended .*SIGKILL"):
            await page
        assert (await rasterizer.draw(document.reference(2))).width == 400

    asyncio.run(run())


def test_a_worker_that_died_while_idle_fails_no_page(document: OpenDocument) -> None:
    rasterizer = Rasterizer(1)

    async def run() -> None:
        before = children()
        await rasterizer.draw(document.reference(1))
        (worker,) = children() - before
        os.kill(worker, signal.SIGKILL)
        await asyncio.sleep(0.1)
        assert (await rasterizer.draw(document.reference(2))).width == 400

    asyncio.run(run())


def test_a_page_that_takes_too_long_fails_alone() -> None:
    rasterizer = Rasterizer(1)

    async def run(document: OpenDocument) -> None:
        start = time.monotonic()
        with pytest.raises(InputError, match=r"page 2 of <bytes> cannot be drawn: it takes longer than 0.5 s"):
            await rasterizer.draw(document.reference(2), seconds=0.5)
        assert time.monotonic() - start < 8
        assert (await rasterizer.draw(document.reference(3))).width == 200

    with open_document(hanging_pdf()) as document:
        asyncio.run(run(document))


def test_cancelling_ends_the_worker_and_frees_its_place() -> None:
    rasterizer = Rasterizer(1)

    async def run(document: OpenDocument) -> None:
        before = children()
        page = asyncio.create_task(rasterizer.draw(document.reference(2)))
        await asyncio.sleep(0.1)
        (worker,) = children() - before
        page.cancel()
        with pytest.raises(asyncio.CancelledError):
            await page
        assert worker not in children()
        assert (await rasterizer.draw(document.reference(3))).width == 200

    with open_document(hanging_pdf()) as document:
        asyncio.run(run(document))


def test_a_worker_may_not_take_all_memory_nor_leave_copies_of_documents_behind(document: OpenDocument) -> None:
    rasterizer = Rasterizer(1)
    before = children()
    draw_all(rasterizer, document)
    (worker,) = children() - before
    limits = Path(f"/proc/{worker}/limits").read_text()
    assert re.search(rf"Max address space +{WORKER_MEMORY} ", limits)
    assert re.search(r"Max core file size +0 ", limits)


def test_a_worker_keeps_the_memory_of_a_page_for_the_next_one() -> None:
    async def run() -> list[int]:
        rasterizer, taken = Rasterizer(1), []
        with open_document(pdf_of((595, 842))) as document:
            for _ in range(4):
                await rasterizer.draw(document.reference(1))
                (worker,) = rasterizer._idle
                status = Path(f"/proc/{worker._process.pid}/stat").read_text()
                taken.append(
                    int(status.rpartition(")")[2].split()[7])
                )  # pages of memory that the kernel gave it so far
        rasterizer.close()
        return taken

    taken = asyncio.run(run())
    assert taken[0] > 4000  # 16 MB, which the bitmap alone takes
    assert taken[-1] - taken[-2] < 400


def test_a_loop_in_a_thread_whose_tasks_are_cancelled_leaves_nothing_behind(document: OpenDocument) -> None:
    rasterizer = Rasterizer(1)
    started = threading.Event()

    async def run() -> None:
        await rasterizer.draw(document.reference(1))
        draws = [asyncio.create_task(rasterizer.draw(document.reference(number))) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        started.set()
        for task in draws:
            task.cancel()
        await asyncio.gather(*draws, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    thread.join(20)
    assert started.is_set()
    assert not thread.is_alive()


def test_close_ends_the_workers(document: OpenDocument) -> None:
    rasterizer = Rasterizer(2)
    before = children()
    draw_all(rasterizer, document)
    assert children() > before
    rasterizer.close()
    assert children() == before


SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from dots_ocr_client.pages.documents import open_document
from dots_ocr_client.pages.rasterizer import Rasterizer

rasterizer = Rasterizer(1)
document = open_document("a.pdf")

async def draw(number, seconds=60):
    return await rasterizer.draw(document.reference(number), seconds)

print(asyncio.run(draw(1)).width)
print(*(task.read_text() for task in Path("/proc/self/task").glob("*/children")), flush=True)
"""
"""It has no ``if __name__ == "__main__"``, as many scripts; running it twice would show in what it prints."""


def run_script(script: str, pdf: bytes, folder: Path) -> tuple[str, int, str]:
    """Return the width of the first page, the worker, and what went to standard error."""
    (folder / "a.pdf").write_bytes(pdf)
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-W", "error", "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    width, worker = done.stdout.split()
    return width, int(worker), done.stderr


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)", "asyncio.run(draw(3))"])
def test_workers_neither_run_the_program_again_nor_outlive_it(end: str, tmp_path: Path) -> None:
    width, worker, errors = run_script(SCRIPT + end, pdf_of((144, 72), (72, 72), (72, 72)), tmp_path)
    assert (width, errors) == ("400", "")
    assert has_ended(worker, 5)


def test_a_worker_whose_program_was_killed_does_not_draw_on_for_ever(tmp_path: Path) -> None:
    end = """
async def leave():
    page = asyncio.create_task(draw(2))
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), 9)

asyncio.run(leave())
"""
    _, worker, _ = run_script(SCRIPT + end, hanging_pdf(), tmp_path)
    assert has_ended(worker, 5)


def test_a_worker_is_ended_by_its_timers_whatever_its_parent_blocks_and_ignores(document: OpenDocument) -> None:
    signals = (signal.SIGALRM, signal.SIGPROF, signal.SIGIO)
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)  # of an earlier test
    before = children()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        rasterizer.draw(document.reference(1))
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    (worker,) = children() - before
    status = Path(f"/proc/{worker}/status").read_text()
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)
    kept = [int(mask, 16) for mask in re.findall(r"^Sig(?:Blk|Ign):\s*(\w+)$", status, re.MULTILINE)]
    assert len(kept) == 2
    assert not [number for number in signals for mask in kept if mask & 1 << number - 1]


def test_a_blocking_call_ends_a_worker_whose_timers_do_not(document: OpenDocument) -> None:
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)  # of an earlier test
    before = children()
    rasterizer.draw(document.reference(1))
    (worker,) = children() - before
    os.kill(worker, signal.SIGSTOP)
    wake = threading.Timer(5, os.kill, (worker, signal.SIGCONT))  # or a failure would last for ever
    wake.start()
    with pytest.raises(InputError, match=r"^page 2 of <bytes> cannot be drawn: it takes longer than 0\.05 s$"):
        rasterizer.draw(document.reference(2), seconds=0.05)
    wake.cancel()
    wake.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_made_by_fork_waits_for_no_thread_and_keeps_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasterizer, "_BOOT", "import sys; sys.stdin.read()")
    idle, busy = rasterizer._Worker(), rasterizer._Worker()
    parents = rasterizer._for_threads()
    parents[1]._idle.append(idle)
    read, write = os.pipe()
    with documents._pdfium:
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(write)
            loop, drawing = rasterizer._for_threads()
            own = loop is not parents[0] and drawing is not parents[1] and drawing._idle == []
            free = documents._pdfium.acquire(blocking=False)
            os.read(read, 1)  # until the workers have ended
            status = 0 if own and free else 1
        finally:
            os._exit(status)
    os.close(read)
    ended = []
    for worker in (idle, busy):
        assert worker._process.stdin is not None
        worker._process.stdin.close()
        ended.append(has_ended(worker._process.pid, 5))
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    assert ended == [True, True]
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)
    busy.end()


@pytest.mark.parametrize(("name", "value"), [("executable", None), ("executable", ""), ("frozen", True)])
def test_without_a_python_to_start_nothing_is_started(
    name: str, value: object, document: OpenDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ConfigurationError, match="Fix: run this with the interpreter"):
        rasterizer.draw(document.reference(1))


def test_a_worker_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasterizer, "_BOOT", "import sys; sys.stdin.read()")
    monkeypatch.setenv("DOTS_OCR_API_KEY", "sk-secret")
    monkeypatch.setenv("ANOTHER", "is kept")
    worker = rasterizer._Worker()
    environment = [b""]
    while environment == [b""]:  # it is there a moment after the program
        environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes().split(b"\0")
    worker.end()
    assert b"ANOTHER=is kept" in environment
    assert not [setting for setting in environment if setting.startswith(b"DOTS_OCR_")]


PAGE = {"number": 2, "width": 1, "height": 1, "sent_width": 1, "sent_height": 1, "warnings": [], "size": 0}


@pytest.mark.parametrize(
    "answer",
    [
        PAGE | {"size": -1},
        PAGE | {"size": True},
        PAGE | {"size": 2**40},
        PAGE | {"width": "1"},
        PAGE | {"sent_height": 0},
        PAGE | {"warnings": None},
        PAGE | {"more": 1},
        {"size": 0},
        [],
        "[" * 10**5,
    ],
)
def test_what_is_no_answer_fails_its_page_only(
    answer: object, document: OpenDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = answer if isinstance(answer, str) else json.dumps(answer)
    code = f"import sys; print({line!r}, flush=True); sys.stdin.read()"
    monkeypatch.setattr(rasterizer, "_BOOT", code)
    before = children()
    own = Rasterizer(1)
    with pytest.raises(InputError, match=r"^page 2 of <bytes> cannot be drawn: its process gave no sound answer"):
        asyncio.run(own.draw(document.reference(2), seconds=5))
    assert children() == before


def test_a_worker_may_end_by_a_signal_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasterizer, "_BOOT", "import os; os.kill(os.getpid(), 40)")
    with pytest.raises(InputError, match=r"^<bytes> cannot be opened: its process ended \(signal 40\)$"):
        rasterizer.open_document(b"any")


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", None])
def test_what_is_no_number_of_pages_is_bad_input(count: object, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"count": count, "warnings": [], "size": 0})
    monkeypatch.setattr(rasterizer, "_BOOT", f"import sys; print({line!r}, flush=True); sys.stdin.read()")
    with pytest.raises(InputError, match=r"^<bytes> cannot be opened: its process gave no sound answer"):
        rasterizer.open_document(b"any")


def test_a_worker_runs_nothing_of_the_current_directory(
    document: OpenDocument, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importlib.py").write_text("open('was-run', 'w')")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(InputError):
        rasterizer.draw(document.reference(1))
    rasterizer._end_all(rasterizer._for_threads()[1]._idle)
    assert not Path("was-run").exists()


def test_a_worker_imports_little() -> None:
    code = "import sys, dots_ocr_client.pages.rasterizer; print('openai' in sys.modules, 'httpx2' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "False False\n"
