"""The Triton kernel of attention, from the query, key and value product on: positions of the cache are split
over programs, and the last of them to come joins what they found."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.heads import Heads, finished_heads
from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import WIDTH, Product, plane_columns, starts
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract
from pallas_kernels.svsk_matmul.triton_prepare import PLANES, Prepared, abstract_prepared, store_superblock

NAME = "svsk_attend"
POSITIONS = 64
"""Positions that a program takes at a time."""
WARPS = 4
MOST_QUERIES = 16
"""Queries of a key head, at most, and of a program: the least that a tensor-core product takes."""
PROGRAMS = 128
"""Programs that fill a GPU."""
MOST_SPLITS = 32
NOTHING = -1e30
"""The largest score of no position."""


def splits_of(capacity: int, programs: int) -> int:
    """Into how many parts the positions are split, a power of two, for so many programs without."""
    most = min(MOST_SPLITS, 1 << (ceil_div(capacity, POSITIONS) - 1).bit_length())
    return max(1, min(most, 1 << max(0, (PROGRAMS // programs).bit_length() - 1)))


def keys_together(heads: Heads) -> int:
    """Key heads whose queries are joined by one program, since they share superblocks of the next product."""
    return next(
        count
        for count in range(1, heads.keys + 1)
        if heads.keys % count == 0
        and (count == heads.keys or count * heads.queries_per_key * heads.dim % WIDTH == 0)
    )


def _attend(
    ref: Refs,
    program: jax.Array,
    item: jax.Array,
    *,
    splits: int,
    window: int,
    product: Product,
    heads: Heads,
    columns: int,
    eps: float,
    interpret: bool,
) -> None:
    head, split = lax.div(program, jnp.int32(splits)), lax.rem(program, jnp.int32(splits))
    capacity, half, per_key = ref["keys"].shape[1], heads.dim // 2, heads.queries_per_key
    dtype, rows = ref["keys"].dtype, max(MOST_QUERIES, heads.rows)
    lane = lax.broadcasted_iota(jnp.int32, (half,), 0)
    # The new position is at `slot`; those before it are read from the cache.
    length = plgpu.load(ref["lengths"].at[item])
    slot = jnp.minimum(length, capacity - 1)
    begin = jnp.maximum(length + 1 - window, 0)
    size = POSITIONS * lax.div(slot - begin + (POSITIONS * splits - 1), jnp.int32(POSITIONS * splits))
    start = begin + split * size
    stop = jnp.minimum(start + size, slot)

    def block(position):
        index = position + lax.broadcasted_iota(jnp.int32, (POSITIONS, half), 0)
        column = lax.broadcasted_iota(jnp.int32, (POSITIONS, half), 1)
        return tuple(
            plgpu.load(ref[name].at[item, index, head, side + column], mask=index < stop, other=0)
            for name in ("keys", "values")
            for side in (0, half)
        )

    # Under way while the heads are made.
    first = block(start)
    made = finished_heads(ref, head, item, product=product, heads=heads, columns=columns, eps=eps)
    made = tuple(each.astype(dtype) for each in made)

    def one_row(index):
        row = lax.broadcasted_iota(jnp.int32, made[0].shape, 0)
        return tuple(jnp.sum(jnp.where(row == index, each.astype(jnp.float32), 0.0), axis=0) for each in made)

    key, value = one_row(heads.key_row), one_row(heads.key_row + 1)
    is_last = split == splits - 1

    @pl.when(is_last)
    def _():
        for name, pair in (("new_keys", key), ("new_values", value)):
            for side, each in zip((0, half), pair, strict=True):
                plgpu.store(ref[name].at[item, slot, head, side + lane], each.astype(dtype))

    # As many rows as a tensor-core product takes: the heads again and again.
    def tall(each):
        several = (rows // heads.rows, heads.rows, half)
        return jnp.broadcast_to(each[None], several).reshape(rows, half)

    queries = tuple(tall(each) for each in made)
    scale = jnp.float32(heads.dim**-0.5)

    def some(carry, position, block):
        low, high, most, weight = carry
        score = (plgpu.dot(queries[0], block[0].T) + plgpu.dot(queries[1], block[1].T)) * scale
        inside = position + lax.broadcasted_iota(jnp.int32, score.shape, 1) < stop
        score = jnp.where(inside, score, NOTHING)
        larger = jnp.maximum(most, jnp.max(score, axis=1))
        p = jnp.where(inside, jnp.exp(score - larger[:, None]), 0.0)
        shrink = jnp.exp(most - larger)
        low, high = (
            total * shrink[:, None] + plgpu.dot(p.astype(dtype), values)
            for total, values in zip((low, high), block[2:], strict=True)
        )
        return low, high, larger, weight * shrink + jnp.sum(p, axis=1)

    own = sum(q.astype(jnp.float32) * k[None, :] for q, k in zip(queries, key, strict=True))
    own = jnp.sum(own, axis=1) * scale
    carry = (
        *(jnp.where(is_last, jnp.broadcast_to(v[None, :], (rows, half)), 0.0) for v in value),
        jnp.where(is_last, own, NOTHING),
        jnp.where(is_last, jnp.ones((rows,), jnp.float32), 0.0),
    )
    carry = some(carry, start, first)
    blocks = lax.div(jnp.maximum(stop - start, 0) + (POSITIONS - 1), jnp.int32(POSITIONS))

    def further(i, carry):
        position = start + i * POSITIONS
        return some(carry, position, block(position))

    *totals, most, weight = lax.fori_loop(1, blocks, further, carry)
    row = lax.broadcasted_iota(jnp.int32, (rows, half), 0)
    column = lax.broadcasted_iota(jnp.int32, (rows, half), 1)
    for side, total in zip((0, half), totals, strict=True):
        index = (item, head * per_key + row, split, side + column)
        plgpu.store(ref["sums"].at[index], total, mask=row < per_key)
    one = lax.broadcasted_iota(jnp.int32, (rows,), 0)
    for name, each in (("most", most), ("weight", weight)):
        plgpu.store(ref[name].at[item, head * per_key + one, split], each, mask=one < per_key)

    # Stores of all threads come before the count, which releases them to the program that comes last and
    # acquires what it joins.
    if not interpret:
        plgpu.debug_barrier()
    together = keys_together(heads)
    group = lax.div(head, jnp.int32(together))
    before = plgpu.atomic_add(ref["arrivals"], (item, group), jnp.int32(1))

    @pl.when(before == together * splits - 1)
    def _():
        count = ceil_div(together * per_key * heads.dim, WIDTH)
        for start in range(0, count, 2):
            superblocks = [group * count + each for each in range(start, min(start + 2, count))]
            joined = [_joined(ref, superblock, item) for superblock in superblocks]
            for superblock, total in zip(superblocks, joined, strict=True):
                store_superblock(ref["small"], ref["unit"], item, superblock, total)
        plgpu.store(ref["arrivals"].at[item, group], jnp.int32(0))


def _joined(ref: Refs, superblock: jax.Array, item: jax.Array) -> jax.Array:
    """Of all splits, f32 [4, 64]."""
    _, heads, splits, dim = ref["sums"].shape
    first = starts(superblock * WIDTH, PLANES, PLANE)
    head, inside = lax.div(first, jnp.int32(dim)), first < heads * dim
    split = lax.broadcasted_iota(jnp.int32, (PLANES, splits), 1)
    per_split = (item, jnp.broadcast_to(head, split.shape), split)
    inside_split = jnp.broadcast_to(inside, split.shape)
    most = plgpu.load(ref["most"].at[per_split], mask=inside_split, other=NOTHING)
    weight = plgpu.load(ref["weight"].at[per_split], mask=inside_split, other=0.0)
    factor = jnp.exp(most - jnp.max(most, axis=1)[:, None])
    factor /= jnp.maximum(jnp.sum(factor * weight, axis=1), 1e-30)[:, None]
    shape = (PLANES, splits, PLANE)
    lane = lax.rem(first, jnp.int32(dim))[:, :, None] + lax.broadcasted_iota(jnp.int32, shape, 2)
    index = (item, jnp.broadcast_to(head[:, :, None], shape), lax.broadcasted_iota(jnp.int32, shape, 1), lane)
    mask = jnp.broadcast_to(inside[:, :, None], shape)
    total = jnp.sum(plgpu.load(ref["sums"].at[index], mask=mask, other=0.0) * factor[:, :, None], axis=1)
    return jnp.where(plane_columns(superblock) < heads * dim, total, 0.0)


@partial(jax.jit, static_argnames=("columns", "eps", "window", "interpret"))
def attend(
    product: Product,
    squares: jax.Array,
    norms: tuple[Float[Array, "dim"], Float[Array, "dim"]] | None,
    turns: tuple[Float[Array, "m half"], Float[Array, "m half"]],
    lengths: Int[Array, "m"],
    keys: Float[Array, "m capacity keys dim"],
    values: Float[Array, "m capacity keys dim"],
    arrivals: Int[Array, "m keys"],
    *,
    columns: int,
    eps: float,
    window: int | None,
    interpret: bool = False,
) -> tuple[Prepared, jax.Array, jax.Array, jax.Array]:
    """softmax(q kᵀ / √dim) v over the cache and the new position, as the next product reads it, the cache
    with that position, and `arrivals`; queries and keys are normed and rotated. Sums are f32, queries of the
    cache's dtype.

    Args:
        product: of q, k and v, one above the other, with `Residual.scaled`.
        squares: `Residual.squares`.
        norms: scales of the heads' RMSNorm, for queries and for keys, or None without it.
        turns: cosines and sines of the new positions' angles, f32.
        lengths: int32, filled positions of the cache; the new one is written behind them.
        keys, values: the cache, which is written in place.
        arrivals: int32 zeros, in which programs count themselves; zeros again afterwards, in place.
        columns: d, of the residual stream.
        eps: of the RMSNorms.
        window: positions that are seen, the new one included, or None for all.
        interpret: run in interpret mode.

    Raises:
        NotImplementedError: more than 16 queries for each key head.
    """
    m, capacity, num_keys, dim = keys.shape
    heads = Heads(queries=product.weight.rows[0] // dim, keys=num_keys, dim=dim)
    if heads.queries > MOST_QUERIES * num_keys:
        raise NotImplementedError(
            f"attend: {heads.queries} heads on {num_keys} key heads; at most {MOST_QUERIES} of each are taken"
        )
    splits = splits_of(capacity, num_keys * m)
    operands = {"squares": squares, "cos": turns[0], "sin": turns[1], "lengths": lengths}
    operands |= product.operands
    if norms is not None:
        operands |= {"query_norm": norms[0], "key_norm": norms[1]}
    operands |= {"keys": keys, "values": values, "counts": arrivals}
    per_split = jax.ShapeDtypeStruct((m, heads.queries, splits), jnp.float32)
    prepared = abstract_prepared(m, ceil_div(heads.queries * dim, WIDTH))
    parts = {
        "sums": jax.ShapeDtypeStruct((m, heads.queries, splits, dim), jnp.float32),
        "most": per_split,
        "weight": per_split,
    }
    results = {
        **parts,
        "new_keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        "new_values": jax.ShapeDtypeStruct(values.shape, values.dtype),
        "arrivals": jax.ShapeDtypeStruct(arrivals.shape, arrivals.dtype),
        "small": prepared.values,
        "unit": prepared.unit,
    }
    *_, keys, values, arrivals, small, unit = launch(
        partial(
            _attend,
            splits=splits,
            window=capacity + 1 if window is None else window,
            product=abstract(product),
            heads=heads,
            columns=columns,
            eps=eps,
            interpret=interpret,
        ),
        NAME,
        operands,
        results,
        programs=num_keys * splits,
        rows=m,
        warps=WARPS,
        stages=2,
        in_place={"keys": "new_keys", "values": "new_values", "counts": "arrivals"},
        interpret=interpret,
    )
    return Prepared(small, unit), keys, values, arrivals
