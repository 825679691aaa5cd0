"""A document for docling's chunkers and exporters: `python docling_document.py FILE` writes FILE.docling.json.

Needs docling-core beside the client, in its environment (client/README.md): pip install ./client docling-core
"""

from __future__ import annotations

import sys
from pathlib import Path

from docling_core.types.doc.base import BoundingBox, CoordOrigin, Size
from docling_core.types.doc.document import DoclingDocument, ProvenanceItem, TableCell, TableData
from docling_core.types.doc.labels import DocItemLabel
from dots_ocr_client import Cell, Document, DotsOCR, Page
from dots_ocr_client.layout import table_rows

LABELS = {
    "Caption": DocItemLabel.CAPTION,
    "Footnote": DocItemLabel.FOOTNOTE,
    "Formula": DocItemLabel.FORMULA,
    "Page-footer": DocItemLabel.PAGE_FOOTER,
    "Page-header": DocItemLabel.PAGE_HEADER,
}


def convert(read: Document) -> DoclingDocument:
    """Return what was read, with the place of every element; a page that failed has none."""
    document = DoclingDocument(name=Path(read.source).stem)
    for page in read.pages:
        if isinstance(page, Page):
            document.add_page(page_no=page.number, size=Size(width=page.width, height=page.height))
            for cell in page.cells or (Cell("Text", None, page.text),):
                add(document, page, cell)
    return document


def add(document: DoclingDocument, page: Page, cell: Cell) -> None:
    """Add a cell at the end of a document."""
    left, top, right, bottom = cell.box or (0, 0, page.width, page.height)
    box = BoundingBox(l=left, t=top, r=right, b=bottom, coord_origin=CoordOrigin.TOPLEFT)
    place = ProvenanceItem(page_no=page.number, bbox=box, charspan=(0, len(cell.text)))
    text = cell.text.strip()
    match cell.category:
        case "Picture":
            document.add_picture(prov=place)
        case "Table":
            document.add_table(data=table(cell), prov=place)
        case "Title":
            document.add_title(text=text.lstrip("# "), prov=place)
        case "Section-header":
            document.add_heading(text=text.lstrip("# "), prov=place)
        case "List-item":
            document.add_list_item(text=text.lstrip("-* "), prov=place)
        case category:
            document.add_text(label=LABELS.get(category, DocItemLabel.TEXT), text=text, prov=place)


def table(cell: Cell) -> TableData:
    """Return a table's rows; a cell over several rows or columns stands in its first."""
    rows = table_rows(cell.text)
    cells = [
        TableCell(
            text=text,
            start_row_offset_idx=row,
            end_row_offset_idx=row + 1,
            start_col_offset_idx=column,
            end_col_offset_idx=column + 1,
        )
        for row, texts in enumerate(rows)
        for column, text in enumerate(texts)
    ]
    return TableData(num_rows=len(rows), num_cols=max(map(len, rows), default=0), table_cells=cells)


if __name__ == "__main__":
    with DotsOCR() as ocr:
        convert(ocr.read(sys.argv[1])).save_as_json(Path(f"{sys.argv[1]}.docling.json"))
