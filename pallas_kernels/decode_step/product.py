"""An unfinished product y = x Ŵᵀ of a decode step, and what the kernels that finish it share."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.svsk_matmul import triton_decode, triton_rows
from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, TritonWeight
from pallas_kernels.svsk_matmul.triton_operands import Refs
from pallas_kernels.svsk_matmul.triton_prepare import PLANES, Prepared
from pallas_kernels.svsk_matmul.tuning import batch_of, configuration
from pallas_kernels.svsk_matmul.types import Leaf

RANKS = 16
"""Sidecar rows taken at a time."""
AT_ONCE = 4
"""Blocks of rows up to which a program adds ranks up at once."""
WIDTH = PLANES * PLANE
"""Columns that a program finishes: a superblock of the next product's x."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """y = Σ parts + U diag(scale) (V x) for m rows of x, before the sum."""

    parts: Leaf
    """f32 [parts, m, rows]: of x Ŵᵀ without sidecar for the weight's padded rows, and after them of x Vᵀ."""
    weight: TritonWeight
    bias: Leaf | None = None

    @property
    def operands(self) -> dict[str, jax.Array]:
        """What a kernel that finishes it reads, by name."""
        found = {"parts": self.parts, "bias": self.bias}
        found |= {name: getattr(self.weight, name) for name in ("v_scale", "u", "ranges")}
        return {name: value for name, value in found.items() if value is not None}


@partial(jax.jit, static_argnames="interpret")
def product(
    x: Prepared, weight: TritonWeight, bias: jax.Array | None = None, *, interpret: bool = False
) -> Product:
    """x Ŵᵀ + bias, unfinished. m is 1, or a multiple of what `batch_of` says of it.

    Args:
        x: m rows of K columns.
        weight: laid out for the kernels.
        bias: [n] for the weight's rows without padding, or None.
        interpret: run in interpret mode.

    Raises:
        ValueError: m is another number.
    """
    m = x.unit.shape[0]
    if m % batch_of(m):
        raise ValueError(f"decode step: {m} rows of x; expected 1, 8, 16, 32 or a multiple of 64: pad them")
    blocks = configuration(weight, m)
    kernel = triton_decode if m == 1 else triton_rows
    return Product(
        parts=kernel.partial_products(x, weight, blocks, interpret=interpret), weight=weight, bias=bias
    )


def plane_columns(superblock: jax.Array) -> jax.Array:
    """Within a kernel: the columns of a superblock, int32 [4, 64]."""
    shape = (PLANES, PLANE)
    plane = lax.broadcasted_iota(jnp.int32, shape, 0) * PLANE
    return superblock * WIDTH + plane + lax.broadcasted_iota(jnp.int32, shape, 1)


def starts(first: jax.Array | int, height: int, width: int) -> jax.Array:
    """Within a kernel: the first rows of some blocks of rows, int32 [height, 1]."""
    return first + lax.broadcasted_iota(jnp.int32, (height, 1), 0) * width


def inverse_rms(ref: Any, item: jax.Array, columns: int, eps: float) -> jax.Array:
    """Within a kernel: 1 / √(mean(x²) + ε) from the sums of squares of a `Residual`."""
    blocks = ref.shape[1]
    index = lax.broadcasted_iota(jnp.int32, (1 << (blocks - 1).bit_length(),), 0)
    squares = plgpu.load(ref.at[item, index], mask=index < blocks, other=0.0)
    return lax.rsqrt(jnp.sum(squares) / columns + eps)


def finished(ref: Refs, product: Product, item: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """Within a kernel: rows of y of one row of x, without bias, f32 [h, width].

    Args:
        ref: the product's operands.
        product: its shapes.
        item: which row of x.
        start: int32 [h, 1], the first of each `width` rows, which lie within one unit of 64. From the padded
            rows of the weight on there are zeros.
        width: of rows.
    """
    parts, height, padded_rows = product.parts.shape[0], start.shape[0], product.weight.padded_rows
    alive = start < padded_rows
    row = start + lax.broadcasted_iota(jnp.int32, (height, width), 1)

    def loaded(row: jax.Array, mask: jax.Array) -> list[jax.Array]:
        return [
            plgpu.load(ref["parts"].at[jnp.int32(part), item, row], mask=mask, other=0.0)
            for part in range(parts)
        ]

    def summed(row: jax.Array, mask: jax.Array) -> jax.Array:
        values = loaded(row, mask)
        return sum(values[1:], values[0])

    y = summed(row, jnp.broadcast_to(alive, row.shape))
    if "u" not in ref:
        return y
    unit = lax.div(start, jnp.int32(ROW_UNIT))
    # Known to be zero, it lets U be loaded 16 bytes at a time.
    below = jnp.zeros_like(start) if width == ROW_UNIT else lax.rem(start, jnp.int32(ROW_UNIT))
    first, count, begin = (
        plgpu.load(ref["ranges"].at[unit, jnp.int32(i)], mask=alive, other=0) for i in range(3)
    )

    def some_at_once(i, y):
        here = i * RANKS + lax.broadcasted_iota(jnp.int32, (height, RANKS), 1)
        alive = here < count
        scale = plgpu.load(ref["v_scale"].at[first + here], mask=alive, other=0.0)
        t = summed(padded_rows + first + here, alive) * scale
        shape = (height, width, RANKS)
        u_row = below[:, :, None] + lax.broadcasted_iota(jnp.int32, shape, 1)
        rank = i * RANKS + lax.broadcasted_iota(jnp.int32, shape, 2)
        mask = rank < count[:, :, None]
        u = plgpu.load(ref["u"].at[begin[:, :, None] + rank, u_row], mask=mask, other=0)
        return y + jnp.sum(t[:, None, :] * u.astype(jnp.float32), axis=2)

    def some_by_rank(i, y):
        u_row = below + lax.broadcasted_iota(jnp.int32, (height, width), 1)
        factors = []
        for each in range(RANKS):
            here = i * RANKS + each
            alive = here < count
            index = jnp.broadcast_to(begin + here, u_row.shape), u_row
            u = plgpu.load(ref["u"].at[index], mask=jnp.broadcast_to(alive, u_row.shape), other=0)
            scale = plgpu.load(ref["v_scale"].at[first + here], mask=alive, other=0.0)
            factors.append((u, scale, loaded(padded_rows + first + here, alive)))
        # All loads come before the first sum.
        for u, scale, values in factors:
            y += sum(values[1:], values[0]) * scale * u.astype(jnp.float32)
        return y

    # The sum at once goes through shuffles, more than it saves in loads of V x for each row.
    some = some_at_once if height <= AT_ONCE else some_by_rank
    return lax.fori_loop(0, lax.div(jnp.max(count) + (RANKS - 1), jnp.int32(RANKS)), some, y)


def biased(ref: Refs, y: jax.Array, column: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Within a kernel: y with the bias at columns, if there is one."""
    if "bias" not in ref:
        return y
    return y + plgpu.load(ref["bias"].at[column], mask=mask, other=0).astype(jnp.float32)
