"""The package as the application's: its models are imported with it."""

from models.qwen_vl import QwenVLModel

__all__ = ["QwenVLModel"]
