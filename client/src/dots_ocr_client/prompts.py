"""The modes that dots.ocr was trained for, each with its prompt; it follows no others.

The prompts are byte for byte those of upstream (dots_ocr/utils/prompts.py), line breaks at their ends included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

# What to read; see `MODES`.
Mode = Literal["layout", "layout_only", "text", "grounding", "web", "scene", "svg", "general"]

# Where the image goes. It belongs in front of the prompt exactly once: a server that runs with
# ``--chat-template-content-format string`` and finds none adds one with a line break, which the model never saw.
PLACEHOLDER: Final = "<|img|><|imgpad|><|endofimg|>"

TEMPERATURE: Final = 0.1
TOP_P: Final = 0.9  # both as in upstream's client (dots_ocr/model/inference.py)

# What dots.ocr tells apart. The mode ``web`` of dots.mocr has others, which stay as the model wrote them.
Category = Literal[
    "Caption",
    "Footnote",
    "Formula",
    "List-item",
    "Page-footer",
    "Page-header",
    "Picture",
    "Section-header",
    "Table",
    "Text",
    "Title",
]
_CATEGORIES = list(get_args(Category))


@dataclass(frozen=True, slots=True)
class ModeSpec:
    """How one mode is asked for."""

    # With ``{box}``, ``{width}``, ``{height}`` or ``{question}`` where something is filled in; boxes and sizes are in
    # pixels of the image as the model sees it.
    prompt: str
    # ``cells`` is JSON with boxes, categories and texts, ``boxes`` the same without texts, ``text`` free.
    answer: Literal["cells", "boxes", "text"]
    temperature: float = TEMPERATURE  # of sampling
    top_p: float = TOP_P  # of sampling
    system: str | None = None  # a system prompt, which only the general mode was trained with
    mocr: bool = False  # only dots.mocr knows the mode


MODES: Final[dict[Mode, ModeSpec]] = {
    "layout": ModeSpec(  # upstream's prompt_layout_all_en
        "Please output the layout information from the PDF image, including each layout element's bbox, its category, "
        "and the corresponding text content within the bbox.\n\n"
        "1. Bbox format: [x1, y1, x2, y2]\n\n"
        f"2. Layout Categories: The possible categories are {_CATEGORIES}.\n\n"
        "3. Text Extraction & Formatting Rules:\n"
        "    - Picture: For the 'Picture' category, the text field should be omitted.\n"
        "    - Formula: Format its text as LaTeX.\n"
        "    - Table: Format its text as HTML.\n"
        "    - All Others (Text, Title, etc.): Format their text as Markdown.\n\n"
        "4. Constraints:\n"
        "    - The output text must be the original text from the image, with no translation.\n"
        "    - All layout elements must be sorted according to human reading order.\n\n"
        "5. Final Output: The entire output must be a single JSON object.\n",
        "cells",
    ),
    "layout_only": ModeSpec(  # prompt_layout_only_en
        "Please output the layout information from this PDF image, including each layout's bbox and its category. The "
        f"bbox should be in the format [x1, y1, x2, y2]. The layout categories for the PDF document include "
        f"{_CATEGORIES}. Do not output the corresponding text. The layout result should be in JSON format.",
        "boxes",
    ),
    "text": ModeSpec("Extract the text content from this image.", "text"),  # prompt_ocr
    "grounding": ModeSpec(  # prompt_grounding_ocr
        "Extract text from the given bounding box on the image (format: [x1, y1, x2, y2]).\nBounding Box:\n{box}",
        "text",
    ),
    "web": ModeSpec(  # prompt_web_parsing
        "Parsing the layout info of this webpage image with format json:\n", "cells", mocr=True
    ),
    "scene": ModeSpec("Detect and recognize the text in the image.", "text", mocr=True),  # prompt_scene_spotting
    "svg": ModeSpec(  # prompt_image_to_svg; a low temperature makes it loop (upstream: demo/demo_vllm_svg.py)
        'Please generate the SVG code based on the image.viewBox="0 0 {width} {height}"',
        "text",
        temperature=0.9,
        top_p=1.0,
        mocr=True,
    ),
    "general": ModeSpec(  # prompt_general (upstream: demo/demo_vllm_general.py)
        "{question}", "text", system="You are a helpful assistant.", mocr=True
    ),
}
