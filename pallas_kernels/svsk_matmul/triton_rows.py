"""The Triton kernel for several rows of x, y = x Ŵᵀ with M > 1.

A group's int6 scale multiplies the f32 sum of its columns (M ≤ 16), or its f16 levels (M > 16); its
super-scale multiplies the sum of a superblock. As in `triton_decode`, the rows of the sidecars' V are further
row blocks of the launch, and K may be split over the grid.
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
    LINEAR_STEP,
    UNITS,
    companded_plane,
    fma_f32,
    linear_plane,
    small_to_f16,
)
from pallas_kernels.svsk_matmul.triton_prepare import Prepared
from pallas_kernels.svsk_matmul.tuning import Blocks

NAME = "svsk_rows"


def _kernel(*refs, names: tuple[str, ...], weight: TritonWeight, blocks: Blocks, asm: bool):
    ref = named(names, refs)
    at = stack_index(ref)
    rows, batch = blocks.rows, blocks.batch
    block, part = pl.program_id(0), pl.program_id(2)
    base_blocks = weight.padded_rows // rows
    first = part * blocks.superblocks
    group = weight.group
    # Scales on f32 sums cost more the wider x is, scales in the levels the same for any; f16 scales may make
    # levels too small for f16.
    on_sums = batch <= 16 or weight.super_scales is None
    per_plane = PLANE // group

    def x_at(column, width):
        return plgpu.load(ref["x"].at[:, pl.ds(column, width)]).T

    def unit_at(i):
        return plgpu.load(ref["unit"].at[:, first + i])

    def base():
        row = pl.ds(block * rows, rows)
        constant = block * rows // ROW_UNIT
        codebook, factor = load_codebook(ref, at, constant, (rows, group))

        scales_at = scales_loader(ref, at, weight, block, rows, asm=asm)

        def super_at(i):
            if weight.super_scales is None:
                return None
            return plgpu.load(ref["super_scales"].at[(*at, first + i, row)])

        def superblock(i, carry):
            total, supers = carry
            b = first + i
            # A superblock ahead, so that its way from memory is spent on products.
            ahead = super_at(jnp.minimum(i + 1, blocks.superblocks - 1))
            product = jnp.zeros((rows, batch), jnp.float32)
            if on_sums:
                small = scales_at(b)
            for q in range(per_plane):
                words = plgpu.load(ref["words"].at[(*at, b, row, pl.ds(q * group, group))])
                for plane in range(4):
                    if weight.companded:
                        level = companded_plane(words, plane, codebook, asm=asm)
                    else:
                        level = linear_plane(words, plane, asm=asm)
                    place = (plane // 2) * 2 * per_plane + 2 * q + plane % 2
                    x = x_at(b * SUPERBLOCK + plane * PLANE + q * group, group)
                    if on_sums:
                        # A product with a unit vector brings a scale to where the sums of its rows are.
                        one = (lax.broadcasted_iota(jnp.int32, (16, batch), 0) == place).astype(jnp.float16)
                        product = fma_f32(plgpu.dot(level, x), plgpu.dot(small, one), product, asm=asm)
                    else:
                        scale = plgpu.load(ref["scales"].at[(*at, b, row, jnp.int32(place))])
                        product = product + plgpu.dot(level * small_to_f16(scale, asm=False)[:, None], x)
            factors = jnp.broadcast_to(unit_at(i)[None, :], product.shape)
            if supers is not None:
                factors = factors * supers.astype(jnp.float32)[:, None]
            return fma_f32(product, factors, total, asm=asm), ahead

        start = jnp.zeros((rows, batch), jnp.float32), super_at(0)
        total, _ = lax.fori_loop(0, blocks.superblocks, superblock, start)
        return total * (
            jnp.broadcast_to(factor, total.shape) if weight.companded else jnp.float32(1 / LINEAR_STEP)
        )

    def sidecar():
        total = sidecar_products(
            ref,
            at,
            lambda i, plane: x_at((first + i) * SUPERBLOCK + plane * PLANE, PLANE),
            unit_at,
            block=block - base_blocks,
            first=first,
            superblocks=blocks.superblocks,
            shape=(rows, batch),
            asm=asm,
        )
        return total * (1 / UNITS[0])

    result = base() if weight.v is None else lax.cond(block < base_blocks, base, sidecar)
    ref["out"][...] = result.T


def partial_products(
    x: Prepared,
    weight: TritonWeight,
    blocks: Blocks,
    *,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> Float[Array, "parts m rows"]:
    """Parts of x Ŵᵀ without sidecar, for the weight's padded rows, and after them of x Vᵀ; f32.

    Args:
        x: a multiple of `blocks.batch` rows.
        weight: laid out, or a stack of them with `layer`.
        blocks: configuration.
        layer: index into the stack, int32.
        interpret: run in interpret mode.
    """
    parts = weight.superblocks // blocks.superblocks
    v_blocks = 0 if weight.v is None else ceil_div(weight.v.shape[-2], blocks.rows)
    m = x.values.shape[0]
    grid = (weight.padded_rows // blocks.rows + v_blocks, m // blocks.batch, parts)
    fields = ("words", "scales", "constants", "super_scales", "v", "ranges")
    operands = {"x": x.values, "unit": x.unit, **weight_operands(weight, fields, layer)}
    specs = [pl.BlockSpec((blocks.batch, each.shape[1]), lambda i, m, k: (m, 0)) for each in x]
    specs += [pl.BlockSpec()] * (len(operands) - len(x))
    body = partial(
        _kernel,
        names=tuple(operands),
        weight=abstract(weight),
        blocks=blocks,
        asm=not interpret,
    )
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((None, blocks.batch, blocks.rows), lambda i, m, k: (k, m, i)),
        out_shape=jax.ShapeDtypeStruct((parts, m, grid[0] * blocks.rows), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
