"""A proxy that is the only way out: NAME.invalid, which no resolver knows, is NAME behind it.

Usage: proxy.py PORT
"""

from __future__ import annotations

import http.client
import sys
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ONWARD_ONLY = ("connection", "proxy-connection", "proxy-authorization", "keep-alive", "transfer-encoding")


class Proxy(BaseHTTPRequestHandler):
    """Passes requests with a full address on; the answer comes whole."""

    def pass_on(self) -> None:
        """Ask the server that is meant."""
        address = urllib.parse.urlsplit(self.path)
        host = (address.hostname or "").removesuffix(".invalid")
        connection = http.client.HTTPConnection(host, address.port or 80, timeout=30)
        path = address._replace(scheme="", netloc="").geturl()
        connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # one by one: Docker sends several of one name
            if name.lower() not in ONWARD_ONLY:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in (*ONWARD_ONLY, "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)
        self.log_request(answer.status)

    do_GET = do_HEAD = pass_on


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Proxy).serve_forever()
