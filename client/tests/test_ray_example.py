"""Of the example for Ray Data, what needs no Ray; tests/examples has the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import FakeServer, pdf_of

from dots_ocr_client.pages import documents

EXAMPLE = Path(__file__).parents[2] / "examples/ray_data.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    spec = importlib.util.spec_from_file_location("ray_data", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", ["argument", "environment"])
def test_the_workers_get_the_login_in_the_base_url(
    place: str, example: ModuleType, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.base_url.replace("//", "//user:password@")
    if place == "environment":
        monkeypatch.setenv("DOTS_OCR_BASE_URL", url)
    assert asyncio.run(example.check(url if place == "argument" else None)) == url


def test_documents_are_opened_in_a_process_of_their_own(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(reference: documents.PageReference) -> None:
        raise AssertionError("opened in this process")

    monkeypatch.setattr(documents, "look_into", fail)
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf_of((200.0, 100.0), (200.0, 100.0)))
    row = {"document": str(file), "done": [1]}
    assert list(example.missing_pages(row)) == [{"document": str(file), "page": 2}]
