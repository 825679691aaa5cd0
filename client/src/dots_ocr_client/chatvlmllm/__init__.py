"""What the application chatvlmllm calls to read with dots.ocr, under its own names; no other program needs this.

The application's ``vllm_dots_ocr_client.py`` and ``models/dots_ocr_vllm_integration.py`` may import everything from
here: names, arguments and results are those of its own modules. Nothing here raises, apart from the two ``encode_*``
methods; what goes wrong is in the results, in Russian as the rest of that application, with the details of this package
in English behind it.

A message may name any file that this process can read, as the application's own messages do: do not pass on messages
of strangers.
"""

from .client import VLLMDotsOCRClient, get_vllm_dots_ocr_client
from .integration import DotsOCRVLLMIntegration, get_dots_ocr_vllm_integration, initialize_dots_ocr_vllm

__all__ = [
    "DotsOCRVLLMIntegration",
    "VLLMDotsOCRClient",
    "get_dots_ocr_vllm_integration",
    "get_vllm_dots_ocr_client",
    "initialize_dots_ocr_vllm",
]
