"""Block configurations of the Triton kernels."""

import dataclasses

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import TritonWeight, padded

FUSED_LIMIT = 384
"""Rows of x from which restoring the weight first is faster (H100, `docs/decisions/0004-kernels.md`)."""
WAVE = 700
"""Programs that a launch wants at least, to fill a large GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a launch is cut up."""

    rows: int
    """Rows of the weight that a program computes."""
    superblocks: int
    """Superblocks of 256 columns that it adds up; the rest of K goes to other programs."""
    warps: int
    """Warps of a program."""
    stages: int = 2
    """Stages of the software pipeline."""
    batch: int = 1
    """Rows of x that a program computes."""

    def check(self, weight: TritonWeight, m: int) -> None:
        """ValueError unless the blocks divide the padded weight and m rows of x."""
        misfits = [
            f"{name} = {part} does not divide {whole}"
            for name, part, whole in (
                ("superblocks", self.superblocks, weight.superblocks),
                ("batch", self.batch, m),
                *(("rows", self.rows, padded(rows)) for rows in weight.rows),
            )
            if whole % part
        ]
        if misfits:
            raise ValueError(f"{self}: {', '.join(misfits)}")


def batch_of(m: int) -> int:
    """Rows of x that a program computes of m."""
    return 1 if m == 1 else next((size for size in (8, 16, 32) if m <= size), 64)


def heuristic(weight: TritonWeight, m: int) -> Blocks:
    """A configuration for m rows of x, as the search on an H100 found it for most shapes."""
    if m == 1:
        pair = 2 if weight.superblocks % 2 == 0 else 1
        return Blocks(rows=32, superblocks=pair, warps=2)
    batch = batch_of(m)
    wide = batch > 16 and all(padded(rows) % 128 == 0 for rows in weight.rows)
    rows, warps = (128, 4) if wide else (64, 4) if batch > 16 else (32, 2)
    programs = weight.padded_rows // rows * ceil_div(m, batch)
    divisors = [d for d in range(weight.superblocks, 0, -1) if weight.superblocks % d == 0]
    enough = [d for d in divisors if programs * (weight.superblocks // d) >= WAVE]
    return Blocks(rows=rows, superblocks=enough[0] if enough else 1, warps=warps, batch=batch)
