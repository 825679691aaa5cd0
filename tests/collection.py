"""The collection as an operator gets it: `python -m tests.collection FOLDER` builds it and installs it there.

Beside it come the examples of the documentation: site.yml from docs/operate/collection.md, ROLE.yml from each README.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rehearsal.shell import REPOSITORY, run

EXAMPLE = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of an operator with this collection, and with no other setting of Ansible."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return {
        **others,
        "ANSIBLE_COLLECTIONS_PATH": str(folder / "collections"),
        "ANSIBLE_CONFIG": str(folder / "none.cfg"),
    }


def example(readme: Path) -> str:
    """Return the first example of a README as the text of a playbook; raises LookupError if it has none."""
    found = EXAMPLE.search(readme.read_text())
    if not found:
        raise LookupError(f"{readme} has no example")
    return f"---\n{found[1]}"


def install(folder: Path) -> Path:
    """Build and install the collection, write the examples, and return the tarball.

    Raises:
        RehearsalError: ansible-galaxy failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "none.cfg").touch()
    (folder / "site.yml").write_text(example(REPOSITORY / "docs/operate/collection.md"))
    for readme in REPOSITORY.glob("roles/*/README.md"):
        (folder / f"{readme.parent.name}.yml").write_text(example(readme))
    os.environ |= environment(folder)
    run("ansible-galaxy", "collection", "build", "--force", "--output-path", folder, REPOSITORY)
    tarball = next(folder.glob("dots_ocr-deploy-*.tar.gz"))
    # What it depends on is in the controller's environment.
    run("ansible-galaxy", "collection", "install", "--offline", "--force", "-p", folder / "collections", tarball)
    return tarball


if __name__ == "__main__":
    install(Path(sys.argv[1]))
