"""Work in background threads, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")
_THREADS = 8
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


def mapped(function: Callable[[S], T], items: Iterable[S], ahead: int = 2 * _THREADS) -> Iterator[T]:
    """Yield the function of each item in order, computed in threads: for reading and decoding.

    Args:
        function: may be called for several items at a time; its exceptions arrive where they belong.
        items: as many as they like; they are taken as they are needed.
        ahead: results that wait, at most.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
