"""What the kernels become when compiled: instructions per weight, registers, bytes."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.svsk_matmul import triton, triton_decode, triton_int8, triton_restore, triton_rows
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.synthetic import random_int8, random_weight
from pallas_kernels.svsk_matmul.triton_int8 import TritonInt8Weight, lay_out_int8
from pallas_kernels.svsk_matmul.triton_layout import SUPERBLOCK, TritonWeight, lay_out
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT, Blocks, heuristic

ISSUE_PER_CYCLE = 4
"""Warp instructions that a multiprocessor issues in a cycle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one compiled kernel."""

    kernel: str
    target: str
    instructions: float
    """Of the inner loop, executed by all threads together, per weight; 0 where the loop is unrolled."""
    whole: float
    """The same of the whole kernel, the rows of sidecars included: an upper bound."""
    registers: int
    stack_bytes: int
    spilled_bytes: int
    copies: int
    """Asynchronous copies to shared memory in the kernel, of 16 bytes each."""
    local: int
    """Accesses to local memory."""
    products: int
    """Tensor-core products in the inner loop."""
    conversions: int
    """Conversions from integers in the inner loop."""
    warpgroups: int
    """Warp-group instructions, which wait for each other."""


def abstract_weight(
    n: int, k: int, *, group: int = 16, companded: bool = True, rank: int = 16
) -> TritonWeight:
    """Shapes of a weight laid out, with two-level scales and tiles of 512 rows of equal rank."""
    make = partial(random_weight, n=n, k=k, group=group, companded=companded, rank=rank)
    return jax.eval_shape(lambda key: lay_out(make(key)), jax.random.key(0))


def abstract_int8(n: int, k: int) -> TritonInt8Weight:
    """Shapes of an int8 matrix laid out."""
    return jax.eval_shape(lambda key: lay_out_int8(random_int8(key, n, k)), jax.random.key(0))


def default_blocks(weight: TritonWeight, m: int, target: str) -> Blocks:
    """The heuristic's configuration on a target."""
    with aot.targeting(target):
        return heuristic(weight, m)


def compiled_figures(
    weight: TritonWeight | TritonInt8Weight, m: int, target: str, blocks: Blocks | None = None
) -> Figures:
    """Figures of the kernel that multiplies m rows of x by this weight, or restores it, on a target.

    Raises:
        NotImplementedError: the compiler for GPUs is not installed.
    """
    if isinstance(weight, TritonInt8Weight):
        name, rows, warps = triton_int8.NAME, triton_int8.ROWS, triton_int8.WARPS
    elif m >= FUSED_LIMIT:
        name, rows, warps = triton_restore.NAME, 0, 0
    else:
        blocks = blocks or default_blocks(weight, m, target)
        name = triton_decode.NAME if blocks.batch == 1 else triton_rows.NAME
        rows, warps = blocks.rows, blocks.warps
    x = jax.ShapeDtypeStruct((m, weight.shape[1]), jnp.bfloat16)
    program = aot.compile_for(lambda x, weight: triton.matmul(x, weight, blocks=blocks), (x, weight), target)
    [kernel] = [each for each in program.kernels if each.name == name]
    loop = kernel.loops[0] if kernel.loops else ()
    threads, columns = warps * aot.WARP, SUPERBLOCK * (1 if blocks is None else blocks.superblocks)
    return Figures(
        kernel=name,
        target=target,
        instructions=len(loop) * threads / (rows * SUPERBLOCK) if rows else 0.0,
        whole=len(kernel.instructions) * threads / (rows * columns) if rows else 0.0,
        registers=kernel.registers,
        stack_bytes=kernel.stack_bytes,
        spilled_bytes=kernel.spilled_bytes,
        copies=kernel.count(r"LDGSTS\S*\.128"),
        local=kernel.count("LDL|STL"),
        products=kernel.count("HMMA|HGMMA", loop),
        conversions=kernel.count("I2F", loop),
        warpgroups=kernel.count("WARPGROUP|HGMMA"),
    )


def estimate(figures: Figures, weight: TritonWeight, m: int, blocks: Blocks) -> float:
    """Microseconds by the roofline: the time to read the weight, or to issue the loop's instructions in
    whole waves of programs, whichever is longer; registers alone limit the programs on a multiprocessor."""
    card = aot.TARGETS[figures.target]
    reading = weight.nbytes / card.bandwidth
    threads = blocks.warps * aot.WARP
    resident = max(1, min(32, 65536 // (max(figures.registers, 16) * threads)))
    programs = weight.padded_rows // blocks.rows * (weight.superblocks // blocks.superblocks)
    programs *= ceil_div(m, blocks.batch)
    waves = ceil_div(programs, card.multiprocessors * resident)
    of_program = (figures.instructions or figures.whole) * blocks.rows * SUPERBLOCK * blocks.superblocks
    issuing = waves * resident * of_program / (ISSUE_PER_CYCLE * aot.WARP * card.clock)
    return 1e6 * max(reading, issuing)


def rank(
    weight: TritonWeight, batch: int, target: str, choices: Sequence[Blocks]
) -> list[tuple[float, Blocks, Figures]]:
    """Configurations by estimated microseconds, the best first.

    Raises:
        NotImplementedError: the compiler for GPUs is not installed.
    """
    figures = [compiled_figures(weight, batch, target, blocks) for blocks in choices]
    times = [estimate(each, weight, batch, blocks) for each, blocks in zip(figures, choices, strict=True)]
    return sorted(zip(times, choices, figures, strict=True), key=lambda found: found[0])
