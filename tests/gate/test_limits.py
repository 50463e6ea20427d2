"""Machine code of the kernels, compiled for GPUs that are not here: `make gate`."""

import pytest

from pallas_kernels import aot
from pallas_kernels.svsk_matmul.figures import (
    abstract_int8,
    abstract_weight,
    compiled_figures,
    default_blocks,
)
from pallas_kernels.svsk_matmul.limits import limit

pytestmark = pytest.mark.skipif(
    bool(aot.what_is_missing()),
    reason=f"NO KERNEL WAS COMPILED FOR A GPU: {', '.join(aot.what_is_missing())} missing; run `make gate`",
)
ROWS = (1, 8, 16, 64, 256)


def check(figures, m, companded):
    allowed = limit(figures.kernel, m, companded)
    said = f"{figures}: {allowed}"
    if allowed.instructions:
        assert 0 < figures.instructions <= allowed.instructions, said
        assert figures.products > 0, said
        assert figures.conversions == 0, said
    assert figures.registers <= allowed.registers, said
    # An access is of four bytes or more.
    in_memory = max(figures.stack_bytes, figures.spilled_bytes, 4 * figures.local)
    assert in_memory <= allowed.spilled.get(figures.target, 0), said
    if allowed.wide_copies:
        assert figures.copies > 0, said
        # Hopper's groups of four warps wait for each other.
        assert figures.warpgroups == 0, said


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("companded", [False, True])
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_products(target, m, companded, rank):
    # Large enough for 64 rows of x that the loop over K is one.
    weight = abstract_weight(24576 if m == 64 else 4096, 4096, companded=companded, rank=rank)
    check(compiled_figures(weight, m, target), m, companded)


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_int8_products(target, m):
    check(compiled_figures(abstract_int8(4096, 4096), m, target), m, False)


@pytest.mark.parametrize(
    ("companded", "rank", "m", "most"),
    [
        (False, 0, 1, 2.2),
        (False, 16, 1, 2.25),
        (True, 0, 1, 3.4),
        (True, 16, 1, 3.6),
        (False, 16, 16, 3.2),
    ],
)
def test_instructions_with_groups_of_32(companded, rank, m, most):
    weight = abstract_weight(24576, 4096, group=32, companded=companded, rank=rank)
    figures = compiled_figures(weight, m, "sm_90")
    assert 0 < figures.instructions <= most
    assert (figures.stack_bytes, figures.spilled_bytes) == (0, 0)
    if m == 1:
        finer = abstract_weight(24576, 4096, group=16, companded=companded, rank=rank)
        blocks = default_blocks(weight, m, "sm_90")
        assert compiled_figures(finer, m, "sm_90", blocks).instructions <= most + 0.4
