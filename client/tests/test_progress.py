from __future__ import annotations

import pytest

from dots_ocr_client.apps import progress
from dots_ocr_client.apps.progress import Lines
from dots_ocr_client.results import FailedPage
from dots_ocr_client.texts import count, printable

PAGE = FailedPage(1, "AllEnginesFailed", "why")


def test_a_log_gets_a_line_for_each_finished_document(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.documents(2)
    for name, status in (("a.pdf", "read"), ("b\n.pdf", "failed")):
        lines.opened(name, 3)
        lines.page(name, PAGE)
        lines.done(name, status)
    assert capsys.readouterr().err == "read: a.pdf\nfailed: b\\n.pdf\n"


def test_a_long_document_is_heard_of_from_time_to_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines()
    lines.documents(1)
    lines.opened("a.pdf", 500)
    lines.page("a.pdf", PAGE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    lines.page("a.pdf", PAGE)
    assert capsys.readouterr().err.startswith("2 of about 500 pages, ")


def test_documents_that_are_not_open_yet_count_as_many_pages_as_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    lines = Lines()
    lines.documents(10)
    lines.opened("a.pdf", 10)
    lines.opened("b.pdf", 20)
    lines.done("unchanged.pdf", "unchanged")  # which is never opened
    capsys.readouterr()
    lines.page("a.pdf", PAGE)
    assert capsys.readouterr().err.startswith("1 of about 135 pages, ")  # 30 and 7 times 15


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Größe 大.pdf", "Größe 大.pdf"), ("a\nb", "a\\nb"), ("\x1b[1m\udcff", "\\x1b[1m\\udcff"), ("\x9b", "\\x9b")],
)
def test_names_are_printed_without_anything_that_a_terminal_obeys(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_one_is_no_plural() -> None:
    assert [count(number, "page") for number in (0, 1, 2)] == ["0 pages", "1 page", "2 pages"]
