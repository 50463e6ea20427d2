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
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, SUPERBLOCK, TritonWeight
from pallas_kernels.svsk_matmul.triton_operands import Refs, stack_index
from pallas_kernels.svsk_matmul.triton_prepare import PLANES, Prepared
from pallas_kernels.svsk_matmul.tuning import batch_of, configuration
from pallas_kernels.svsk_matmul.types import Leaf

RANKS = 16
"""Of the sidecar, taken at a time."""
WIDTH = PLANES * PLANE
"""Columns that a program finishes: a superblock of the next product's x."""


class Chosen(NamedTuple):
    """Which matrix of a stack each of m rows of a product has."""

    matrices: jax.Array
    """int32 [m]."""
    order: jax.Array | None
    """int32, at least m: in which a launch takes the rows. Those with the same matrix come one after another,
    so that it is read from memory once. None: as they are."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """y = Σ parts + U (diag(scale) V x) for m rows, before the sum. With `chosen` a row of x has several."""

    parts: Leaf
    """f32 [parts, m, columns]: of x Ŵᵀ without sidecar for the weight's padded rows, and after them of
    x Vᵀ diag(scale), in their places."""
    weight: TritonWeight
    bias: Leaf | None = None
    chosen: Chosen | None = None
    """Which matrix each row has, where `weight` is a stack."""

    @property
    def operands(self) -> dict[str, jax.Array]:
        """What a kernel that finishes it reads, by name."""
        found = {"parts": self.parts, "bias": self.bias}
        found["layer"] = None if self.chosen is None else self.chosen.matrices
        found |= {name: getattr(self.weight, name) for name in ("u", "ranges")}
        return {name: value for name, value in found.items() if value is not None}


@partial(jax.jit, static_argnames="interpret")
def product(
    x: Prepared,
    weight: TritonWeight,
    bias: jax.Array | None = None,
    *,
    chosen: Chosen | None = None,
    interpret: bool = False,
) -> Product:
    """x Ŵᵀ + bias, unfinished. m is 1, or a multiple of what `batch_of` says of it; with `chosen` any number.

    Args:
        x: m rows of K columns.
        weight: laid out for the kernels.
        bias: [n] for the weight's rows without padding, or None.
        chosen: of c m rows, where `weight` is a stack: each row of x has c results one after another, of
            these matrices. x is in runs of 256 columns then.
        interpret: run in interpret mode.

    Raises:
        ValueError: m is another number; with `chosen`, results that are no multiple of it, x in other runs or
            a bias.
    """
    m = x.unit.shape[0]
    if chosen is not None:
        run, rows = x.values.shape[2], len(chosen.matrices)
        if rows % m or (m > 1 and run != SUPERBLOCK) or bias is not None:
            raise ValueError(
                f"decode step: {rows} products with matrices of a stack for {m} rows of x in runs of {run}; "
                f"expected a multiple of {m}, runs of {SUPERBLOCK} and no bias"
            )
        blocks = configuration(weight, 1, matrices=rows)
        parts = triton_decode.partial_products(
            x, weight, blocks, layer=chosen.matrices, order=chosen.order, interpret=interpret
        )
        return Product(parts=parts, weight=weight, chosen=chosen)
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


def hidden_zero(index: jax.Array) -> jax.Array:
    """Within a kernel: zero, for an index that is not negative, of which the compiler knows neither. Added to
    an index it hides what that is a multiple of, so that a thread accesses one number there and not the next
    ones too. Tensors of which all accesses are so have their elements in the same threads as the sums over a
    row's ranks, and need not go through shared memory to meet them."""
    return jnp.minimum(index + 1, 0)


def load_squares(ref: Refs, item: jax.Array) -> jax.Array:
    """Within a kernel: the sums of squares of a `Residual`, and zeros."""
    blocks = ref["squares"].shape[1]
    index = lax.broadcasted_iota(jnp.int32, (1 << (blocks - 1).bit_length(),), 0)
    return plgpu.load(ref["squares"].at[item, index], mask=index < blocks, other=0.0)


def inverse_rms(squares: jax.Array, columns: int, eps: float) -> jax.Array:
    """1 / √(mean(x²) + ε) from `load_squares`."""
    return lax.rsqrt(jnp.sum(squares) / columns + eps)


class _Unit(NamedTuple):
    """Within a kernel: where some rows of y find their sidecar."""

    row: jax.Array
    """Row of U, int32 [h, width]."""
    first: jax.Array
    """Place of its first number of V x, int32 [h, 1]."""
    count: jax.Array
    """Ranks, int32 [h, 1]."""
    alive: jax.Array
    """Whether there are such rows, [h, 1]."""


def finishing(
    ref: Refs,
    product: Product,
    item: jax.Array,
    starts: Sequence[jax.Array],
    width: int,
    *,
    shared: bool = False,
    threads: int,
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
        threads: of the program, over which V x is spread.
    """
    padded_rows, ranks = product.weight.padded_rows, product.weight.sidecar_ranks
    parts, tile_units = product.parts.shape[0], product.weight.tile_units
    at = stack_index(ref, item)
    found: list[list[jax.Array]] = []
    units: list[_Unit] = []
    for start in starts:
        alive = start < padded_rows
        row = start + hidden_zero(start) + lax.broadcasted_iota(jnp.int32, (start.shape[0], width), 1)
        mask = jnp.broadcast_to(alive, row.shape)
        found.append(
            [
                plgpu.load(ref["parts"].at[jnp.int32(part), item, row], mask=mask, other=0.0)
                for part in range(parts)
            ]
        )
        if "u" in ref:
            unit = lax.div(start, jnp.int32(ROW_UNIT))
            # Where to read is known before anything is read, if it can be.
            if tile_units:
                first = lax.div(unit, jnp.int32(tile_units)) * ranks
            else:
                first = plgpu.load(ref["ranges"].at[(*at, unit, jnp.int32(2))], mask=alive, other=0)
            count = plgpu.load(ref["ranges"].at[(*at, unit, jnp.int32(1))], mask=alive, other=0)
            units.append(_Unit(row, first, count, alive))

    def load_u(i: jax.Array, unit: _Unit) -> jax.Array:
        """int8 [h, width, ranks], all ranks of a row in one thread, at once."""
        shape = (*unit.row.shape, RANKS)
        rank = i * RANKS + lax.broadcasted_iota(jnp.int32, shape, 2)
        mask = jnp.broadcast_to(unit.alive[..., None], shape)
        return plgpu.load(ref["u"].at[(*at, unit.row[..., None], rank)], mask=mask, other=0)

    def load_t(i: jax.Array, unit: _Unit) -> jax.Array:
        """diag(scale) V x, f32 [h, ranks]."""
        h = unit.count.shape[0]
        # Smaller tensors are loaded whole by every thread that needs a part of them, as is best for one part.
        enough = 1 if parts == 1 else ceil_div(threads, RANKS * h)
        shape = (1 << (max(parts, enough) - 1).bit_length(), h, RANKS)
        part, rank = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
        rank = i * RANKS + rank
        mask = (part < parts) & jnp.broadcast_to(unit.alive[None], shape)
        index = part, item, padded_rows + unit.first[None] + rank
        found = jnp.sum(plgpu.load(ref["parts"].at[index], mask=mask, other=0.0), axis=0)
        # Places beyond the count hold anything.
        rank = i * RANKS + lax.broadcasted_iota(jnp.int32, found.shape, 1)
        return jnp.where(rank < unit.count, found, 0.0)

    def some(i, ys):
        # All loads of U come before the first sum.
        us = [load_u(i, unit) for unit in units]
        ts = [load_t(i, unit) for unit in units[: 1 if shared else None]]
        ts = ts * len(ys) if shared else ts
        return [
            y + jnp.sum(t[:, None] * u.astype(jnp.float32), axis=2)
            for y, u, t in zip(ys, us, ts, strict=True)
        ]

    def finish() -> list[jax.Array]:
        ys = [sum(values[1:], values[0]) for values in found]
        if not units:
            return ys
        # The first ranks are loaded before it is known whether there are more.
        ys = some(jnp.int32(0), ys)
        if ranks <= RANKS:
            return ys
        most = jnp.max(reduce(jnp.maximum, (unit.count for unit in units)))
        return lax.fori_loop(1, lax.div(most + (RANKS - 1), jnp.int32(RANKS)), some, ys)

    return finish


def biased(ref: Refs, y: jax.Array, column: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Within a kernel: y with the bias at columns, if there is one."""
    if "bias" not in ref:
        return y
    return y + plgpu.load(ref["bias"].at[column], mask=mask, other=0).astype(jnp.float32)
