"""A small Hub: serves the folders of a directory as repositories by the parts of the Hugging Face protocol that matter.

    python3 hub.py FOLDER PORT

FOLDER/ORGANISATION/NAME/* are the files of one repository. It has one revision, reachable as `main` or by its hash,
which is made from the contents. Files that end in .safetensors carry a SHA-256 as large files on the Hub do.
"""

import hashlib
import json
import re
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])
API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/?]+)(\?.*)?$")
FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?$")


def describe(file: Path, folder: Path) -> dict:
    """Return the Hub's description of one file: path, size in bytes, git object id, SHA-256 of a large file."""
    content = file.read_bytes()
    git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": str(file.relative_to(folder)), "size": len(content), "oid": git_id}
    if file.suffix == ".safetensors":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def snapshot(name: str) -> tuple[str, list]:
    """Return the revision's hash and the descriptions of its files; an unknown name gives no files."""
    folder = FOLDER / name
    files = [describe(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return hashlib.sha1(json.dumps(files).encode()).hexdigest(), files


class Hub(SimpleHTTPRequestHandler):
    """Answers the API and hands out files."""

    def do_GET(self) -> None:
        """Answer /api/models/NAME/{revision,tree}/REVISION and /NAME/resolve/REVISION/FILE."""
        match = API.match(self.path) or FILE.match(self.path)
        sha, files = snapshot(match["name"]) if match else ("", [])
        if not files or match["revision"] not in ("main", sha):
            self.send_error(404, "no such repository or revision")
        elif "file" in match.groupdict():
            self.path = f"/{match['name']}/{match['file']}"
            super().do_GET()
        elif match["what"] == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in files]
            self.send_json({"id": match["name"], "sha": sha, "siblings": siblings})
        else:
            self.send_json(files)

    def send_json(self, value: object) -> None:
        """Send a value as a JSON document."""
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    handler = lambda *arguments: Hub(*arguments, directory=str(FOLDER))  # noqa: E731
    ThreadingHTTPServer(("", int(sys.argv[2])), handler).serve_forever()
