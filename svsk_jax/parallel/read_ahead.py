"""Reading on threads of its own what comes next, while what came before is being worked on."""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
T = TypeVar("T")


class ReadAhead(Generic[Item, T]):
    """`take(item)` gives `read(item)`; the items behind it are read meanwhile. A context manager: at its end
    nothing is read any more. Items may be taken from several threads, each item once; one that is taken more
    than `depth` items behind the last is read anew.

    Args:
        read: called on the threads, with one item at a time on each; an error is raised by the `take` of its
            item.
        items: in the order in which they will be taken; some may be left out.
        depth: how many items are read ahead at most, whoever takes them, which is how many more than those
            taken are in memory.
        threads: how many items are read at once.
    """

    def __init__(self, read: Callable[[Item], T], items: Sequence[Item], depth: int = 1, threads: int = 1):
        self._read, self._items, self._depth = read, items, depth
        self._places = {item: place for place, item in enumerate(items)}
        self._reading: dict[Item, Future[T]] = {}
        self._taken: set[Item] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=threads)

    def __enter__(self) -> "ReadAhead[Item, T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def take(self, item: Item) -> T:
        """The item, which is not kept."""
        place = self._places[item]
        with self._lock:
            # Left out: whatever lies further back than items may be taken out of order.
            for other in [each for each in self._reading if self._places[each] < place - self._depth]:
                self._reading.pop(other).cancel()
            self._taken.add(item)
            found = self._reading.pop(item, None) or self._threads.submit(self._read, item)
            for coming in self._items[place + 1 : place + 1 + self._depth]:
                if len(self._reading) == self._depth:
                    break
                if coming not in self._taken and coming not in self._reading:
                    self._reading[coming] = self._threads.submit(self._read, coming)
        return found.result()
