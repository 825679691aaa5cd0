"""A healthy server with another model, run on a host: `python3 wrong_model.py PORT LOG`."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOG = Path(sys.argv[2])


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does that was started without its arguments."""

    def answer(self, status: int, content: object) -> None:
        """Send JSON, and note the request."""
        with LOG.open("a") as log:
            log.write(f"{self.requestline}\n")
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Be healthy, and name the model."""
        models = {"object": "list", "data": [{"id": "another/model", "object": "model"}]}
        self.answer(200, models if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        """Refuse a page for a model that is not here."""
        self.answer(404, {"error": {"message": "The model `dots.ocr` does not exist.", "code": 404}})


LOG.touch()
ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
