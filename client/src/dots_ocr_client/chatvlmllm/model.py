"""dots.ocr on the server as one of chatvlmllm's models: what its API and its mode "Transformers" load."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .client import DEFAULT_PROMPT, get_vllm_dots_ocr_client
from .messages import Conversation
from .page import words_for
from .trained import task_of


class ServerModel:
    """Has the methods of the application's models. What goes wrong is a `RuntimeError` in Russian, which they show."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Take the model's entry in the application's config.yaml; nothing is loaded."""
        self.config = config
        self.model_path = self.model_id = config.get("model_path", "")
        self.device = "server"
        self.model: Any = None
        self.processor: Any = None

    def load_model(self) -> None:
        """Do nothing: the server has the model."""

    def unload(self) -> None:
        """Do nothing: the server keeps the model."""

    unload_model = unload

    def process_image(self, image: Image.Image, prompt: str | None = None, **options: Any) -> str:
        """Read a picture to its end, with a prompt that dots.ocr was trained with, or that means the same.

        Without one, and for any other, which dots.ocr does not follow, all the text is read. Options of other models,
        such as ``temperature``, are not used.
        """
        client = get_vllm_dots_ocr_client()  # by the settings of now
        prompt = prompt if prompt and task_of(prompt) else DEFAULT_PROMPT
        try:
            completion = client.complete(Conversation.about(image, prompt))
        except Exception as error:
            raise RuntimeError(words_for(error, client)) from error
        return str(completion["choices"][0]["message"]["content"])

    def extract_text(self, image: Image.Image, language: str | None = None) -> str:
        """Read all the text of a picture, in whatever language it is."""
        return self.process_image(image)

    def parse_document(self, image: Image.Image, return_json: bool = False) -> dict[str, Any]:
        """Read all the text of a picture, under the names that the API and its examples look for."""
        text = self.process_image(image)
        return {"success": True, "text": text, "raw_text": text, "method": "vllm"}

    def chat(self, image: Image.Image, prompt: str | None = None, **options: Any) -> str:
        """Read a picture; see `process_image`. ``message`` is another name of the prompt."""
        return self.process_image(image, prompt or options.get("message"))
