# Written by dots-ocr-deploy (role chatvlmllm): the original is beside it as a backup; state "absent" puts it back.
"""The names of chatvlmllm's dots.ocr integration, provided by the package dots-ocr-client."""

from dots_ocr_client.chatvlmllm import (
    DotsOCRVLLMIntegration,
    VLLMDotsOCRClient,
    get_dots_ocr_vllm_integration,
    initialize_dots_ocr_vllm,
)

__all__ = [
    "DotsOCRVLLMIntegration",
    "VLLMDotsOCRClient",
    "get_dots_ocr_vllm_integration",
    "initialize_dots_ocr_vllm",
]
