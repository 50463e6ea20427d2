"""Writing on threads of its own, while the next thing to write is being computed."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Behind:
    """Runs tasks on threads, a few at a time. A context manager: when the block ends well, all tasks have
    ended; an error of a task is raised by a later `submit`, or by `finish`.

    Args:
        most: how many tasks run at once, and with the one that waits for them are in memory.
    """

    def __init__(self, most: int):
        self._threads = ThreadPoolExecutor(max_workers=most)
        self._most = most
        self._running: deque[Future[Any]] = deque()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._threads.shutdown()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Begin a task; where as many run as may, once the first of them has ended."""
        if len(self._running) == self._most:
            self._running.popleft().result()
        self._running.append(self._threads.submit(task, *arguments))

    def finish(self) -> None:
        """Wait for the tasks that are running."""
        while self._running:
            self._running.popleft().result()
