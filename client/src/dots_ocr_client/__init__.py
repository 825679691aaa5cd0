"""Read documents with dots.ocr on a vLLM server, and with Tesseract when that server cannot."""

from .client import AsyncDotsOCR, DotsOCR
from .documents import PageImage
from .engines.base import Answer, Engine, Task
from .engines.tesseract import TesseractEngine
from .engines.vllm import VLLMEngine
from .errors import (
    AllEnginesFailed,
    ConfigurationError,
    CutOff,
    DeadlineExceeded,
    DotsOCRError,
    EngineError,
    EngineMissing,
    InputError,
    ModelNotServed,
    ModeNotSupported,
    Overloaded,
    Repetition,
    RequestRejected,
    ServerUnavailable,
    Unauthorized,
    UnusableAnswer,
)
from .limiter import Limiter
from .prompts import Mode
from .results import Attempt, Box, Cell, Document, FailedPage, Page

__version__ = "0.1.0"

__all__ = [
    "AllEnginesFailed",
    "Answer",
    "AsyncDotsOCR",
    "Attempt",
    "Box",
    "Cell",
    "ConfigurationError",
    "CutOff",
    "DeadlineExceeded",
    "Document",
    "DotsOCR",
    "DotsOCRError",
    "Engine",
    "EngineError",
    "EngineMissing",
    "FailedPage",
    "InputError",
    "Limiter",
    "Mode",
    "ModeNotSupported",
    "ModelNotServed",
    "Overloaded",
    "Page",
    "PageImage",
    "Repetition",
    "RequestRejected",
    "ServerUnavailable",
    "Task",
    "TesseractEngine",
    "Unauthorized",
    "UnusableAnswer",
    "VLLMEngine",
    "__version__",
]
