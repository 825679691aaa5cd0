"""The role dots_ocr_gateway: what it writes, and how a real HAProxy behaves with it."""
