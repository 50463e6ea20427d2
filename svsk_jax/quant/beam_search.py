"""Error feedback over the columns of a row that follows several roundings at once and keeps the cheapest."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from pallas_kernels import error_feedback as kernels
from svsk_jax.quant.codebook import decode, round_to_level
from svsk_jax.quant.metric import HIGHEST

WINDOWS = (kernels.COLUMNS, 64, 32)
"""Columns between updates of all later ones; the first of these that divides K."""
BLOCK = 32
"""Columns of a block where XLA rounds them."""


def round_columns(
    W: Float[Array, "k r"],
    scales: Float[Array, "k r"],
    U: Float[Array, "k k"],
    coefficients: Float[Array, "2"],
    beam_width: int,
) -> UInt8[Array, "k r"]:
    """Codes of Wᵀ, from the first row of W (a column of the matrix) to the last, that keep Σ_k (e_k / U_kk)²
    small for each row, which with H⁻¹ = Uᵀ U is e H eᵀ.

    Each of a row's `beam_width` beams is a choice of codes so far, its cost and the columns still to come
    after feedback. At each column a beam goes on with the nearest level and with the next one on the other
    side of the weight; the cheapest `beam_width` of all these live on. With one beam it is plain error
    feedback. f32; K a multiple of 32. On a GPU a block is one kernel (`pallas_kernels.error_feedback`).

    Source: the M-algorithm (Anderson & Mohan, 1984), applied to the lattice view of Chen et al., "The
    Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm" (2025).
    """
    k, rows = W.shape
    # Columns far off are brought up to date once for a window of blocks: they are most of the work.
    window = next(size for size in WINDOWS if k % size == 0)
    by_kernel = kernels.why_no_kernel(beam_width) is None
    round_block, block = (kernels.round_columns, window) if by_kernel else (_round_block, BLOCK)
    beams = (beam_width, rows)

    def step(state, start):
        W, cost = state
        right = jax.lax.dynamic_slice_in_dim(U, start, window)
        w, s = (jax.lax.dynamic_slice_in_dim(x, start, window) for x in (W, scales))
        square = jax.lax.dynamic_slice_in_dim(right, start, window, axis=1)
        errors, cost, ancestors, path = _round_window(w, s, square, coefficients, cost, round_block, block)
        return (_brought_up(W, right, errors, ancestors, start + window), cost), path

    first = jnp.broadcast_to(jnp.where(jnp.arange(beam_width)[:, None] == 0, 0.0, jnp.inf), beams)
    begin = (jnp.broadcast_to(W[:, None], (k, *beams)), first)
    (_, cost), path = jax.lax.scan(step, begin, jnp.arange(0, k, window))
    codes, ancestors = (x.reshape(-1, *x.shape[2:]) for x in path)
    return _along(codes, ancestors, jnp.argmin(cost, axis=0))


def _brought_up(
    W: Float[Array, "k b r"],
    U: Float[Array, "c k"],
    errors: Float[Array, "c b r"],
    ancestors: Int[Array, "b r"],
    start: int | Int[Array, ""],
) -> Float[Array, "k b r"]:
    """The columns from `start` on, after feedback of the errors of c columns to the beams that live on."""
    later = jnp.where(jnp.arange(len(W)) >= start, U, 0.0)
    passed_on = jnp.matmul(later.T, errors.reshape(len(U), -1), precision=HIGHEST).reshape(W.shape)
    return _descended(W, ancestors) - passed_on


def _descended(x: Shaped[Array, "*c b r"], ancestors: Int[Array, "b r"]) -> Shaped[Array, "*c b r"]:
    """What each beam has from the one that it comes from."""
    if len(ancestors) == 1:
        return x
    return jnp.take_along_axis(x, jnp.expand_dims(ancestors, range(x.ndim - 2)), axis=-2)


def _round_window(
    W: Float[Array, "w b r"],
    scales: Float[Array, "w r"],
    U: Float[Array, "w w"],
    coefficients: Float[Array, "2"],
    cost: Float[Array, "b r"],
    round_block: Callable[..., kernels.RoundedColumns],
    block: int,
) -> tuple[
    Float[Array, "w b r"],
    Float[Array, "b r"],
    Int[Array, "b r"],
    tuple[UInt8[Array, "n c b r"], Int[Array, "n b r"]],
]:
    """Round a window of columns block by block: the errors, costs and ancestors of the beams that live on,
    and the codes and ancestors of each block."""

    def step(state, start):
        W, errors, cost, ancestors = state
        w, s, right = (jax.lax.dynamic_slice_in_dim(x, start, block) for x in (W, scales, U))
        square = jax.lax.dynamic_slice_in_dim(right, start, block, axis=1)
        found = round_block(w, s, square, coefficients, cost)
        W = _brought_up(W, right, found.errors, found.ancestors, start + block)
        errors, ancestors = (_descended(x, found.ancestors) for x in (errors, ancestors))
        errors = jax.lax.dynamic_update_slice_in_dim(errors, found.errors, start, axis=0)
        return (W, errors, found.cost, ancestors), (found.codes, found.ancestors)

    beams = jnp.broadcast_to(jnp.arange(len(cost), dtype=jnp.int32)[:, None], cost.shape)
    begin = (W, jnp.zeros_like(W), cost, beams)
    (_, errors, cost, ancestors), path = jax.lax.scan(step, begin, jnp.arange(0, len(W), block))
    return errors, cost, ancestors, path


def _along(
    codes: UInt8[Array, "n c b r"], ancestors: Int[Array, "n b r"], last: Int[Array, "r"]
) -> UInt8[Array, "k r"]:
    """The codes along the path through n blocks that ends in each row's beam `last`."""

    def step(beam, before):
        return jnp.take_along_axis(before, beam[None], axis=0)[0], beam

    _, tips = jax.lax.scan(step, last, ancestors, reverse=True)
    picked = jnp.take_along_axis(codes, tips[:, None, None], axis=2)
    return picked.reshape(-1, picked.shape[-1])


def _round_block(
    w: Float[Array, "c b r"],
    scales: Float[Array, "c r"],
    U: Float[Array, "c c"],
    coefficients: Float[Array, "2"],
    cost: Float[Array, "b r"],
) -> kernels.RoundedColumns:
    """`kernels.round_columns` by XLA, for any number of beams."""
    beams = jnp.broadcast_to(jnp.arange(len(cost))[:, None], cost.shape)
    step = partial(_extend, w, scales, U, coefficients)
    (cost, ancestors, errors), path = jax.lax.scan(step, (cost, beams, jnp.zeros_like(w)), jnp.arange(len(w)))

    def back(tips, column):
        code, parent = (jnp.take_along_axis(x, tips, axis=0) for x in column)
        return parent, code

    _, codes = jax.lax.scan(back, beams, path, reverse=True)
    return kernels.RoundedColumns(codes, errors, cost, ancestors)


def _extend(
    w: Float[Array, "c b r"],
    scales: Float[Array, "c r"],
    U: Float[Array, "c c"],
    coefficients: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
    j: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Round column j of a block in every beam.

    The state is the cost of each beam, the beam at the block's start that it comes from, and its errors
    e_i / U_ii within the block. Returned beside it: each beam's code, and the beam before it.
    """
    cost, ancestors, errors = state
    width = len(cost)
    before = jnp.where(jnp.arange(len(U)) < j, U[:, j], 0.0)
    fed = jnp.einsum("c,cbr->br", before, errors, precision=HIGHEST)
    target = jnp.take_along_axis(w[j], ancestors, axis=0) - fed
    nearest = round_to_level(target, scales[j], coefficients)
    above = target * jnp.sign(scales[j]) > jnp.abs(scales[j]) * decode(nearest, coefficients)
    other = nearest + jnp.where(above, 1, -1)
    exists = (other >= 0) & (other <= kernels.TOP_CODE)
    codes = jnp.concatenate([nearest, jnp.clip(other, 0, kernels.TOP_CODE)])
    error = (jnp.tile(target, (2, 1)) - scales[j] * decode(codes, coefficients)) / U[j, j]
    costs = jnp.tile(cost, (2, 1)) + error * error
    costs = jnp.where(jnp.concatenate([jnp.ones_like(exists), exists]), costs, jnp.inf)
    cheapest, chosen = jax.lax.top_k(-costs.T, width)
    chosen = chosen.T
    parents = chosen % width
    errors = jnp.take_along_axis(errors, parents[None], axis=1)
    errors = errors.at[j].set(jnp.take_along_axis(error, chosen, axis=0))
    ancestors = jnp.take_along_axis(ancestors, parents, axis=0)
    picked = jnp.take_along_axis(codes, chosen, axis=0).astype(jnp.uint8)
    return (-cheapest.T, ancestors, errors), (picked, parents)
