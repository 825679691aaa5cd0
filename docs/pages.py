"""The documentation as a site: a hook of MkDocs (mkdocs.yml), and what its tests know of pages and links.

The pages outside of docs/ belong to the site too. Links are written as they work in the repository; here they become
those of the site, and those to other files of the repository lead to where it is kept.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contribute/contributing.md",
    "SECURITY.md": "operate/security.md",
    "CHANGELOG.md": "changelog.md",
    "client/README.md": "use/client.md",
    "examples/README.md": "use/examples.md",
    "rehearsal/README.md": "contribute/rehearsal.md",
    **{f"roles/{path.name}/README.md": f"roles/{path.name}.md" for path in sorted((ROOT / "roles").iterdir())},
}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:)([^)\s#]*)(#[^)\s]*)?(?=\))")


def slug(heading: str, separator: str = "-") -> str:
    """Return a heading's anchor, as code hosts make it."""
    text = unicodedata.normalize("NFC", re.sub(r"\[([^]]*)\]\([^)]*\)|<[^>]*>|`", r"\1", heading)).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", separator)


def outside_of_code(markdown: str) -> Iterator[tuple[bool, str]]:
    """Yield the pieces of a page in order, and of each whether it is text, not a block of code."""
    end = 0
    for block in FENCE.finditer(markdown):
        yield True, markdown[end : block.start()]
        yield False, block[0]
        end = block.end()
    yield True, markdown[end:]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    text = "".join(piece for is_text, piece in outside_of_code(page.read_text()) if is_text)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def source(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    return next((path for path, uri in OUTSIDE.items() if uri == page), f"docs/{page}")


def target(page: str, link: str) -> str:
    """Return the path in the repository that a link of a page leads to; both are relative to the root."""
    return os.path.normpath(PurePosixPath(page).parent / link) if link else page


def on_config(config: Any) -> Any:
    """Make anchors as code hosts do, which keep letters that are not Latin."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for path, uri in OUTSIDE.items():
        if (ROOT / path).is_file():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site."""
    here = source(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        path, anchor = target(here, found[1]), found[2] or ""
        uri = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        if uri and files.get_file_from_path(uri):
            return os.path.relpath(uri, PurePosixPath(page.file.src_uri).parent) + anchor
        return f"{config['repo_url']}/src/branch/main/{path}{anchor}" if (ROOT / path).exists() else found[0]

    return "".join(LINK.sub(turned, piece) if is_text else piece for is_text, piece in outside_of_code(markdown))
