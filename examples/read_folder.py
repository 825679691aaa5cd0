"""Read every PDF of a folder and write Markdown beside it: `python read_folder.py FOLDER`.

Needs only the client, in its environment (client/README.md). The server is that of DOTS_OCR_BASE_URL and
DOTS_OCR_API_KEY.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dots_ocr_client import DotsOCR, DotsOCRError


def main(folder: Path) -> int:
    """Return how many documents were not read completely."""
    incomplete = 0
    with DotsOCR(timeout=120) as ocr:
        for file in sorted(folder.glob("*.pdf")):
            try:
                document = ocr.read(file)
            except DotsOCRError as error:
                print(f"{file.name}: {error}", file=sys.stderr)  # what is wrong, and what to do
                incomplete += 1
                continue
            file.with_suffix(".md").write_text(document.markdown())
            for page in document.failures:
                print(f"{file.name}, page {page.number}: {page.reason}", file=sys.stderr)
            incomplete += bool(document.failures)
    return incomplete


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
