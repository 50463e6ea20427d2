"""What the attention kernel makes of the query, key and value product: heads, normed and rotated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_step.product import Product, biased, finished, inverse_rms
from pallas_kernels.svsk_matmul.triton_operands import Refs

HEAD_DIMS = (64, 128)
"""Sizes of a head whose halves lie within a block of 64 rows of the product."""


class Heads(NamedTuple):
    """Numbers of a layer's attention."""

    queries: int
    keys: int
    dim: int

    @property
    def queries_per_key(self) -> int:
        """Of each key head."""
        return self.queries // self.keys

    @property
    def key_row(self) -> int:
        """Where the key is among the `finished_heads`, behind the queries; the value follows it."""
        return 1 << (self.queries_per_key - 1).bit_length()

    @property
    def rows(self) -> int:
        """Of `finished_heads`: a power of two."""
        return 1 << (self.key_row + 1).bit_length()


def finished_heads(
    ref: Refs, head: jax.Array, item: jax.Array, *, product: Product, heads: Heads, columns: int, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Within a kernel: the queries of a key head, their key and their value, at the new position.

    Args:
        ref: the product's operands, `squares`, `cos`, `sin` and, with norms, `query_norm` and `key_norm`.
        head: the key head.
        item: which row of x.
        product: of q, k and v, one above the other.
        heads: their numbers.
        columns: d, of the residual stream.
        eps: of the RMSNorms.

    Returns:
        The first and the second half of each head, f32 [rows, dim / 2]: queries from row 0, the key at
        `key_row`, then the value. Queries and the key are normed and rotated. Other rows mean nothing.
    """
    half, rows, key = heads.dim // 2, heads.rows, heads.key_row
    norm = inverse_rms(ref["squares"], item, columns, eps)
    index = lax.broadcasted_iota(jnp.int32, (2 * rows, 1), 0)
    row, upper = index // 2, index % 2
    place = heads.queries + head + jnp.where(row == key, 0, heads.keys)
    place = jnp.where(row < key, head * heads.queries_per_key + row, place)
    known = (row < heads.queries_per_key) | (row == key) | (row == key + 1)
    start = jnp.where(known, place * heads.dim + upper * half, product.weight.padded_rows)
    column = start + lax.broadcasted_iota(jnp.int32, (2 * rows, half), 1)
    y = finished(ref, product, item, start, half) * norm
    y = biased(ref, y, column, jnp.broadcast_to(known, column.shape)).reshape(rows, 2, half)
    is_upper = lax.broadcasted_iota(jnp.int32, y.shape, 1) == 1
    low, high = jnp.sum(jnp.where(is_upper, 0.0, y), axis=1), jnp.sum(jnp.where(is_upper, y, 0.0), axis=1)

    row = lax.broadcasted_iota(jnp.int32, (rows, half), 0)
    turn = lax.broadcasted_iota(jnp.int32, (rows, half), 1)
    is_value = row == key + 1
    if "query_norm" in ref:
        rms = jnp.sum(low * low + high * high, axis=1) / heads.dim
        factor = jnp.where(is_value, 1.0, lax.rsqrt(rms + eps)[:, None])

        def scale(lane: jax.Array) -> jax.Array:
            of_query = plgpu.load(ref["query_norm"].at[lane], mask=row < key, other=0)
            of_key = plgpu.load(ref["key_norm"].at[lane], mask=row == key, other=0)
            return jnp.where(is_value, 1.0, (of_query + of_key).astype(jnp.float32))

        low, high = low * factor * scale(turn), high * factor * scale(half + turn)
    cos = jnp.where(is_value, 1.0, plgpu.load(ref["cos"].at[item, turn]))
    sin = jnp.where(is_value, 0.0, plgpu.load(ref["sin"].at[item, turn]))
    return low * cos - high * sin, high * cos + low * sin
