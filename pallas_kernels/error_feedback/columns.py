"""The Triton kernel that rounds a block of columns with error feedback, following several beams of each row.

Each thread has a row, whose weights still to be rounded it holds in registers, a set for each beam. XLA would
start some twenty kernels for each column instead.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.svsk_matmul.api import why_no_triton

NAME = "svsk_round_columns"
LANES = 32
"""Rows of a program, which is one warp."""
REGISTERS = 64
"""Weights that a thread holds: columns of a block times beams."""
MOST_COLUMNS, MOST_BEAMS = 64, 4
LINE = 32
"""f32 of a line of the cache."""
CODE_BITS, TOP_CODE = 4, 15


class RoundedColumns(NamedTuple):
    """What rounding C columns of R rows leaves, for each of the B beams that live on."""

    codes: UInt8[Array, "c b r"]
    errors: Float[Array, "c b r"]
    """e_j / U_jj of each column, which the columns after the block make up for."""
    cost: Float[Array, "b r"]
    ancestors: Int[Array, "b r"]
    """The beam at the block's start that each comes from."""


def columns_at_once(beams: int) -> int:
    """Columns of a block for so many beams."""
    return min(MOST_COLUMNS, REGISTERS // beams)


def why_no_kernel(beams: int) -> str | None:
    """Why the kernel can't follow so many beams here, or None if it can."""
    if beams not in (1, 2, MOST_BEAMS):
        return f"it follows 1, 2 or {MOST_BEAMS} beams, not {beams}"
    return why_no_triton(jnp.bfloat16)


def _exchange(pairs: list[tuple[jax.Array, jax.Array]], low: int, high: int) -> None:
    """Put the cheaper of two (cost, what) at `low`."""
    (a, x), (b, y) = pairs[low], pairs[high]
    swap = b < a
    pairs[low] = jnp.where(swap, b, a), jnp.where(swap, y, x)
    pairs[high] = jnp.where(swap, a, b), jnp.where(swap, x, y)


SORTING_NETWORKS = {1: (), 2: ((0, 1),), 4: ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))}


def _cheapest(
    nearest: list[tuple[jax.Array, jax.Array]], other: list[tuple[jax.Array, jax.Array]]
) -> list[tuple[jax.Array, jax.Array]]:
    """The cheaper half of two lists of (cost, what): each is sorted, and of the i-th of one and the i-th from
    the end of the other the cheaper is among them (Batcher, 1968)."""
    for pairs in (nearest, other):
        for low, high in SORTING_NETWORKS[len(pairs)]:
            _exchange(pairs, low, high)
    kept = []
    for (a, x), (b, y) in zip(nearest, reversed(other), strict=True):
        kept.append((jnp.minimum(a, b), jnp.where(b < a, y, x)))
    return kept


def _pick(values: Sequence[jax.Array], index: jax.Array) -> jax.Array:
    """values[index], for each row."""
    values = list(values)
    bit = 1
    while len(values) > 1:
        odd = (index & bit) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit *= 2
    return values[0]


def _kernel(
    w_ref,
    scales_ref,
    u_ref,
    coefficients_ref,
    cost_ref,
    codes_ref,
    errors_ref,
    cost_out_ref,
    ancestors_ref,
    *,
    columns: int,
    beams: int,
):
    rows = pl.ds(pl.program_id(0) * LANES, LANES)
    pair = [plgpu.load(coefficients_ref.at[jnp.int32(index)]) for index in range(2)]

    def level(code: jax.Array) -> jax.Array:
        t = code.astype(jnp.float32) - 7.5
        return t + pair[0] * t * t * t - pair[1]

    def nearest_code(z: jax.Array) -> jax.Array:
        code = jnp.zeros(z.shape, jnp.int32)
        for bit in (8, 4, 2, 1):
            higher = code + bit
            code = jnp.where(z > (level(higher) + level(higher - 1)) / 2, higher, code)
        return code

    def load(ref, *at: jax.Array | int) -> jax.Array:
        return plgpu.load(ref.at[(*map(jnp.int32, at), rows)])

    def store(ref, value: jax.Array, *at: jax.Array | int) -> None:
        plgpu.store(ref.at[(*map(jnp.int32, at), rows)], value)

    def ahead(j):
        """What column j needs first. Loading it a column early brings the lines of its row of U near."""
        firsts = [plgpu.load(u_ref.at[j, jnp.int32(at)]) for at in range(0, columns, LINE)]
        return load(scales_ref, j), *firsts

    def round_column(j, state):
        weights, cost, (scale, diagonal, *_) = state
        coming = ahead(jnp.minimum(j + 1, columns - 1))
        safe = jnp.where(scale == 0, 1.0, scale)
        nearest, other = [], []
        for beam in range(beams):
            target = weights[0][beam]
            z = target / safe
            code = nearest_code(z)
            found = level(code)
            miss = (target - scale * found) / diagonal
            nearest.append((cost[beam] + miss * miss, code | (beam << CODE_BITS)))
            if beams > 1:
                beyond = code + jnp.where(z > found, 1, -1)
                miss = (target - scale * level(beyond)) / diagonal
                exists = (beyond >= 0) & (beyond <= TOP_CODE)
                worse = jnp.where(exists, cost[beam] + miss * miss, jnp.inf)
                other.append((worse, jnp.where(exists, beyond, 0) | (beam << CODE_BITS)))
        kept = _cheapest(nearest, other) if beams > 1 else nearest
        parents = [what >> CODE_BITS for _, what in kept]
        errors = []
        for beam, (_, what) in enumerate(kept):
            target = _pick(weights[0], parents[beam])
            errors.append((target - scale * level(what & TOP_CODE)) / diagonal)
            store(codes_ref, what.astype(jnp.uint8), j, beam)
            store(errors_ref, errors[-1], j, beam)
        # The column just rounded is shifted out: what comes next is always the first.
        shifted = []
        for offset in range(1, columns):
            factor = plgpu.load(u_ref.at[j, jnp.int32(offset)])
            shifted.append(
                [_pick(weights[offset], parents[beam]) - factor * errors[beam] for beam in range(beams)]
            )
        shifted.append(weights[-1])
        return shifted, [each for each, _ in kept], coming

    weights = [[load(w_ref, column, beam) for beam in range(beams)] for column in range(columns)]
    begin = weights, [load(cost_ref, beam) for beam in range(beams)], ahead(jnp.int32(0))
    _, cost, _ = lax.fori_loop(jnp.int32(0), jnp.int32(columns), round_column, begin)
    for beam in range(beams):
        store(cost_out_ref, cost[beam], beam)
    if beams == 1:
        store(ancestors_ref, jnp.zeros((LANES,), jnp.int32), 0)
        return

    def trace_back(step, tips):
        j = jnp.int32(columns - 1) - step
        packed = [load(codes_ref, j, beam).astype(jnp.int32) for beam in range(beams)]
        missed = [load(errors_ref, j, beam) for beam in range(beams)]
        before = []
        for beam, tip in enumerate(tips):
            what = _pick(packed, tip)
            store(codes_ref, (what & TOP_CODE).astype(jnp.uint8), j, beam)
            store(errors_ref, _pick(missed, tip), j, beam)
            before.append(what >> CODE_BITS)
        return before

    tips = [jnp.full((LANES,), beam, jnp.int32) for beam in range(beams)]
    for beam, tip in enumerate(lax.fori_loop(jnp.int32(0), jnp.int32(columns), trace_back, tips)):
        store(ancestors_ref, tip, beam)


@partial(jax.jit, static_argnames="interpret")
def round_columns(
    W: Float[Array, "c b r"],
    scales: Float[Array, "c r"],
    U: Float[Array, "c c"],
    coefficients: Float[Array, "2"],
    cost: Float[Array, "b r"],
    *,
    interpret: bool = False,
) -> RoundedColumns:
    """Round C columns one after another, each in B beams: a beam goes on with the nearest level and with the
    next one on the other side of the weight, and the cheapest B of all live on. f32.

    Args:
        W: the columns of each beam's row, R a multiple of `LANES`.
        scales: of each weight.
        U: the block's own square of the upper factor of H⁻¹.
        coefficients: (a, δ) of the codebook.
        cost: Σ (e / U)² of each beam so far; inf for one that is not there.
        interpret: run in interpret mode.

    Source: the M-algorithm (Anderson & Mohan, 1984) over the tree of Frantar et al., "GPTQ" (2022).
    """
    columns, beams, rows = W.shape
    shape = jax.ShapeDtypeStruct
    # Row j from its diagonal on: a thread that has shifted its weights reads at the same places for each j.
    wide = jnp.pad(U, ((0, 0), (0, columns))).reshape(-1)
    skewed = jnp.pad(wide, (0, columns)).reshape(columns, 2 * columns + 1)[:, :columns]
    found = pl.pallas_call(
        partial(_kernel, columns=columns, beams=beams),
        grid=(rows // LANES,),
        out_shape=(
            shape((columns, beams, rows), jnp.uint8),
            shape((columns, beams, rows), jnp.float32),
            shape((beams, rows), jnp.float32),
            shape((beams, rows), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(W, scales, skewed, coefficients, cost)
    return RoundedColumns(*found)
