"""Use the configuration class that vLLM itself ships."""

from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig as _Config


class DotsOCRConfig(_Config):
    model_type = "dots_ocr"
