"""The sequential part of quantization as a kernel: rounding a block of columns with error feedback."""

from pallas_kernels.error_feedback.columns import (
    LANES,
    RoundedColumns,
    columns_at_once,
    round_columns,
    why_no_kernel,
)

__all__ = ["LANES", "RoundedColumns", "columns_at_once", "round_columns", "why_no_kernel"]
