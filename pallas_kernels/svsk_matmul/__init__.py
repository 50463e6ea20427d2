"""Products with packed SVSK weights: y = x Ŵᵀ."""

from pallas_kernels.svsk_matmul.api import (
    IMPLEMENTATIONS,
    LaidOutWeight,
    svsk_matmul,
    take_rows,
    why_no_triton,
)
from pallas_kernels.svsk_matmul.reference import dequantize
from pallas_kernels.svsk_matmul.stack import common_form, stack
from pallas_kernels.svsk_matmul.transposed import (
    TransposedInt8Weight,
    TransposedWeight,
    transpose,
    transpose_int8,
)
from pallas_kernels.svsk_matmul.triton_int8 import TritonInt8Weight, lay_out_int8
from pallas_kernels.svsk_matmul.triton_layout import TritonWeight, lay_out
from pallas_kernels.svsk_matmul.types import Int8Weight, PackedWeight, Sidecar, SVSKWeight

__all__ = [
    "IMPLEMENTATIONS",
    "Int8Weight",
    "LaidOutWeight",
    "PackedWeight",
    "SVSKWeight",
    "Sidecar",
    "TransposedInt8Weight",
    "TransposedWeight",
    "TritonInt8Weight",
    "TritonWeight",
    "common_form",
    "dequantize",
    "lay_out",
    "lay_out_int8",
    "stack",
    "svsk_matmul",
    "take_rows",
    "transpose",
    "transpose_int8",
    "why_no_triton",
]
