"""Read documents with dots.ocr on a vLLM server, and with Tesseract when that server cannot."""

from .client import DotsOCR
from .documents import PageImage
from .engines.base import Answer, Engine
from .engines.tesseract import TesseractEngine
from .engines.vllm import VLLMEngine
from .errors import (
    AllEnginesFailed,
    ConfigurationError,
    DeadlineExceeded,
    DotsOCRError,
    EngineError,
    EngineMissing,
    InputError,
    ModelNotServed,
    RequestRejected,
    ServerUnavailable,
    Unauthorized,
    UnusableAnswer,
)
from .results import Attempt, Document, Page

__version__ = "0.1.0"

__all__ = [
    "AllEnginesFailed",
    "Answer",
    "Attempt",
    "ConfigurationError",
    "DeadlineExceeded",
    "Document",
    "DotsOCR",
    "DotsOCRError",
    "Engine",
    "EngineError",
    "EngineMissing",
    "InputError",
    "ModelNotServed",
    "Page",
    "PageImage",
    "RequestRejected",
    "ServerUnavailable",
    "TesseractEngine",
    "Unauthorized",
    "UnusableAnswer",
    "VLLMEngine",
    "__version__",
]
