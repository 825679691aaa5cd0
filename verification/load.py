"""A steady load, run on the host under test: clients that have the golden page's first line read again and again,
and note how each request ends.

    python3 load.py SETTINGS RESULTS CLIENTS

Ends when the file RESULTS is removed, and then rewrites it: a list of {start, end, outcome}, times in seconds of
CLOCK_BOOTTIME. Outcomes: read, misread with the text, refused (nobody took the request), failed (an error after it was
taken, or an answer that says that it is not whole), silent (no answer within SILENCE). Needs nothing but Python's
standard library.
"""

import base64
import json
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SILENCE = 120.0  # seconds
PAUSE = 0.5  # seconds after each answer
PROMPT = "<|img|><|imgpad|><|endofimg|>Extract the text content from this image."
GOLDEN = Path("/usr/local/lib/dots-ocr/golden")


def request(settings: dict[str, Any]) -> urllib.request.Request:
    """Return the request for the golden page."""
    image = base64.b64encode((GOLDEN / "page.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": PROMPT},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"model": settings["model"], "messages": messages, "temperature": 0.0, "max_completion_tokens": 1024}
    body["stop"] = ["\n"]  # after the first line: a small host has more to do than to read
    headers = {"Content-Type": "application/json"}
    if settings["api_key_file"]:
        headers["Authorization"] = f"Bearer {Path(settings['api_key_file']).read_text().strip()}"
    return urllib.request.Request(f"{settings['url']}/v1/chat/completions", json.dumps(body).encode(), headers)


def read(page: urllib.request.Request, expected: str) -> str:
    """Send one request and return its outcome."""
    try:
        with urllib.request.urlopen(page, timeout=SILENCE, context=ssl._create_unverified_context()) as answer:
            choice = json.loads(answer.read())["choices"][0]
            text = choice["message"]["content"]
    except urllib.error.HTTPError:
        return "failed"
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return "refused"
        return "silent" if isinstance(error.reason, TimeoutError) else "failed"
    except TimeoutError:
        return "silent"
    except OSError:
        return "failed"
    if choice["finish_reason"] != "stop":
        return "failed"
    return "read" if text.split() == expected.split() else f"misread {text!r}"


def main() -> None:
    """Keep the clients busy until the results are wanted."""
    settings, results, clients = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    expected = (GOLDEN / "page.txt").read_text().splitlines()[0]
    outcomes: list[dict[str, Any]] = []
    results.write_text("[]")

    def client() -> None:
        while results.exists():
            start = time.clock_gettime(time.CLOCK_BOOTTIME)
            outcome = read(request(settings), expected)
            outcomes.append({"start": start, "end": time.clock_gettime(time.CLOCK_BOOTTIME), "outcome": outcome})
            time.sleep(PAUSE)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.with_suffix(".part").write_text(json.dumps(outcomes))
    results.with_suffix(".part").rename(results)


if __name__ == "__main__":
    main()
