"""The Triton kernel for one row of x, y = x Ŵᵀ with M = 1.

`triton_prepare` spreads x over eight columns, each of which holds the x of one scale group in eight and zeros
elsewhere, so that one tensor-core product of the bare levels keeps the groups apart and scales are applied to
128 or 256 columns at once. The rows of the sidecars' V are further row blocks of the same launch. K is split
over the grid; `triton_epilogue` sums the parts and applies the sidecars' U.
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
    sidecar_products,
    stack_index,
    weight_operands,
)
from pallas_kernels.svsk_matmul.triton_planes import (
    UNITS,
    code_plane,
    companded_plane,
    fma_f32,
    small_to_f32,
)
from pallas_kernels.svsk_matmul.triton_prepare import SPREAD, Prepared
from pallas_kernels.svsk_matmul.tuning import Blocks

NAME = "svsk_decode"


def _kernel(*refs, names: tuple[str, ...], weight: TritonWeight, rows: int, superblocks: int, asm: bool):
    ref = named(names, refs)
    at = stack_index(ref)
    block, part = pl.program_id(0), pl.program_id(1)
    blocks = weight.padded_rows // rows
    first = part * superblocks

    def x_plane(i, plane):
        return plgpu.load(ref["x"].at[:, pl.ds((first + i) * SUPERBLOCK + plane * PLANE, PLANE)]).T

    def unit_at(i):
        return plgpu.load(ref["unit"].at[jnp.int32(0), pl.ds(first + i, 1)])

    def base():
        row = pl.ds(block * rows, rows)
        constant = block * rows // ROW_UNIT
        codebook, factor = load_codebook(ref, at, constant, (rows, PLANE))

        def superblock(i, total):
            b = first + i
            words = plgpu.load(ref["words"].at[(*at, row, pl.ds(b * PLANE, PLANE))])
            if weight.super_scales is not None:
                supers = plgpu.load(ref["super_scales"].at[(*at, b, row)]).astype(jnp.float32) * unit_at(i)
            halves = ((0, 1), (2, 3)) if weight.group == 16 else ((0, 1, 2, 3),)
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
                scales = plgpu.load(ref["scales"].at[(*at, b, row, pl.ds(SPREAD * half, SPREAD))])
                if weight.super_scales is not None:
                    scales = small_to_f32(scales) * supers[:, None]
                else:
                    scales = scales.astype(jnp.float32) * unit_at(i)
                total = fma_f32(product, scales, total, asm=asm)
            return total

        total = lax.fori_loop(0, superblocks, superblock, jnp.zeros((rows, SPREAD), jnp.float32))
        if not weight.companded:
            odd = lax.broadcasted_iota(jnp.int32, (rows, SPREAD), 1) % 2
            total = total * jnp.where(odd == 1, 1 / UNITS[1], 1 / UNITS[0]).astype(jnp.float32)
        else:
            total = total * jnp.broadcast_to(factor, total.shape)
        return jnp.sum(total, axis=1)

    def sidecar():
        total = sidecar_products(
            ref,
            at,
            x_plane,
            unit_at,
            block=block - blocks,
            first=first,
            superblocks=superblocks,
            shape=(rows, SPREAD),
            asm=asm,
        )
        return jnp.sum(total, axis=1) * (1 / UNITS[0])

    result = base() if weight.v is None else lax.cond(block < blocks, base, sidecar)
    ref["out"][...] = result


def partial_products(
    x: Prepared,
    weight: TritonWeight,
    blocks: Blocks,
    *,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> Float[Array, "parts 1 rows"]:
    """Parts of x Ŵᵀ without sidecar, for the weight's padded rows, and after them of x Vᵀ; f32.

    Args:
        x: spread for the weight's groups.
        weight: laid out, or a stack of them with `layer`.
        blocks: configuration.
        layer: index into the stack, int32.
        interpret: run in interpret mode.
    """
    parts = weight.superblocks // blocks.superblocks
    v_blocks = 0 if weight.v is None else ceil_div(weight.v.shape[-2], blocks.rows)
    grid = (weight.padded_rows // blocks.rows + v_blocks, parts)
    fields = ("words", "scales", "constants", "super_scales", "v", "ranges")
    operands = {"x": x.values, "unit": x.unit, **weight_operands(weight, fields, layer)}
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
        out_specs=pl.BlockSpec((None, None, blocks.rows), lambda i, k: (k, 0, i)),
        out_shape=jax.ShapeDtypeStruct((parts, 1, grid[0] * blocks.rows), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
