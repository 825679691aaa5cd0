"""Pages and documents as Markdown and as HTML.

The HTML is safe to show, whatever the model wrote: it has no scripts, no pictures, and links only to http, https and
mailto. The Markdown is as the model wrote it, except that tables are sanitised; whoever turns it into HTML should not
let HTML through that stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from ..texts import encodable

if TYPE_CHECKING:  # results.py imports this module
    from . import Cell, FailedPage, Page

_HEADERS: Final = frozenset({"Page-header", "Page-footer"})
_HEADINGS: Final = {"Title": "# ", "Section-header": "## "}
_LINKS: Final = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)
_LIST_MARKER: Final = re.compile(r"\s*(?:[-*+•·▪◦‣\u2013\u2014○●■□]|\(?\w{1,4}[.)])(?:\s|$)")
_FORMULA_MARKS: Final = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
# LaTeX inside other text. A dollar sign before a space opens none, nor does one behind a space or before a digit close
# one: those are prices (the rule is Pandoc's, but for the line breaks).
MATH: Final = re.compile(
    r"\$\$[^$]+\$\$|\$(?![ $])[^$]+(?<! )\$(?!\d)|\\\((?:(?!\\[()]).)+\\\)|\\\[(?:(?!\\[\[\]]).)+\\\]", re.DOTALL
)

_TABLE: Final = nh3.Cleaner(
    tags={"table", "thead", "tbody", "tr", "th", "td", "sub", "sup", "b", "i", "br"},
    attributes={"th": {"rowspan", "colspan"}, "td": {"rowspan", "colspan"}},
    link_rel=None,
)
_CONTENT: Final = nh3.Cleaner(
    tags={"h1", "h2", "h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong"}
    | {"a", "br", "hr"},
    attributes={"a": {"href", "title"}, "ol": {"start"}},
    allowed_classes={"code": {"formula"}},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
)

_CSP: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE: Final = """
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; }
.page + .page { margin-top: 2rem; padding-top: 2rem; border-top: 1px solid #999; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; }
.formula { white-space: pre-wrap; }
.picture, .failed { color: #666; font-style: italic; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 0.5rem; border: 1px solid #999; vertical-align: top; }
"""


def markdown(page: Page, *, headers: bool, picture: Callable[[int, Cell], str | None] | None = None) -> str:
    """Return a page as Markdown: its cells with an empty line between them, or its text if it has none.

    `picture` gives the address of a picture's file, by the place of its cell among the page's cells; without an address
    a comment with the box takes its place.
    """
    if not page.cells:
        return page.text.strip()
    blocks = []
    for index, cell in enumerate(page.cells):
        if headers or cell.category not in _HEADERS:
            address = picture(index, cell) if picture and cell.category == "Picture" else None
            blocks.append(f"![picture](<{address}>)" if address else _markdown(cell))
    return "\n\n".join(block for block in blocks if block)


def failed_markdown(page: FailedPage) -> str:
    """Return a comment that says why a page could not be read."""
    return f"<!-- {re.sub('-(?=[->])', '- ', ' '.join(encodable(_failure(page)).split()))} -->"


def html(page: Page, *, headers: bool) -> str:
    """Return a page as an HTML fragment: a ``section`` with a ``div`` for each cell, or a ``pre`` with its text."""
    if page.cells:
        lines = [_html(cell) for cell in page.cells if headers or cell.category not in _HEADERS]
    else:
        lines = [f'<pre class="text">{_escape(page.text)}</pre>'] if page.text.strip() else []
    return "\n".join([f'<section class="page" data-page="{_escape(page.number)}">', *lines, "</section>"])


def failed_html(page: FailedPage) -> str:
    """Return an HTML fragment that says why a page could not be read."""
    number, why = _escape(page.number), _escape(_failure(page))
    return f'<section class="page failed" data-page="{number}">\n<p>{why}</p>\n</section>'


def html_document(source: str, pages: Iterable[str]) -> Iterator[str]:
    """Yield a whole HTML page of these fragments, which loads nothing, in parts: a large one is never in memory."""
    yield (
        "<!DOCTYPE html>\n<html>\n<head>\n"
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_escape(source)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    for page in pages:
        yield page + "\n"
    yield "</body>\n</html>\n"


def clean_table(text: str) -> str:
    """Return the HTML of a table with nothing in it but table, thead, tbody, tr, th, td, sub, sup, b, i and br."""
    if "<table" not in text.lower():
        text = f"<table>{text}</table>"  # rows outside of a table would lose their tags
    return _TABLE.clean(encodable(text)).strip()


def _failure(page: FailedPage) -> str:
    return f"page {page.number} could not be read: {page.reason}"


def _markdown(cell: Cell) -> str:
    text = cell.text.strip()
    if cell.category == "Picture":
        return f"<!-- picture {_edges(cell)}-->"
    if not text:
        return ""
    if cell.category in _HEADINGS and not text.startswith("#"):
        return _HEADINGS[cell.category] + " ".join(text.split())
    if cell.category == "List-item" and not _LIST_MARKER.match(text):
        return f"- {text}"
    if cell.category == "Formula":
        return f"$$\n{_latex(text)}\n$$"
    if _is_html_table(cell):
        return re.sub(r"\n\s*\n", "\n", clean_table(text))  # an empty line would end the HTML
    return text


def _html(cell: Cell) -> str:
    if cell.category == "Picture":
        content = "picture"
    elif cell.category == "Formula":
        content = _formula(cell.text.strip())
    elif _is_html_table(cell):
        content = clean_table(cell.text)
    else:
        content = _CONTENT.clean(_MARKDOWN.render(encodable(_markdown(cell)))).strip()
    kind = re.sub(r"[^a-z]+", "-", cell.category.lower()).strip("-")
    box = f' data-box="{_edges(cell).strip()}"' if cell.box else ""
    return f'<div class="cell {kind}" data-category="{_escape(cell.category)}"{box}>{content}</div>'


def _is_html_table(cell: Cell) -> bool:
    return cell.category == "Table" and "<" in cell.text


def _edges(cell: Cell) -> str:
    return "" if cell.box is None else " ".join(map(_escape, cell.box)) + " "


def _latex(text: str) -> str:
    """Take off the marks around a formula, of which the model writes many kinds or none."""
    for begin, end in _FORMULA_MARKS:
        if len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end):
            inner = text[len(begin) : -len(end)]
            return text if begin in inner else inner.strip()
    return text


def _formula(text: str) -> str:
    return f'<code class="formula">{_escape(_latex(text))}</code>'


def _escape(value: object) -> str:
    """Write a text or a number so that whatever stands in its place does no harm in HTML and in comments."""
    return escape(encodable(str(value)))


class _Renderer(RendererHTML):
    """Shows the text that stands for an image, and formulas as they were written."""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return escape(self.renderInlineAsText(tokens[idx].children, options, env))

    def formula(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return _formula(tokens[idx].content)


class _Markdown(MarkdownIt):
    """CommonMark without HTML, and with formulas, in which stars and underscores mean something else."""

    def __init__(self) -> None:
        super().__init__("commonmark", {"html": False, "breaks": True}, renderer_cls=_Renderer)
        self.inline.ruler.before("escape", "formula", _find_formula)

    def validateLink(self, url: str) -> bool:
        return _LINKS.match(url) is not None


def _find_formula(state: StateInline, silent: bool) -> bool:
    match = MATH.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        state.push("formula", "", 0).content = match[0]
    state.pos = match.end()
    return True


_MARKDOWN: Final = _Markdown()
