"""Documents for LangChain, one for each page: `python langchain_loader.py FILE...` prints them.

Needs langchain-core beside the client, in its environment (client/README.md): pip install ./client langchain-core
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from dots_ocr_client import AllEnginesFailed, DotsOCR, FailedPage
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document


class DotsOCRLoader(BaseLoader):  # type: ignore[misc]  # not installed where the types are checked
    """Loads the pages of documents as Markdown, in the order in which they finish."""

    def __init__(self, *files: str | Path, base_url: str | None = None) -> None:
        """Name the files; the server is that of DOTS_OCR_BASE_URL unless another is named."""
        self.files = files
        self.base_url = base_url

    def lazy_load(self) -> Iterator[Document]:
        """Yield each page with its source, number, engine and warnings.

        Raises:
            DotsOCRError: A file cannot be opened, or one of its pages cannot be read.
        """
        with DotsOCR(self.base_url) as ocr:
            for file in self.files:
                for page in ocr.stream(file):
                    if isinstance(page, FailedPage):
                        raise AllEnginesFailed(page.number, page.attempts)
                    about = {"source": str(file), "page": page.number, "engine": page.engine, "model": page.model}
                    yield Document(page.markdown(headers=False), metadata=about | {"warnings": list(page.warnings)})


if __name__ == "__main__":
    for document in DotsOCRLoader(*sys.argv[1:]).lazy_load():
        print(document.metadata, document.page_content, sep="\n", end="\n\n")
