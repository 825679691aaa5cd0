"""The client's examples for LangChain and docling, with the real libraries, run as the user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from docling_core.types.doc.document import DoclingDocument
from support import FakeServer, pdf_of

EXAMPLES = Path(__file__).parents[2] / "examples"
CELLS = [
    {"bbox": [28, 28, 280, 56], "category": "Title", "text": "# Report"},
    {"bbox": [28, 84, 280, 112], "category": "Text", "text": "All is well."},
    {
        "bbox": [28, 140, 280, 224],
        "category": "Table",
        "text": "<table><tr><td>a</td><td>1</td></tr><tr><td>b</td><td>2</td></tr></table>",
    },
    {"bbox": [28, 280, 280, 364], "category": "Picture"},
    {"bbox": [28, 700, 280, 728], "category": "Page-footer", "text": "page 1"},
]


@pytest.fixture
def file(server: FakeServer, tmp_path: Path) -> Path:
    server.script = [(json.dumps(CELLS), "stop")]
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf_of((288, 288)))
    return path


def run(example: str, file: Path, server: FakeServer) -> str:
    environment = {**os.environ, "DOTS_OCR_BASE_URL": server.base_url}
    command = [sys.executable, str(EXAMPLES / example), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_langchain_gets_a_document_for_each_page(server: FakeServer, file: Path) -> None:
    said = run("langchain_loader.py", file, server)
    assert f"'source': '{file}', 'page': 1, 'engine': 'vllm', 'model': 'dots.ocr'" in said
    assert "# Report\n\nAll is well." in said
    assert "page 1\n" not in said


def test_docling_gets_text_tables_and_places(server: FakeServer, file: Path) -> None:
    run("docling_document.py", file, server)
    document = DoclingDocument.model_validate_json(Path(f"{file}.docling.json").read_text())
    assert [(item.label.value, item.text) for item in document.texts] == [
        ("title", "Report"),
        ("text", "All is well."),
        ("page_footer", "page 1"),
    ]
    (table,) = document.tables
    assert [[cell.text for cell in row] for row in table.data.grid] == [["a", "1"], ["b", "2"]]
    (picture,) = document.pictures
    place = picture.prov[0]
    size = document.pages[1].size
    assert (place.page_no, round(size.width), round(size.height)) == (1, 800, 800)
    assert 0 < place.bbox.l < place.bbox.r < size.width
    assert 0 < place.bbox.t < place.bbox.b < size.height
