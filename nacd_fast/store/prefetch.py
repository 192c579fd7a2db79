"""Reading ahead in a thread: what the next iterations need is there when they come to it."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")


class Prefetch(Generic[Item, Read]):
    """Iterates over read(item) for each item, in order, read by one thread that is at most `depth` items ahead.

    `items` may be endless; they are drawn in that thread. An exception in it reaches the caller in the place of its
    item and ends the iteration. `close`, the end of a `with` block or of the object's life stop the thread.
    """

    def __init__(self, read: Callable[[Item], Read], items: Iterable[Item], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth={depth}, must be at least 1")
        self._made: SimpleQueue[tuple[Read | None, BaseException | None]] = SimpleQueue()
        self._room, self._stop, self._over = threading.Semaphore(depth), threading.Event(), False
        # the thread must not hold the object, which else would live as long as the thread does
        arguments = (read, iter(items), self._made, self._room, self._stop)
        self._thread = threading.Thread(target=_work, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Read]:
        return self

    def __next__(self) -> Read:
        if self._over:
            raise StopIteration
        value, error = self._made.get()
        self._room.release()
        if error is None:
            return value  # type: ignore[return-value]  # None only with an error
        self.close()
        raise error

    def close(self) -> None:
        """Stop reading; what was read ahead is let go. Waits for the read that is under way."""
        self._over = True
        self._stop.set()
        self._room.release()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetch[Item, Read]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._stop.set()
            self._room.release()


def _work(
    read: Callable[[Item], Read],
    items: Iterator[Item],
    made: "SimpleQueue[tuple[Read | None, BaseException | None]]",
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    while True:
        room.acquire()  # before the reading: at most `depth` items are in memory
        if stop.is_set():
            return
        try:
            made.put((read(next(items)), None))
        except BaseException as error:  # StopIteration too: it is the caller's
            made.put((None, error))
            return
