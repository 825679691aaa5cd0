from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dots_ocr_client.results import Box, Cell, Document, FailedPage, Page

BOX = Box(10, 20, 110, 220)
TABLE = '<table><tr><td colspan="2">a<sub>1</sub></td></tr></table>'


def page_of(*cells: Cell, text: str = "", number: int = 1) -> Page:
    return Page(number, 1000, 2000, "layout", text, cells, "vllm", "dots.ocr", 1.0)


def markdown_of(category: str, text: str) -> str:
    return page_of(Cell(category, BOX, text)).markdown()


def html_of(category: str, text: str) -> str:
    """What is inside the one cell."""
    before, _, after = page_of(Cell(category, None, text)).html().partition(f'data-category="{category}">')
    assert before
    return after.removesuffix("</div>\n</section>")


def words(html: str) -> set[str]:
    return set(re.sub("<[^>]*>", " ", html).split())


class Inspector(HTMLParser):
    """Finds all tags and attributes, as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("br", "hr", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Markdown


@pytest.mark.parametrize(
    ("category", "text", "expected"),
    [
        ("Title", "Annual\nreport", "# Annual report"),
        ("Title", "## Annual report", "## Annual report"),
        ("Section-header", "1. Results", "## 1. Results"),
        ("Section-header", "### Results", "### Results"),
        ("List-item", "apples", "- apples"),
        ("List-item", "- apples", "- apples"),
        ("List-item", "1. apples", "1. apples"),
        ("List-item", "a) apples", "a) apples"),
        ("List-item", "• apples", "• apples"),
        ("List-item", "-5 degrees", "- -5 degrees"),
        ("Formula", "x^2", "$$\nx^2\n$$"),
        ("Formula", "$$\nx^2\n$$", "$$\nx^2\n$$"),
        ("Formula", r"\[x^2\]", "$$\nx^2\n$$"),
        ("Picture", "", "<!-- picture 10 20 110 220 -->"),
        ("Text", "**bold** text\n", "**bold** text"),
        ("Caption", "Figure 1", "Figure 1"),
        ("Footnote", "1 See there.", "1 See there."),
        ("Stamp", "PAID", "PAID"),
        ("Table", "a | b", "a | b"),
    ],
)
def test_each_category_has_its_markdown(category: str, text: str, expected: str) -> None:
    assert markdown_of(category, text) == expected


@pytest.mark.parametrize("write", [markdown_of, html_of])
@pytest.mark.parametrize(
    ("table", "kept"),
    [
        (TABLE, '<td colspan="2">a<sub>1</sub></td>'),
        ('<tr><td onclick="x()" style="x">a</td></tr>', "<table><tbody><tr><td>a</td></tr></tbody></table>"),
        ("<table><tr><td>cut", "<td>cut</td></tr></tbody></table>"),
    ],
)
def test_tables_stay_html_and_are_sanitised(write: Callable[[str, str], str], table: str, kept: str) -> None:
    assert kept in write("Table", table)


def test_no_empty_line_ends_the_html_of_a_table_early() -> None:
    assert "\n\n" not in markdown_of("Table", "<table>\n\n<tr><td>a\n \n\n\nb</td></tr></table>")


def test_cells_stand_apart_by_an_empty_line() -> None:
    page = page_of(Cell("Title", BOX, "A"), Cell("Text", BOX), Cell("Text", None, "b"), Cell("Picture", None))
    assert page.markdown() == "# A\n\nb\n\n<!-- picture -->"


def test_headers_and_footers_can_be_left_out() -> None:
    page = page_of(Cell("Page-header", None, "head"), Cell("Text", None, "body"), Cell("Page-footer", None, "foot"))
    assert page.markdown() == "head\n\nbody\n\nfoot"
    assert page.markdown(headers=False) == "body"
    assert {"head", "body", "foot"} == words(page.html())
    assert {"body"} == words(page.html(headers=False))


def test_a_page_without_layout_is_its_text() -> None:
    page = page_of(text="a < b\n")
    assert page.markdown() == "a < b"
    assert page.html() == '<section class="page" data-page="1">\n<pre class="text">a &lt; b\n</pre>\n</section>'


def test_a_document_is_its_pages_with_an_empty_line_between_them() -> None:
    pages = (page_of(text="one"), FailedPage(2, "CutOff", "too\nlong"), page_of(), page_of(text="four"))
    markdown = Document("a.pdf", pages).markdown()
    assert markdown == "one\n\n<!-- page 2 could not be read: too long -->\n\nfour"


@pytest.mark.parametrize("reason", ["a --> b", "--!> b", "->", "---->", "-", "--"])
def test_a_reason_cannot_end_its_comment(reason: str) -> None:
    markdown = Document("a.pdf", (FailedPage(1, "CutOff", reason),)).markdown()
    inside = markdown.removeprefix("<!--").removesuffix("-->")
    assert "--" not in inside
    assert "->" not in inside


# HTML


@pytest.mark.parametrize(
    ("category", "text", "expected"),
    [
        ("Title", "A & B", "<h1>A &amp; B</h1>"),
        ("Text", "**a** *b*\nc", "<p><strong>a</strong> <em>b</em><br>\nc</p>"),
        ("List-item", "apples", "<ul>\n<li>apples</li>\n</ul>"),
        ("Formula", "$$a < b_1 * c_2 * d$$", '<code class="formula">a &lt; b_1 * c_2 * d</code>'),
        ("Text", r"if $a_1 < b_2$ or \(x\)", '<p>if <code class="formula">a_1 &lt; b_2</code> or '
         '<code class="formula">x</code></p>'),
        ("Text", "from $5 to $7", "<p>from $5 to $7</p>"),
        ("Picture", "", "picture"),
        ("Text", "", ""),
        ("Text", "![alt](https://host/a.png)", "<p>alt</p>"),
        ("Text", "<http://a.b/>", '<p><a href="http://a.b/" rel="noopener noreferrer">http://a.b/</a></p>'),
        ("Text", "[a](mailto:a@b.c)", '<p><a href="mailto:a@b.c" rel="noopener noreferrer">a</a></p>'),
    ],
)  # fmt: skip
def test_each_category_has_its_html(category: str, text: str, expected: str) -> None:
    assert html_of(category, text) == expected


def test_each_cell_says_what_and_where_it_is() -> None:
    html = page_of(Cell("List-item", BOX, "- a"), number=3).html()
    assert '<section class="page" data-page="3">' in html
    assert '<div class="cell list-item" data-category="List-item" data-box="10 20 110 220">' in html


def test_a_document_is_a_whole_page_that_loads_nothing() -> None:
    html = Document("a.pdf", (page_of(text="one"), FailedPage(2, "CutOff", "too long"))).html()
    assert html.startswith('<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n')
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in html
    assert "<title>a.pdf</title>" in html
    assert "page 2 could not be read: too long" in html
    assert Inspector(html).open == []


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "[a](javascript:alert(1))",
    "[a](JAVA&#x73;cript:alert(1))",
    "[a](data:text/html,x)",
    "[a](//host/x)",
    "[a](file:///etc/passwd)",
    "![a](https://host/x.png)",
    "<javascript:alert(1)>",
    "--><script>alert(1)</script><!--",
    "</style></title></pre></div></section><script>alert(1)</script>",
    "<table><tr><td><a href='javascript:alert(1)'>a</a><svg onload=alert(1)></td></tr></table></div>",
    "</table></div><script>alert(1)</script>",
    "$</code><script>alert(1)</script>$",
    "```\n</code></pre><script>alert(1)</script>\n```",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
]
TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "sub", "sup", "b", "i", "br"}
TEXT_TAGS = {"h1", "h2", "h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "blockquote", "hr", "em", "strong", "a"}
TAGS = {"html", "head", "meta", "title", "style", "body", "section", "div", "pre", "code"} | TABLE_TAGS | TEXT_TAGS
DATA = {"data-page", "data-category", "data-box"}
ATTRIBUTES = {
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "href",
    "title",
    "rel",
    "start",
    "rowspan",
    "colspan",
}


def everywhere(text: str) -> Document:
    """A document with this text wherever one can be."""
    categories = ["Text", "Title", "List-item", "Table", "Formula", "Picture", "Caption", text]
    cells = (Cell(category, BOX, text) for category in categories)
    return Document(text, (page_of(*cells), page_of(text=text), FailedPage(3, text, text)))


def assert_harmless(html: str) -> None:
    inspector = Inspector(html)
    assert inspector.tags <= TAGS
    assert inspector.attributes <= ATTRIBUTES | DATA
    assert all(link.startswith(("http://", "https://", "mailto:")) for link in inspector.links)
    assert inspector.open == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_html_is_harmless_whatever_the_model_wrote(attack: str) -> None:
    assert_harmless(everywhere(attack).html())


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_tables_of_markdown_are_harmless(attack: str) -> None:
    inspector = Inspector(markdown_of("Table", f"<table><tr><td>{attack}</td></tr></table>"))
    assert inspector.tags <= TABLE_TAGS
    assert inspector.attributes <= {"rowspan", "colspan"}


@given(
    st.lists(st.sampled_from([*ATTACKS, "<", ">", "`", "\n\n", "&lt;", "\0", "\ud800", "a"]), max_size=5).map("".join)
)
@settings(max_examples=100, deadline=None)
def test_the_html_of_any_mixture_is_harmless_and_can_be_saved(text: str) -> None:
    html = everywhere(text).html()
    assert_harmless(html)
    html.encode()
    assert "\0" not in html
