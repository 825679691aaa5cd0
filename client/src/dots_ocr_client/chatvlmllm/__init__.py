"""What the application chatvlmllm calls to read with dots.ocr, under its own names; no other program needs this.

Modules of these names in the application's folder import from here, by way of `dots_ocr_client_installed`: names,
arguments and results are those of its own modules. Nothing but the ``encode_*`` methods and `ServerModel` raises; what
goes wrong is in the results, in Russian as the rest of that application, with the details of this package in English
behind it.

A message may name any file that this process can read, as the application's own messages do: do not pass on messages
of strangers.
"""

from .client import VLLMDotsOCRClient, get_vllm_dots_ocr_client
from .integration import DotsOCRVLLMIntegration, get_dots_ocr_vllm_integration, initialize_dots_ocr_vllm
from .model import ServerModel
from .page import SingleContainerManager, VLLMStreamlitAdapter, create_single_container_ui, create_vllm_interface

__all__ = [
    "DotsOCRVLLMIntegration",
    "ServerModel",
    "SingleContainerManager",
    "VLLMDotsOCRClient",
    "VLLMStreamlitAdapter",
    "create_single_container_ui",
    "create_vllm_interface",
    "get_dots_ocr_vllm_integration",
    "get_vllm_dots_ocr_client",
    "initialize_dots_ocr_vllm",
]
