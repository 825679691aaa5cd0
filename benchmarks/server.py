"""A server that reads so many pages at once and takes so long for each, but only waits: `python -m benchmarks.server`.

Takes the pages at once and the seconds for each, and prints its port. A process of its own, so that it shares no
interpreter with who measures it. The scripted servers of tests/gateway would not do: their answers leave in two parts,
and the second one waits 40 ms for the first to be acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

LENGTH = re.compile(r"^content-length: *(\d+)", re.MULTILINE)
CHUNK = 1 << 20
MODELS = json.dumps({"object": "list", "data": [{"id": "dots.ocr", "object": "model"}]}).encode()
PAGE = json.dumps({"choices": [{"message": {"role": "assistant", "content": "A line of the page. " * 300}}]}).encode()


class Server:
    """Answers what a gateway and its clients ask a vLLM server."""

    def __init__(self, capacity: int, seconds: float) -> None:
        """Take how many pages are read at the same time, and how long each takes."""
        self._slots = asyncio.Semaphore(capacity)
        self._seconds = seconds

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either side closes it."""
        try:
            closes = False
            while not closes:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                closes = "\r\nconnection: close\r\n" in head
                found = LENGTH.search(head)
                left = int(found[1]) if found else 0
                while left:
                    chunk = await reader.read(min(left, CHUNK))
                    if not chunk:
                        return
                    left -= len(chunk)
                body = await self._read() if head.startswith("post ") else MODELS
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                    + body
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the other side has what it wanted
        finally:
            writer.close()

    async def _read(self) -> bytes:
        async with self._slots:
            await asyncio.sleep(self._seconds)
        return PAGE


async def main(capacity: int, seconds: float) -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(Server(capacity, seconds).serve, "127.0.0.1", 0, limit=CHUNK, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
