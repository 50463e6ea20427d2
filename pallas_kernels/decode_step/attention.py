"""The Triton kernels of attention over the cache: positions split over programs, then joined."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import WIDTH, plane_columns, starts
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE
from pallas_kernels.svsk_matmul.triton_operands import Refs
from pallas_kernels.svsk_matmul.triton_prepare import PLANES, Prepared, abstract_prepared, store_superblock

ATTEND, JOIN = "svsk_attend", "svsk_join"
POSITIONS = 64
"""Positions that a program takes at a time."""
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


def _attend(ref: Refs, program: jax.Array, item: jax.Array, *, splits: int, window: int) -> None:
    head, split = lax.div(program, jnp.int32(splits)), lax.rem(program, jnp.int32(splits))
    per_key = ref["queries"].shape[1] // ref["keys"].shape[2]
    dim = ref["keys"].shape[3]
    row = lax.broadcasted_iota(jnp.int32, (MOST_QUERIES, dim), 0)
    lane = lax.broadcasted_iota(jnp.int32, (MOST_QUERIES, dim), 1)
    query = head * per_key + row
    q = plgpu.load(ref["queries"].at[item, query, lane], mask=row < per_key, other=0)
    stop = jnp.minimum(plgpu.load(ref["lengths"].at[item]) + 1, ref["keys"].shape[1])
    start = jnp.maximum(stop - window, 0)
    size = POSITIONS * lax.div(stop - start + (POSITIONS * splits - 1), jnp.int32(POSITIONS * splits))
    start += split * size
    stop = jnp.minimum(start + size, stop)

    def block(name, position):
        index = position + lax.broadcasted_iota(jnp.int32, (POSITIONS, dim), 0)
        column = lax.broadcasted_iota(jnp.int32, (POSITIONS, dim), 1)
        return plgpu.load(ref[name].at[item, index, head, column], mask=index < stop, other=0)

    def some(i, carry):
        total, most, weight = carry
        position = start + i * POSITIONS
        score = plgpu.dot(q, block("keys", position).T) * jnp.float32(dim**-0.5)
        inside = position + lax.broadcasted_iota(jnp.int32, score.shape, 1) < stop
        score = jnp.where(inside, score, NOTHING)
        larger = jnp.maximum(most, jnp.max(score, axis=1))
        p = jnp.where(inside, jnp.exp(score - larger[:, None]), 0.0)
        shrink = jnp.exp(most - larger)
        values = block("values", position)
        total = total * shrink[:, None] + plgpu.dot(p.astype(values.dtype), values)
        return total, larger, weight * shrink + jnp.sum(p, axis=1)

    blocks = lax.div(jnp.maximum(stop - start, 0) + (POSITIONS - 1), jnp.int32(POSITIONS))
    each = jnp.zeros((MOST_QUERIES,), jnp.float32)
    empty = jnp.zeros((MOST_QUERIES, dim), jnp.float32), each + NOTHING, each
    total, most, weight = lax.fori_loop(0, blocks, some, empty)
    plgpu.store(ref["sums"].at[item, query, split, lane], total, mask=row < per_key)
    one = lax.broadcasted_iota(jnp.int32, (MOST_QUERIES,), 0)
    for name, value in (("most", most), ("weight", weight)):
        plgpu.store(ref[name].at[item, head * per_key + one, split], value, mask=one < per_key)


def _join(ref: Refs, superblock: jax.Array, item: jax.Array) -> None:
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
    total = jnp.where(plane_columns(superblock) < heads * dim, total, 0.0)
    store_superblock(ref["values"], ref["unit"], item, superblock, total)


@partial(jax.jit, static_argnames=("window", "interpret"))
def attend(
    queries: Float[Array, "m heads dim"],
    keys: Float[Array, "m capacity keys dim"],
    values: Float[Array, "m capacity keys dim"],
    lengths: Int[Array, "m"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Prepared:
    """softmax(q kᵀ / √dim) v over the cache, as the next product reads it; f32 sums.

    Args:
        queries: of the position at `lengths`.
        keys, values: the cache, filled up to and with that position.
        lengths: int32, positions before it.
        window: positions that are seen, itself included, or None for all.
        interpret: run in interpret mode.

    Raises:
        NotImplementedError: more than 16 queries for each key head.
    """
    m, heads, dim = queries.shape
    capacity, num_keys = keys.shape[1:3]
    if heads > MOST_QUERIES * num_keys:
        raise NotImplementedError(
            f"attend: {heads} heads on {num_keys} key heads; at most {MOST_QUERIES} of each can be taken"
        )
    splits = splits_of(capacity, num_keys * m)
    per_split = jax.ShapeDtypeStruct((m, heads, splits), jnp.float32)
    parts = {
        "sums": jax.ShapeDtypeStruct((m, heads, splits, dim), jnp.float32),
        "most": per_split,
        "weight": per_split,
    }
    found = launch(
        partial(_attend, splits=splits, window=capacity + 1 if window is None else window),
        ATTEND,
        {"queries": queries, "keys": keys, "values": values, "lengths": lengths},
        parts,
        programs=num_keys * splits,
        rows=m,
        warps=4,
        stages=2,
        interpret=interpret,
    )
    superblocks = ceil_div(heads * dim, WIDTH)
    small, unit = launch(
        _join,
        JOIN,
        dict(zip(parts, found, strict=True)),
        abstract_prepared(m, superblocks)._asdict(),
        programs=superblocks,
        rows=m,
        warps=8,
        interpret=interpret,
    )
    return Prepared(small, unit)
