"""Ŵ from what is laid out for the Triton kernels, by XLA: what runs where a kernel can't."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul import triton_int8
from pallas_kernels.svsk_matmul.layout import expand_groups
from pallas_kernels.svsk_matmul.triton import without_padding
from pallas_kernels.svsk_matmul.triton_int8 import TritonInt8Weight
from pallas_kernels.svsk_matmul.triton_layout import (
    ROW_UNIT,
    SUPERBLOCK,
    UNIT,
    TritonWeight,
    unpack_byte_planes,
)


def restore(weight: TritonWeight | TritonInt8Weight) -> Float[Array, "n k"]:
    """Ŵ of all parts, f32, in the reference's order of operations."""
    if isinstance(weight, TritonInt8Weight):
        return triton_int8.take_rows(weight, jnp.arange(weight.shape[0]), jnp.float32)
    dense = _base(weight, jnp.arange(weight.padded_rows))
    if weight.v is not None:
        dense = dense + _restore_sidecar(weight)
    return without_padding(dense.T, weight.rows).T[:, : weight.columns]


def take_rows(
    weight: TritonWeight | TritonInt8Weight, rows: Int[Array, "*b"], dtype: DTypeLike
) -> Float[Array, "*b k"]:
    """Rows of Ŵ by index (an embedding look-up), in `dtype`; of one weight without a sidecar."""
    if isinstance(weight, TritonInt8Weight):
        return triton_int8.take_rows(weight, rows, dtype)
    dense = _base(weight, rows.reshape(-1))[:, : weight.columns]
    return dense.reshape(*rows.shape, -1).astype(dtype)


def _base(weight: TritonWeight, rows: Int[Array, "n"]) -> Float[Array, "n k"]:
    """Rows of the padded weight without its sidecar, f32."""
    n, blocks, half = len(rows), weight.superblocks, weight.scales.shape[-1] // 2
    words = lax.bitcast_convert_type(weight.words[:, rows], jnp.uint16).swapaxes(0, 1)[:, :, None]
    shifts = jnp.asarray([0, 4, 8, 12], jnp.uint16)[:, None]
    codes = ((words >> shifts) & 15).astype(jnp.float32).reshape(n, blocks * SUPERBLOCK)
    # [b, n, j // 2, q, j % 2] → [n, b, j, q]
    scales = weight.scales[:, rows].reshape(blocks, n, 2, half // 2, 2).transpose(1, 0, 2, 4, 3)
    scales = scales.astype(jnp.float32)
    if weight.super_scales is not None:
        scales = scales * weight.super_scales[:, rows].T.astype(jnp.float32)[:, :, None, None, None]
    scales = expand_groups(scales.reshape(n, -1), weight.group, blocks * SUPERBLOCK)
    return scales * _levels(codes, weight, rows)


def _levels(codes: Float[Array, "n k"], weight: TritonWeight, rows: Int[Array, "n"]) -> Float[Array, "n k"]:
    if not weight.companded:
        return codes - 8.0
    rho, shift, _, step = weight.constants[rows // ROW_UNIT].T[:, :, None]
    step = step * UNIT
    a, delta = step * step / rho, -shift / (step * rho)
    t = codes - 7.5
    return t + a * t * t * t - delta


def _restore_sidecar(weight: TritonWeight) -> Float[Array, "n k"]:
    return jnp.matmul(_dense_u(weight), unpack_byte_planes(weight.v), precision=lax.Precision.HIGHEST)


def _dense_u(weight: TritonWeight) -> Float[Array, "n r"]:
    """U diag(scale) over all rows of V, f32."""
    first, count, _ = (jnp.repeat(column, ROW_UNIT) for column in weight.ranges.T)
    column = jnp.arange(weight.v.shape[0]) - first[:, None]
    alive = (column >= 0) & (column < count[:, None])
    u = jnp.take_along_axis(weight.u, jnp.where(alive, column, 0), axis=1)
    return jnp.where(alive, u.astype(jnp.float32), 0.0) * weight.v_scale[: weight.v.shape[0]]
