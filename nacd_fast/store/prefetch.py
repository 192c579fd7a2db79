"""Reading ahead in a thread: what the next iterations need is there when they come to it."""

import atexit
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Item = TypeVar("Item")
Read = TypeVar("Read")


class Prefetch(Generic[Item, Read]):
    """Iterates over read(item) for each item, in order, read by one thread that is at most `depth` items ahead.

    `items` may be endless; they are drawn in that thread. An exception in it reaches the caller in the place of its
    item and ends the iteration. `close`, the end of a `with` block, of the object's life or of the process stop the
    thread.
    """

    def __init__(self, read: Callable[[Item], Read], items: Iterable[Item], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth={depth}, must be at least 1")
        self._over = False
        self._thread = Worker(read, iter(items), depth)  # does not hold this object, which may be forgotten
        self._thread.start()

    def __iter__(self) -> Iterator[Read]:
        return self

    def __next__(self) -> Read:
        if self._over:
            raise StopIteration
        value, error = self._thread.made.get()
        self._thread.room.release()
        if error is None:
            return value  # type: ignore[return-value]  # None only with an error
        self.close()
        raise error

    def close(self) -> None:
        """Stop reading; what was read ahead is let go. Waits for the read that is under way."""
        self._over = True
        self._thread.stop()
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
            self._thread.stop()  # without waiting: whoever lets go of the object may hold what a read waits for


class Worker(threading.Thread, Generic[Item, Read]):
    def __init__(self, read: Callable[[Item], Read], items: Iterator[Item], depth: int):
        super().__init__(daemon=True)
        self.read, self.items = read, items
        self.made: SimpleQueue[tuple[Read | None, BaseException | None]] = SimpleQueue()
        self.room, self.stopped = threading.Semaphore(depth), threading.Event()
        workers.add(self)

    def stop(self) -> None:
        self.stopped.set()
        self.room.release()

    def run(self) -> None:
        while True:
            self.room.acquire()  # before the reading: at most `depth` items are in memory
            if self.stopped.is_set():
                return
            try:
                self.made.put((self.read(next(self.items)), None))
            except BaseException as error:  # StopIteration too: it is the caller's
                self.made.put((None, error))
                return


workers: "WeakSet[Worker[Any, Any]]" = WeakSet()


@atexit.register
def stop_all() -> None:
    """A thread that comes back from native code when the interpreter is gone would abort the process."""
    running = [worker for worker in list(workers) if worker.is_alive()]
    for worker in running:
        worker.stop()
    for worker in running:
        worker.join()
