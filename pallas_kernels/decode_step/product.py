"""An unfinished product y = x Ŵᵀ of a decode step, and what the kernels that finish it share."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.svsk_matmul import triton_decode, triton_rows
from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, TritonWeight
from pallas_kernels.svsk_matmul.triton_operands import Refs
from pallas_kernels.svsk_matmul.triton_planes import fma_f32
from pallas_kernels.svsk_matmul.triton_prepare import PLANES, Prepared
from pallas_kernels.svsk_matmul.tuning import batch_of, configuration
from pallas_kernels.svsk_matmul.types import Leaf

RANKS = 16
"""Sidecar rows taken at a time for one row of x, whose programs wait for what they load."""
RANKS_OF_MANY = 8
"""And for several, whose programs are so many that their registers count."""
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


def load_squares(ref: Refs, item: jax.Array) -> jax.Array:
    """Within a kernel: the sums of squares of a `Residual`, and zeros."""
    blocks = ref["squares"].shape[1]
    index = lax.broadcasted_iota(jnp.int32, (1 << (blocks - 1).bit_length(),), 0)
    return plgpu.load(ref["squares"].at[item, index], mask=index < blocks, other=0.0)


def inverse_rms(squares: jax.Array, columns: int, eps: float) -> jax.Array:
    """1 / √(mean(x²) + ε) from `load_squares`."""
    return lax.rsqrt(jnp.sum(squares) / columns + eps)


class _Unit(NamedTuple):
    """Within a kernel: where some rows of y find their sidecar, int32 [h, 1] each."""

    below: jax.Array
    """The first row within its block of 64."""
    first: jax.Array
    """Row of V x."""
    count: jax.Array
    """Ranks."""
    begin: jax.Array
    """Row of Uᵀ."""


def finishing(
    ref: Refs,
    product: Product,
    item: jax.Array,
    starts: Sequence[jax.Array],
    width: int,
    *,
    shared: bool = False,
    asm: bool,
) -> Callable[[], list[jax.Array]]:
    """Within a kernel: begin to load rows of y of one row of x, and return what finishes them: without bias,
    f32 [h, width] for each of `starts`. What is loaded between is on its way at the same time.

    Args:
        ref: the product's operands.
        product: its shapes.
        item: which row of x.
        starts: int32 [h, 1], the first of each `width` rows, which lie within one unit of 64. From the padded
            rows of the weight on there are zeros.
        width: of rows.
        shared: whether all starts need the same rows of V.
        asm: inline assembly.
    """
    padded_rows = product.weight.padded_rows
    at_a_time = RANKS if product.parts.shape[1] == 1 else RANKS_OF_MANY

    def loaded(row: jax.Array, mask: jax.Array) -> list[jax.Array]:
        return [
            plgpu.load(ref["parts"].at[jnp.int32(part), item, row], mask=mask, other=0.0)
            for part in range(product.parts.shape[0])
        ]

    def summed(values: list[jax.Array]) -> jax.Array:
        return sum(values[1:], values[0])

    found: list[list[jax.Array]] = []
    units: list[_Unit] = []
    for start in starts:
        alive = start < padded_rows
        row = start + lax.broadcasted_iota(jnp.int32, (start.shape[0], width), 1)
        found.append(loaded(row, jnp.broadcast_to(alive, row.shape)))
        if "u" in ref:
            unit = lax.div(start, jnp.int32(ROW_UNIT))
            ranges = (plgpu.load(ref["ranges"].at[unit, jnp.int32(i)], mask=alive, other=0) for i in range(3))
            # Known to be zero, the first row lets U be loaded 16 bytes at a time.
            below = jnp.zeros_like(start) if width == ROW_UNIT else lax.rem(start, jnp.int32(ROW_UNIT))
            units.append(_Unit(below, *ranges))

    def load_t(unit: _Unit, rank: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        alive = rank < unit.count
        scale = plgpu.load(ref["v_scale"].at[unit.first + rank], mask=alive, other=0.0)
        return loaded(padded_rows + unit.first + rank, alive), scale

    def load_u(unit: _Unit, rank: jax.Array, y: jax.Array) -> jax.Array:
        row = unit.below + lax.broadcasted_iota(jnp.int32, y.shape, 1)
        index = jnp.broadcast_to(unit.begin + rank, row.shape), row
        return plgpu.load(ref["u"].at[index], mask=jnp.broadcast_to(rank < unit.count, row.shape), other=0)

    def by_rank(i, ys):
        # All loads come before the first sum.
        ranks = [i * at_a_time + rank for rank in range(at_a_time)]
        us = [[load_u(unit, rank, y) for rank in ranks] for y, unit in zip(ys, units, strict=True)]
        ts = [[load_t(unit, rank) for rank in ranks] for unit in units[: 1 if shared else None]]
        ts = [[summed(values) * scale for values, scale in t] for t in ts]
        sums = []
        for y, u, t in zip(ys, us, ts * len(ys) if shared else ts, strict=True):
            for one_u, one_t in zip(u, t, strict=True):
                y = fma_f32(jnp.broadcast_to(one_t, y.shape), one_u.astype(jnp.float32), y, asm=asm)
            sums.append(y)
        return sums

    def finish() -> list[jax.Array]:
        ys = [summed(values) for values in found]
        if not units:
            return ys
        most = jnp.max(reduce(jnp.maximum, (unit.count for unit in units)))
        return lax.fori_loop(0, lax.div(most + (at_a_time - 1), jnp.int32(at_a_time)), by_rank, ys)

    return finish


def biased(ref: Refs, y: jax.Array, column: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Within a kernel: y with the bias at columns, if there is one."""
    if "bias" not in ref:
        return y
    return y + plgpu.load(ref["bias"].at[column], mask=mask, other=0).astype(jnp.float32)
