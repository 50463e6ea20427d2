"""What the compiled kernels may cost: limits that guard against accidents. Time on a device is the goal."""

import dataclasses

REGISTERS = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """Of one kernel, on every target, with any rank and group."""

    instructions: float
    """Executed in the inner loop, per weight."""
    registers: int
    reason: str


LIMITS: dict[tuple[str, int, bool], Limit] = {}
"""By kernel, rows of x that a program computes, and whether the codebook is companded."""
