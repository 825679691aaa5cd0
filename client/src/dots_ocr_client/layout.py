"""The path under which programs know `table_rows`; see `dots_ocr_client.results.layout`."""

from .results.layout import table_rows

__all__ = ["table_rows"]
