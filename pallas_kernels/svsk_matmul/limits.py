"""What the compiled kernels may cost. Limits guard against accidents; time on a device is the goal."""

import dataclasses
from collections.abc import Mapping

from pallas_kernels.svsk_matmul import triton_decode, triton_int8, triton_restore, triton_rows
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """Of one kernel on every target, with the heuristic's blocks, any rank and groups of 16."""

    instructions: float
    """Executed by the inner loop for each weight; 0 for a kernel without such a loop."""
    registers: int
    wide_copies: bool
    """Whether codes come by 16-byte asynchronous copies."""
    reason: str
    spilled: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Bytes that may be kept in local memory for want of registers, by target; elsewhere none."""


LIMITS: dict[tuple[str, int, bool], Limit] = {
    (triton_decode.NAME, 1, False): Limit(
        instructions=2.4,
        registers=112,
        wide_copies=True,
        reason="2.0 to 2.2 in groups of 16: half of what an H100 can issue while it reads",
    ),
    (triton_decode.NAME, 1, True): Limit(
        instructions=3.5,
        registers=112,
        wide_copies=True,
        reason="three half2 operations per pair more than linear, 3.2 to 3.3; registers for the next scales",
    ),
    (triton_rows.NAME, 8, False): Limit(
        instructions=3.6,
        registers=128,
        wide_copies=True,
        reason="scales go to sums of 16 or 32 columns, one fma each; x is read again for every 32 rows",
    ),
    (triton_rows.NAME, 8, True): Limit(
        instructions=4.4, registers=128, wide_copies=True, reason="as linear, with the codebook's cubic"
    ),
    (triton_rows.NAME, 16, False): Limit(
        instructions=4.4,
        registers=144,
        wide_copies=True,
        reason="4.0 to 4.2 in groups of 16: twice the sums of eight rows of x",
    ),
    (triton_rows.NAME, 16, True): Limit(
        instructions=5.4, registers=144, wide_copies=True, reason="as linear, with the codebook's cubic"
    ),
    (triton_rows.NAME, 64, False): Limit(
        instructions=6.8,
        registers=255,
        wide_copies=False,
        reason="sums of 64 rows of x fill the registers; Hopper loads x by itself",
    ),
    (triton_rows.NAME, 64, True): Limit(
        instructions=7.4,
        registers=255,
        wide_copies=False,
        reason="as linear, with the codebook's cubic; on sm_89 ptxas keeps to 128 registers",
        spilled={"sm_89": 32},
    ),
    (triton_restore.NAME, FUSED_LIMIT, False): Limit(
        instructions=0.0,
        registers=168,
        wide_copies=False,
        reason="writes; three programs fit a multiprocessor",
    ),
    (triton_restore.NAME, FUSED_LIMIT, True): Limit(
        instructions=0.0,
        registers=168,
        wide_copies=False,
        reason="writes; three programs fit a multiprocessor",
    ),
    (triton_int8.NAME, 1, False): Limit(
        instructions=2.3,
        registers=112,
        wide_copies=True,
        reason="a byte permutation per pair, and its offset",
    ),
    (triton_int8.NAME, 16, False): Limit(
        instructions=3.0,
        registers=144,
        wide_copies=True,
        reason="as for one row of x, with twice the columns",
    ),
    (triton_int8.NAME, 64, False): Limit(
        instructions=9.0, registers=255, wide_copies=True, reason="sums of 64 rows of x fill the registers"
    ),
}
"""By kernel, rows of x, and whether the codebook is companded."""


def limit(kernel: str, m: int, companded: bool) -> Limit:
    """The limit of a kernel that takes m rows of x: that of the largest number in the table not above it."""
    counts = [rows for name, rows, of in LIMITS if (name, of) == (kernel, companded) and rows <= m]
    return LIMITS[kernel, max(counts), companded]
