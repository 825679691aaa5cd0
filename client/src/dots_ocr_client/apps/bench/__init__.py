"""The command `dots-ocr bench`: engines side by side on the same pages."""
