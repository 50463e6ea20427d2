"""What XLA must be told before it compiles anything."""

import os

import jaxlib.version

YNN_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
TRITON_PRODUCTS = "--xla_gpu_enable_triton_gemm"


def avoid_crashing_fusions() -> None:
    """Keep jaxlib before 0.11 from handing sums to its CPU backend YNNPACK, whose code for some of them
    crashes.

    A sum over `concatenate(zeros, u @ v)` is one (docs/decisions/0003).
    """
    if jaxlib.version.__version_info__[:2] < (0, 11):
        _append(YNN_FUSIONS, "-LIBRARY_FUSION_TYPE_REDUCE")


def take_library_products() -> None:
    """Have XLA take cuBLAS for matrix products on a GPU, rather than compile and time Triton's.

    Quantization has hundreds of products of different shapes, each run a few times: the search for the
    fastest costs more than all of them (benchmarks/speed/NOTES.md).
    """
    _append(TRITON_PRODUCTS, "false")


def _append(flag: str, value: str) -> None:
    """Append to XLA_FLAGS, which XLA reads when the first function is compiled; what the user set is left
    alone."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={value}".strip()
