"""The strings at the edges of the model: dots.ocr's trained prompts and the answer's frame.

The prompts are an interface fact: byte for byte those of `dots_ocr/utils/prompts.py` in rednote-hilab/dots.ocr,
including the line break at the end of the layout prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

# isort: split
from page import HEIGHT, WIDTH, pad_lines

PROMPT_OCR = "Extract the text content from this image."

PROMPT_LAYOUT_ALL_EN = (
    "Please output the layout information from the PDF image, including each layout element's bbox, its category, and "
    "the corresponding text content within the bbox.\n"
    "\n"
    "1. Bbox format: [x1, y1, x2, y2]\n"
    "\n"
    "2. Layout Categories: The possible categories are ['Caption', 'Footnote', 'Formula', 'List-item', 'Page-footer', "
    "'Page-header', 'Picture', 'Section-header', 'Table', 'Text', 'Title'].\n"
    "\n"
    "3. Text Extraction & Formatting Rules:\n"
    "    - Picture: For the 'Picture' category, the text field should be omitted.\n"
    "    - Formula: Format its text as LaTeX.\n"
    "    - Table: Format its text as HTML.\n"
    "    - All Others (Text, Title, etc.): Format their text as Markdown.\n"
    "\n"
    "4. Constraints:\n"
    "    - The output text must be the original text from the image, with no translation.\n"
    "    - All layout elements must be sorted according to human reading order.\n"
    "\n"
    "5. Final Output: The entire output must be a single JSON object.\n"
)

LINE_BREAK_OCR = "\n"
LINE_BREAK_LAYOUT = "\\n"  # as it stands inside a JSON string

# The page is one text block: one box around everything.
LAYOUT_PREFIX = f'[{{"bbox": [0, 0, {WIDTH}, {HEIGHT}], "category": "Text", "text": "'
LAYOUT_SUFFIX = '"}]'


def ocr_answer(lines: Sequence[str]) -> str:
    """Return the exact answer to `PROMPT_OCR`: eight lines, blanks kept, each ended by a line break."""
    return "".join(line + LINE_BREAK_OCR for line in pad_lines(lines))


def layout_answer(lines: Sequence[str]) -> str:
    """Return the exact answer to `PROMPT_LAYOUT_ALL_EN`: one cell that holds the same text."""
    answer = LAYOUT_PREFIX + "".join(line + LINE_BREAK_LAYOUT for line in pad_lines(lines)) + LAYOUT_SUFFIX
    assert json.loads(answer)[0]["text"] == ocr_answer(lines)
    return answer
