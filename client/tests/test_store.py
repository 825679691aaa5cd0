from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePath
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dots_ocr_client.errors import InputError
from dots_ocr_client.pages.documents import PageImage
from dots_ocr_client.prompts import Mode
from dots_ocr_client.results import Box, Cell, Document, FailedPage, Page
from dots_ocr_client.results.store import FORMATS, Folder, Store, Summary


class Again(TypedDict):
    retry_failed: bool
    upgrade: bool


JOURNAL = "a.pdf.pages.jsonl"
ALWAYS: Again = {"retry_failed": True, "upgrade": True}
NEVER: Again = {"retry_failed": False, "upgrade": False}


def page(number: int, engine: str = "vllm", text: str = "Grüße,\nÖl & <Wasser>") -> Page:
    cells = (Cell("Page-header", None, "Header"), Cell("Text", Box(1, 2, 30, 40), text))
    return Page(number, 1000, 1400, "layout", text, cells, engine, "dots.ocr", 1.5)


def no_page(number: int) -> PageImage:
    raise InputError("it cannot be drawn again")


BLANK = Page(1, 100, 100, "layout", "", (), "", "", 0.1)


def failed(number: int) -> FailedPage:
    return FailedPage(number, "AllEnginesFailed", "no engine could read it -->")


PAGES = (page(1), failed(2), page(3, text=""), page(4, "tesseract"))


@contextmanager
def opened(out: Path, name: str = "a.pdf", sha256: str = "12ab", mode: Mode = "layout") -> Iterator[Store]:
    with closing(Folder(out)) as root, closing(Store(root, PurePath(name), name, sha256, mode)) as store:
        store.open()
        yield store


def finish(out: Path, pages: Sequence[Page | FailedPage] = PAGES, formats: frozenset[str] = FORMATS) -> None:
    with opened(out) as store:
        for one in reversed(pages):
            store.record(one)
        store.assemble(formats, headers=True, draw=no_page)


def wanted(
    store: Store, numbers: range = range(1, 5), *, retry_failed: bool = False, upgrade: bool = False
) -> list[int]:
    return [number for number in numbers if store.wants(number, retry_failed=retry_failed, upgrade=upgrade)]


def is_unchanged(store: Store, formats: frozenset[str] = FORMATS, headers: bool = True) -> bool:
    return store.is_unchanged(formats, headers=headers, retry_failed=False, upgrade=False)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_json_is_the_document_and_says_what_it_was_made_from(tmp_path: Path) -> None:
    finish(tmp_path)
    values = json.loads((tmp_path / "a.pdf.json").read_bytes())
    note = values.pop("dots_ocr")
    assert values == json.loads(json.dumps(Document("a.pdf", PAGES).to_dict()))
    assert (note["sha256"], note["mode"], note["pages"], note["failed_pages"]) == ("12ab", "layout", 4, 1)
    assert note["engines"] == {"tesseract": 1, "vllm": 2}


@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize("pages", [PAGES, PAGES[:1], PAGES[1:2], PAGES[2:]])
def test_the_other_outputs_are_those_of_the_document(
    tmp_path: Path, pages: tuple[Page | FailedPage, ...], headers: bool
) -> None:
    with opened(tmp_path) as store:
        for one in reversed(pages):
            store.record(one)
        store.assemble(FORMATS, headers=headers, draw=no_page)
    document = Document("a.pdf", pages)
    assert (tmp_path / "a.pdf.html").read_text("utf-8") == document.html(headers=headers)
    assert (tmp_path / "a.pdf.md").read_text("utf-8") == document.markdown(headers=headers) + "\n"
    assert (tmp_path / "a.pdf.txt").read_text("utf-8") == document.text + "\n"


def test_only_the_outputs_that_were_asked_for_and_the_json_are_left(tmp_path: Path) -> None:
    finish(tmp_path, formats=frozenset({"txt"}))
    assert names(tmp_path) == {"a.pdf.json", "a.pdf.txt"}


def test_bytes_of_a_name_that_is_no_utf8_survive(tmp_path: Path) -> None:
    with opened(tmp_path, name="caf\udce9.pdf") as store:
        store.record(page(1))
        store.assemble(FORMATS, headers=True, draw=no_page)
    document = json.loads((tmp_path / "caf\udce9.pdf.json").read_bytes())
    assert document["source"] == "caf\udce9.pdf"


@settings(max_examples=50, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_journal_that_was_cut_anywhere_keeps_its_whole_lines_and_goes_on(cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        with opened(out) as store:
            for one in PAGES:
                store.record(one)
        whole = (out / JOURNAL).read_bytes()
        left = whole[: int(cut * len(whole))]
        (out / JOURNAL).write_bytes(left)
        kept = max(0, left.count(b"\n") - 1)
        with opened(out) as store:
            assert wanted(store) == [1, 2, 3, 4][kept:]
            for one in PAGES[kept:]:
                store.record(one)
            store.assemble(FORMATS, headers=True, draw=no_page)
        assert Document.from_dict(json.loads((out / "a.pdf.json").read_bytes())) == Document("a.pdf", PAGES)


@pytest.mark.parametrize(("sha256", "mode"), [("34cd", "layout"), ("12ab", "text")])
def test_another_source_or_mode_begins_anew(tmp_path: Path, sha256: str, mode: Mode) -> None:
    finish(tmp_path)
    with opened(tmp_path) as store:
        store.reopen()
    with opened(tmp_path, sha256=sha256, mode=mode) as store:
        assert wanted(store) == [1, 2, 3, 4]
        assert not is_unchanged(store)
        store.record(page(1, text="new"))
        assert store.summary() == Summary(1, 0, {"vllm": 1})
    assert b"Wasser" not in (tmp_path / JOURNAL).read_bytes()


@pytest.mark.parametrize(
    ("again", "numbers"),
    [
        (NEVER, []),
        ({"retry_failed": True, "upgrade": False}, [2]),
        ({"retry_failed": False, "upgrade": True}, [4]),
        (ALWAYS, [2, 4]),
    ],
)
def test_finished_pages_are_wanted_again_only_on_request(tmp_path: Path, again: Again, numbers: list[int]) -> None:
    finish(tmp_path)
    with opened(tmp_path) as store:
        assert store.is_unchanged(FORMATS, headers=True, **again) == (not numbers)
        store.reopen()
        assert wanted(store, **again) == numbers


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        (page(1), page(1, "tesseract"), False),
        (page(1), failed(1), False),
        (page(1, "tesseract"), failed(1), False),
        (page(1, "tesseract"), page(1, "tesseract", "other"), False),
        (page(1, "tesseract"), page(1), True),
        (failed(1), failed(1), True),
        (failed(1), page(1, "tesseract"), True),
    ],
)
def test_a_page_is_replaced_only_by_a_better_one(
    tmp_path: Path, old: Page | FailedPage, new: Page | FailedPage, taken: bool
) -> None:
    with opened(tmp_path) as store:
        assert store.record(old)
        assert store.record(new) == taken
    with opened(tmp_path) as store:
        store.assemble(FORMATS, headers=True, draw=no_page)
    document = Document.from_dict(json.loads((tmp_path / "a.pdf.json").read_bytes()))
    assert document.pages == (new if taken else old,)


def test_other_formats_or_headers_are_made_without_reading(tmp_path: Path) -> None:
    finish(tmp_path, formats=frozenset({"md"}))
    (tmp_path / "a.pdf.txt").write_text("of an older run")
    with opened(tmp_path) as store:
        assert is_unchanged(store, frozenset({"json", "md"}))
        assert not is_unchanged(store, frozenset({"md"}), headers=False)
        assert not is_unchanged(store, frozenset({"txt"}))
        store.reopen()
        assert wanted(store) == []
        store.assemble(frozenset({"txt"}), headers=True, draw=no_page)
    assert (tmp_path / "a.pdf.txt").read_text("utf-8").startswith("Grüße")


@pytest.mark.parametrize("again", [{"sha256": "34cd"}, {"mode": "text"}, {}])
def test_outputs_in_other_formats_go_once_pages_have_changed(tmp_path: Path, again: dict[str, Any]) -> None:
    finish(tmp_path, [page(1, "tesseract")])
    (tmp_path / "a.pdf.pictures/page-1-1.png").write_bytes(b"cut out")
    (tmp_path / "a.pdf.notes").write_text("somebody's own")
    with opened(tmp_path, **again) as store:
        store.reopen()
        store.record(page(1))
        store.assemble(frozenset({"md"}), headers=True, draw=no_page)
    assert names(tmp_path) - {"a.pdf.csv", "a.pdf.pictures"} == {"a.pdf.json", "a.pdf.md", "a.pdf.notes"}
    assert names(tmp_path / "a.pdf.pictures") == set()


def test_a_folder_that_is_gone_is_made_again(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "a.pdf.pictures").rmdir()
    with opened(tmp_path) as store:
        assert not is_unchanged(store)
        assert is_unchanged(store, FORMATS - {"pictures"})


OURS = b'{"dots_ocr": {"format": 1, "sha256": "12ab", "mode": "layout"'


@pytest.mark.parametrize(
    "content",
    [b"", b"[1", b"{}\n", b"\xff", b"[" * 60_000, b'{"dots_ocr": 3,\n', OURS + b"},\n", OURS + b', "pages": "3"},\n'],
)
def test_a_json_that_is_not_ours_counts_for_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pdf.json").write_bytes(content)
    with opened(tmp_path) as store:
        assert store.finished is None


@pytest.mark.parametrize("line", [b"", b"[]", b"5", b'{"number": "3"}', b'{"number": 3}', b"[" * 60_000])
def test_a_journal_counts_up_to_the_first_line_that_is_no_page(tmp_path: Path, line: bytes) -> None:
    with opened(tmp_path) as store:
        store.record(page(1))
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(line + b"\n")
    with opened(tmp_path) as store:
        assert wanted(store) == [2, 3, 4]


def test_pages_of_an_output_that_somebody_edited_are_read_anew(tmp_path: Path) -> None:
    finish(tmp_path)
    file = tmp_path / "a.pdf.json"
    file.write_bytes(b"".join(line for line in file.read_bytes().splitlines(True) if b'"number": 3' not in line))
    with opened(tmp_path) as store:
        store.reopen()
        assert wanted(store) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a.pdf.json", JOURNAL])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_links_and_pipes_are_replaced_and_never_written_through(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "victim").write_text("untouched")
    out = tmp_path / "out"
    out.mkdir()
    if kind == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name).symlink_to(tmp_path / ("victim" if kind == "link" else "nothing"))
    finish(out)
    assert (out / "a.pdf.json").is_file()
    assert not (out / "a.pdf.json").is_symlink()
    assert names(tmp_path) == {"victim", "out"}
    assert (tmp_path / "victim").read_text() == "untouched"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_that_is_a_link_or_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    if kind == "link":
        (out / "sub").symlink_to(elsewhere)
    else:
        (out / "sub").write_text("")
    with pytest.raises(InputError, match="sub' is a link or a file"), opened(out, name="sub/deep/a.pdf"):
        pass
    assert names(elsewhere) == set()


def test_an_output_that_cannot_be_finished_leaves_nothing_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with closing(Folder(tmp_path)) as folder, pytest.raises(TypeError), folder.replacing("a.json") as file:
        file.writelines([b"new", None])  # type: ignore[list-item]
    assert names(tmp_path) == {"a.json"}
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_blank_page_is_final_and_nobodys(tmp_path: Path) -> None:
    finish(tmp_path, [BLANK, page(2, "tesseract")])
    with opened(tmp_path) as store:
        assert store.summary() == Summary(2, 0, {"tesseract": 1})
        store.reopen()
        assert wanted(store, range(1, 3), **ALWAYS) == [2]
        store.record(page(2))
        store.assemble(FORMATS, headers=True, draw=no_page)
    with opened(tmp_path) as store:
        assert store.is_unchanged(FORMATS, headers=True, **ALWAYS)
        assert store.summary() == Summary(2, 0, {"vllm": 1})


TABLE = (
    '<table><tr><td rowspan="2">a, b</td><td>=1+1</td></tr><tr><td>-5,50 €</td></tr>'
    "<tr><td>-</td><td>-$5.00</td></tr></table>"
)
SCENE = (
    Cell("Picture", Box(100, 200, 300, 400)),
    Cell("Table", Box(0, 500, 900, 600), TABLE),
    Cell("Picture", Box(500, 500, 500, 500)),
    Cell("Picture", None),
)


def scene(number: int, cells: tuple[Cell, ...] = SCENE) -> Page:
    return Page(number, 1000, 1400, "layout", "", cells, "vllm", "dots.ocr", 1.5)


def drawn(number: int) -> PageImage:
    image = Image.new("RGB", (1000, 1400), "white")
    image.paste("red", (100, 200, 300, 400))
    return PageImage.of(number, image)


def test_pictures_are_cut_out_and_the_markdown_links_them(tmp_path: Path) -> None:
    with opened(tmp_path, name="a <b>.pdf") as store:
        store.record(scene(1))
        store.record(scene(12))
        store.assemble(FORMATS, headers=True, draw=lambda number: drawn(number) if number == 1 else no_page(number))
    assert names(tmp_path / "a <b>.pdf.pictures") == {"page-1-1.png"}
    with Image.open(tmp_path / "a <b>.pdf.pictures/page-1-1.png") as cut:
        assert (cut.size, cut.convert("RGB").getcolors()) == ((200, 200), [(40_000, (255, 0, 0))])
    written = (tmp_path / "a <b>.pdf.md").read_text("utf-8").split("\n\n")
    assert written[0] == "![picture](<a%20%3Cb%3E.pdf.pictures/page-1-1.png>)"
    assert written[2:5] == ["<!-- picture 500 500 500 500 -->", "<!-- picture -->", "<!-- picture 100 200 300 400 -->"]


def test_tables_become_csv_in_which_nothing_can_be_a_formula(tmp_path: Path) -> None:
    finish(tmp_path, (scene(3),))
    assert names(tmp_path / "a.pdf.csv") == {"page-3-2.csv"}
    text = (tmp_path / "a.pdf.csv/page-3-2.csv").read_bytes()
    assert text.decode("utf-8-sig") == '"a, b",\'=1+1\r\n,"-5,50 €"\r\n-,-$5.00\r\n'
    assert text.startswith(b"\xef\xbb\xbf")  # a spreadsheet takes it for another encoding without


def test_parts_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    finish(tmp_path, (scene(3),))
    (tmp_path / "a.pdf.csv/mine.csv").touch()
    with opened(tmp_path) as store:
        assert store.is_unchanged(FORMATS, headers=True, **NEVER)
        store.discard()
        store.record(scene(3, SCENE[:1]))
        store.assemble(FORMATS, headers=True, draw=drawn)
    assert names(tmp_path / "a.pdf.csv") == {"mine.csv"}
    assert names(tmp_path / "a.pdf.pictures") == {"page-3-1.png"}


def test_words_in_hocr_have_the_places_that_the_picture_shows(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.record(scene(1, (Cell("Text", Box(50, 150, 400, 450), "square"),)))
        store.assemble(frozenset({"hocr"}), headers=True, draw=drawn)
    assert '<span class="ocrx_word" title="bbox 100 200 300 400">square</span>' in (tmp_path / "a.pdf.hocr").read_text()
