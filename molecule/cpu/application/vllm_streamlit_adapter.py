# Адаптер приложения
from single_container_manager import SingleContainerManager


class VLLMStreamlitAdapter:
    """Starts a rival container when it is asked for anything."""

    def __init__(self, base_url="http://localhost:8000"):
        self.base_url = base_url
        self.container_manager = SingleContainerManager()

    def process_image(self, image, prompt, model, max_tokens):
        self.container_manager.start_single_container(model)


def create_vllm_interface():
    """Show a page."""
