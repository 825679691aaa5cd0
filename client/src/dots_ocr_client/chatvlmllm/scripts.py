"""What stands in for the application's scripts that start containers: programs over ``dots-ocr``.

Each returns the exit status of ``dots-ocr``: 0 if all went well, 1 if something does not work.
"""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

from ..cli import main
from . import settings

LANGUAGES = ("--languages", "rus+eng")


def quick_vllm_test() -> int:
    """Check the server and the installation, and read a page."""
    settings.export()
    return main(["doctor", "--ocr", *LANGUAGES])


def setup_vllm_dots_ocr() -> int:
    """Say how the server is set up, and check it; nothing is started or written."""
    print(
        "Этот скрипт больше не запускает контейнер: сервер работает как служба dots-ocr.service.\n"
        "Развернуть или обновить его: make deploy в папке dots-ocr-deploy. Проверка:\n"
    )
    return quick_vllm_test()


def measure_vllm() -> int:
    """Measure the server."""
    settings.export()
    return main(["bench", "--engine", "vllm", "--pages", "4", "--concurrency", "1,2", *LANGUAGES])
