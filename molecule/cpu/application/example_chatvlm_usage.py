"""Stands in for the application: reads one picture in the way that its documentation shows, and prints the result."""

import json
import sys

from models import QwenVLModel
from models.dots_ocr_vllm_integration import get_dots_ocr_vllm_integration, initialize_dots_ocr_vllm

PROMPT = "Extract all text from this image"

initialize_dots_ocr_vllm(fallback_model=QwenVLModel())
integration = get_dots_ocr_vllm_integration()
picture = sys.argv[1]
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": PROMPT}]
print(
    json.dumps(
        {
            "completion": integration.chat_completion([{"role": "user", "content": content}]),
            "file": integration.process_image_file(picture, PROMPT),
        }
    )
)
