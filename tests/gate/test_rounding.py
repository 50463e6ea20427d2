"""Machine code of the kernel that rounds columns, compiled for GPUs that are not here: `make gate`."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.error_feedback import COLUMNS, NAME, round_columns

pytestmark = pytest.mark.skipif(
    bool(aot.what_is_missing()),
    reason=f"NO KERNEL WAS COMPILED FOR A GPU: {', '.join(aot.what_is_missing())} missing; run `make gate`",
)
ROWS = 96


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_row_stays_in_registers(target, beams):
    shapes = ((COLUMNS, beams, ROWS), (COLUMNS, ROWS), (COLUMNS, COLUMNS), (2,), (beams, ROWS))
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    kernels = aot.compile_for(round_columns, operands, target).kernels
    [kernel] = [each for each in kernels if each.name.startswith(NAME)]
    assert (kernel.stack_bytes, kernel.spilled_bytes) == (0, 0)
    # A warp is a program: as many as an SM has schedulers' worth of registers for are there at a time.
    assert kernel.registers <= 128
