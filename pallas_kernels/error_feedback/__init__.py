"""The sequential part of quantization as a kernel: rounding a block of columns with error feedback."""

from pallas_kernels.error_feedback.columns import (
    COLUMNS,
    NAME,
    TOP_CODE,
    RoundedColumns,
    round_columns,
    why_no_kernel,
)

__all__ = ["COLUMNS", "NAME", "TOP_CODE", "RoundedColumns", "round_columns", "why_no_kernel"]
