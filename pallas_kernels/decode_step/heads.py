"""What the attention kernel makes of the query, key and value product: heads, normed and rotated."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_step.product import (
    Product,
    biased,
    finishing,
    hidden_zero,
    inverse_rms,
    load_squares,
)
from pallas_kernels.svsk_matmul.triton_layout import ROW_UNIT
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
        """Where the key is among the heads, behind the queries; the value follows it."""
        return 1 << (self.queries_per_key - 1).bit_length()

    @property
    def rows(self) -> int:
        """Of the tile of heads: a power of two, and what a tensor-core product takes."""
        return max(8, 1 << (self.key_row + 1).bit_length())


def finishing_heads(
    ref: Refs,
    head: jax.Array,
    item: jax.Array,
    *,
    product: Product,
    heads: Heads,
    columns: int,
    eps: float,
    threads: int,
) -> Callable[[], tuple[jax.Array, jax.Array]]:
    """Within a kernel: begin to load the queries of a key head, their key and their value, at the new
    position, and return what finishes them.

    Args:
        ref: the product's operands, `squares`, `cos`, `sin` and, with norms, `query_norm` and `key_norm`.
        head: the key head.
        item: which row of x.
        product: of q, k and v, one above the other.
        heads: their numbers.
        columns: d, of the residual stream.
        eps: of the RMSNorms.
        threads: of the program.

    Returns:
        The first and the second half of each head, f32 [rows, dim / 2]: queries from row 0, the key at
        `key_row`, then the value. Queries and the key are normed and rotated. Other rows mean nothing.
    """
    half, rows, key = heads.dim // 2, heads.rows, heads.key_row
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    place = heads.queries + head + jnp.where(row == key, 0, heads.keys)
    place = jnp.where(row < key, head * heads.queries_per_key + row, place)
    known = (row < heads.queries_per_key) | (row == key) | (row == key + 1)
    starts = [jnp.where(known, place * heads.dim + side, product.weight.padded_rows) for side in (0, half)]
    # A head of two blocks of rows, at an even place.
    shared = product.weight.paired and half == ROW_UNIT
    finish = finishing(ref, product, item, starts, half, shared=shared, threads=threads)
    squares = load_squares(ref, item)
    turn = hidden_zero(head) + lax.broadcasted_iota(jnp.int32, (rows, half), 1)
    row = lax.broadcasted_iota(jnp.int32, (rows, half), 0)
    cos, sin = (plgpu.load(ref[name].at[item, turn], mask=row <= key, other=0.0) for name in ("cos", "sin"))
    scales = []
    if "query_norm" in ref:
        for lane in (turn, half + turn):
            of_query = plgpu.load(ref["query_norm"].at[lane], mask=row < key, other=0)
            scales.append((of_query, plgpu.load(ref["key_norm"].at[lane], mask=row == key, other=0)))

    def finished() -> tuple[jax.Array, jax.Array]:
        norm = inverse_rms(squares, columns, eps)
        ys = []
        for y, start in zip(finish(), starts, strict=True):
            column = start + lax.broadcasted_iota(jnp.int32, y.shape, 1)
            ys.append(biased(ref, y * norm, column, jnp.broadcast_to(known, y.shape)))
        low, high = ys
        is_value = row == key + 1
        if scales:
            rms = jnp.sum(low * low + high * high, axis=1)[:, None] / heads.dim
            factor = lax.rsqrt(rms + eps)
            low, high = (
                jnp.where(is_value, y, y * factor * (of_query + of_key).astype(jnp.float32))
                for y, (of_query, of_key) in zip((low, high), scales, strict=True)
            )
        first, second = low * cos - high * sin, high * cos + low * sin
        return jnp.where(is_value, low, first), jnp.where(is_value, high, second)

    return finished
