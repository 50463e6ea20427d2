"""The Triton kernel for int8 matrices (embedding and head), y = x Ŵᵀ, and their layout."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul.layout import ceil_div, pad_axis
from pallas_kernels.svsk_matmul.triton_layout import (
    PLANE,
    ROW_UNIT,
    SUPERBLOCK,
    nbytes,
    pack_byte_planes,
    padded,
    unpack_byte_planes,
)
from pallas_kernels.svsk_matmul.triton_planes import UNITS, byte_plane, fma_f32
from pallas_kernels.svsk_matmul.triton_prepare import Prepared, load_columns
from pallas_kernels.svsk_matmul.types import Int8Weight, Leaf

NAME = "svsk_int8"
ROWS, WARPS, STAGES = 32, 2, 2
RUN = PLANE
"""Columns of x that the kernel takes at a time, and that should lie together."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonInt8Weight:
    """An Int8Weight as the kernel reads it, K padded to B superblocks of 256 columns and N to a multiple of
    64 rows, both with zeros.

    - `words`: int16 [N, 128 B], pairs of bytes as in `TritonWeight.v`.
    - `scales`: f16 [4 B, N].
    """

    words: Leaf
    scales: Leaf
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def superblocks(self) -> int:
        """B: superblocks of a row."""
        return ceil_div(self.shape[1], SUPERBLOCK)

    @property
    def padded_rows(self) -> int:
        """N, padding included."""
        return padded(self.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding included."""
        return nbytes(self)


def lay_out_int8(weight: Int8Weight) -> TritonInt8Weight:
    """The weight for the kernel, exactly. Compile it with `jax.jit`."""
    values = pad_axis(pad_axis(weight.values, 1, SUPERBLOCK), 0, ROW_UNIT)
    scales = pad_axis(pad_axis(weight.scales, 1, SUPERBLOCK // PLANE), 0, ROW_UNIT)
    return TritonInt8Weight(words=pack_byte_planes(values), scales=scales.T, shape=weight.shape)


def take_rows(weight: TritonInt8Weight, rows: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b k"]:
    """Rows of Ŵ by index (an embedding look-up), in `dtype`."""
    values = unpack_byte_planes(weight.words[rows])
    scales = jnp.repeat(jnp.moveaxis(weight.scales[:, rows], 0, -1).astype(jnp.float32), PLANE, axis=-1)
    return (values * scales).astype(dtype)[..., : weight.shape[1]]


def _kernel(x_ref, unit_ref, words_ref, scales_ref, out_ref, *, superblocks: int, asm: bool):
    batch = out_ref.shape[0]
    items = pl.program_id(1) * batch, batch
    row = pl.ds(pl.program_id(0) * ROWS, ROWS)

    def superblock(b, total):
        unit = plgpu.load(unit_ref.at[:, b])[None, :]
        for half in range(2):
            words = plgpu.load(words_ref.at[row, pl.ds((2 * b + half) * PLANE, PLANE)])
            for byte in range(2):
                plane = 4 * b + 2 * half + byte
                x = load_columns(x_ref, items, b, (2 * half + byte) * PLANE, PLANE)
                product = plgpu.dot(byte_plane(words, byte, asm=asm), x)
                product += plgpu.dot(jnp.full((ROWS, PLANE), -128 * UNITS[0], jnp.float16), x)
                scale = plgpu.load(scales_ref.at[plane, row]).astype(jnp.float32)
                total = fma_f32(product, scale[:, None] * unit, total, asm=asm)
        return total

    total = lax.fori_loop(0, superblocks, superblock, jnp.zeros((ROWS, batch), jnp.float32))
    out_ref[...] = (total.T * jnp.float32(1 / UNITS[0])).astype(out_ref.dtype)


def matmul(
    x: Prepared,
    weight: TritonInt8Weight,
    dtype: DTypeLike,
    *,
    batch: int,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """x Ŵᵀ in `dtype`, for the padded rows of the weight; f32 accumulation.

    Args:
        x: a multiple of `batch` rows.
        weight: laid out.
        dtype: of the result.
        batch: rows of x that a program computes, 8 or a power of two above.
        interpret: run in interpret mode.
    """
    m = x.unit.shape[0]
    return pl.pallas_call(
        partial(_kernel, superblocks=weight.superblocks, asm=not interpret),
        grid=(weight.padded_rows // ROWS, m // batch),
        in_specs=[
            pl.BlockSpec(),
            pl.BlockSpec((batch, x.unit.shape[1]), lambda i, m: (m, 0)),
            pl.BlockSpec(),
            pl.BlockSpec(),
        ],
        out_specs=pl.BlockSpec((batch, ROWS), lambda i, m: (m, i)),
        out_shape=jax.ShapeDtypeStruct((m, weight.padded_rows), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=NAME,
    )(*x, weight.words, weight.scales)
