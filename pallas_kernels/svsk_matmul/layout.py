"""Bit layout of stored codes and scales, and the tiling of a matrix. Exact inverses, jit-compatible, row by
row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer, UInt8

SUPER_GROUP = 256
"""Columns that share one f16 super-scale in two-level scales."""


def ceil_div(a: int, b: int) -> int:
    """The smallest integer not below a / b."""
    return -(-a // b)


def packed_int6_bytes(count: int) -> int:
    """Bytes of `count` 6-bit integers packed without gaps."""
    return ceil_div(6 * count, 8)


def tile_spans(size: int, tile: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each tile along an axis of `size`; the last one may be ragged. `tile` 0 means the
    whole axis."""
    step = tile or size
    return tuple((start, min(start + step, size)) for start in range(0, size, step))


def pad_axis(x: Array, axis: int, multiple: int) -> Array:
    """Zero-pad `axis` of x at its end up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def pack_codes(codes: Integer[Array, "*b n k"]) -> UInt8[Array, "*b n bytes"]:
    """Pack 4-bit codes in 0..15: byte j of a row holds code 2j in its low nibble and 2j + 1 in its high
    one. An odd K ends in a zero nibble."""
    pairs = pad_axis(codes.astype(jnp.uint8), -1, 2)
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)


def unpack_codes(packed: UInt8[Array, "*b n bytes"], k: int) -> UInt8[Array, "*b n {k}"]:
    """Inverse of `pack_codes` for a row length of `k` codes."""
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :k]


def pack_int6(values: Integer[Array, "*b n g"]) -> UInt8[Array, "*b n bytes"]:
    """Pack signed integers in -32..31 as a little-endian stream of 6-bit two's complement fields, ⌈6 g / 8⌉
    bytes a row."""
    count = values.shape[-1]
    fields = pad_axis(values.astype(jnp.int32) & 63, -1, 4)
    quads = fields.reshape(*fields.shape[:-1], -1, 4)
    words = quads[..., 0] | (quads[..., 1] << 6) | (quads[..., 2] << 12) | (quads[..., 3] << 18)
    octets = jnp.stack([words & 255, (words >> 8) & 255, words >> 16], axis=-1)
    return octets.astype(jnp.uint8).reshape(*values.shape[:-1], -1)[..., : packed_int6_bytes(count)]


def unpack_int6(packed: UInt8[Array, "*b n bytes"], count: int) -> Int8[Array, "*b n {count}"]:
    """Inverse of `pack_int6` for `count` integers a row."""
    octets = pad_axis(packed, -1, 3).astype(jnp.int32)
    octets = octets.reshape(*octets.shape[:-1], -1, 3)
    words = octets[..., 0] | (octets[..., 1] << 8) | (octets[..., 2] << 16)
    fields = jnp.stack([(words >> shift) & 63 for shift in (0, 6, 12, 18)], axis=-1)
    signed = jnp.where(fields > 31, fields - 64, fields)
    return signed.astype(jnp.int8).reshape(*packed.shape[:-1], -1)[..., :count]


def expand_groups(values: Float[Array, "*b n g"], group: int, k: int) -> Float[Array, "*b n {k}"]:
    """Repeat each group's value over its `group` columns, cut to `k` (the last group may be ragged)."""
    return jnp.repeat(values, group, axis=-1)[..., :k]


def levels(codes: Integer[Array, "*b n k"], coefficients: jax.Array | None) -> Float[Array, "*b n k"]:
    """f32 level of each code.

    Without coefficients the linear codebook, c - 8. With `coefficients` = (a, δ), f16 [..., 2], the
    companded one,
    t + a t³ - δ with t = c - 7.5.
    """
    if coefficients is None:
        return codes.astype(jnp.float32) - 8.0
    t = codes.astype(jnp.float32) - 7.5
    a, delta = (
        coefficients.astype(jnp.float32)[..., None, None, 0],
        coefficients.astype(jnp.float32)[..., None, None, 1],
    )
    return t + a * t * t * t - delta
