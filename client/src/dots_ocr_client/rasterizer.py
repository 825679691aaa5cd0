"""The path under which programs know `open_document` and `draw`; see `dots_ocr_client.pages.rasterizer`."""

from .pages.rasterizer import draw, open_document

__all__ = ["draw", "open_document"]
