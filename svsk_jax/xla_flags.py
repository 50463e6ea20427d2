"""What XLA must be told before it compiles anything."""

import os

import jaxlib.version

YNN_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"


def avoid_crashing_fusions() -> None:
    """Keep jaxlib before 0.11 from handing sums to its CPU backend YNNPACK, whose code for some of them
    crashes.

    A sum over `concatenate(zeros, u @ v)` is one (docs/decisions/0003). Appends to XLA_FLAGS, which XLA reads
    when the first function is compiled; a value that the user set is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.version.__version_info__[:2] < (0, 11) and YNN_FUSIONS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {YNN_FUSIONS}=-LIBRARY_FUSION_TYPE_REDUCE".strip()
