"""The prompts that dots.ocr was trained with; it follows no others (upstream: dots_ocr/utils/prompts.py)."""

from typing import Final, Literal

Mode = Literal["text"]
"""What to read: ``text`` is plain text in reading order, without page headers and footers."""

PROMPTS: Final[dict[Mode, str]] = {
    "text": "Extract the text content from this image.",  # upstream's prompt_ocr
}

PLACEHOLDER: Final = "<|img|><|imgpad|><|endofimg|>"
"""Where the image goes. It belongs in front of the prompt exactly once: a server that runs with
``--chat-template-content-format string`` and finds none adds one with a line break, which the model never saw."""
