"""The Triton kernel between the query, key and value product and attention."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import Product, biased, finished, inverse_rms, starts
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract

NAME = "svsk_heads"
WARPS = 2
HEAD_DIMS = (64, 128)
"""Sizes of a head whose halves lie within a block of 64 rows of the product."""


class Heads(NamedTuple):
    """Numbers of a layer's attention."""

    queries: int
    keys: int
    dim: int


def _work(
    ref: Refs, head: jax.Array, item: jax.Array, *, product: Product, heads: Heads, columns: int, eps: float
) -> None:
    half = heads.dim // 2
    norm = inverse_rms(ref["squares"], item, columns, eps)
    first = starts(head * heads.dim, 2, half)
    lane = lax.broadcasted_iota(jnp.int32, (2, half), 1)
    upper = lax.broadcasted_iota(jnp.int32, (2, half), 0) == 1
    y = biased(ref, finished(ref, product, item, first, half) * norm, first + lane)
    is_query, is_value = head < heads.queries, head >= heads.queries + heads.keys
    if "query_norm" in ref:
        place = starts(0, 2, half) + lane
        of_query, of_key = (plgpu.load(ref[name].at[place]) for name in ("query_norm", "key_norm"))
        scale = jnp.where(is_query, of_query, of_key).astype(jnp.float32)
        y = jnp.where(is_value, y, y * lax.rsqrt(jnp.sum(y * y) / heads.dim + eps) * scale)
    low, high = jnp.sum(jnp.where(upper, 0.0, y), axis=0), jnp.sum(jnp.where(upper, y, 0.0), axis=0)
    turn = lax.broadcasted_iota(jnp.int32, (half,), 0)
    cos = jnp.where(is_value, 1.0, plgpu.load(ref["cos"].at[item, turn]))
    sin = jnp.where(is_value, 0.0, plgpu.load(ref["sin"].at[item, turn]))
    low, high = low * cos - high * sin, high * cos + low * sin

    def store(target, *index):
        plgpu.store(target.at[(*index, turn)], low.astype(target.dtype))
        plgpu.store(target.at[(*index, half + turn)], high.astype(target.dtype))

    slot = jnp.minimum(plgpu.load(ref["lengths"].at[item]), ref["keys"].shape[1] - 1)

    @pl.when(is_query)
    def _():
        store(ref["queries"], item, head)

    @pl.when(jnp.logical_not(is_query) & jnp.logical_not(is_value))
    def _():
        store(ref["new_keys"], item, slot, head - heads.queries)

    @pl.when(is_value)
    def _():
        store(ref["new_values"], item, slot, head - heads.queries - heads.keys)


@partial(jax.jit, static_argnames=("columns", "eps", "dtype", "interpret"))
def finish_heads(
    product: Product,
    squares: jax.Array,
    norms: tuple[Float[Array, "dim"], Float[Array, "dim"]] | None,
    turns: tuple[Float[Array, "m half"], Float[Array, "m half"]],
    lengths: Int[Array, "m"],
    keys: Float[Array, "m capacity heads dim"],
    values: Float[Array, "m capacity heads dim"],
    *,
    columns: int,
    eps: float,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "m queries dim"], jax.Array, jax.Array]:
    """Queries, and the cache with keys and values of the new positions; queries and keys normed and rotated.

    Args:
        product: of q, k and v, one above the other, with `Residual.scaled`.
        squares: `Residual.squares`.
        norms: scales of the heads' RMSNorm, for queries and for keys, or None without it.
        turns: cosines and sines of the new positions' angles, f32.
        lengths: int32, filled positions of the cache; the new one is written behind them.
        keys, values: the cache, which is written in place.
        columns: d, of the residual stream.
        eps: of the RMSNorms.
        dtype: of the queries.
        interpret: run in interpret mode.
    """
    m, _, num_keys, dim = keys.shape
    heads = Heads(queries=product.weight.rows[0] // dim, keys=num_keys, dim=dim)
    operands = {"squares": squares, "cos": turns[0], "sin": turns[1], "lengths": lengths}
    operands |= product.operands
    if norms is not None:
        operands |= {"query_norm": norms[0], "key_norm": norms[1]}
    operands |= {"keys": keys, "values": values}
    shapes = {
        "queries": jax.ShapeDtypeStruct((m, heads.queries, dim), dtype),
        "new_keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        "new_values": jax.ShapeDtypeStruct(values.shape, values.dtype),
    }
    queries, keys, values = launch(
        partial(_work, product=abstract(product), heads=heads, columns=columns, eps=eps),
        NAME,
        operands,
        shapes,
        programs=heads.queries + 2 * heads.keys,
        rows=m,
        warps=WARPS,
        in_place={"keys": "new_keys", "values": "new_values"},
        interpret=interpret,
    )
    return queries, keys, values
