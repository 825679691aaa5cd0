# Менеджер приложения
import docker


class SingleContainerManager:
    """Finds the folder docker/ instead of a library."""

    def __init__(self):
        self.client = docker.from_env()
        self.models_config = {}

    def start_single_container(self, model_key):
        """Do what must not be done beside a deployment."""
        self.client.containers.run("vllm/vllm-openai:latest")
