"""The Triton kernel for one row of x, y = x Ŵᵀ with M = 1, or for several with a matrix of their own each.

x is spread over the eight columns of a tensor-core product, each of which holds the x of one scale group in
eight and zeros elsewhere, so that one product of the bare levels keeps groups apart and scales are applied to
128 or 256 columns at once. The rows of the sidecars' V are further row blocks of the launch. K is split over
the grid; `triton_epilogue` sums the parts and applies the sidecars' U.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, SUPERBLOCK, TritonWeight
from pallas_kernels.svsk_matmul.triton_operands import (
    abstract,
    load_codebook,
    named,
    scales_loader,
    sidecar_products,
    stack_index,
    weight_operands,
)
from pallas_kernels.svsk_matmul.triton_planes import (
    UNITS,
    code_plane,
    companded_plane,
    fma_f32,
)
from pallas_kernels.svsk_matmul.triton_prepare import Prepared
from pallas_kernels.svsk_matmul.tuning import Blocks

NAME = "svsk_decode"
SPREAD = 8
"""Columns of a tensor-core product, at least."""


def _kernel(*refs, names: tuple[str, ...], weight: TritonWeight, rows: int, superblocks: int, asm: bool):
    ref = named(names, refs)
    (parts, results, _), given = ref["out"].shape, ref["unit"].shape[0]
    block, part, item = pl.program_id(0), pl.program_id(1), jnp.int32(0)
    if results > 1:
        item, part = lax.div(part, jnp.int32(parts)), lax.rem(part, jnp.int32(parts))
    if "order" in ref:
        item = plgpu.load(ref["order"].at[item])
    at = stack_index(ref, item)
    source = lax.div(item, jnp.int32(results // given)) if given > 1 else jnp.int32(0)
    blocks = weight.padded_rows // rows
    first = part * superblocks
    last = first + superblocks - 1

    def x_plane(i, plane):
        # Eight columns, each with the x of its scale group and zeros, which are not read.
        column, lane = (lax.broadcasted_iota(jnp.int32, (SPREAD, PLANE), axis) for axis in range(2))
        place = 2 * lax.div(lane, jnp.int32(weight.group)) + plane % 2
        place += 0 if weight.group == 16 else (plane // 2) * 4
        # Rows of x lie superblock by superblock.
        index = ((first + i) * given + source) * SUPERBLOCK + plane * PLANE + lane
        return plgpu.load(ref["x"].at[index], mask=place == column, other=0).T

    def unit_at(i):
        return plgpu.load(ref["unit"].at[source, pl.ds(first + i, 1)])

    def base():
        row = pl.ds(block * rows, rows)
        constant = block * rows // ROW_UNIT
        codebook, to_levels = load_codebook(ref, at, constant, (rows, PLANE))

        halves = ((0, 1), (2, 3)) if weight.group == 16 else ((0, 1, 2, 3),)

        scales_at = scales_loader(ref, at, weight, block, rows, asm=asm)

        def super_at(b):
            unit = plgpu.load(ref["unit"].at[source, pl.ds(b, 1)])
            if weight.super_scales is None:
                return unit, unit
            return unit, plgpu.load(ref["super_scales"].at[(*at, b, row)])

        def superblock(i, carry):
            total, (unit, supers) = carry
            b = first + i
            # A superblock ahead, so that their way from memory is spent on products.
            ahead = super_at(jnp.minimum(b + 1, last))
            words = plgpu.load(ref["words"].at[(*at, b, row, pl.ds(0, PLANE))])
            small = scales_at(b)
            sums = jnp.zeros((rows, SPREAD), jnp.float32)
            for half, planes in enumerate(halves):
                product = jnp.zeros((rows, SPREAD), jnp.float32)
                for plane in planes:
                    x = x_plane(i, plane)
                    if weight.companded:
                        level = companded_plane(words, plane, codebook, asm=asm)
                        product += plgpu.dot(level, x)
                    else:
                        product += plgpu.dot(code_plane(words, plane, asm=asm), x)
                        product += plgpu.dot(jnp.full((rows, PLANE), -8 * UNITS[plane], jnp.float16), x)
                # A product with unit vectors brings scales to where the sums are.
                source, column = (lax.broadcasted_iota(jnp.int32, (16, SPREAD), axis) for axis in range(2))
                one = (source == SPREAD * half + column).astype(jnp.float16)
                sums = fma_f32(product, plgpu.dot(small, one), sums, asm=asm)
            if weight.super_scales is not None:
                factor = (supers.astype(jnp.float32) * unit)[:, None]
            else:
                factor = unit[None, :]
            total = fma_f32(sums, jnp.broadcast_to(factor, total.shape), total, asm=asm)
            return total, ahead

        start = jnp.zeros((rows, SPREAD), jnp.float32), super_at(first)
        total, _ = lax.fori_loop(0, superblocks, superblock, start)
        if not weight.companded:
            odd = lax.broadcasted_iota(jnp.int32, (rows, SPREAD), 1) % 2
            total = total * jnp.where(odd == 1, 1 / UNITS[1], 1 / UNITS[0]).astype(jnp.float32)
        else:
            total = total * jnp.broadcast_to(to_levels, total.shape)
        place = block * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)
        return jnp.sum(total, axis=1), place

    def sidecar():
        total, scale, place = sidecar_products(
            ref,
            at,
            x_plane,
            unit_at,
            weight=weight,
            block=block - blocks,
            first=first,
            superblocks=superblocks,
            shape=(rows, SPREAD),
            asm=asm,
        )
        return jnp.sum(total, axis=1) * scale, place

    result, place = base() if weight.v is None else lax.cond(block < blocks, base, sidecar)
    plgpu.store(ref["out"].at[part, item, place], result)


def partial_products(
    x: Prepared,
    weight: TritonWeight,
    blocks: Blocks,
    *,
    layer: jax.Array | None = None,
    order: jax.Array | None = None,
    interpret: bool = False,
) -> Float[Array, "parts m columns"]:
    """Parts of x Ŵᵀ without sidecar, for the weight's padded rows, and after them of x Vᵀ diag(scale), in
    their places; f32.

    Args:
        x: one row, or rows in runs of a superblock's columns.
        weight: laid out, or a stack of them with `layer`.
        blocks: configuration.
        layer: index into the stack, int32, or [m], one for each row of the result: then each row of x is that
            of m / rows of x rows one after another.
        order: int32, at least m, in which programs take these rows, or None as they are.
        interpret: run in interpret mode.
    """
    parts = weight.superblocks // blocks.superblocks
    v_blocks = 0 if weight.v is None else ceil_div(weight.v.shape[-2], blocks.rows)
    m = 1 if layer is None else layer.size
    # Of three axes Pallas takes the first as a remainder, behind which the compiler knows less.
    grid = (weight.padded_rows // blocks.rows + v_blocks, parts * m)
    fields = ("words", "scales", "constants", "super_scales", "v", "v_scale", "places")
    operands = {"x": x.values.reshape(-1), "unit": x.unit, **weight_operands(weight, fields, layer)}
    operands |= {} if order is None else {"order": order}
    body = partial(
        _kernel,
        names=tuple(operands),
        weight=abstract(weight),
        rows=blocks.rows,
        superblocks=blocks.superblocks,
        asm=not interpret,
    )
    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((parts, m, weight.product_columns), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
