"""What the method takes and returns: recipes, activation statistics, and the packed weights they lead to."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul.types import (
    Codebook,
    Int8Weight,
    PackedWeight,
    ScaleKind,
    Sidecar,
    SVSKWeight,
)

__all__ = [
    "DEFAULT_RECIPE",
    "MAX_RANK",
    "RECIPES",
    "SENSITIVITY_TILE",
    "InputMoment",
    "Int8Weight",
    "OutputSensitivity",
    "PackedWeight",
    "QuantConfig",
    "SVSKWeight",
    "Sidecar",
    "TensorPlan",
    "TileShape",
    "recipe",
]

MAX_RANK = 128
"""Largest rank of a sidecar tile."""
GROUPS = (16, 32, 64)
"""Columns that may share a scale."""
MAX_BEAMS, MAX_ROUNDS = 256, 100
"""Beyond these a run would not end, or not fit."""
EMBEDDING_GROUP = 16
"""Columns of an embedding or head in 4 bits that share a scale."""
SENSITIVITY_TILE = 512
"""Rows of a block of the output sensitivity."""


def _check_coefficients(coefficients: tuple[float, float]) -> None:
    """ValueError unless the levels t + a t³ - δ of a companded codebook rise with t and reach both signs."""
    a, delta = coefficients
    if not (0 <= a <= 1 and abs(delta) < 7.5):
        raise ValueError(f"coefficients (a, δ): expected a in 0 to 1 and |δ| below 7.5, got {coefficients}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileShape:
    """Rows and columns of a sidecar tile."""

    rows: int = 512
    """Output rows of a tile."""
    columns: int = 1024
    """Input columns of a tile; 0 means the whole row."""

    def __post_init__(self):
        if self.rows < 1 or self.columns < 0:
            raise ValueError(
                f"TileShape: rows must be at least 1 and columns at least 0, got {self.rows} × {self.columns}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How decoder linears, embedding and head are stored, and how the stored numbers are found.

    Two families. With flat scales, the published method: linear codebook, one search for scales and codes, a
    sidecar of equal ranks from a weighted SVD. With two-level scales, the strong one: error feedback, a
    sidecar in the metric of choice, and group sizes and ranks allocated to a budget of `bits`.
    """

    codebook: Codebook = "linear"
    """Levels of the 4-bit codes."""
    coefficients: tuple[float, float] = (0.008, 0.3)
    """(a, δ) of the companded codebook."""
    groups: tuple[int, ...] = (64,)
    """Columns that share a scale: 16, 32 or 64; where several are given, each linear gets one of them."""
    scales: ScaleKind = "flat"
    """Scales as one f16 each (flat), or as int6 with an f16 per 256 columns (two_level)."""
    bits: float | None = None
    """Bits per weight of the decoder linears to allocate groups and ranks to; None for `rank` in every
    tile."""
    rank: int = 16
    """Rank of the sidecar in every tile where ranks are not allocated; 0 for none."""
    tile: TileShape = TileShape()
    """Tile of the sidecar."""
    importance: Literal["second_moment", "imatrix"] = "second_moment"
    """Cost of an error in the scale search: h, or h √(2 mean(w²) + w²)."""
    feedback: Literal["none", "columns", "both"] = "none"
    """Error feedback over the columns of a row, or over its columns and the rows of a tile."""
    beam_width: int = 1
    """Roundings of a row that error feedback follows at once; the cheapest is kept."""
    metric: Literal["diagonal", "full", "fisher"] = "diagonal"
    """What the sidecar minimises: the error under the inputs' mean squares, under their second moments, or
    under these and the model's sensitivity to the output."""
    fisher_share: float = 0.0
    """Share of the second moment weighted by token sensitivity in H."""
    damping: float = 0.01
    """Share of its mean diagonal added to H before error feedback."""
    moment_shrinkage: float = 0.0
    """Share by which H is drawn towards its diagonal."""
    sensitivity_shrinkage: float = 0.01
    """Share by which G is drawn towards a multiple of the identity."""
    joint_rounds: int = 0
    """Rounds of rounding W minus the sidecar, then fitting the sidecar again."""
    polish: int = 0
    """Steps of training the continuous numbers (super-scales, codebook, sidecar) on the calibration text
    until the whole model predicts like the original; meant for an accelerator."""
    embedding: Literal["int8", "q4", "bfloat16"] = "int8"
    """How embedding and head are stored: int8 with an f16 scale per 64 columns; as the linears without their
    sidecars, two-level scales per 16 columns; or unquantized bfloat16."""

    def __post_init__(self):
        if not self.groups or any(group not in GROUPS for group in self.groups):
            raise ValueError(f"QuantConfig.groups: expected 16, 32 or 64, got {self.groups}")
        _check_coefficients(self.coefficients)
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"QuantConfig.rank: expected 0 to {MAX_RANK}, got {self.rank}")
        if self.scales == "flat" and (
            self.codebook != "linear"
            or self.feedback != "none"
            or self.metric != "diagonal"
            or self.bits is not None
            or len(self.groups) != 1
            or self.polish
        ):
            raise ValueError(
                "QuantConfig: flat scales go with the published method alone (linear codebook, one group "
                "size, no feedback, diagonal metric, no budget, no polish); use two_level scales"
            )
        if self.scales == "flat" and self.embedding == "q4":
            raise ValueError(
                "QuantConfig.embedding: 4 bits go with two_level scales; take int8, or a recipe svsk-*"
            )
        if self.tile.rows > SENSITIVITY_TILE and self.metric == "fisher":
            raise ValueError(
                f"QuantConfig.tile: the fisher metric takes tiles of at most {SENSITIVITY_TILE} rows, got "
                f"{self.tile.rows}"
            )
        if not (1 <= self.beam_width <= MAX_BEAMS and 0 <= self.joint_rounds <= MAX_ROUNDS):
            raise ValueError(
                f"QuantConfig: expected beam_width 1 to {MAX_BEAMS} and joint_rounds 0 to {MAX_ROUNDS}, got "
                f"{self.beam_width} and {self.joint_rounds}"
            )
        if self.polish < 0 or self.damping < 0:
            raise ValueError(
                f"QuantConfig: expected polish and damping at least 0, got {self.polish} and {self.damping}"
            )
        for name in ("fisher_share", "moment_shrinkage", "sensitivity_shrinkage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"QuantConfig.{name}: expected 0 to 1, got {getattr(self, name)}")

    @property
    def needs_full_moments(self) -> bool:
        """Whether diagonals of the second moments are not enough."""
        return self.scales == "two_level"

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the recipe is meant to be given the Fisher pass."""
        return self.metric == "fisher" or self.fisher_share > 0 or self.feedback == "both"

    def without_sensitivity(self) -> "QuantConfig":
        """The same recipe in the plain metric."""
        return dataclasses.replace(
            self,
            metric="full" if self.metric == "fisher" else self.metric,
            fisher_share=0.0,
            feedback="columns" if self.feedback == "both" else self.feedback,
        )


STRONG = QuantConfig(
    codebook="companded",
    groups=(16, 32),
    scales="two_level",
    bits=4.6,
    tile=TileShape(rows=512, columns=0),
    importance="imatrix",
    feedback="both",
    beam_width=4,
    metric="fisher",
    fisher_share=0.5,
    moment_shrinkage=0.05,
    sensitivity_shrinkage=0.1,
    joint_rounds=1,
)

RECIPES: dict[str, QuantConfig] = {
    "svsk-r16": STRONG,
    "svsk-r16-polish": dataclasses.replace(STRONG, polish=300),
    "svsk-r8": dataclasses.replace(STRONG, bits=4.44),
    "classic-r16": QuantConfig(rank=16),
    "classic-r8": QuantConfig(rank=8),
    "q4": QuantConfig(rank=0),
}
"""Named recipes. `svsk-*` keep the published budgets and allocate groups and ranks within them; `classic-*`
are the published method, and `q4` is their base without a sidecar."""
DEFAULT_RECIPE = "svsk-r16"


def recipe(name: str) -> QuantConfig:
    """The configuration that a recipe names; ValueError lists the known names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How one linear is stored: what `QuantConfig` leaves open."""

    group: int
    """Columns that share a scale."""
    coefficients: tuple[float, float] | None
    """(a, δ) of the companded codebook; None for the linear one."""
    tile: TileShape
    """Tile of the sidecar."""
    ranks: tuple[tuple[int, ...], ...]
    """Rank of each tile, by row tile, then column tile."""

    def __post_init__(self):
        if self.group not in GROUPS:
            raise ValueError(f"TensorPlan.group: expected 16, 32 or 64, got {self.group}")
        if self.coefficients is not None:
            _check_coefficients(self.coefficients)

    @property
    def has_sidecar(self) -> bool:
        """Whether any tile has a rank."""
        return any(rank for row in self.ranks for rank in row)


if TYPE_CHECKING:
    MomentValue = jax.Array | np.ndarray
else:
    # Programs are compiled ahead for moments of which there are only shapes.
    MomentValue = Any


@jax.jit
def mean_of(total: jax.Array | np.ndarray, tokens: jax.Array | np.ndarray) -> jax.Array:
    """A sum over so many tokens divided by their number, or by 1 where there are none."""
    return jnp.asarray(total) / jnp.maximum(tokens.astype(jnp.float32), 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputMoment:
    """Sum over calibration tokens of x xᵀ for a linear's input x: f32 [K, K], or only its diagonal [K]; and
    how many tokens.

    Moments of disjoint tokens add: `a + b`.
    """

    total: MomentValue
    tokens: MomentValue

    def __add__(self, other: "InputMoment") -> "InputMoment":
        return InputMoment(total=self.total + other.total, tokens=self.tokens + other.tokens)

    @property
    def is_full(self) -> bool:
        """Whether the whole matrix is there, not just its diagonal."""
        return self.total.ndim == 2

    @property
    def mean(self) -> jax.Array:
        """H = E[x xᵀ], or its diagonal h = E[x²], f32."""
        return mean_of(self.total, self.tokens)

    @property
    def diagonal(self) -> jax.Array:
        """h = E[x²], f32 [K]."""
        return jnp.diagonal(self.mean) if self.is_full else self.mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSensitivity:
    """How much the model's output feels a linear's output y, from g = ∂(Σ -log p)/∂y at labels that the model
    samples.

    `blocks`: Σ g gᵀ over tokens, f32 [t, m, m], the diagonal blocks of m = min(512, N) rows of the whole
    matrix, the last one padded with zeros. `weights`: mean(g²) of each token, f32 [chunks, length].
    `tokens`: how many.

    Sensitivities of disjoint tokens add: `a + b`.
    """

    blocks: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray

    def __add__(self, other: "OutputSensitivity") -> "OutputSensitivity":
        return OutputSensitivity(
            blocks=self.blocks + other.blocks,
            weights=jnp.concatenate([self.weights, other.weights]),
            tokens=self.tokens + other.tokens,
        )

    @property
    def mean(self) -> jax.Array:
        """The blocks of G = E[g gᵀ], f32."""
        return mean_of(self.blocks, self.tokens)
