"""Several processes, on one host or on many, that work on one mesh and share a file system.

All run the same program. Process 0, the lead, writes what belongs to the run as a whole, and prints; the
others wait for it at barriers. With one process everything here does nothing.
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed as runtime

T = TypeVar("T")
LONGEST_WAIT = 7 * 24 * 3600 * 1000
"""Milliseconds that a process waits for another. One that ended is noticed otherwise."""
HEARTBEAT = 30
"""Seconds after which a process that says nothing is taken for dead."""
COORDINATOR_STAYS = 2.0
"""Seconds that the coordinator's process outlives another one's failure."""
FAREWELL = 10.0
"""Seconds that a process which failed waits for the others to end."""
WATCHES_EVERY = 0.5
"""Seconds between looks whether another process has failed."""
FAILURE, ENDED = "svsk/failure", "svsk/ended"

_steps = itertools.count()
_over = threading.Event()


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes, before any use of a device; what is None is found out from the cluster's own
    scheduler, where there is one.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which of them this one is.

    Raises:
        ValueError: no scheduler is known that could tell, or the processes do not come together.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {str(error).splitlines()[0]}; give --coordinator HOST:PORT, --num-processes and "
            "--process-id, the same coordinator and number to each process"
        ) from error
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    atexit.register(_end_watch, watch)


def is_lead() -> bool:
    """Whether this is the process that writes and prints."""
    return runtime.global_state.process_id == 0


def is_distributed() -> bool:
    """Whether there are other processes."""
    return runtime.global_state.client is not None and runtime.global_state.num_processes > 1


def barrier() -> None:
    """Wait until all processes are here."""
    if is_distributed():
        _client().wait_at_barrier(f"svsk/barrier/{next(_steps)}", LONGEST_WAIT)


def agree(make: Callable[[], T]) -> T:
    """The value that `make` has in the lead, which is JSON data, in every process."""
    if not is_distributed():
        return make()
    key = f"svsk/agreed/{next(_steps)}"
    if is_lead():
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, LONGEST_WAIT))


def fail(status: int, message: str) -> None:
    """After an error: tell the other processes, which end, and end this one. Returns where there are none."""
    if not is_distributed():
        return
    state = runtime.global_state
    try:
        _client().key_value_set(FAILURE, json.dumps([state.process_id, status, message]))
        others = state.num_processes - 1
        deadline = time.monotonic() + FAREWELL
        while time.monotonic() < deadline and len(_client().key_value_dir_get(ENDED)) < others:
            time.sleep(0.1)
    except jax.errors.JaxRuntimeError:  # another one failed before
        _say_ended()
    _leave(status)


def _watch() -> None:
    """End this process when another has failed: it may be waiting for that one in a collective."""
    state = runtime.global_state
    while not _over.wait(WATCHES_EVERY):
        client = state.client
        try:
            found = client and client.key_value_try_get(FAILURE)
        except jax.errors.JaxRuntimeError:
            continue
        if not found:
            continue
        process, status, message = json.loads(found)
        if process == state.process_id:
            return
        print(f"process {state.process_id}: process {process} failed: {message}", file=sys.stderr)
        _say_ended()
        if is_lead():
            # Its end is that of the coordinator, where the one that failed still waits for the others.
            time.sleep(COORDINATOR_STAYS)
        _leave(status)


def _end_watch(watch: threading.Thread) -> None:
    """A thread that comes back from the client when Python has ended makes the process abort."""
    _over.set()
    watch.join(FAREWELL)


def _say_ended() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{ENDED}/{runtime.global_state.process_id}", "", allow_overwrite=True)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly exit would wait for the others.
    os._exit(status)


def _client() -> Any:
    return runtime.global_state.client
