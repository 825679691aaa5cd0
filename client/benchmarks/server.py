"""A server with a fixed latency and a number of slots, which costs next to nothing itself: the ideal to compare with.

python -m benchmarks.server SLOTS SECONDS [ADDRESS]

Prints its port; listens on the loopback unless told otherwise. A request waits for a slot, holds it for SECONDS, and is
answered with the layout of a full page; one for the model olmocr as that model answers. GET /times tells when the first
one came and the last was answered, in seconds of the wall clock.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

CELLS = [
    {"bbox": [100, 60 * row, 1500, 60 * row + 50], "category": "Text", "text": f"Paragraph {row} of the page. " * 4}
    for row in range(1, 31)
]

OLMOCR = """---
primary_language: en
is_rotation_valid: True
rotation_correction: 0
is_table: False
is_diagram: False
---
"""


class Server:
    """Answers what the client asks a vLLM server."""

    def __init__(self, slots: int, seconds: float) -> None:
        """Take the number of slots, and how long a request holds one."""
        self._slots = asyncio.Semaphore(slots)
        self._seconds = seconds
        self._times: list[float] = []
        self._page = _page("dots.ocr", json.dumps(CELLS))
        self._page_of_olmocr = _page("olmocr", OLMOCR + "".join(str(cell["text"]) for cell in CELLS))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until the other side closes it."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                request, *headers = head.decode().split("\r\n")
                lengths = [line.split(":")[1] for line in headers if line.lower().startswith("content-length:")]
                asked = await reader.readexactly(int(lengths[0]) if lengths else 0)
                answer = await self._answer(request.split()[1], asked)
                kind, body = "application/json", json.dumps(answer).encode()
                if b'"stream":true' in asked.replace(b" ", b""):
                    kind, body = "text/event-stream", _stream(answer)
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n".encode())
                writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes) -> Any:
        match path:
            case "/health":
                return {}
            case "/version":
                return {"version": "0.32.0"}
            case "/v1/models":
                return {"object": "list", "data": [{"id": "dots.ocr", "object": "model", "max_model_len": 32768}]}
            case "/times":
                return self._times
        if not self._times:
            self._times = [time.time()] * 2
        async with self._slots:
            await asyncio.sleep(self._seconds)
        self._times[1] = time.time()
        return self._page_of_olmocr if b'"olmocr"' in body else self._page


def _page(model: str, text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 6000, "completion_tokens": 1500, "total_tokens": 7500}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}


def _stream(answer: dict[str, Any]) -> bytes:
    """Return an answer in one piece as `vllm bench serve` wants it."""
    [choice] = answer["choices"]
    piece = answer | {"object": "chat.completion.chunk", "choices": [choice | {"delta": choice["message"]}]}
    return f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n".encode()


async def main(slots: int, seconds: float, address: str = "127.0.0.1") -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(Server(slots, seconds).serve, address, 0, limit=2**20, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
