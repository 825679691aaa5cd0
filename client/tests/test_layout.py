from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dots_ocr_client.errors import UnusableAnswer
from dots_ocr_client.pages.images import MAX_ASPECT, smart_resize
from dots_ocr_client.results import Box, Cell
from dots_ocr_client.results.layout import Layout, parse, plain_text, to_page, to_seen

SEEN = (100, 200)
PAGE = (100, 200)

HEAD = '{"bbox": [1, 2, 30, 40], "category": "Text", "text": '
HELLO = HEAD + '"hello"}'
WORLD = '{"bbox": [1, 50, 30, 90], "category": "Title", "text": "world"}'
HELLO_CELL = Cell("Text", Box(1, 2, 30, 40), "hello")
WORLD_CELL = Cell("Title", Box(1, 50, 30, 90), "world")


def read(answer: str, *, texts: bool = True) -> Layout:
    return parse(answer, SEEN, PAGE, texts=texts)


def cell_of(**fields: Any) -> str:
    return json.dumps([{"bbox": [1, 2, 30, 40], "category": "Text", "text": "hello", **fields}])


def text_of(text: str, category: str = "Text") -> str:
    """What is read from an answer that holds this text as it stands, without any escaping."""
    (cell,) = read(f'[{{"bbox": [1, 2, 30, 40], "category": "{category}", "text": "{text}"}}]').cells
    return cell.text


# Answers in order


def test_an_answer_in_order_is_taken_as_it_is() -> None:
    picture = '{"bbox": [0, 0, 9.5, 9], "category": "Picture"}'
    layout = read(f"[{HELLO}, {picture}, {WORLD}]\n")
    assert layout == Layout((HELLO_CELL, Cell("Picture", Box(0, 0, 10, 9)), WORLD_CELL), ())


def test_a_blank_page_has_no_cells_and_is_no_error() -> None:
    assert read("[]") == Layout((), ())


def test_boxes_are_in_pixels_of_the_page() -> None:
    (cell,) = parse(f"[{HELLO}]", (100, 200), (150, 100), texts=True).cells
    assert cell.box == Box(1, 1, 45, 20)


def test_a_layout_without_texts_is_in_order() -> None:
    assert read('[{"bbox": [1, 2, 30, 40], "category": "Table"}]', texts=False) == Layout(
        (Cell("Table", Box(1, 2, 30, 40)),)
    )


@pytest.mark.parametrize("answer", [cell_of(category="Picture"), cell_of(category="Table")])
def test_texts_that_were_not_asked_for_are_left_out_with_a_note(answer: str) -> None:
    layout = read(answer, texts="Picture" in answer)
    assert layout.cells[0].text == ""
    assert layout.repairs == ("texts dropped that were not asked for: 1",)


# Around the cells


@pytest.mark.parametrize(
    ("answer", "repairs"),
    [
        (f"```json\n[{HELLO}, {WORLD}]\n```", ("code fence around the JSON removed",)),
        (f"Sure: [{HELLO}, {WORLD}]", ("characters dropped that stood outside of cells: 5",)),
        (f"[{HELLO}{WORLD}]", ("missing commas between cells added: 1",)),
        (
            f"[{HELLO}\n{WORLD}",
            ("missing commas between cells added: 1", "the list has no end, so cells may be missing"),
        ),
        (f'{{"cells": [{HELLO}, {WORLD}]}}', ("list of cells taken out of an object",)),
        (
            f'{{"cells": [{HELLO}, {WORLD}], "size": 3}}',
            ("list of cells taken out of an object", "other fields of that object dropped: 1"),
        ),
        (f"[[{HELLO}, {WORLD}]]", ()),
        (f"[{HELLO}, 7, {WORLD}, {{}}]", ("values dropped that are not cells: 2",)),
        (
            f"[{HELLO}, {WORLD}, {WORLD}, {HELLO}, {WORLD}]",
            ("cells dropped that repeat an earlier one: 3",),
        ),
    ],
)
def test_whatever_is_wrong_around_the_cells_costs_no_cell(answer: str, repairs: tuple[str, ...]) -> None:
    assert read(answer) == Layout((HELLO_CELL, WORLD_CELL), repairs)


@pytest.mark.parametrize(
    ("cell", "missing"),
    [
        ('{"bbox": [1 2 30, 40], "category": "Text", "text": "hello"}', 2),
        ('{"bbox": [1, 2, 30\n40], "category": "Text", "text": "hello"}', 1),
        ('{"bbox": [1, 2, 30, 40] "category": "Text", "text": "hello"}', 1),
        ('{"bbox": [1, 2, 30, 40], "category": "Text"\n"text": "hello"}', 1),
        ('{"bbox": [1 2 30 40]"category": "Text""text": "hello"}', 5),
        ('{"category": "Text", "text": "hello" "bbox": [1, 2, 30, 40]}', 1),
    ],
)
@pytest.mark.parametrize("around", ["[{cell}]", "[{cell}, {other}]", "[{other}, {cell}"])
def test_a_missing_comma_in_a_cell_costs_neither_text_nor_box(cell: str, missing: int, around: str) -> None:
    layout = read(around.format(cell=cell, other=WORLD))
    assert HELLO_CELL in layout.cells
    assert (WORLD_CELL in layout.cells) == ("{other}" in around)
    assert f"missing commas inside cells added: {missing}" in layout.repairs


@pytest.mark.parametrize(
    ("text", "read_as"),
    [(r"a \frac, [1 2] \"text\": \"x\" y", r'a \frac, [1 2] "text": "x" y'), ('a "b" c [1 2]', 'a "b" c [1 2]')],
)
def test_a_missing_comma_beside_another_fault_costs_neither_text_nor_box(text: str, read_as: str) -> None:
    layout = read(f'[{{"bbox": [1, 2 30, 40] "category": "Text" "text": "{text}"}}]')
    assert layout.cells == (Cell("Text", Box(1, 2, 30, 40), read_as),)


def test_a_single_cell_counts_as_a_list() -> None:
    assert read(HELLO) == Layout((HELLO_CELL,), ("single cell taken for a list",))


@pytest.mark.parametrize("answer", ["```json\n[]\n```", "```\n[ ]```", '{"cells": []}'])
def test_a_blank_page_is_also_seen_in_a_wrapping(answer: str) -> None:
    layout = read(answer)
    assert layout.cells == ()
    assert len(layout.repairs) == 1


# Cut off


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('"hel', "hel"),
        ('"hello', "hello"),
        ('"hello"', "hello"),
        (r'"hel\n', "hel\n"),
        ('"hel\\', "hel"),
        (r'"hel\u04', "hel"),
        (r'"hel\\u04', r"hel\u04"),
        ('"say "hel', 'say "hel'),
        ('"a\tb\nhel', "a\tb\nhel"),
    ],
)
def test_the_text_of_a_last_cell_that_breaks_off_is_kept_as_far_as_it_goes(text: str, kept: str) -> None:
    layout = read(f"[{WORLD}, {HEAD}{text}")
    assert layout.cells == (WORLD_CELL, Cell("Text", Box(1, 2, 30, 40), kept))
    assert layout.repairs


@pytest.mark.parametrize(
    "rest",
    ['{"bbox": [1, 2', '{"bbox": [1, 2, 30, 4', '{"bbox": [1, 2, 30, 40]', '{"bbox": [1, 2, 30, 40], "category": "Te'],
)
def test_a_last_cell_that_breaks_off_before_its_text_is_dropped(rest: str) -> None:
    assert read(f"[{WORLD}, {rest}") == Layout((WORLD_CELL,), ("broken or cut off cells dropped: 1",))


@pytest.mark.parametrize(
    ("rest", "box"), [("[1, 2, 30, 4", None), ("[1, 2, 30, 40", None), ("[1, 2, 30, 40]", Box(1, 2, 30, 40))]
)
def test_a_box_that_breaks_off_is_lost_because_its_last_number_may_lack_digits(rest: str, box: Box | None) -> None:
    layout = read('[{"category": "Picture", "bbox": ' + rest)
    assert layout.cells == (Cell("Picture", box),)
    assert "cells kept without the part that is broken or cut off: 1" in layout.repairs


@given(st.integers(0, 10_000))
@settings(max_examples=200)
def test_cutting_an_answer_anywhere_never_costs_a_whole_cell(length: int) -> None:
    texts = ["first", r"\frac{a}{b}", 'a "quoted" word', "line\nline", "Привет"]
    cells = [{"bbox": [i, i, i + 9, i + 9], "category": "Text", "text": text} for i, text in enumerate(texts)]
    answer = json.dumps(cells)
    length %= len(answer)
    whole = sum(len(json.dumps(cells[: i + 1])) - 1 <= length for i in range(len(cells)))
    if whole:
        assert [cell.text for cell in read(answer[:length]).cells][:whole] == texts[:whole]


# Inside the cells


def test_raw_control_characters_in_texts_are_kept() -> None:
    layout = read(f'[{HEAD}"a\nb\tc"}}, {WORLD}]')
    assert layout.cells == (Cell("Text", Box(1, 2, 30, 40), "a\nb\tc"), WORLD_CELL)
    assert layout.repairs == ("control characters inside strings escaped: 2",)


def test_quotation_marks_that_were_not_escaped_are_kept() -> None:
    layout = read(f'[{HEAD}"say "hi", please"}}, {WORLD}]')
    assert layout.cells == (Cell("Text", Box(1, 2, 30, 40), 'say "hi", please'), WORLD_CELL)
    assert layout.repairs == ("quotation marks inside texts escaped: 2",)


def test_braces_inside_texts_are_no_missing_commas() -> None:
    layout = read(f"[{cell_of(text='}{ {')[1:-1]}{WORLD}]")
    assert [cell.text for cell in layout.cells] == ["}{ {", "world"]


@pytest.mark.parametrize(
    "box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], [1, 2, 3, math.nan], [1, 2, 3, math.inf], "1 2 3 4", None, {}]
)
def test_a_box_that_is_not_four_numbers_is_dropped_and_the_cell_kept(box: Any) -> None:
    assert read(cell_of(bbox=box)) == Layout(
        (Cell("Text", None, "hello"),), ("boxes dropped that are not four numbers: 1",)
    )


def test_a_box_that_is_no_json_is_dropped_and_the_cell_kept() -> None:
    layout = read('[{"bbox": [1, 2,, 30 40, "category": "Text", "text": "hello"}]')
    assert layout == Layout((Cell("Text", None, "hello"),), ("boxes dropped that are not four numbers: 1",))


@pytest.mark.parametrize(
    ("numbers", "box", "repair"),
    [
        ([30, 40, 1, 2], Box(1, 2, 30, 40), "boxes turned the right way round: 1"),
        ([-5, 2, 300, 10**400], Box(0, 2, 100, 200), "boxes cut off at the edges of the page: 1"),
        ([1, 2, 1e308, 40], Box(1, 2, 100, 40), "boxes cut off at the edges of the page: 1"),
        ([5, 2, 5, 40], None, "boxes dropped that are empty or lie outside the page: 1"),
        ([101, 2, 130, 40], None, "boxes dropped that are empty or lie outside the page: 1"),
    ],
)
def test_boxes_are_mended(numbers: list[float], box: Box | None, repair: str) -> None:
    assert read(cell_of(bbox=numbers)) == Layout((Cell("Text", box, "hello"),), (repair,))


def test_categories_that_dots_ocr_does_not_have_are_kept_and_noted_once() -> None:
    layout = read(f"[{cell_of(category='Stamp')[1:-1]}, {cell_of(category='Stamp', text='x')[1:-1]}]")
    assert [cell.category for cell in layout.cells] == ["Stamp", "Stamp"]
    assert layout.repairs == ("categories kept as written that dots.ocr does not have: 1 ('Stamp')",)


@pytest.mark.parametrize(
    ("fields", "cell", "repair"),
    [
        ({"text": 5.5}, Cell("Text", HELLO_CELL.box, "5.5"), "texts made of values that are not strings: 1"),
        ({"text": ["é"]}, Cell("Text", HELLO_CELL.box, '["é"]'), "texts made of values that are not strings: 1"),
        ({"category": None}, HELLO_CELL, "cells without a category taken for Text: 1"),
        ({"score": 1}, HELLO_CELL, "fields dropped other than bbox, category and text: 1"),
    ],
)
def test_other_faults_of_a_cell_are_mended_and_noted(fields: dict[str, Any], cell: Cell, repair: str) -> None:
    assert read(cell_of(**fields)) == Layout((cell,), (repair,))


def test_a_field_that_occurs_twice_is_noted() -> None:
    layout = read(HEAD + '"lost", "text": "hello"}')
    assert layout.cells == (HELLO_CELL,)
    assert "fields dropped that occur again later in the same cell: 1" in layout.repairs


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_nul_and_lone_surrogates_are_replaced(text: str, ascii_only: bool) -> None:
    answer = json.dumps([{"category": "Text", "bbox": [1, 2, 3, 4], "text": text}], ensure_ascii=ascii_only)
    layout = read(answer)
    assert layout.cells[0].text == "a\N{REPLACEMENT CHARACTER}b"
    assert layout.repairs == ("texts in which NUL or lone surrogates were replaced: 1",)


# LaTeX with single backslashes


@pytest.mark.parametrize(
    "latex",
    [
        r"\frac{a}{b}",
        r"\beta + \bar x",
        r"h\nu \neq 0, \nabla f, x \notin X",
        r"\rho \rightarrow \rangle",
        r"a \times \tau \to \text{b} \theta \triangle",
        r"\alpha \underline{x} \left( \right)",
    ],
)
def test_lost_backslashes_of_a_formula_are_put_back(latex: str) -> None:
    assert text_of(latex, "Formula") == latex
    assert text_of(f"see ${latex}$.") == f"see ${latex}$."
    assert text_of(f"see $${latex}$$.") == f"see $${latex}$$."


def test_backslashes_that_are_put_back_are_counted() -> None:
    layout = read(cell_of(category="Formula", text="\frac{a}{\beta} \nu \alpha"))
    assert layout.repairs == ("lost backslashes of LaTeX commands put back: 3",)


@pytest.mark.parametrize(
    "text",
    [
        "$$\nu = e\n$$",
        "\\begin{aligned}\nu &= 1 \\\\\ni &= 2\n\\end{aligned}",
        "x\nand\ty",
    ],
)
def test_line_breaks_of_a_formula_stay(text: str) -> None:
    assert read(cell_of(category="Formula", text=text)) == Layout((Cell("Formula", Box(1, 2, 30, 40), text),))


@pytest.mark.parametrize("text", ["first\nnot second\tto third", "for $5\nnot $3", "$5\nnot US$3"])
def test_line_breaks_outside_of_formulas_stay(text: str) -> None:
    assert read(cell_of(text=text)) == Layout((Cell("Text", Box(1, 2, 30, 40), text),))


# Answers without a layout


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "<html>",
        "null",
        "7",
        '"text"',
        "{}",
        "[{}]",
        "[null]",
        "[[[",
        "[[]]",
        "NaN",
        '[{"bbox": [1, 2',
        "\ud800",
        "A text.",
    ],
)
def test_an_answer_without_any_cell_is_unusable(answer: str) -> None:
    with pytest.raises(UnusableAnswer, match="not a layout"):
        read(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "[" * 1_000_000,
        '{"text":' * 20_000,
        '{"text": "' * 20_000,
        '"' * 500_000,
        HEAD + '"' + "\\" * 500_000,
        '[{"category": "Text", "bbo\\u0078": [1',
        HEAD + '"' + '" ' * 250_000,
        HEAD + '""' + " " * 500_000 + "x",
        "[1" + "0" * 500_000 + "]",
        '{"bbox": [1' + "0" * 500_000 + '], "text": "a"}',
        cell_of(text="\\(" * 200_000),
        cell_of(text="$\nu " * 100_000),
        cell_of(category="Formula", text="\nu" * 100_000),
        "[" + ", ".join([HELLO] * 8_000),
    ],
    ids=lambda answer: answer[:20],
)
def test_no_answer_takes_long(answer: str) -> None:
    began = time.monotonic()
    with contextlib.suppress(UnusableAnswer):
        read(answer)
    assert time.monotonic() - began < 5  # most take milliseconds; anything quadratic would take minutes


SNIPPETS = [HELLO, HEAD, '{"bbox": [', "bbox", "category", "text", "Formula", "Table", "<td>", "$", "\\frac", "```"]
TOKENS = [
    "[",
    "]",
    "{",
    "}",
    '"',
    ",",
    ":",
    "\\",
    "\n",
    " ",
    "\0",
    "\ud83d",
    "\\ud83d",
    "\\u0000",
    "1",
    "-1e999",
    "NaN",
]
PIECES = st.sampled_from(SNIPPETS + TOKENS) | st.text(max_size=5)


@given(st.lists(PIECES, max_size=30).map("".join), st.booleans())
@settings(max_examples=200)
def test_whatever_comes_the_result_is_a_layout_or_unusable(answer: str, texts: bool) -> None:
    try:
        layout = parse(answer, (28, 56), (1000, 70), texts=texts)
    except UnusableAnswer:
        return
    assert len(set(layout.cells)) == len(layout.cells)
    for cell in layout.cells:
        assert "\0" not in cell.category + cell.text
        (cell.category + cell.text).encode()
        if cell.box is not None:
            assert 0 <= cell.box.left < cell.box.right <= 1000
            assert 0 <= cell.box.top < cell.box.bottom <= 70


# Boxes


@st.composite
def pages_with_boxes(draw: st.DrawFn) -> tuple[tuple[int, int], Box]:
    width, height = draw(st.integers(1, 9000)), draw(st.integers(1, 9000))
    assume(max(width, height) < MAX_ASPECT * min(width, height))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), Box(left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@given(pages_with_boxes())
def test_a_box_that_goes_to_the_model_and_comes_back_covers_itself_closely(case: tuple[tuple[int, int], Box]) -> None:
    page, box = case
    seen = smart_resize(*page)
    back = to_page(to_seen(box, seen, page), seen, page)
    slack = [math.ceil(ours / models) for ours, models in zip(page, seen, strict=True)]
    assert 0 <= box.left - back.left <= slack[0]
    assert 0 <= box.top - back.top <= slack[1]
    assert 0 <= back.right - box.right <= slack[0]
    assert 0 <= back.bottom - box.bottom <= slack[1]


@given(pages_with_boxes())
def test_the_whole_page_stays_the_whole_page(case: tuple[tuple[int, int], Box]) -> None:
    page, _ = case
    seen = smart_resize(*page)
    assert to_page((0, 0, *seen), seen, page) == Box(0, 0, *page)
    assert to_seen(Box(0, 0, *page), seen, page) == Box(0, 0, *seen)


def test_the_scale_is_exact_where_floats_are_not() -> None:
    assert to_page((0, 0, 49, 1), (49, 1), (3, 1)).right == 3  # 49 * (3 / 49) is more than 3 in floats
    assert to_page((1 / 3, 0, 2 / 3, 1), (1, 1), (3, 1)) == Box(0, 0, 2, 1)


# Plain text


def test_plain_text_joins_the_texts_in_order() -> None:
    cells = [
        Cell("Page-header", None, "header"),
        Cell("Picture", None),
        Cell("Text", None, "a\nb\n"),
        Cell("Formula", None, "x"),
    ]
    assert plain_text(cells) == "header\n\na\nb\n\nx"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1 &lt; 2</td><td></td></tr></table>", "a\tb\n1 < 2\t"),
        ("<table>\n <tr>\n  <td>a\n b</td> <td>c<br>d</td>\n </tr>\n</table>", "a b\tc d"),
        ("<tr><td>a</td></tr><tr><td>b", "a\nb"),
        ("<table><tr><td>a<script>x</script></td></tr></table>", "a"),
        ("a | b", "a | b"),
        ("<table></table>", ""),
        ("<tr><td rowspan=2>a</td><td>b</td></tr><tr><td>c</td></tr><tr><td>d</td></tr>", "a\tb\n\tc\nd"),
        ("<tr><td>a</td><td rowspan='2'>b</td><td>c</td></tr><tr><td>d</td><td>e</td></tr>", "a\tb\tc\nd\t\te"),
        ("<tr><td colspan=2>a</td><td>b</td></tr><tr><td>c</td><td>d</td><td>e</td></tr>", "a\t\tb\nc\td\te"),
        ("<tr><td colspan=2 rowspan=3>a</td><td>b</td></tr><tr></tr><tr><td>c</td></tr>", "a\t\tb\n\t\tc"),
        ("<tr><th colspan=3>a</th></tr><tr><td>b</td></tr>", "a\nb"),
        ("<tr><td rowspan=0>a</td><td rowspan=x colspan=>b</td></tr><tr><td>c</td></tr>", "a\tb\nc"),
    ],
)
def test_plain_text_of_a_table_has_a_line_for_each_row(table: str, text: str) -> None:
    assert plain_text([Cell("Table", None, table)]) == text


@pytest.mark.parametrize(
    "piece", ["<!--", "<a ", "<a href=", "<table>", "<b><p>", "<", "<tr><td colspan=9999 rowspan=9999>"]
)
def test_no_table_takes_long(piece: str) -> None:
    began = time.monotonic()
    plain_text([Cell("Table", None, piece * 30_000)])
    assert time.monotonic() - began < 5


def test_nothing_gives_no_text() -> None:
    assert plain_text([]) == ""
