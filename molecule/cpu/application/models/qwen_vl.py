"""A model with the methods of the application's own, which has no chat_completion."""

from typing import Any


class QwenVLModel:
    """Reads the same in every picture."""

    def process_image(self, image: Any, prompt: str) -> str:
        """Return what a model would have read."""
        return f"прочитано моделью Qwen: {image.width} x {image.height}"
