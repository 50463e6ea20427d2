"""How many cores a measurement takes."""

import os


def pin(cores: int | None) -> None:
    """Keep this process, and those that it starts, to so many of its cores; None: to all that it has.

    JAX and the libraries under it start as many threads as there are cores then.

    Raises:
        ValueError: more cores than there are.
    """
    if cores is None:
        return
    here = sorted(os.sched_getaffinity(0))
    if not 0 < cores <= len(here):
        raise ValueError(f"--threads {cores}: expected 1 to {len(here)}, the cores of this process")
    os.sched_setaffinity(0, here[:cores])
