"""Writing on a thread of its own, while the next thing to write is being computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class OneBehind:
    """Runs tasks one at a time on a thread. A context manager: when the block ends well, the last task has
    ended; an error of a task is raised by the next `submit`, or by `finish`."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: Future[Any] | None = None

    def __enter__(self) -> "OneBehind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Begin a task once the one before has ended: what tasks hold in memory is at most that of two."""
        self.finish()
        self._running = self._thread.submit(task, *arguments)

    def finish(self) -> None:
        """Wait for the task that is running."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
