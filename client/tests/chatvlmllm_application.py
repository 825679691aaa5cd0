"""Reads a page in the ways in which chatvlmllm's own scripts do. Arguments: the page's path, the server's URL.

Prints what came of it as JSON, with the heavy packages that were imported on the way.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from PIL import Image

from dots_ocr_client.chatvlmllm import get_dots_ocr_vllm_integration, get_vllm_dots_ocr_client, initialize_dots_ocr_vllm


class QwenVLModel:
    """The application's own model, as far as others see it: no chat_completion, and it wants a PIL image."""

    def process_image(self, image: Image.Image, prompt: str = "Extract all text from this image") -> str:
        return self.chat(image, prompt)

    def chat(self, image: Image.Image, prompt: str, history: Any = None, **kwargs: Any) -> str:
        assert image.mode == "RGB"
        return f"Qwen прочитал {image.width} x {image.height}: {prompt}"


def main() -> None:
    path, url = sys.argv[1:]
    heavy = sorted({"torch", "transformers", "requests", "openai", "starlette"} & sys.modules.keys())
    ready = initialize_dots_ocr_vllm(vllm_url=url, fallback_model=QwenVLModel())
    integration = get_dots_ocr_vllm_integration()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": path}},
                {"type": "text", "text": "Extract all text from this image"},
            ],
        }
    ]
    results = {
        "imported": heavy,
        "ready": ready,
        "status": integration.get_status(),
        "client": get_vllm_dots_ocr_client(url).process_image(path),
        "file": integration.process_image_file(path, "Extract all text"),
        "pil": integration.process_pil_image(Image.open(path), "Extract all text"),
        "chat": integration.chat_completion(messages),
    }
    print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
