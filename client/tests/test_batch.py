from __future__ import annotations

import asyncio
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pypdfium2
import pytest
from PIL import Image
from support import pdf_of

from dots_ocr_client import batch
from dots_ocr_client.apps.progress import Silent
from dots_ocr_client.batch import OutputError, Report, Status
from dots_ocr_client.errors import ConfigurationError, DotsOCRError, InputError
from dots_ocr_client.pages import rasterizer
from dots_ocr_client.pages.documents import FORMATS, OpenDocument, PageReference, open_document
from dots_ocr_client.prompts import Mode
from dots_ocr_client.results import Document, FailedPage, Page

ALL = frozenset({"json", "md", "html", "txt"})
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
TIFF_BIG_ENDIAN = b"MM\0*\0\0\0\x08"
PATIENCE = 20.0


class FakeClient:
    """Looks only at the numbers of a document's pages; `asked` lists those that it was asked for."""

    max_in_flight = 4

    def __init__(
        self,
        engine: str = "vllm",
        fails: Collection[int] = (),
        seconds: float = 0,
        size: int = 1,
        log: Path | None = None,
    ) -> None:
        self.engine = engine
        self.fails = fails
        self.seconds = seconds
        self.size = size
        self.asked: list[tuple[str, int]] = []
        self.modes: set[Mode] = set()
        self.streams = self.most_streams = 0

    async def open(self, document: Path, *, password: str | None = None) -> OpenDocument:
        return open_document(document)

    async def stream(
        self, document: OpenDocument, *, mode: Mode = "layout", pages: Iterable[int] | None = None
    ) -> AsyncGenerator[Page | FailedPage, None]:
        path = Path(str(document.reference(1).source))
        self.modes.add(mode)
        self.streams += 1
        self.most_streams = max(self.most_streams, self.streams)
        try:
            for number in sorted(document.numbers if pages is None else pages, reverse=True):
                await asyncio.sleep(self.seconds)
                yield self.page(path, number, mode)
        finally:
            self.streams -= 1

    def page(self, document: Path, number: int, mode: Mode) -> Page | FailedPage:
        self.asked.append((document.name, number))
        if number in self.fails:
            return FailedPage(number, "AllEnginesFailed", "nobody could")
        text = f"{document.name}, page {number}: {'x' * self.size}"
        return Page(number, 100, 100, mode, text, (), self.engine, "a model", 0.0)


class Events(Silent):
    """A progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def documents(self, total: int) -> None:
        self.seen.append(("documents", total))

    def opened(self, name: str, pages: int) -> None:
        self.seen.append(("opened", name, pages))

    def page(self, name: str, page: Page | FailedPage) -> None:
        self.seen.append(("page", name, page.number))

    def done(self, name: str, status: str) -> None:
        self.seen.append(("done", name, status))


def pdf(path: Path, pages: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = pypdfium2.PdfDocument.new()
    for _ in range(pages):
        document.new_page(72, 72)
    document.save(path)
    document.close()
    return path


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "white").save(path, "PNG")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def read(client: Any, inputs: Sequence[Path], out: Path, **options: Any) -> Report:
    return asyncio.run(batch.run(client, inputs, out, **options))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".dots-ocr.lock"}


def load(out: Path, name: str = "a.pdf") -> Document:
    return Document.from_dict(json.loads((out / f"{name}.json").read_bytes()))


def journal(out: Path, name: str = "a.pdf") -> list[int]:
    lines = (out / f"{name}.pages.jsonl").read_bytes().splitlines(keepends=True)[1:]
    return [json.loads(line)["number"] for line in lines if line.endswith(b"\n")]


def statuses(report: Report) -> list[Status]:
    return [document.status for document in report.documents]


# What is read, and where the outputs go


def test_outputs_have_the_name_of_the_document_and_its_pages_in_order(tmp_path: Path, out: Path) -> None:
    report = read(FakeClient(), [pdf(tmp_path / "a.pdf")], out, formats=ALL)
    assert statuses(report) == ["read"]
    assert files(out) == {"a.pdf.json", "a.pdf.md", "a.pdf.html", "a.pdf.txt", "report.json"}
    document = load(out)
    assert document.source == str(tmp_path / "a.pdf")
    assert [page.number for page in document.pages] == [1, 2, 3]
    assert (out / "a.pdf.md").read_text() == document.markdown() + "\n"


def test_folders_are_searched_and_keep_their_shape(tmp_path: Path, out: Path) -> None:
    docs = tmp_path / "docs"
    for name in ("a.png", "sub/B.PNG", ".hidden.png", ".hidden/c.png", "notes.doc"):
        png(docs / name)
    pdf(docs / "a.pdf")
    (docs / "link").symlink_to(docs / "sub")
    given = png(tmp_path / "explicitly given.dat")
    read(FakeClient(), [docs, given], out, formats=frozenset({"json"}))
    assert files(out) == {
        "a.pdf.json",
        "a.png.json",
        "sub/B.PNG.json",
        "explicitly given.dat.json",
        "report.json",
    }


def test_every_usual_suffix_is_taken_from_a_folder(tmp_path: Path, out: Path) -> None:
    suffixes = "avif bmp gif heic heif j2k jfif jp2 jpe jpeg jpg pbm pdf pgm png pnm ppm tif tiff webp"
    for suffix in suffixes.split():
        png(tmp_path / "docs" / f"a.{suffix}")
    report = read(FakeClient(), [tmp_path / "docs"], out)
    assert statuses(report) == ["read"] * 20


@pytest.mark.parametrize("name", ["-rf.png", "two\nlines.png", "caf\udce9.png", "a b;$(c).png", "Ω.png"])
def test_any_file_name_works(tmp_path: Path, out: Path, name: str) -> None:
    report = read(FakeClient(), [png(tmp_path / "docs" / name).parent], out, formats=ALL)
    assert statuses(report) == ["read"]
    assert f"{name}.json" in files(out)
    assert json.loads((out / "report.json").read_bytes())["documents"][0]["source"].endswith(name)


def image_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, kind)
    return buffer.getvalue()


IMAGES = [kind for kind in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if kind in FORMATS]


@pytest.mark.parametrize("name", ["scan", "No. 5", "scan.001", "Brief vom 3. Mai"])
@pytest.mark.parametrize(
    "content",
    [*map(image_of, IMAGES), pdf_of((72, 72)), b"rubbish\n" + pdf_of((72, 72)), HEIC, TIFF_BIG_ENDIAN],
    ids=[*IMAGES, "PDF", "PDF behind a line", "HEIC", "TIFF of a Motorola"],
)
def test_a_file_without_a_suffix_is_found_by_what_it_holds(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [path.name for path in batch._find([tmp_path], tmp_path, Counter()).values()] == [name]


NOTES = [b"", b"Python notes", b"P1 of 2", b"BMW, II and GIF", b"a file of the kind %PDF-1.4", b"MM", b"RIFFx   WAVE"]


def test_what_is_passed_over_in_folders_is_counted(tmp_path: Path, out: Path) -> None:
    docs = tmp_path / "docs"
    png(docs / "a.png")
    for name in (".hidden.png", ".git/x.png", "b.docx", "c.DOCX", "d.pdf~", "sub/e.mp3", "sub/f.txt", ".dots-ocr.lock"):
        png(docs / name)
    for number, note in enumerate(NOTES):
        (docs / f"notes {number}").write_bytes(note)
    os.mkfifo(docs / "pipe")
    (docs / "nowhere").symlink_to("missing")
    (docs / "link").symlink_to("sub")
    report = read(FakeClient(), [docs], out)
    assert [Path(document.source).name for document in report.documents] == ["a.png"]
    counts = {"without a suffix": len(NOTES) + 2, "hidden": 3, ".docx": 2, ".pdf~": 1, ".mp3": 1, ".txt": 1}
    assert report.skipped == {**counts, "link to a folder": 1}
    assert json.loads((out / "report.json").read_bytes())["skipped"] == report.skipped
    (docs / "a.png").unlink()
    with pytest.raises(InputError, match=r"no documents in .*docs'; passed over: .*'\.docx': 2"):
        read(FakeClient(), [docs], out)


@pytest.mark.parametrize(
    ("start", "end"), [("x" * 250, ".pdf"), ("ж" * 125, ".pdf"), ("x" * 239, ""), ("\udce9" * 250, ".pdf")]
)
def test_names_of_up_to_255_bytes_are_shortened_and_stay_unique(
    tmp_path: Path, out: Path, start: str, end: str
) -> None:
    documents = {str(pdf(tmp_path / "docs" / (start + letter + end), 1)) for letter in "ab"}
    assert statuses(read(FakeClient(), [tmp_path / "docs"], out, formats=ALL)) == ["read"] * 2
    names = {file.removesuffix(".txt") for file in files(out) if file.endswith(".txt")}
    assert {load(out, name).source for name in names} == documents
    assert [len(os.fsencode(name)) <= batch.LONGEST_NAME and name.endswith(end) for name in names] == [True] * 2
    assert statuses(read(FakeClient(), [tmp_path / "docs"], out, formats=ALL)) == ["unchanged"] * 2


def test_a_name_that_just_fits_stays_as_it_is(tmp_path: Path, out: Path) -> None:
    name = "x" * 235 + ".pdf"
    read(FakeClient(), [pdf(tmp_path / name)], out)
    assert f"{name}.json" in files(out)


BAD_INPUTS: dict[str, Callable[[Path], Sequence[Path]]] = {
    "No such file": lambda folder: [folder / "missing.pdf"],
    "neither a file nor a folder": lambda _: [Path("/dev/null")],
    "same outputs": lambda folder: [folder / "a.png", folder / "sub" / "a.png"],
    "would replace report.json": lambda folder: [folder / "report"],
    "embedded null": lambda _: [Path("a\0.pdf")],
}


@pytest.mark.parametrize("reason", BAD_INPUTS)
def test_bad_inputs_are_refused_before_anything_is_read(tmp_path: Path, out: Path, reason: str) -> None:
    for name in ("a.png", "sub/a.png", "report", "good.png"):
        png(tmp_path / name)
    client = FakeClient()
    with pytest.raises(InputError, match=reason):
        read(client, [tmp_path / "good.png", *BAD_INPUTS[reason](tmp_path)], out)
    assert not client.asked


def test_outputs_that_a_pattern_names_too_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.png", "pictures.csv/b.png"):
        png(tmp_path / name)
    read(FakeClient(), [tmp_path / "a.png"], tmp_path)
    png(tmp_path / "a.png.pictures/page-1-1.png")
    client = FakeClient()
    report = read(client, sorted(tmp_path.iterdir()), tmp_path)
    assert (statuses(report), client.asked) == (["unchanged", "read"], [("b.png", 1)])
    assert report.skipped == {"named as an output": 5}  # JSON, Markdown, pictures, the report and the lock
    with pytest.raises(InputError, match=r"no documents in .*'named as an output': 1.* Fix: "):
        read(client, [tmp_path / "a.png.json"], tmp_path)


MINE = ("report.json", "a.pdf.json", "a.pdf.md", "a.pdf.csv/page-1-1.csv")


@pytest.mark.parametrize("name", MINE)
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path, out: Path) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    (out / "a.pdf.txt").write_text("mine")  # which is in nobody's way
    document = pdf(tmp_path / "a.pdf")
    formats = frozenset({"json", "md", "csv"})
    if name == "report.json":
        with pytest.raises(InputError, match=r"report\.json'.* Fix: "):
            read(FakeClient(), [document], out, formats=formats)
    else:
        report = read(FakeClient(), [document, png(tmp_path / "b.png")], out, formats=formats)
        assert statuses(report) == ["failed", "read"]
        assert f"{name.split('/')[0]}' is there" in str(report.documents[0].error)
    assert [(out / file).read_text() for file in (name, "a.pdf.txt")] == ["mine", "mine"]
    (out / name).unlink()
    if name == MINE[-1]:
        (out / name).parent.rmdir()
    assert statuses(read(FakeClient(), [document], out, formats=formats)) == ["read"]


def test_what_other_runs_wrote_is_ours_and_no_more(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")

    def run(form: str) -> tuple[Status, str | None]:
        (report,) = read(FakeClient(), [document], out, formats=frozenset({form})).documents
        return report.status, report.error

    assert [run(form)[0] for form in ("md", "html", "md")] == ["read"] * 3
    (out / "a.pdf.txt").write_text("mine")
    status, error = run("txt")
    assert (status, (out / "a.pdf.txt").read_text()) == ("failed", "mine")
    assert "is gone" not in str(error)
    (out / "a.pdf.json").write_text(json.dumps(load(out).to_dict(), indent=2))  # as of `dots-ocr read`
    assert run("json") == ("read", None)
    (out / "a.pdf.json").unlink()
    assert "or a.pdf.json, which an earlier run wrote with it, is gone. Fix: move or delete" in str(run("md")[1])


def test_a_folder_without_documents_is_a_mistake(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no documents in"):
        read(FakeClient(), [tmp_path / "empty"], out)


@pytest.mark.parametrize("place", ["file", "file/below", "nul\0"])
def test_a_place_for_outputs_that_is_no_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        read(FakeClient(), [png(tmp_path / "a.png")], tmp_path / place)


def test_outputs_may_go_beside_the_documents(tmp_path: Path) -> None:
    pdf(tmp_path / "a.pdf")
    assert statuses(read(FakeClient(), [tmp_path], tmp_path)) == ["read"]
    again = read(FakeClient(), [tmp_path], tmp_path)
    assert (statuses(again), again.skipped) == (["unchanged"], {})


def test_a_link_to_elsewhere_in_the_folder_of_outputs_is_refused(tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "sub").symlink_to(tmp_path / "elsewhere")
    png(tmp_path / "docs" / "a.png")
    png(tmp_path / "docs" / "sub" / "b.png")
    report = read(FakeClient(), [tmp_path / "docs"], out)
    assert statuses(report) == ["read", "failed"]
    assert "is a link" in str(report.documents[1].error)
    assert not files(tmp_path / "elsewhere")


def test_modes_that_need_more_than_a_page_are_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match="needs a box or a question"):
        read(FakeClient(), [png(tmp_path / "a.png")], out, mode="grounding")


def test_unknown_formats_are_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="docx"):
        read(FakeClient(), [png(tmp_path / "a.png")], out, formats=frozenset({"docx"}))


# Going on


def test_a_finished_document_is_not_read_again(tmp_path: Path, out: Path) -> None:
    docs = [pdf(tmp_path / "a.pdf"), png(tmp_path / "b.png")]
    first = read(FakeClient(), docs, out)
    before = {name: (out / name).stat().st_ino for name in files(out) - {"report.json"}}
    client = FakeClient()
    report = read(client, docs, out)
    assert statuses(report) == ["unchanged", "unchanged"]
    assert not client.asked
    assert {name: (out / name).stat().st_ino for name in files(out) - {"report.json"}} == before
    assert (report.totals["pages"], report.totals["pages_read"]) == (first.totals["pages"], 0) == (4, 0)


def test_a_changed_document_is_read_anew(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf", 3)
    read(FakeClient(), [document], out)
    pdf(document, 2)
    assert statuses(read(FakeClient(), [document], out)) == ["read"]
    assert len(load(out).pages) == 2


def test_another_mode_is_read_anew(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    read(FakeClient(), [document], out)
    client = FakeClient()
    assert statuses(read(client, [document], out, mode="text")) == ["read"]
    assert (len(client.asked), client.modes) == (3, {"text"})


def test_another_format_is_made_without_reading(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    read(FakeClient(), [document], out)
    client = FakeClient()
    assert statuses(read(client, [document], out, formats=ALL)) == ["read"]
    assert not client.asked
    assert (out / "a.pdf.txt").read_text() == load(out).text + "\n"


def test_pictures_of_an_earlier_run_are_no_documents(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    png(tmp_path / "my.pictures/b.png")
    (out := tmp_path / "out").mkdir()
    read(FakeClient(), [tmp_path / "a.png"], out)
    png(out / "a.png.pictures/page-1-1.png")
    png(out / "other.pictures/c.png")
    png(out / "b.pdf.pictures/page-1-1.png")  # of which the JSON is gone
    png(out / f"{'n' * 245}.pictures/d.png")
    client = FakeClient()
    read(client, [tmp_path], out)
    assert {name for name, _ in client.asked} == {"b.png", "c.png", "d.png"}


def test_pages_can_be_chosen_and_the_rest_read_later(tmp_path: Path, out: Path) -> None:
    document, client = pdf(tmp_path / "a.pdf", 5), FakeClient()
    read(client, [document], out, pages="2,4-")
    assert [page.number for page in load(out).pages] == [2, 4, 5]
    assert statuses(read(client, [document], out, pages="2,4-")) == ["unchanged"]
    assert statuses(read(client, [document], out)) == ["read"]
    assert [page.number for page in load(out).pages] == [1, 2, 3, 4, 5]
    read(client, [document], out, pages="1")
    assert [page.number for page in load(out).pages] == [1, 2, 3, 4, 5]  # what was read stays
    assert Counter(number for _, number in client.asked) == Counter([1, 2, 3, 4, 5])


def test_pages_that_a_document_lacks_are_its_failure_alone(tmp_path: Path, out: Path) -> None:
    report = read(FakeClient(), [pdf(tmp_path / "a.pdf", 5), pdf(tmp_path / "b.pdf", 1)], out, pages="3")
    assert statuses(report) == ["read", "failed"]
    assert "has 1 page" in str(report.documents[1].error)


def test_failed_pages_are_read_again_and_only_those(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    first = read(FakeClient(fails={2}), [document], out)
    assert statuses(first) == ["partial"]
    assert first.documents[0].error == "page 2: nobody could"
    client = FakeClient()
    assert statuses(read(client, [document], out)) == ["read"]
    assert client.asked == [("a.pdf", 2)]
    assert not load(out).failures


@pytest.mark.parametrize(
    ("again", "engines"),
    [
        (FakeClient("vllm"), {"vllm": 3}),
        (FakeClient("tesseract"), {"tesseract": 3}),
        (FakeClient("vllm", fails={1, 2}), {"tesseract": 2, "vllm": 1}),
    ],
)
def test_an_upgrade_reads_pages_of_other_engines_again_and_loses_none(
    tmp_path: Path, out: Path, again: FakeClient, engines: dict[str, int]
) -> None:
    document = pdf(tmp_path / "a.pdf")
    read(FakeClient("tesseract"), [document], out)
    assert statuses(read(FakeClient(), [document], out)) == ["unchanged"]
    report = read(again, [document], out, upgrade=True)
    assert len(again.asked) == 3
    assert report.documents[0].engines == engines
    assert (report.documents[0].status, report.documents[0].error) == ("read", None)
    assert not load(out).failures


def test_nothing_is_upgraded_where_vllm_read_everything(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    read(FakeClient(), [document], out)
    assert statuses(read(FakeClient(), [document], out, upgrade=True)) == ["unchanged"]


def test_after_kill_9_no_page_is_read_twice_and_none_is_missing(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf", 12)
    with subprocess.Popen([sys.executable, __file__, str(document), str(out)]) as process:
        wait_for(lambda: (out / "a.pdf.pages.jsonl").exists() and len(journal(out)) >= 5)
        process.send_signal(signal.SIGKILL)
    kept = journal(out)
    assert files(out) == {"a.pdf.pages.jsonl"}
    client = FakeClient()
    report = read(client, [document], out, formats=ALL)
    asked = [number for _, number in client.asked]
    assert sorted(kept + asked) == list(range(1, 13))
    assert report.documents[0].pages_read == len(asked)
    read(FakeClient(), [document], tmp_path / "undisturbed", formats=ALL)
    for name in files(tmp_path / "undisturbed") - {"report.json"}:
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# Faults


def test_a_document_that_cannot_be_opened_does_not_stop_the_others(tmp_path: Path, out: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.pdf").write_bytes(b"%PDF-1.7 broken")
    (tmp_path / "docs" / "b.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "docs" / "c.png")
    pdf(tmp_path / "docs" / "d.pdf")
    report = read(FakeClient(), [tmp_path / "docs"], out)
    assert statuses(report) == ["failed", "failed", "failed", "read"]
    assert all(document.error for document in report.documents[:3])


def test_a_document_without_a_single_page_read_has_failed_and_is_tried_again(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    assert statuses(read(FakeClient(fails={1, 2, 3}), [document], out)) == ["failed"]
    assert statuses(read(FakeClient(), [document], out)) == ["read"]


class Stops(FakeClient):
    """Raises at page 2, which is the second one of three."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def page(self, document: Path, number: int, mode: Mode) -> Page | FailedPage:
        if number == 2:
            raise self.error
        return super().page(document, number, mode)


def test_wrong_settings_stop_the_batch_and_what_was_read_is_safe(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    with pytest.raises(ConfigurationError, match="wrong key"):
        read(Stops(ConfigurationError("wrong key")), [document, png(tmp_path / "b.png")], out)
    assert json.loads((out / "report.json").read_bytes())["stopped"] == "ConfigurationError: wrong key"
    client = FakeClient()
    read(client, [document], out)
    assert client.asked == [("a.pdf", 2), ("a.pdf", 1)]


def test_an_error_in_the_middle_of_a_document_keeps_its_pages(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    report = read(Stops(DotsOCRError("gone")), [document, png(tmp_path / "b.png")], out)
    assert statuses(report) == ["failed", "read"]
    assert (report.documents[0].error, report.documents[0].pages) == ("gone", 1)
    assert journal(out) == [3]


def test_a_client_that_leaves_out_a_page_is_found_out(tmp_path: Path, out: Path) -> None:
    class Forgets(FakeClient):
        async def stream(self, document: OpenDocument, **options: Any) -> AsyncGenerator[Page | FailedPage, None]:
            async for page in super().stream(document, **options):
                if page.number != 2:
                    yield page

    report = read(Forgets(), [pdf(tmp_path / "a.pdf")], out)
    assert statuses(report) == ["failed"]
    assert journal(out) == [3, 1]


def test_a_document_that_changes_while_it_is_read_has_failed(tmp_path: Path, out: Path) -> None:
    class Changes(FakeClient):
        def page(self, document: Path, number: int, mode: Mode) -> Page | FailedPage:
            pdf(document, 4)
            return super().page(document, number, mode)

    document = pdf(tmp_path / "a.pdf")
    report = read(Changes(), [document], out)
    assert "changed while it was read" in str(report.documents[0].error)
    assert files(out) == {"report.json"}


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Limits the size of files: the nearest thing to a full disk without mounting one."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize(("size", "left"), [(120_000, {1, 2}), (250_000, set())])
def test_a_full_disk_stops_the_batch_and_a_later_run_goes_on(
    tmp_path: Path, out: Path, small_disk: Callable[[int], None], size: int, left: set[int]
) -> None:
    document = pdf(tmp_path / "a.pdf", 4)
    small_disk(size)
    with pytest.raises(OutputError, match=r"a\.pdf.*make room"):
        read(FakeClient(size=50_000), [document], out)
    small_disk(resource.RLIM_INFINITY)
    assert files(out) == {"a.pdf.pages.jsonl", "report.json"}
    client = FakeClient(size=50_000)
    assert statuses(read(client, [document], out)) == ["read"]
    assert {number for _, number in client.asked} == left
    assert files(out) == {"a.pdf.json", "a.pdf.md", "report.json"}


def test_an_output_that_cannot_be_replaced_fails_only_its_document(tmp_path: Path, out: Path) -> None:
    (out / "a.pdf.md").mkdir(parents=True)
    report = read(FakeClient(), [pdf(tmp_path / "a.pdf"), png(tmp_path / "b.png")], out)
    assert statuses(report) == ["failed", "read"]
    assert "cannot write the outputs" in str(report.documents[0].error)


def test_cancelling_keeps_what_was_read_and_leaves_no_tasks(tmp_path: Path, out: Path) -> None:
    documents = [pdf(tmp_path / f"{name}.pdf", 50) for name in "abc"]
    client: Any = FakeClient(seconds=0.01)

    async def main() -> None:
        task = asyncio.create_task(batch.run(client, documents, out))
        while len(client.asked) < 12:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert client.streams == 0
    kept = {(document.name, number) for document in documents for number in journal(out, document.name)}
    assert kept == set(client.asked)
    assert json.loads((out / "report.json").read_bytes())["stopped"] == "CancelledError"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that two workers open; they get stuck at one called ``stuck.png``, until they are ended."""
    opened: list[str] = []
    ask = rasterizer._Worker.ask

    def look(worker: rasterizer._Worker, verb: str, reference: PageReference, *rest: Any) -> Any:
        opened.append(Path(reference.label).name)
        if opened[-1] != "stuck.png":
            return ask(worker, verb, reference, *rest)
        end = time.monotonic() + 2 * PATIENCE
        while worker.alive and time.monotonic() < end:
            time.sleep(0.005)
        raise InputError("ended")

    monkeypatch.setattr(rasterizer, "_default_workers", lambda: 2)
    monkeypatch.setattr(rasterizer._Worker, "ask", look)
    return opened


class Opens(FakeClient):
    """Opens documents as `AsyncDotsOCR` does."""

    def __init__(self) -> None:
        super().__init__()
        self.rasterizer = rasterizer.Rasterizer()

    async def open(self, document: Path, *, password: str | None = None) -> OpenDocument:
        return await self.rasterizer.open(document)


def test_a_document_that_hangs_in_opening_holds_up_no_other_and_no_end(
    tmp_path: Path, out: Path, opened: list[str]
) -> None:
    bad, good = png(tmp_path / "stuck.png"), pdf(tmp_path / "good.pdf")
    events = Events()

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        client: Any = Opens()
        task = asyncio.create_task(batch.run(client, [bad, good], out, progress=events))
        async with asyncio.timeout(PATIENCE):
            while ("done", str(good), "read") not in events.seen:
                await asyncio.sleep(0.005)
        task.cancel()
        assert await asyncio.wait([task], timeout=PATIENCE) == ({task}, set())
        client.rasterizer.close()

    asyncio.run(main())
    assert sorted(opened) == ["good.pdf", "stuck.png"]  # each was opened once
    assert json.loads((out / "report.json").read_bytes())["stopped"] == "CancelledError"


def test_two_runs_do_not_use_the_same_folder(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")

    async def main() -> None:
        client: Any = FakeClient(seconds=0.1)
        first = asyncio.create_task(batch.run(client, [document], out))
        while not client.streams:
            await asyncio.sleep(0.005)
        with pytest.raises(InputError, match="another run"):
            await batch.run(client, [document], out)
        # Whoever can open a file can lock it.
        assert (out / batch.LOCK).stat().st_mode & 0o777 == 0o600
        assert statuses(await first) == ["read"]

    asyncio.run(main())
    assert statuses(read(FakeClient(), [document], out)) == ["unchanged"]


# Report, progress and size


def test_the_report_counts_pages_and_engines(tmp_path: Path, out: Path) -> None:
    documents = [pdf(tmp_path / "a.pdf"), png(tmp_path / "b.png")]
    report = read(FakeClient(fails={2}), documents, out)
    assert json.loads((out / "report.json").read_bytes()) == report.to_dict()
    assert report.started <= report.finished
    totals = report.totals
    assert totals.pop("pages_per_second") > 0
    assert totals == {
        "documents": 2,
        "read": 1,
        "partial": 1,
        "failed": 0,
        "unchanged": 0,
        "pages": 4,
        "failed_pages": 1,
        "blank_pages": 0,
        "engines": {"vllm": 3},
        "pages_read": 3,
    }


def test_progress_is_told_of_each_page_and_document(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf")
    name, events = str(document), Events()
    read(FakeClient(fails={1, 2}), [document], out, progress=events)
    read(FakeClient(), [document], out, progress=events)
    read(FakeClient(), [document], out, progress=events)
    pages = [("page", name, number) for number in (3, 2, 1)]
    assert events.seen == [
        *[("documents", 1), ("opened", name, 3), *pages, ("done", name, "partial")],
        *[("documents", 1), ("opened", name, 2), *pages[1:], ("done", name, "read")],
        *[("documents", 1), ("done", name, "unchanged")],
    ]


def test_enough_documents_are_open_to_fill_the_pages_in_flight_and_no_more(tmp_path: Path, out: Path) -> None:
    for index in range(20):
        png(tmp_path / "docs" / f"{index}.png")
    client = FakeClient(seconds=0.1)
    assert statuses(read(client, [tmp_path / "docs"], out)) == ["read"] * 20
    assert client.max_in_flight <= client.most_streams <= client.max_in_flight + batch.SPARE


def test_five_thousand_pages_take_seconds_and_little_memory(tmp_path: Path, out: Path) -> None:
    document = pdf(tmp_path / "a.pdf", 5000)
    begin = time.monotonic()
    tracemalloc.start()
    read(FakeClient(size=4000), [document], out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - begin < 30
    assert (out / "a.pdf.json").stat().st_size > 40_000_000
    assert peak < 8_000_000


if __name__ == "__main__":  # what the test of kill -9 kills
    read(FakeClient(seconds=0.05), [Path(sys.argv[1])], Path(sys.argv[2]))
