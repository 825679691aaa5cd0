# Written by dots-ocr-deploy (role chatvlmllm): the original is beside it as a backup; state "absent" puts it back.
"""The names of chatvlmllm's dots.ocr client, provided by the package dots-ocr-client."""

from dots_ocr_client.chatvlmllm import VLLMDotsOCRClient, get_vllm_dots_ocr_client

__all__ = ["VLLMDotsOCRClient", "get_vllm_dots_ocr_client"]
