"""The Triton kernel that restores Ŵ to a dense matrix, for products with many rows of x."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, SUPERBLOCK, TritonWeight
from pallas_kernels.svsk_matmul.triton_operands import (
    abstract,
    load_codebook,
    named,
    stack_index,
    weight_operands,
)
from pallas_kernels.svsk_matmul.triton_planes import (
    LINEAR_STEP,
    companded_plane,
    linear_plane,
    small_to_f32,
)

NAME = "svsk_restore"
RANKS = 16
"""Sidecar rows taken at a time: the depth of a tensor-core product."""
WARPS = 4


def _kernel(*refs, names: tuple[str, ...], weight: TritonWeight, asm: bool):
    ref = named(names, refs)
    at = stack_index(ref)
    block, b = pl.program_id(0), pl.program_id(1)
    row = pl.ds(block * ROW_UNIT, ROW_UNIT)
    shape = (ROW_UNIT, PLANE)
    words = plgpu.load(ref["words"].at[(*at, b, row, pl.ds(0, PLANE))])
    codebook, factor = load_codebook(ref, at, block, shape)
    row_index = block * ROW_UNIT + lax.broadcasted_iota(jnp.int32, shape, 0)
    q = lax.broadcasted_iota(jnp.int32, shape, 1) // weight.group
    if weight.super_scales is not None:
        supers = plgpu.load(ref["super_scales"].at[(*at, b, row)]).astype(jnp.float32)

    def base(plane):
        if weight.companded:
            level = companded_plane(words, plane, codebook, asm=asm).astype(jnp.float32) * factor
        else:
            level = linear_plane(words, plane, asm=asm).astype(jnp.float32) * (1 / LINEAR_STEP)
        place = (plane // 2) * (2 * PLANE // weight.group) + 2 * q + plane % 2
        scale = plgpu.load(ref["scales"].at[(*at, b, row_index, place)])
        if weight.super_scales is None:
            return level * scale.astype(jnp.float32)
        return level * (small_to_f32(scale) * supers[:, None])

    def sidecar(plane, total):
        first, count = (plgpu.load(ref["ranges"].at[(*at, block, jnp.int32(i))]) for i in range(2))
        u_rank = lax.broadcasted_iota(jnp.int32, (ROW_UNIT, RANKS), 1)
        v_rank = lax.broadcasted_iota(jnp.int32, (RANKS, PLANE), 0)
        column = lax.broadcasted_iota(jnp.int32, (RANKS, PLANE), 1)

        def some(i, total):
            here = i * RANKS
            alive = here + u_rank < count
            u = plgpu.load(ref["u"].at[(*at, row, pl.ds(here, RANKS))]).astype(jnp.float32)
            scale = plgpu.load(ref["v_scale"].at[(*at, first + here + u_rank)], mask=alive, other=0.0)
            # A power of two takes the largest factor to 1 to 2, so that all fit f16.
            bits = lax.bitcast_convert_type(jnp.max(jnp.abs(scale)), jnp.int32) & 0x7F800000
            unit = lax.bitcast_convert_type(jnp.maximum(bits, 1 << 23), jnp.float32)
            u = (u * (scale / unit)).astype(jnp.float16)
            index = (*at, first + here + v_rank, (2 * b + plane // 2) * PLANE + column)
            pairs = plgpu.load(ref["v"].at[index], mask=here + v_rank < count, other=0)
            byte = lax.shift_right_logical(pairs, jnp.int16(8 * (plane % 2))) & jnp.int16(255)
            v = (byte.astype(jnp.float32) - 128).astype(jnp.float16)
            return total + plgpu.dot(u, v) * unit

        return lax.fori_loop(0, lax.div(count + (RANKS - 1), jnp.int32(RANKS)), some, total)

    for plane in range(4):
        value = base(plane)
        if weight.v is not None:
            value = sidecar(plane, value)
        plgpu.store(ref["out"].at[:, pl.ds(plane * PLANE, PLANE)], value.astype(ref["out"].dtype))


def restore(
    weight: TritonWeight, dtype: DTypeLike, *, layer: jax.Array | None = None, interpret: bool = False
) -> Float[Array, "rows columns"]:
    """Ŵ in `dtype`, padding included. Levels and the sidecar's factors U·scale are rounded to f16, the sum to
    `dtype`.

    Args:
        weight: laid out, or a stack of them with `layer`.
        dtype: of the result.
        layer: index into the stack, int32.
        interpret: run in interpret mode.
    """
    fields = ("words", "scales", "constants", "super_scales", "v", "v_scale", "u", "ranges")
    operands = weight_operands(weight, fields, layer)
    return pl.pallas_call(
        partial(_kernel, names=tuple(operands), weight=abstract(weight), asm=not interpret),
        grid=(weight.padded_rows // ROW_UNIT, weight.superblocks),
        out_specs=pl.BlockSpec((ROW_UNIT, SUPERBLOCK), lambda i, k: (i, k)),
        out_shape=jax.ShapeDtypeStruct((weight.padded_rows, weight.superblocks * SUPERBLOCK), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
