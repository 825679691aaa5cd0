"""Read documents with dots.ocr on a vLLM server, or with the next engine that can."""

import sys

if sys.platform == "win32":
    raise ImportError(
        "dots-ocr-client runs on Linux: install it inside WSL, together with the application that uses it; "
        "a file C:\\scan.png is /mnt/c/scan.png there"
    )

from .client import AsyncDotsOCR, DotsOCR
from .engines.admission import Limiter
from .engines.base import Answer, Engine, Task
from .engines.defaults import make_engines
from .engines.tesseract import TesseractEngine
from .engines.vllm import VLLMEngine
from .errors import (
    AllEnginesFailed,
    CircuitOpen,
    ConfigurationError,
    CutOff,
    DeadlineExceeded,
    DotsOCRError,
    EngineError,
    EngineMissing,
    InputError,
    InvalidKey,
    ModelNotServed,
    ModeNotSupported,
    NotApplicable,
    Overloaded,
    Repetition,
    RequestRejected,
    ServerUnavailable,
    Unauthorized,
    UnusableAnswer,
)
from .pages.documents import PageImage
from .prompts import Mode
from .results import Attempt, Box, Cell, Document, FailedPage, Page
from .version import __version__

__all__ = [
    "AllEnginesFailed",
    "Answer",
    "AsyncDotsOCR",
    "Attempt",
    "Box",
    "Cell",
    "CircuitOpen",
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
    "InvalidKey",
    "Limiter",
    "Mode",
    "ModeNotSupported",
    "ModelNotServed",
    "NotApplicable",
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
    "make_engines",
]
