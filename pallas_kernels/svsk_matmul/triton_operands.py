"""What the kernels of a laid-out weight share: its arrays as operands by name, and what several load."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.svsk_matmul.triton_layout import PLANE, SUPERBLOCK, TritonWeight
from pallas_kernels.svsk_matmul.triton_planes import UNITS, Codebook, byte_plane, fma_f32, small_to_f16

T = TypeVar("T")
Refs = Mapping[str, Any]
"""A kernel's references by the name of their operand, `out` for the result."""


def weight_operands(
    weight: TritonWeight, names: Sequence[str], layer: jax.Array | None
) -> dict[str, jax.Array]:
    """Those of a weight's arrays that it has, and after them `layer`, the index into a stack, if any."""
    found = {name: getattr(weight, name) for name in names}
    found = {name: value for name, value in found.items() if value is not None}
    if layer is not None:
        found["layer"] = jnp.reshape(layer, (-1,)).astype(jnp.int32)
    return found


def abstract(operand: T) -> T:
    """The shapes of a weight or another tree of arrays, which a kernel's body may depend on."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), operand)


def named(names: Sequence[str], refs: Sequence[Any]) -> Refs:
    """References by operand, the last one the result's."""
    return dict(zip([*names, "out"], refs, strict=True))


def stack_index(ref: Refs, row: jax.Array | int = 0) -> tuple[jax.Array, ...]:
    """What an index into the weight's arrays begins with: the layer of a stack, from `layer` int32 [1], or
    [rows] where each row has its own; nothing without it."""
    return (plgpu.load(ref["layer"].at[jnp.int32(row)]),) if "layer" in ref else ()


def load_codebook(
    ref: Refs, at: tuple[jax.Array, ...], block: jax.Array, shape: tuple[int, int]
) -> tuple[Codebook, jax.Array]:
    """The codebook of a block of 64 rows, as large as `shape`, and f, which takes kernel levels to it."""
    rho, shift, factor, step = (
        plgpu.load(ref["constants"].at[(*at, pl.ds(block, 1), pl.ds(index, 1))]) for index in range(4)
    )
    return Codebook.of(rho, shift, step, shape), factor


def scales_loader(
    ref: Refs, at: tuple[jax.Array, ...], weight: TritonWeight, block: jax.Array, rows: int, *, asm: bool
) -> Callable[[jax.Array], jax.Array]:
    """What loads the scales of a superblock for a block of rows, f16 [rows, 16], super-scales aside. Sixteen
    are the least that a product takes; of eight, each comes twice."""
    index: tuple[Any, ...] = (pl.ds(block * rows, rows), pl.ds(0, 16))
    if weight.group > 16:
        row, place = (lax.broadcasted_iota(jnp.int32, (rows, 16), axis) for axis in range(2))
        index = (block * rows + row, place % (SUPERBLOCK // weight.group))

    def load(b: jax.Array) -> jax.Array:
        small = plgpu.load(ref["scales"].at[(*at, b, *index)])
        return small if weight.super_scales is None else small_to_f16(small, asm=asm)

    return load


def sidecar_products(
    ref: Refs,
    at: tuple[jax.Array, ...],
    x_plane: Callable[[jax.Array, int], jax.Array],
    unit_at: Callable[[jax.Array], jax.Array],
    *,
    weight: TritonWeight,
    block: jax.Array,
    first: jax.Array,
    superblocks: int,
    shape: tuple[int, int],
    asm: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """V x over some superblocks, f32 in units of UNITS[0], the factors that take its rows from there to
    diag(scale) V x, and where these go among the numbers of a product.

    Args:
        ref: with `v`, `v_scale` and `places`.
        at: see `stack_index`.
        x_plane: loads the x of a superblock, counted from the first, and a plane of it.
        unit_at: loads the unit of a superblock for each column of x, or for all as one.
        weight: its shapes.
        block: which rows of V, in blocks of shape[0].
        first: superblock.
        superblocks: how many.
        shape: rows of V and columns of x.
        asm: inline assembly.
    """
    rows = shape[0]
    row = block * rows + lax.broadcasted_iota(jnp.int32, (rows, PLANE), 0)
    column = lax.broadcasted_iota(jnp.int32, (rows, PLANE), 1)

    alive = row < plgpu.load(ref["places"].at[(*at, jnp.int32(ref["v_scale"].shape[-1]))])
    own = pl.ds(block * rows, rows)
    # Here, and places behind the loop: 6 % of some products' time (NOTES.md on speed, "Machine code").
    scale = plgpu.load(ref["v_scale"].at[(*at, own)]) * (1 / UNITS[0])

    def superblock(i, total):
        product = jnp.zeros(shape, jnp.float32)
        for half in range(2):
            index = (*at, row, (2 * (first + i) + half) * PLANE + column)
            words = plgpu.load(ref["v"].at[index], mask=alive, other=0)
            for byte in range(2):
                x = x_plane(i, 2 * half + byte)
                product += plgpu.dot(byte_plane(words, byte, asm=asm), x)
                product += plgpu.dot(jnp.full((rows, PLANE), -128 * UNITS[0], jnp.float16), x)
        return fma_f32(product, jnp.broadcast_to(unit_at(i)[None, :], shape), total, asm=asm)

    total = lax.fori_loop(0, superblocks, superblock, jnp.zeros(shape, jnp.float32))
    return total, scale, weight.padded_rows + plgpu.load(ref["places"].at[(*at, own)])
