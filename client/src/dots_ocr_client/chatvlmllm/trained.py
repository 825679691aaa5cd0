"""From the texts that chatvlmllm sends to the prompts that dots.ocr was trained with; it follows no others."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import re
from typing import Final

from ..engines.base import Answer, Task
from ..prompts import MODES, PLACEHOLDER, Mode
from ..results import Box, Page
from ..results.layout import as_answer


def _normal(text: str) -> str:
    """Make texts equal that differ only in spacing, capitals and the full stop at the end."""
    return " ".join(text.replace(PLACEHOLDER, "").split()).casefold().rstrip(".")


_TEXT: Final = (
    "Extract all text",
    "Extract all text and structured data from this invoice",
    "Extract all text content from this image while maintaining reading order. Exclude headers and footers",
    "Extract all text from this document",
    "Extract all text from this driver's license, preserving structure and formatting",
    "Extract all text from this image",
    "Extract all text from this image, preserving structure and formatting",
    "Extract all text from this passport document, preserving structure and formatting",
    "Extract all text in Russian and English",
    "Extract text",
    "Extract text from this image",
    "Извлеки весь текст",
    "Извлеки весь текст из документа",
    "Извлеки весь текст из этого изображения",
    "Извлеки весь текст с изображения",
    "Прочитай весь текст",
    "Прочитай текст",
    "Распознай текст",
    "Извлеките весь текст из этого документа, сохраняя структуру и форматирование",
)
_LAYOUT: Final = "Please output the layout information from the PDF image, including bbox, category, and text"
_LAYOUT_ONLY: Final = (
    "Perform layout detection only. Identify and locate all layout elements in the document without text recognition. "
    "For each element provide: 1. Bbox coordinates: [x1, y1, x2, y2] 2. Category from: ['Caption', 'Footnote', "
    "'Formula', 'List-item', 'Page-footer', 'Page-header', 'Picture', 'Section-header', 'Table', 'Text', 'Title'] "
    "3. Confidence score if available Output as JSON array of detected layout elements"
)
_PICTURES: Final = (
    "Analyze this document image and detect all visual elements including pictures, logos, stamps, signatures, and "
    "other graphical content. For each detected element, provide: 1. Bbox coordinates in format [x1, y1, x2, y2] "
    "2. Category (Picture, Logo, Stamp, Signature, Barcode, QR-code, etc.) 3. Brief description of the visual element "
    "Output as JSON array with detected visual elements"
)
_TABLES: Final = (
    "Extract and format all table content from this document as structured HTML tables with proper formatting. "
    "Include: 1. All table data with correct row and column structure 2. Preserve headers and data relationships "
    "3. Format as clean HTML tables 4. Include bbox coordinates for each table: [x1, y1, x2, y2] Output format: JSON "
    "with tables array containing bbox and html_content for each table"
)

# The prompts of the modes, and the application's own words for the same wishes. Without any words: all the text.
_MODES: Final[dict[str, Mode]] = {
    **{_normal(spec.prompt): mode for mode, spec in MODES.items() if "{" not in spec.prompt},
    **{_normal(text): "text" for text in ("", *_TEXT)},
    **{_normal(text): "layout" for text in (_LAYOUT, _TABLES)},
    **{_normal(text): "layout_only" for text in (_LAYOUT_ONLY, _PICTURES)},
}
_CATEGORIES: Final = {_normal(_PICTURES): "Picture", _normal(_TABLES): "Table"}

_GROUNDING: Final = re.compile(
    re.escape(_normal(MODES["grounding"].prompt.partition("{box}")[0]))
    + r" ?\[ ?(\d{1,6}), ?(\d{1,6}), ?(\d{1,6}), ?(\d{1,6}) ?\]"
)


def task_of(prompt: str) -> Task | None:
    """Return what a prompt asks for; ``None`` if dots.ocr was not trained with it or anything that means the same."""
    text = _normal(prompt)
    if text in _MODES:
        return Task(_MODES[text])
    if match := _GROUNDING.fullmatch(text):
        box = Box(*map(int, match.groups()))
        if box.left < box.right and box.top < box.bottom:
            return Task("grounding", box)
    return None


def content_of(answer: Answer | Page, prompt: str = "") -> str:
    """Write an answer as the application expects it from dots.ocr: text, or a layout as an array in JSON.

    The boxes are in pixels of the upright image, and a picture has no text. A cell without a usable box has no
    ``bbox``: the application passes over it when it draws.
    """
    wanted = _CATEGORIES.get(_normal(prompt))
    kind = MODES[answer.mode].answer
    if kind == "text":
        return answer.text
    return as_answer((cell for cell in answer.cells if wanted in (None, cell.category)), texts=kind == "cells")
