"""The Triton kernel that rounds a block of columns with error feedback, following several beams of a row.

A warp has a row, whose weights still to be rounded it holds in registers, a set for each beam. XLA would
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
COLUMNS = 128
"""Columns of a block: a thread has a few of them."""
MOST_BEAMS = 4
CODE_BITS, TOP_CODE = 4, 15


class RoundedColumns(NamedTuple):
    """What rounding C columns of R rows leaves, for each of the B beams that live on."""

    codes: UInt8[Array, "c b r"]
    errors: Float[Array, "c b r"]
    """e_j / U_jj of each column, which the columns after the block make up for."""
    cost: Float[Array, "b r"]
    ancestors: Int[Array, "b r"]
    """The beam at the block's start that each comes from."""


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
    """values[index], the index a scalar."""
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
    row = pl.program_id(0)
    column = lax.broadcasted_iota(jnp.int32, (columns,), 0)
    pair = [plgpu.load(coefficients_ref.at[jnp.int32(index)]) for index in range(2)]

    def level(code: jax.Array) -> jax.Array:
        t = code.astype(jnp.float32) - 7.5
        return t + pair[0] * t * t * t - pair[1]

    def nearest_code(z: jax.Array) -> jax.Array:
        code = jnp.int32(0)
        for bit in (8, 4, 2, 1):
            higher = code + bit
            code = jnp.where(z > (level(higher) + level(higher - 1)) / 2, higher, code)
        return code

    def ahead(j: jax.Array) -> tuple[jax.Array, ...]:
        """What column j needs, loaded a column early: scale, U_jj, and row j of U."""
        loaded = plgpu.load(scales_ref.at[j, row]), plgpu.load(u_ref.at[j, j])
        return *loaded, plgpu.load(u_ref.at[j, pl.ds(jnp.int32(0), columns)])

    def round_column(j, state):
        weights, codes, cost, ancestors, (scale, diagonal, right) = state
        coming = ahead(jnp.minimum(j + 1, columns - 1))
        here, later = column == j, jnp.where(column > j, right, 0.0)
        safe = jnp.where(scale == 0, 1.0, scale)
        targets = [jnp.sum(jnp.where(here, each, 0.0)) for each in weights]
        nearest, other = [], []
        for beam, target in enumerate(targets):
            z = target / safe
            code = nearest_code(z)
            found = level(code)
            miss = (target - scale * found) / diagonal
            nearest.append((cost[beam] + miss * miss, code | (beam << CODE_BITS)))
            if beams > 1:
                beyond = jnp.where(z > found, code + 1, code - 1)
                miss = (target - scale * level(beyond)) / diagonal
                exists = (beyond >= 0) & (beyond <= TOP_CODE)
                worse = jnp.where(exists, cost[beam] + miss * miss, jnp.inf)
                other.append((worse, jnp.where(exists, beyond, 0) | (beam << CODE_BITS)))
        kept = _cheapest(nearest, other) if beams > 1 else nearest
        grown = []
        for _, what in kept:
            parent, code = what >> CODE_BITS, what & TOP_CODE
            error = (_pick(targets, parent) - scale * level(code)) / diagonal
            # A column that is done keeps its error where its weight was.
            passed_on = _pick(weights, parent) - later * error
            grown.append(
                (
                    jnp.where(here, error, passed_on),
                    jnp.where(here, code, _pick(codes, parent)),
                    _pick(ancestors, parent),
                )
            )
        weights, codes, ancestors = (list(each) for each in zip(*grown, strict=True))
        return weights, codes, [each for each, _ in kept], ancestors, coming

    whole = pl.ds(jnp.int32(0), columns)
    begin = (
        [plgpu.load(w_ref.at[whole, jnp.int32(beam), row]) for beam in range(beams)],
        [jnp.zeros((columns,), jnp.int32)] * beams,
        [plgpu.load(cost_ref.at[jnp.int32(beam), row]) for beam in range(beams)],
        [jnp.int32(beam) for beam in range(beams)],
        ahead(jnp.int32(0)),
    )
    errors, codes, cost, ancestors, _ = lax.fori_loop(jnp.int32(0), jnp.int32(columns), round_column, begin)
    for beam in range(beams):
        at = jnp.int32(beam)
        plgpu.store(errors_ref.at[whole, at, row], errors[beam])
        plgpu.store(codes_ref.at[whole, at, row], codes[beam].astype(jnp.uint8))
        plgpu.store(cost_out_ref.at[at, row], cost[beam])
        plgpu.store(ancestors_ref.at[at, row], ancestors[beam])


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
        W: the columns of each beam's row, C a power of two.
        scales: of each weight.
        U: the block's own square of the upper factor of H⁻¹.
        coefficients: (a, δ) of the codebook.
        cost: Σ (e / U)² of each beam so far; inf for one that is not there.
        interpret: run in interpret mode.

    Source: the M-algorithm (Anderson & Mohan, 1984) over the tree of Frantar et al., "GPTQ" (2022).
    """
    columns, beams, rows = W.shape
    shape = jax.ShapeDtypeStruct
    found = pl.pallas_call(
        partial(_kernel, columns=columns, beams=beams),
        grid=(rows,),
        out_shape=(
            shape((columns, beams, rows), jnp.uint8),
            shape((columns, beams, rows), jnp.float32),
            shape((beams, rows), jnp.float32),
            shape((beams, rows), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(W, scales, U, coefficients, cost)
    return RoundedColumns(*found)
