"""The chain of engines that readers get who do not choose one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from .admission import CAP, START, Limiter
from .base import Engine

Name = Literal["vllm", "qwen", "textlayer", "tesseract"]

# Best first. A PDF's own text is exact where it is sound, so it comes before Tesseract; a vision model comes before
# both, because it understands a page's layout.
ENGINES: Final[tuple[Name, ...]] = ("vllm", "qwen", "textlayer", "tesseract")


def make_engines(
    names: Iterable[Name] = ENGINES,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    model: str = "dots.ocr",
    max_in_flight: int = CAP,
    languages: str = "eng",
) -> tuple[Engine, ...]:
    """Make engines in the order in which they are to be asked; each is imported only if it is wanted.

    Args:
        names: Which, in which order; see `ENGINES`.
        base_url: For vLLM; see `VLLMEngine`.
        api_key: For vLLM.
        model: For vLLM.
        max_in_flight: Pages at the vLLM server at once, at most.
        languages: For Tesseract; see `TesseractEngine`.

    Raises:
        ConfigurationError: The base URL is not an http or https URL.
        ValueError: There is no engine of that name.
    """
    engines: list[Engine] = []
    for name in names:
        match name:
            case "vllm":
                from .vllm import VLLMEngine

                limiter = Limiter(min(START, max_in_flight), max_in_flight)
                engines.append(VLLMEngine(base_url, api_key=api_key, model=model, limiter=limiter))
            case "qwen":
                from .qwen import QwenEngine

                engines.append(QwenEngine())
            case "textlayer":
                from .textlayer import TextLayerEngine

                engines.append(TextLayerEngine())
            case "tesseract":
                from .tesseract import TesseractEngine

                engines.append(TesseractEngine(languages))
            case _:
                raise ValueError(f"there is no engine {name!r}; there are: {', '.join(ENGINES)}")
    return tuple(engines)
