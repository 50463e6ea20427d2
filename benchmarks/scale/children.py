"""Processes of a benchmark's own."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


def status_of(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> int | None:
    """Exit status of a command; None when it was not done after so many seconds. What it started ends with
    it, and it with this process's wait, however that ends."""
    # A group of its own.
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return child.wait(timeout=seconds)
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None
