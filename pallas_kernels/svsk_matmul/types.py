"""The stored forms of a weight matrix, as frozen pytrees. Their shapes are invariants, checked on
construction.

Checks look at the trailing axes only, so a stack of weights (a leading axis on every leaf) is valid too,
and they
pass over leaves without a shape, which JAX's own tree functions put in an array's place.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, ceil_div, packed_int6_bytes, tile_spans

Codebook = Literal["linear", "companded"]
ScaleKind = Literal["flat", "two_level"]
Leaf = Any
"""An array, concrete or abstract, or what JAX's tree functions put in its place."""
INT8_GROUP = 64
"""Columns of an int8 matrix that share a scale."""
SIDECAR_UNIT = 2.0**-14
"""Value of a sidecar's scale of 1, for a product of two int8 numbers."""


def _check(owner: str, field: str, value: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return
    actual = tuple(value.shape)
    if (
        actual[len(actual) - len(shape) :] != shape
        or len(actual) < len(shape)
        or value.dtype != jnp.dtype(dtype)
    ):
        raise ValueError(
            f"{owner}.{field}: expected shape [..., {', '.join(map(str, shape))}] of "
            f"{jnp.dtype(dtype).name}, "
            f"got {list(actual)} of {value.dtype}"
        )


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A low-rank correction S of an [N, K] matrix, one product per tile of `tile_out` rows × `tile_in`
    columns.

    Within tile (i, j) of rank r: S = U diag(scale / 2¹⁴) V, with U int8 [rows, r], V int8 [r, columns] and
    scale f16 [r]. The constant
    keeps `scale` near the size of the correction, where f16 is precise; without it small corrections would
    underflow.

    Invariants. `ranks[i][j]` is the rank of the tile in row tile i and column tile j (0 allowed); `tile_in`
    0 means the whole of K. Leaves
    are flat and ordered by row tile first: `u` concatenates, for each row tile, the matrix [rows, Σ_j r_ij]
    whose columns run over
    j then rank; `v` concatenates [r_ij, columns_j] and `scale` [r_ij] over i, then j.
    """

    u: Leaf
    v: Leaf
    scale: Leaf
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    tile: tuple[int, int] = dataclasses.field(metadata={"static": True})
    ranks: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        rows, columns = self.row_spans, self.column_spans
        if len(self.ranks) != len(rows) or any(len(row) != len(columns) for row in self.ranks):
            raise ValueError(
                f"Sidecar.ranks: expected {len(rows)} × {len(columns)} ranks for a matrix of "
                f"{self.shape} in tiles of {self.tile}, "
                f"got {len(self.ranks)} × {sorted({len(row) for row in self.ranks})}"
            )
        if any(rank < 0 for row in self.ranks for rank in row):
            raise ValueError(f"Sidecar.ranks: a rank is negative: {self.ranks}")
        u_size = sum((stop - start) * sum(row) for (start, stop), row in zip(rows, self.ranks, strict=True))
        v_size = sum(
            rank * (stop - start)
            for row in self.ranks
            for (start, stop), rank in zip(columns, row, strict=True)
        )
        _check("Sidecar", "u", self.u, (u_size,), jnp.int8)
        _check("Sidecar", "v", self.v, (v_size,), jnp.int8)
        _check("Sidecar", "scale", self.scale, (sum(map(sum, self.ranks)),), jnp.float16)

    @property
    def row_spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each row tile."""
        return tile_spans(self.shape[0], self.tile[0])

    @property
    def column_spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each column tile."""
        return tile_spans(self.shape[1], self.tile[1])

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return _bytes(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SVSKWeight:
    """An [N, K] matrix as 4-bit codes, group scales and an optional sidecar: Ŵ = scale · level(code) + S.

    Invariants, with groups of g = `group` columns (16, 32 or 64):
    - `codes`: uint8 [N, ⌈K / 2⌉], see `layout.pack_codes`.
    - `scales`, flat: f16 [N, ⌈K / g⌉] and no `super_scales`; two-level: uint8 [N, ⌈6 ⌈K / g⌉ / 8⌉] of
    packed int6, and `super_scales`
      f16 [N, ⌈K / 256⌉]; the scale of a group is its int6 times its super-scale.
    - `coefficients`: None for the linear codebook, f16 [2] = (a, δ) for the companded one.
    """

    codes: Leaf
    scales: Leaf
    super_scales: Leaf | None
    coefficients: Leaf | None
    sidecar: Sidecar | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        n, k = self.shape
        if self.group not in (16, 32, 64):
            raise ValueError(f"SVSKWeight.group: expected 16, 32 or 64 columns, got {self.group}")
        groups = ceil_div(k, self.group)
        _check("SVSKWeight", "codes", self.codes, (n, ceil_div(k, 2)), jnp.uint8)
        if self.super_scales is None:
            _check("SVSKWeight", "scales", self.scales, (n, groups), jnp.float16)
        else:
            _check("SVSKWeight", "scales", self.scales, (n, packed_int6_bytes(groups)), jnp.uint8)
            _check(
                "SVSKWeight", "super_scales", self.super_scales, (n, ceil_div(k, SUPER_GROUP)), jnp.float16
            )
        if self.coefficients is not None:
            _check("SVSKWeight", "coefficients", self.coefficients, (2,), jnp.float16)
        if isinstance(self.sidecar, Sidecar) and self.sidecar.shape != self.shape:
            raise ValueError(
                f"SVSKWeight.sidecar: made for a matrix of {self.sidecar.shape}, the codes are of "
                f"{self.shape}"
            )

    @property
    def codebook(self) -> Codebook:
        """Which codebook the codes index."""
        return "linear" if self.coefficients is None else "companded"

    @property
    def scale_kind(self) -> ScaleKind:
        """How the group scales are stored."""
        return "flat" if self.super_scales is None else "two_level"

    @property
    def nbytes(self) -> int:
        """Bytes stored, padding included."""
        return _bytes(self)

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes stored / (N K)."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """An [N, K] matrix (embedding or head) as int8 values and one f16 scale per 64 columns: Ŵ = scale ·
    value.

    Invariants: `values` int8 [N, K], `scales` f16 [N, ⌈K / 64⌉].
    """

    values: Leaf
    scales: Leaf
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        n, k = self.shape
        _check("Int8Weight", "values", self.values, (n, k), jnp.int8)
        _check("Int8Weight", "scales", self.scales, (n, ceil_div(k, INT8_GROUP)), jnp.float16)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return _bytes(self)


PackedWeight = SVSKWeight | Int8Weight


def row_leaves(weight: PackedWeight) -> dict[str, Leaf]:
    """The weight's arrays, by field, whose rows are its own: all there are but codebook and sidecar."""
    names = ("values", "scales") if isinstance(weight, Int8Weight) else ("codes", "scales", "super_scales")
    leaves = {name: getattr(weight, name) for name in names}
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}
