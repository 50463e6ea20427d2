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
from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, TritonWeight
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
    companded_plane,
    fma_f32,
    linear_plane,
    small_to_f16,
)
from pallas_kernels.svsk_matmul.triton_prepare import Prepared, load_columns
from pallas_kernels.svsk_matmul.tuning import Blocks

NAME = "svsk_rows"


def _strips(blocks: Blocks) -> int:
    """Strips that a program's rows are cut into, each of 16 rows a warp, which is a tensor-core product's
    height; they share what is read of x. Of a taller tensor a warp has several products' rows, and the
    compiler moves its scales through shared memory for each group of columns. Wide x it divides over fewer
    than four warps by columns, whatever the height."""
    if blocks.batch > 16 and blocks.warps < 4:
        return 1
    return max(1, blocks.rows // (16 * blocks.warps))


def _kernel(*refs, names: tuple[str, ...], weight: TritonWeight, blocks: Blocks, asm: bool):
    ref = named(names, refs)
    at = stack_index(ref)
    rows, batch = blocks.rows, blocks.batch
    strips = _strips(blocks)
    shape = rows // strips, batch
    block, part = pl.program_id(0), pl.program_id(2)
    items = pl.program_id(1) * batch, batch
    base_blocks = weight.padded_rows // rows
    first = part * blocks.superblocks
    group = weight.group
    # Scales on f32 sums cost more the wider x is, scales in the levels the same for any; f16 scales may make
    # levels too small for f16.
    on_sums = batch <= 16 or weight.super_scales is None
    per_plane = PLANE // group

    def unit_at(i):
        return plgpu.load(ref["unit"].at[:, first + i])

    def base():
        own = [pl.ds(block * rows + strip * shape[0], shape[0]) for strip in range(strips)]
        codebook, factor = load_codebook(ref, at, block * rows // ROW_UNIT, (shape[0], group))
        scales_at = [
            scales_loader(ref, at, weight, block * strips + strip, shape[0], asm=asm)
            for strip in range(strips)
        ]

        def super_at(i):
            if weight.super_scales is None:
                return None
            return [plgpu.load(ref["super_scales"].at[(*at, first + i, row)]) for row in own]

        def level_of(words, plane):
            if weight.companded:
                return companded_plane(words, plane, codebook, asm=asm)
            return linear_plane(words, plane, asm=asm)

        def superblock(i, carry):
            totals, supers = carry
            b = first + i
            # A superblock ahead, so that its way from memory is spent on products.
            ahead = super_at(jnp.minimum(i + 1, blocks.superblocks - 1))
            sums = [jnp.zeros(shape, jnp.float32)] * strips
            small = [load(b) for load in scales_at] if on_sums else None
            for q in range(per_plane):
                index = pl.ds(q * group, group)
                words = [plgpu.load(ref["words"].at[(*at, b, row, index)]) for row in own]
                for plane in range(4):
                    place = (plane // 2) * 2 * per_plane + 2 * q + plane % 2
                    x = load_columns(ref["x"], items, b, plane * PLANE + q * group, group)
                    for strip, row in enumerate(own):
                        level = level_of(words[strip], plane)
                        if small is not None:
                            # A product with a unit vector brings a scale to where its row's sums are.
                            one = lax.broadcasted_iota(jnp.int32, (16, batch), 0) == place
                            scale = plgpu.dot(small[strip], one.astype(jnp.float16))
                            sums[strip] = fma_f32(plgpu.dot(level, x), scale, sums[strip], asm=asm)
                        else:
                            scale = plgpu.load(ref["scales"].at[(*at, b, row, jnp.int32(place))])
                            scaled = level * small_to_f16(scale, asm=False)[:, None]
                            sums[strip] = sums[strip] + plgpu.dot(scaled, x)
            factors = [jnp.broadcast_to(unit_at(i)[None, :], shape)] * strips
            if supers is not None:
                factors = [
                    unit * each.astype(jnp.float32)[:, None]
                    for unit, each in zip(factors, supers, strict=True)
                ]
            each_strip = zip(sums, factors, totals, strict=True)
            return [fma_f32(*each, asm=asm) for each in each_strip], ahead

        start = [jnp.zeros(shape, jnp.float32)] * strips, super_at(0)
        totals, _ = lax.fori_loop(0, blocks.superblocks, superblock, start)
        to_levels = jnp.broadcast_to(factor, shape) if weight.companded else jnp.float32(1 / LINEAR_STEP)
        for row, total in zip(own, totals, strict=True):
            plgpu.store(ref["out"].at[part, pl.ds(*items), row], (total * to_levels).T)

    def sidecar():
        item = items[0] + lax.broadcasted_iota(jnp.int32, shape[::-1], 0)
        for strip in range(strips):
            total, scale, place = sidecar_products(
                ref,
                at,
                lambda i, plane: load_columns(ref["x"], items, first + i, plane * PLANE, PLANE),
                unit_at,
                weight=weight,
                block=(block - base_blocks) * strips + strip,
                first=first,
                superblocks=blocks.superblocks,
                shape=shape,
                asm=asm,
            )
            index = part, item, jnp.broadcast_to(place[None, :], item.shape)
            plgpu.store(ref["out"].at[index], (total * scale[:, None]).T)

    if weight.v is None:
        base()
    else:
        lax.cond(block < base_blocks, base, sidecar)


def partial_products(
    x: Prepared,
    weight: TritonWeight,
    blocks: Blocks,
    *,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> Float[Array, "parts m columns"]:
    """Parts of x Ŵᵀ without sidecar, for the weight's padded rows, and after them of x Vᵀ diag(scale), in
    their places; f32.

    Args:
        x: a multiple of `blocks.batch` rows.
        weight: laid out, or a stack of them with `layer`.
        blocks: configuration.
        layer: index into the stack, int32.
        interpret: run in interpret mode.
    """
    parts = weight.superblocks // blocks.superblocks
    v_blocks = 0 if weight.v is None else ceil_div(weight.v.shape[-2], blocks.rows)
    m = x.unit.shape[0]
    grid = (weight.padded_rows // blocks.rows + v_blocks, m // blocks.batch, parts)
    fields = ("words", "scales", "constants", "super_scales", "v", "v_scale", "places")
    operands = {"x": x.values, "unit": x.unit, **weight_operands(weight, fields, layer)}
    unit = pl.BlockSpec((blocks.batch, x.unit.shape[1]), lambda i, m, k: (m, 0))
    specs = [unit if name == "unit" else pl.BlockSpec() for name in operands]
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
        out_shape=jax.ShapeDtypeStruct((parts, m, weight.product_columns), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
