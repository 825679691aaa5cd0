from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support import FakeServer, pdf_of

CLIENT = Path(__file__).parents[1]
TEXT = "".join(page.read_text() for page in (CLIENT / "README.md", CLIENT.parent / "docs/use/python.md"))
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_every_example_of_the_documentation_runs(
    example: int, server: FakeServer, sheet: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet.save(tmp_path / "document.png")
    server.http.expect_request("/metrics").respond_with_data()
    for name in ("invoice.pdf", "book.pdf"):
        (tmp_path / name).write_bytes(pdf_of(*[(200.0, 100.0)] * 7))
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url)
    command = [sys.executable, "-W", "error", "-c", EXAMPLES[example]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "read by the server" in done.stdout
