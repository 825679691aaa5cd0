"""A small Hub: serves the folders of a directory as repositories by the parts of the Hugging Face protocol that matter.

    python3 hub.py FOLDER PORT [CONTENT_PORT [CONTENT_FOLDER]]

FOLDER/ORGANISATION/NAME/* are the files of one repository. It has one revision, reachable as `main` or by its hash,
which is made from the contents, so that changed files make a new revision. Files that end in .safetensors carry a
SHA-256 as large files on the Hub do, and come from a content network: a second server at CONTENT_PORT (PORT + 10),
to which the first one redirects. It has its files from CONTENT_FOLDER (FOLDER); another folder makes a bad copy.

With HUB_TOKEN in the environment the Hub answers nobody without that token, and a content network, whose addresses are
signed, refuses whoever sends it. With HUB_DELAY it takes so many seconds to begin with a large file.

Both log every request on standard error: address, status, and the Range that was asked for.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER, PORT = Path(sys.argv[1]), int(sys.argv[2])
CONTENT_PORT = int(sys.argv[3]) if len(sys.argv) > 3 else PORT + 10
TOKEN = os.environ.get("HUB_TOKEN")
CONTENT_FOLDER = Path(sys.argv[4]) if len(sys.argv) > 4 else FOLDER

API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)$")
FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
RANGE = re.compile(r"bytes=(\d+)-$")


def is_large(path: str) -> bool:
    """Tell whether a file comes from the content network."""
    return path.endswith(".safetensors")


def describe(file: Path, folder: Path) -> dict:
    """Return the Hub's description of one file: path, size in bytes, git object id, SHA-256 of a large file."""
    content = file.read_bytes()
    git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": str(file.relative_to(folder)), "size": len(content), "oid": git_id}
    if is_large(file.name):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def snapshot(name: str) -> tuple[str, list]:
    """Return the revision's hash and the descriptions of its files; an unknown name gives no files."""
    folder = FOLDER / name
    files = [describe(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return hashlib.sha1(json.dumps(files).encode()).hexdigest(), files


class Server(BaseHTTPRequestHandler):
    """What both servers can do."""

    def place(self) -> str:
        """Return the path that is asked for, without its query and its escapes."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)

    def send_json(self, value: object) -> None:
        """Send a value as a JSON document."""
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, file: Path) -> None:
        """Send a file, from the byte on that the request's Range names."""
        if ".." in file.parts or not file.is_file():
            self.send_error(404, "no such file")
            return
        size = file.stat().st_size
        match = RANGE.match(self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if match and start >= size:
            self.send_error(416, "the file is shorter")
            return
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(size - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        with file.open("rb") as content:
            content.seek(start)
            shutil.copyfileobj(content, self.wfile)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a request with the Range that it asked for."""
        self.log_message('"%s" %s %s', self.requestline, str(int(code)), self.headers.get("Range", "-"))


class Hub(Server):
    """Answers the API, hands out small files, redirects to large ones."""

    def do_GET(self) -> None:
        """Answer /api/models/NAME/{revision,tree}/REVISION and /NAME/resolve/REVISION/FILE."""
        if TOKEN and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send_error(401, "no token")
            return
        match = API.match(self.place()) or FILE.match(self.place())
        sha, files = snapshot(match["name"]) if match else ("", [])
        if not files or match["revision"] not in ("main", sha):
            self.send_error(404, "no such repository or revision")
        elif "file" in match.groupdict():
            self.send_content(match["name"], match["file"])
        elif match["what"] == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in files]
            self.send_json({"id": match["name"], "sha": sha, "siblings": siblings})
        else:
            self.send_json(files)

    def send_content(self, name: str, path: str) -> None:
        """Send a small file, or redirect to where a large one is."""
        if not is_large(path):
            self.send_file(FOLDER / name / path)
            return
        host = self.headers["Host"].partition(":")[0]
        self.send_response(302)
        self.send_header("Location", f"http://{host}:{CONTENT_PORT}/{name}/{urllib.parse.quote(path)}")
        self.send_header("Content-Length", "0")
        self.end_headers()


class ContentNetwork(Server):
    """Hands out large files."""

    def do_GET(self) -> None:
        """Send /NAME/FILE."""
        if self.headers["Authorization"]:
            self.send_error(400, "only one way to be authorised is allowed")
            return
        time.sleep(float(os.environ.get("HUB_DELAY", "0")))
        self.send_file(CONTENT_FOLDER / self.place().lstrip("/"))


if __name__ == "__main__":
    content_network = ThreadingHTTPServer(("", CONTENT_PORT), ContentNetwork)
    threading.Thread(target=content_network.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("", PORT), Hub).serve_forever()
