"""Run an iterator in a background thread, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


def prefetched(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield the items in order, produced up to ``depth`` ahead in a thread; exceptions arrive where they belong.

    Closing the iterator (or leaving its loop) stops the thread. With ``depth`` 0 nothing runs in the background.
    """
    if depth <= 0:
        yield from items
        return
    buffer: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            try:
                buffer.put(entry, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            # Whatever went wrong belongs to the consumer: a thread that dies silently would leave it waiting.
            put(("error", error))

    thread = threading.Thread(target=produce, name="diffalign-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            what, value = buffer.get()
            if what == "end":
                return
            if what == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
