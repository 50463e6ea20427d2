"""The Triton kernel of attention, from the query, key and value product on: positions of the cache are split
over programs, and the last of them to come joins what they found."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.heads import Heads, finishing_heads
from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import RANKS, WIDTH, Product, hidden_zero, plane_columns, starts
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract
from pallas_kernels.svsk_matmul.triton_planes import fma_f32
from pallas_kernels.svsk_matmul.triton_prepare import PLANES, Prepared, abstract_prepared, store_superblock

NAME = "svsk_attend"
POSITIONS, POSITIONS_OF_MANY = 64, 32
"""Positions that a program takes at a time, and where there are `MANY`."""
WARPS, WARPS_OF_LARGE, WARPS_OF_MANY, STAGES = 4, 8, 2, 3
"""Of a program, of one whose heads overflow the registers of four warps, of one of `MANY`, and of what it
loads ahead."""
SMALL_TILE, LARGE_TILE = 8, 32
"""Heads that four warps hold, and that they do not; between them, eight warps pay where a program has a
multiprocessor alone."""
MOST_QUERIES = 16
"""Of a key head."""
PROGRAMS = 128
"""Programs that fill a GPU."""
MANY = 2 * PROGRAMS
"""Programs, beyond which they are small, so that four fit on a multiprocessor: of the others two do, and
there would be a second wave."""
MOST_SPLITS = 32
SPLITS, MOST_JOINED = 16, 8192
"""Of the positions, and numbers of a key head in all of them, beyond which another split costs more to join
than it saves, unless it has `BLOCKS`."""
BLOCKS = 4
NOTHING = -1e30
"""The largest score of no position."""


def splits_of(capacity: int, programs: int, numbers: int) -> int:
    """Into how many parts the positions are split, a power of two, for so many programs without.

    Args:
        capacity: positions of the cache.
        programs: texts times key heads.
        numbers: of all queries of a key head.
    """
    blocks, wanted, few = (
        1 << most.bit_length() >> 1
        for most in (capacity // POSITIONS, PROGRAMS // programs, min(SPLITS, MOST_JOINED // numbers))
    )
    return max(1, min(wanted, max(min(blocks, few), min(blocks // BLOCKS, MOST_SPLITS))))


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
    warps: int,
    positions: int,
    interpret: bool,
) -> None:
    head, split = lax.div(program, jnp.int32(splits)), lax.rem(program, jnp.int32(splits))
    capacity, half, per_key = ref["keys"].shape[1], heads.dim // 2, heads.queries_per_key
    dtype, rows, key_row = ref["keys"].dtype, heads.rows, heads.key_row
    # The new position is at `slot`; those before it are read from the cache.
    length = plgpu.load(ref["lengths"].at[item])
    finish = finishing_heads(
        ref, head, item, product=product, heads=heads, columns=columns, eps=eps, threads=32 * warps
    )
    slot = jnp.minimum(length, capacity - 1)
    begin = jnp.maximum(length + 1 - window, 0)
    size = positions * lax.div(slot - begin + (positions * splits - 1), jnp.int32(positions * splits))
    start = begin + split * size
    stop = jnp.minimum(start + size, slot)

    def block(position):
        index = position + lax.broadcasted_iota(jnp.int32, (positions, half), 0)
        column = lax.broadcasted_iota(jnp.int32, (positions, half), 1)
        return tuple(
            plgpu.load(ref[name].at[item, index, head, side + column], mask=index < stop, other=0)
            for name in ("keys", "values")
            for side in (0, half)
        )

    # Under way while the heads are made.
    first = block(start)
    scale = jnp.float32(heads.dim**-0.5)
    made = finish()
    # What depends on a number that is not known goes to shared memory here, not before what heads wait for.
    first = tuple(jnp.where(length >= 0, each, 0) for each in first)
    queries = tuple(each.astype(dtype).T for each in made)
    is_last = split == splits - 1

    def new_position():
        """It is written into the cache, and read from there by the threads that need it."""
        row, lane = (lax.broadcasted_iota(jnp.int32, made[0].shape, axis) for axis in range(2))
        lane += hidden_zero(head)
        for name, place in (("new_keys", key_row), ("new_values", key_row + 1)):
            for side, each in zip((0, half), made, strict=True):
                # In interpret mode a masked store writes all it is given, and these share an index.
                one = jnp.sum(jnp.where(row == place, each, 0.0), axis=0) if interpret else each
                mask = None if interpret else row == place
                column = side + (lane[0] if interpret else lane)
                plgpu.store(ref[name].at[item, slot, head, column], one.astype(dtype), mask=mask)
        if not interpret:
            plgpu.debug_barrier()
        own = jnp.zeros((rows,), jnp.float32)
        for side, each in zip((0, half), made, strict=True):
            key = plgpu.load(ref["new_keys"].at[item, slot, head, side + lane])
            query = each.astype(dtype).astype(jnp.float32)
            own += jnp.sum(query * key.astype(jnp.float32), axis=1)
        lane = lax.broadcasted_iota(jnp.int32, (half, rows), 0)
        values = (plgpu.load(ref["new_values"].at[item, slot, head, side + lane]) for side in (0, half))
        return *(value.astype(jnp.float32) for value in values), own * scale, jnp.ones((rows,), jnp.float32)

    def nothing():
        empty = jnp.zeros((half, rows), jnp.float32)
        return empty, empty, jnp.full((rows,), NOTHING), jnp.zeros((rows,), jnp.float32)

    def some(carry, position, block):
        """Positions down, queries across."""
        low, high, most, weight = carry
        score = (plgpu.dot(block[0], queries[0]) + plgpu.dot(block[1], queries[1])) * scale
        inside = position + lax.broadcasted_iota(jnp.int32, score.shape, 0) < stop
        score = jnp.where(inside, score, NOTHING)
        larger = jnp.maximum(most, jnp.max(score, axis=0))
        p = jnp.where(inside, jnp.exp(score - larger[None, :]), 0.0)
        shrink = jnp.exp(most - larger)
        low, high = (
            total * shrink[None, :] + plgpu.dot(values.T, p.astype(dtype))
            for total, values in zip((low, high), block[2:], strict=True)
        )
        return low, high, larger, weight * shrink + jnp.sum(p, axis=0)

    carry = some(lax.cond(is_last, new_position, nothing), start, first)
    blocks = lax.div(jnp.maximum(stop - start, 0) + (positions - 1), jnp.int32(positions))

    def further(i, carry):
        position = start + i * positions
        return some(carry, position, block(position))

    *totals, most, weight = lax.fori_loop(1, blocks, further, carry)
    lane = lax.broadcasted_iota(jnp.int32, (half, rows), 0)
    query = lax.broadcasted_iota(jnp.int32, (half, rows), 1)
    for side, total in zip((0, half), totals, strict=True):
        index = (item, head * per_key + query, split, side + lane)
        plgpu.store(ref["sums"].at[index], total, mask=query < per_key)
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
        joined = [_joined(ref, group * count + each, item, asm=not interpret) for each in range(count)]
        for each, total in enumerate(joined):
            store_superblock(ref["small"], ref["unit"], item, group * count + each, total)
        plgpu.store(ref["arrivals"].at[item, group], jnp.int32(0))


def _joined(ref: Refs, superblock: jax.Array, item: jax.Array, *, asm: bool) -> jax.Array:
    """Of all splits, f32 [4, 64]."""
    _, heads, splits, dim = ref["sums"].shape
    first = starts(superblock * WIDTH, PLANES, PLANE)
    head, inside = lax.div(first, jnp.int32(dim)), first < heads * dim
    lane = lax.rem(first, jnp.int32(dim)) + lax.broadcasted_iota(jnp.int32, (PLANES, PLANE), 1)
    at, mask = jnp.broadcast_to(head, lane.shape), jnp.broadcast_to(inside, lane.shape)

    def loaded(split):
        sums = plgpu.load(ref["sums"].at[item, at, split, lane], mask=mask, other=0.0)
        most = plgpu.load(ref["most"].at[item, head, split], mask=inside, other=NOTHING)
        return sums, most, plgpu.load(ref["weight"].at[item, head, split], mask=inside, other=0.0)

    sums, most, weights = zip(*(loaded(jnp.int32(split)) for split in range(splits)), strict=True)
    largest = reduce(jnp.maximum, most)
    total, weight = jnp.zeros(lane.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    for split in range(splits):
        factor = jnp.exp(most[split] - largest)
        weight = fma_f32(factor, weights[split], weight, asm=asm)
        total = fma_f32(jnp.broadcast_to(factor, total.shape), sums[split], total, asm=asm)
    total = total / jnp.maximum(weight, 1e-30)
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
    splits = splits_of(capacity, num_keys * m, heads.queries_per_key * dim)
    programs = num_keys * m * splits
    large = heads.rows >= LARGE_TILE or (heads.rows > SMALL_TILE and programs <= PROGRAMS)
    # More ranks at once overflow their registers.
    many = heads.rows <= SMALL_TILE and programs > MANY and product.weight.sidecar_ranks <= RANKS
    warps = WARPS_OF_LARGE if large else WARPS_OF_MANY if many else WARPS
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
            warps=warps,
            positions=POSITIONS_OF_MANY if many else POSITIONS,
            interpret=interpret,
        ),
        NAME,
        operands,
        results,
        programs=num_keys * splits,
        rows=m,
        warps=warps,
        stages=STAGES,
        in_place={"keys": "new_keys", "values": "new_values", "counts": "arrivals"},
        interpret=interpret,
    )
    return Prepared(small, unit), keys, values, arrivals
