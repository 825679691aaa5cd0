"""An event loop in a thread of its own, behind the synchronous client.

The client is asynchronous inside, because only cancellation ends a request or a program at a deadline for certain. A
loop of its own lets the synchronous face keep its connections, and work where another loop is running.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads; the loop starts when it is first needed."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Our own, because shutting down asyncio's takes a new thread, which the end of the interpreter does not allow.
        self._executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="dots-ocr")
        self.closed = False  # whether `close` was called

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return what it returns.

        Raises:
            RuntimeError: The loop is closed, or was closed in the meantime.
        """
        with self._lock:
            if self.closed:
                work.close()
                raise RuntimeError("this client is closed: make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(self._executor)
                self._thread = threading.Thread(target=self._loop.run_forever, name="dots-ocr", daemon=True)
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("this client was closed while it was reading") from None
        except BaseException:
            future.cancel()  # for Ctrl-C: do not leave the server at work
            raise

    def close(self, last_work: Coroutine[Any, Any, None]) -> None:
        """Cancel what is running, run the last work if anything ran at all, and end the thread."""
        with self._lock:
            self.closed = True
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            last_work.close()
            return
        asyncio.run_coroutine_threadsafe(_end(last_work), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        self._executor.shutdown()
        loop.close()


async def _end(last_work: Coroutine[Any, Any, None]) -> None:
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await last_work
    await asyncio.get_running_loop().shutdown_asyncgens()
