"""Packed weights laid out for the Triton kernels: once at load, exactly, and back."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int16

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, ceil_div, pad_axis, unpack_codes, unpack_int6
from pallas_kernels.svsk_matmul.triton_sidecar import gather_sidecars, in_pairs
from pallas_kernels.svsk_matmul.types import Leaf, SVSKWeight

SUPERBLOCK = SUPER_GROUP
"""Columns of a superblock: four planes of 64, one for each nibble of its 64 words."""
PLANE = 64
ROW_UNIT = 64
"""Rows of a weight are padded to a multiple of this; each such block has its codebook and its range of
sidecar rows."""
STEPS = tuple(512 * m for m in range(64, 128))
"""The kernels decode a companded code's t to STEP · t, where STEP is 2⁻²⁴ times one of these: t has four bits
and these seven, so that the product is exact. Levels are of the order of STEP³, which f16 holds only
coarsely: each codebook has the step that suits it."""
UNIT = 2.0**-24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonWeight:
    """One or several SVSKWeights of the same input, one above the other, as the Triton kernels read them.

    With K padded to B superblocks of 256 columns, and the rows of each weight padded to a multiple of 64, N
    in all (padding has scale zero):
    - `words`: int16 [B, N, 64]. Nibble j of word c of superblock b is the code of column 256 b + 64 j + c.
      What a program reads at a time lies together.
    - `scales` [B, N, G], G = 256 / group: int8 with `super_scales` f16 [B, N], or f16 without. The group of
      columns 64 j + group · q of a superblock is at (j // 2) · (G / 2) + 2 q + j % 2. Flat groups of 64 are
      stored as pairs of 32.
    - `constants`: f32 [N / 64, 4] = (ρ, d, f, s). The kernels' companded level is u x + d with x = 2⁻²⁴ s t
      and u = x² + ρ; times f it is t + a t³ - δ. For the linear codebook f = 1 and the rest is not read.
    - `v`: int16 [R, 128 B], the sidecars' V over the tiles of all weights, zero outside its columns, as
      `pack_byte_planes` writes it.
    - `v_scale`: f32 [P], the sidecars' scales / 2¹⁴, padded to blocks of 128. `places`: int32 [P + 1], where
      a product puts its number of each row of V, behind its N others (of padding, behind those of tiles), and
      last of all how many rows are not padding.
    - `u`: int8 [N, S], S ranks of each row; `ranges`: int32 [N / 64, 3], for each 64 rows the first row of
      `v` that they need, the count of them, at most S, and the place of the first.

    `super_scales` is None with flat scales, the last five without any sidecar.

    `rows`: of each weight, without padding. `paired`: whether rows 128 i to 128 i + 127 share their rows of V
    (`in_pairs`). `tile_units`: T, where the first place of 64 rows i is ⌊i / T⌋ S; 0 where only `ranges` says
    it. A kernel that finishes a product so needs to read nothing before it knows what to read. Leading axes
    on every leaf are a stack of layers.
    """

    words: Leaf
    scales: Leaf
    super_scales: Leaf
    constants: Leaf
    v: Leaf
    v_scale: Leaf
    places: Leaf
    u: Leaf
    ranges: Leaf
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    companded: bool = dataclasses.field(metadata={"static": True})
    paired: bool = dataclasses.field(metadata={"static": True})
    tile_units: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] without padding."""
        return sum(self.rows), self.columns

    @property
    def padded_rows(self) -> int:
        """N, padding included."""
        return sum(map(padded, self.rows))

    @property
    def superblocks(self) -> int:
        """B: superblocks of a row."""
        return ceil_div(self.columns, SUPERBLOCK)

    @property
    def sidecar_ranks(self) -> int:
        """S: ranks of each row, padding included, a multiple of 16; 0 without a sidecar."""
        return 0 if self.u is None else self.u.shape[-1]

    @property
    def product_columns(self) -> int:
        """Numbers of a row of x in a product before it is finished: rows of Ŵ, and those of V in their
        places."""
        if self.u is None:
            return self.padded_rows
        tiles = ceil_div(self.padded_rows // ROW_UNIT, self.tile_units) if self.tile_units else 0
        return self.padded_rows + tiles * self.sidecar_ranks + self.v_scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding included."""
        return nbytes(self)


def padded(rows: int) -> int:
    """Rows rounded up to whole blocks of 64."""
    return ROW_UNIT * ceil_div(rows, ROW_UNIT)


def nbytes(tree: object) -> int:
    """Bytes of a tree's arrays."""
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@jax.jit
def pack_byte_planes(values: Int8[Array, "n k"]) -> Int16[Array, "n half"]:
    """Pairs of bytes: the low one of word 64 h + c of a superblock is 128 plus the value of column 128 h + c,
    the high one that of column 128 h + 64 + c. K is a multiple of 256."""
    planes = (values.astype(jnp.int16) + 128).astype(jnp.uint16).reshape(len(values), -1, 2, PLANE)
    words = planes[:, :, 0] | planes[:, :, 1] << 8
    return jax.lax.bitcast_convert_type(words.reshape(len(values), -1), jnp.int16)


def unpack_byte_planes(words: Int16[Array, "*b half"]) -> Float[Array, "*b k"]:
    """Inverse of `pack_byte_planes`, as f32."""
    pairs = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*words.shape[:-1], -1, 1, PLANE)
    planes = (pairs >> jnp.asarray([0, 8], jnp.uint16)[:, None]) & 255
    return planes.astype(jnp.float32).reshape(*words.shape[:-1], -1) - 128.0


def lay_out(weights: SVSKWeight | Sequence[SVSKWeight]) -> TritonWeight:
    """The weights, one above the other, for one launch. It compiles what needs it, by shape.

    Where one of several has groups of 16 and another of 32, all get groups of 16, and where one codebook is
    linear and another companded the linear one is written as companded with a = 10⁻⁸.

    Raises:
        ValueError: weights of different K, or some with flat and some with two-level scales.
    """
    weights = [weights] if isinstance(weights, SVSKWeight) else list(weights)
    columns = {weight.shape[1] for weight in weights}
    kinds = {weight.scale_kind for weight in weights}
    if len(columns) != 1 or len(kinds) != 1:
        raise ValueError(
            "lay_out: weights for one launch need the same K and kind of scales, got "
            f"{[list(weight.shape) for weight in weights]} with {sorted(kinds)} scales"
        )
    group = min(min(weight.group for weight in weights), 32)
    companded = any(weight.coefficients is not None for weight in weights)
    bare = [dataclasses.replace(weight, sidecar=None) for weight in weights]
    parts = [_base(weight, group=group, companded=companded) for weight in bare]
    words, scales, constants = (
        jnp.concatenate(each, axis=axis)
        for each, axis in zip(zip(*[part[:3] for part in parts], strict=True), (1, 1, 0), strict=True)
    )
    two_level = kinds == {"two_level"}
    supers = jnp.concatenate([part[3] for part in parts], axis=1) if two_level else None
    rows = tuple(weight.shape[0] for weight in weights)
    width = SUPERBLOCK * ceil_div(weights[0].shape[1], SUPERBLOCK)
    sidecars = gather_sidecars([weight.sidecar for weight in weights], rows, width, ROW_UNIT)
    if sidecars.v is not None:
        sidecars = sidecars._replace(v=pack_byte_planes(sidecars.v))
    return TritonWeight(
        words=words,
        scales=scales,
        super_scales=supers,
        constants=constants,
        rows=rows,
        columns=weights[0].shape[1],
        group=group,
        companded=companded,
        paired=in_pairs([weight.sidecar for weight in weights], rows, ROW_UNIT),
        **sidecars._asdict(),
    )


@partial(jax.jit, static_argnames=("group", "companded"))
def _base(weight: SVSKWeight, *, group: int, companded: bool) -> tuple[jax.Array, jax.Array, jax.Array, Leaf]:
    n, k = weight.shape
    codes = pad_axis(pad_axis(unpack_codes(weight.codes, k), 1, SUPERBLOCK), 0, ROW_UNIT)
    planes = codes.reshape(codes.shape[0], -1, 4, PLANE).astype(jnp.uint16)
    words = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    words = jax.lax.bitcast_convert_type(jnp.swapaxes(words, 0, 1), jnp.int16)

    groups = ceil_div(k, weight.group)
    small = weight.scales if weight.super_scales is None else unpack_int6(weight.scales, groups)
    small = jnp.repeat(pad_axis(small, 1, SUPERBLOCK // weight.group), weight.group // group, axis=1)
    small = pad_axis(small, 0, ROW_UNIT)
    per_plane = PLANE // group
    # [n, b, j // 2, j % 2, q] → [b, n, j // 2, q, j % 2]
    small = small.reshape(small.shape[0], -1, 2, 2, per_plane).transpose(1, 0, 2, 4, 3)
    scales = small.reshape(*small.shape[:2], 4 * per_plane)
    supers = None if weight.super_scales is None else pad_axis(weight.super_scales, 0, ROW_UNIT).T

    blocks = padded(n) // ROW_UNIT
    constants = jnp.broadcast_to(_constants(weight.coefficients, companded), (blocks, 4))
    return words, scales, constants, supers


def _constants(coefficients: jax.Array | None, companded: bool) -> Float[Array, "4"]:
    if not companded:
        return jnp.asarray([0.0, 0.0, 1.0, 0.0], jnp.float32)
    if coefficients is None:
        # c - 8 = t - ½.
        coefficients = jnp.asarray([0.0, 0.5], jnp.float32)
    a, delta = coefficients.astype(jnp.float32)
    a = jnp.where(jnp.abs(a) < 1e-8, 1e-8, a)
    step = jnp.asarray(STEPS, jnp.float32) * UNIT
    rho, shift = step * step / a, -delta * step * step * step / a
    t = jnp.arange(16, dtype=jnp.float32)[:, None] - 7.5
    x = step * t
    u = _round(x * x + _round(rho))
    level, true = _round(u * x + _round(shift)), t + a * t * t * t - delta
    factor = jnp.sum(level * true, axis=0) / jnp.sum(level * level, axis=0)
    best = jnp.argmin(jnp.sum((factor * level - true) ** 2, axis=0))
    return jnp.stack([rho, shift, factor, step / UNIT])[:, best]


def _round(x: jax.Array) -> jax.Array:
    """To f16's precision, subnormals included. XLA drops a pair of conversions that nothing separates."""
    return jax.lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32)
