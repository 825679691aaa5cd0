"""Loads models by their names, as the application's does: the class of another name for dots_ocr, three tries."""

from pathlib import Path
from typing import ClassVar

import yaml

from models.qwen_vl import QwenVLModel


class EmergencyModelLoader:
    """Knows every model but dots_ocr."""

    MODEL_REGISTRY: ClassVar = {
        "qwen3_vl_2b": QwenVLModel,
        # "dots_ocr": DotsOCRUltimateFixModel,  # Отключено
        "dots_ocr_video_processor_fixed": None,
    }

    @classmethod
    def load_model(cls, model_key):
        """Return a model, ready to read."""
        if model_key not in cls.MODEL_REGISTRY:
            raise ValueError(f"Model '{model_key}' not found")
        config = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))["models"][model_key]
        key = "dots_ocr_video_processor_fixed" if model_key == "dots_ocr" else model_key
        model = cls.MODEL_REGISTRY[key](config=config)
        model.load_model()
        return model


# Без перевода строки в конце
ModelLoader = EmergencyModelLoader
