"""The only Python file that vLLM executes from the model's folder, replaced by the classes that vLLM itself ships."""

from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig as VLLMDotsOCRConfig
from vllm.transformers_utils.configs.dotsocr import DotsVisionConfig

__all__ = ["DotsOCRConfig", "DotsVisionConfig"]


class DotsOCRConfig(VLLMDotsOCRConfig):
    """Carries the model type that transformers looks the class up by."""

    model_type = "dots_ocr"
