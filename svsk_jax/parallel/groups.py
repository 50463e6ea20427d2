"""Decoder layers over groups of devices: layers are quantized independently of one another."""

import contextlib
import dataclasses
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from svsk_jax.parallel.mesh import make_mesh

T = TypeVar("T")
Group = tuple[Any, ...]
"""Devices of one process that take a layer together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceGroups:
    """Who takes which layer: those of a `model` group of the mesh take one together; where several processes
    hold such a group, each process's part of it is a group of its own."""

    owners: tuple[int, ...]
    """The process of each group. Layer i is of group i modulo their number."""
    local: tuple[Group, ...]
    """This process's groups."""

    @classmethod
    def of(cls, mesh: Mesh | None = None) -> "DeviceGroups":
        """The groups of a mesh. Without one: every device by itself, but of CPU devices, which share their
        cores, one for each process."""
        if mesh is None:
            devices = jax.devices()
            if devices[0].platform == "cpu":
                devices = list({device.process_index: device for device in reversed(devices)}.values())[::-1]
            mesh = make_mesh(devices=devices)
        groups: list[Group] = []
        for row in mesh.devices:
            processes = dict.fromkeys(device.process_index for device in row)
            groups += [tuple(d for d in row if d.process_index == process) for process in processes]
        here = jax.process_index()
        return cls(
            owners=tuple(group[0].process_index for group in groups),
            local=tuple(group for group in groups if group[0].process_index == here),
        )

    def own(self, layers: int) -> list[int]:
        """The layers that are this process's."""
        here = jax.process_index()
        return [index for index in range(layers) if self.owners[index % len(self.owners)] == here]

    @property
    def at_once(self) -> int:
        """How many of this process's groups are at work at once. On CPU one: devices there share their cores,
        and solvers that run on several at once can wait for one another for ever."""
        return 1 if self.local[0][0].platform == "cpu" else len(self.local)

    def each(self, items: Iterable[int], task: Callable[[int, Sequence[Any]], T]) -> Generator[T]:
        """`task(item, devices)` of each item, in order, with `at_once` items at work. The task runs with the
        group's first device as the default one; `devices` is empty when it is the only one."""

        def run(item: int, group: Group) -> T:
            is_default = group[0] == jax.local_devices()[0]
            with contextlib.nullcontext() if is_default else jax.default_device(group[0]):
                return task(item, group if len(group) > 1 else ())

        if self.at_once == 1:
            for turn, item in enumerate(items):
                yield run(item, self.local[turn % len(self.local)])
            return
        yield from in_threads(items, run, self.local)


def in_threads(items: Iterable[int], run: Callable[[int, Group], T], groups: Sequence[Group]) -> Generator[T]:
    """`run(item, group)` of each item, in order, on a thread for each group; whichever group is free takes
    the next item. At most one finished item for each group waits to be taken."""
    free: queue.SimpleQueue[Group] = queue.SimpleQueue()
    for group in groups:
        free.put(group)

    def take(item: int) -> T:
        group = free.get()
        try:
            return run(item, group)
        finally:
            free.put(group)

    threads = ThreadPoolExecutor(max_workers=len(groups))
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(take, item))
            if len(waiting) == 2 * len(groups):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
