from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dots_ocr_client.apps.view import write_view
from dots_ocr_client.results import Attempt, Box, Cell, Document, FailedPage, Page

ATTEMPT = Attempt("vllm", "failed", "ServerUnavailable", "it is not there", 0.5)
PAGE = Page(
    number=1,
    width=100,
    height=200,
    mode="layout",
    text="text",
    cells=(Cell("Text", Box(1, 2, 100, 200), "text"), Cell("Picture", None)),
    engine="vllm",
    model="dots.ocr",
    seconds=1.5,
    prompt_tokens=9,
    finish_reason="stop",
    attempts=(ATTEMPT,),
    warnings=("a warning",),
)
FAILED = FailedPage(2, "AllEnginesFailed", "why", (ATTEMPT,))
MARKUP = '1"><script>alert(1)</script><!-- -->'
Path_ = tuple[str | int, ...]


def values_of(*pages: Page | FailedPage) -> Any:
    return json.loads(json.dumps(Document("a.pdf", pages).to_dict()))


def places(value: Any, here: Path_ = ()) -> list[Path_]:
    """Where every value is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for name, one in inner for place in places(one, (*here, name)))]


def put(values: Any, place: Path_, new: Any) -> Any:
    if not place:
        return new
    inner = values
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = new
    return values


def test_what_was_written_is_read_back() -> None:
    assert Document.from_dict(values_of(PAGE, FAILED)) == Document("a.pdf", (PAGE, FAILED))


def test_what_has_a_default_may_be_missing() -> None:
    values = PAGE.to_dict()
    for name in ("prompt_tokens", "completion_tokens", "finish_reason", "attempts", "warnings"):
        del values[name]
    assert Page.from_dict(values).attempts == ()


ODD: list[Any] = [
    None, True, -1, 0, 2**31, 10**400, 1.5, float("nan"), float("inf"), "", "3", MARKUP, [], [[]], {}, {"x": 1},
]  # fmt: skip


@settings(max_examples=60)
@given(
    st.sampled_from(places(values_of(PAGE, FAILED))),
    st.sampled_from(ODD)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=6,
    ),
)
@example(("pages", 0, "number"), MARKUP)
@example(("pages", 1, "number"), MARKUP)
@example(("pages", 0, "width"), 0)
@example(("pages", 0, "width"), MARKUP)
@example(("pages", 0, "cells", 0, "box", 2), 101)
@example(("pages", 0, "cells", 0, "box", 2), 0)
@example(("pages", 0, "cells", 0, "box"), [1, 2, 3])
@example(("pages", 0, "cells", 0, "box"), ["1", "2", "3", "4"])
@example(("pages", 0, "seconds"), float("nan"))
@example(("pages", 0, "seconds"), True)
@example(("pages", 0, "seconds"), 10**400)
@example(("pages", 0, "mode"), "none")
@example(("pages", 0, "warnings", 0), 5)
@example(("pages", 0, "attempts", 0, "outcome"), MARKUP)
@pytest.mark.attack(
    "a result file with fields of other types or out of range (10 examples, and what Hypothesis makes of them)",
    "refused",
)
def test_what_is_no_result_is_refused_and_what_is_one_can_be_shown(place: Path_, new: Any) -> None:
    values = put(values_of(PAGE, FAILED), place, new)
    try:
        document = Document.from_dict(values)
    except ValueError as error:
        refused = error
    else:
        assert json.loads(json.dumps(document.to_dict())) == {**values, "text": document.text}
        assert "<script" not in document.html()
        document.markdown()
        return
    assert type(refused) is ValueError, "a clear message, and no fault inside"
    assert MARKUP not in str(refused)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        ((), [], "the document is not an object"),
        (("pages",), {}, "pages of the document must be a list"),
        (("pages", 0), 5, "the page is not an object"),
        (("pages", 0, "number"), "1", "number of the page must be a whole number from 1 on"),
        (("pages", 0, "height"), 2.0, "height of the page must be a whole number from 1 on"),
        (("pages", 0, "seconds"), float("inf"), "seconds of the page must be a number from 0 on"),
        (("pages", 0, "cells", 0, "box"), [5, 2, 3, 4], "box of a cell must be four whole numbers of a rectangle"),
        (("pages", 0, "cells", 0, "box"), [1, 2, 3, 400], "box of a cell must lie on the page"),
        (("pages", 0, "cells", 0, "text"), None, "text of a cell must be a text"),
        (("pages", 0, "cells", 0, "more"), 1, "a cell has fields other than category, box, text"),
        (("pages", 1, "reason"), None, "reason of the failed page must be a text"),
        (("pages", 1, "attempts", 0), {"engine": "vllm"}, "an attempt lacks error, outcome, reason, seconds"),
    ],
)
def test_the_message_names_the_field(place: Path_, new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Document.from_dict(put(values_of(PAGE, FAILED), place, new))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: page_with(number=MARKUP),
        lambda: page_with(cells=(Cell("Text", Box(MARKUP, 2, 3, 4), "text"),)),  # type: ignore[arg-type]
        lambda: page_with(cells=(Cell("Picture", Box(MARKUP, 2, 3, 4)),)),  # type: ignore[arg-type]
        lambda: page_with(cells=(), text=MARKUP),
        lambda: FailedPage(MARKUP, MARKUP, MARKUP),  # type: ignore[arg-type]
    ],
)
@pytest.mark.attack("markup in a result", "escaped in HTML and the view")
def test_whatever_stands_in_a_page_is_no_markup(spoil: Callable[[], Page | FailedPage]) -> None:
    page = spoil()
    parser = _Tags()
    parser.feed(page.html() if isinstance(page, Page) else Document("a", (page,)).html())
    assert parser.found <= {"html", "head", "meta", "title", "style", "body", "section", "div", "pre", "p"}
    if page.number == 1 and isinstance(page, Page) and page.cells:
        assert "<script" not in page.markdown()


@pytest.mark.parametrize("field", ["number", "width", "height"])
@pytest.mark.attack("markup where a number belongs", "escaped in the view")
def test_whatever_stands_for_a_number_is_no_markup_in_the_view(field: str, tmp_path: Path) -> None:
    write_view(Document("a", (page_with(cells=(Cell("Text", None, "text"),), **{field: MARKUP}),)), (), tmp_path / "v")
    assert "<script>alert" not in (tmp_path / "v").read_text()


def page_with(**fields: Any) -> Page:
    return Page(**{**{name: getattr(PAGE, name) for name in Page.__slots__}, **fields})
