"""Fetch the files of one commit, with the Hub's own client, in an image that has it (tasks/hub.yml).

    python3 -c PROGRAM REPOSITORY COMMIT ROOT LISTING

LISTING is the tree of the commit as the Hub's API lists it, in JSON; ROOT is the folder's name for messages. The files
come to /weights, in the end with the manifest SHA256SUMS; NAME.part is one that grows, and that a later run continues
with. Ends with a message that names the fix where it cannot.

`snapshot_download` does not do: in huggingface_hub 2 it starts each file again in a new process, it takes a folder that
is not whole for the model where the Hub does not answer, and it compares no checksums.
"""

import errno
import hashlib
import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path("/weights")
TOKEN = Path("/run/token")
CERTIFICATES = Path("/run/certificates/ca-certificates.crt")  # the host's, which know a company's own authority too
if CERTIFICATES.exists():
    os.environ.update(SSL_CERT_FILE=str(CERTIFICATES), REQUESTS_CA_BUNDLE=str(CERTIFICATES))

from huggingface_hub import constants, hf_hub_url  # noqa: E402  # read the environment
from huggingface_hub.file_download import http_get  # noqa: E402
from huggingface_hub.utils import build_hf_headers  # noqa: E402

TRIES = 5
FIRST_DELAY_SECONDS = 1.0
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_final(error):
    """Tell whether another try is in vain."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return getattr(error, "errno", None) in FULL or (status < 500 and status not in (408, 416, 429))


def fetch(url, file, size, headers):
    """Complete a file of some bytes, from where a run before came to; raises the client's error once it has lasted."""
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    furthest, in_vain = part.stat().st_size, 0
    while (there := part.stat().st_size) != size:
        if there > size:
            os.truncate(part, there := 0)
        try:
            with part.open("ab") as content:
                http_get(url, content, resume_size=there, headers=headers, expected_size=size)
        except Exception as error:
            there = part.stat().st_size
            furthest, in_vain = max(furthest, there), 0 if furthest < there else in_vain + 1
            if is_final(error) or in_vain == TRIES:
                raise
            time.sleep(FIRST_DELAY_SECONDS * 2**in_vain)
    part.rename(file)


def digest(file, algorithm):
    """Return the digest of a file by an algorithm that may have begun."""
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            algorithm.update(chunk)
    return algorithm.hexdigest()


def check(entry, file):
    """Return the SHA-256 of a file; empty if it is not the listed one, of which a small one has but git's name."""
    sha256 = digest(file, hashlib.sha256())
    if "lfs" in entry:
        return sha256 if sha256 == entry["lfs"]["oid"] else ""
    return sha256 if digest(file, hashlib.sha1(b"blob %d\0" % entry["size"])) == entry["oid"] else ""


def main(repository, commit, root, listing):
    """Bring all files, and check them."""
    os.umask(0o022)
    headers = build_hf_headers(token=TOKEN.read_text().strip() or False)
    sums = {}
    for entry in json.loads(listing):
        path, file = entry["path"], FOLDER / entry["path"]
        try:
            if not file.exists():
                fetch(hf_hub_url(repository, path, revision=commit), file, entry["size"], headers)
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            problem = f"{constants.ENDPOINT} does not give {path} of {repository} at commit {commit}: {why}"
            fix = "check that the host reaches the Hub, dots_ocr_model_hub, dots_ocr_model_token, and the proxy if any"
            if getattr(error, "errno", None) in FULL:
                problem, fix = f"{root} ran full", "free some space or choose another dots_ocr_model_root"
            sys.exit(f"{problem}. Fix: {fix}, then run again: what has arrived is kept.")
        sums[path] = check(entry, file)
    if bad := [path for path, sha256 in sums.items() if not sha256]:
        for path in bad:
            (FOLDER / path).unlink()
        fix = "run again, which fetches again what was removed; if that does not help, the source is damaged"
        sys.exit(f"The checksum is wrong of {', '.join(bad)} from {constants.ENDPOINT}; removed. Fix: {fix}.")
    (FOLDER / "SHA256SUMS").write_text("".join(f"{sums[path]}  {path}\n" for path in sorted(sums)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
