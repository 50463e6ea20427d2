"""What the method takes and returns: recipes, activation statistics, and the packed weights they lead to."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.svsk_matmul.types import (
    Codebook,
    Int8Weight,
    PackedWeight,
    ScaleKind,
    Sidecar,
    SVSKWeight,
)

__all__ = [
    "RECIPES",
    "InputMoment",
    "Int8Weight",
    "PackedWeight",
    "QuantConfig",
    "SVSKWeight",
    "Sidecar",
    "TileShape",
    "recipe",
]


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
    """How decoder linears, embedding and head are stored, and how the stored numbers are found."""

    codebook: Codebook = "linear"
    """Levels of the 4-bit codes."""
    group: Literal[16, 32, 64] = 64
    """Columns that share a scale."""
    scales: ScaleKind = "flat"
    """Scales as one f16 each (flat), or as int6 with an f16 per 256 columns (two_level)."""
    rank: int = 16
    """Rank of the sidecar in every tile; 0 for none."""
    tile: TileShape = TileShape()
    """Tile of the sidecar."""
    embedding: Literal["int8", "bfloat16"] = "int8"
    """How embedding and head are stored: int8 with an f16 scale per 64 columns, or unquantized bfloat16."""

    def __post_init__(self):
        if self.group not in (16, 32, 64):
            raise ValueError(f"QuantConfig.group: expected 16, 32 or 64, got {self.group}")
        if not 0 <= self.rank <= 128:
            raise ValueError(f"QuantConfig.rank: expected 0 to 128, got {self.rank}")


RECIPES: dict[str, QuantConfig] = {
    "q4": QuantConfig(rank=0),
    "classic-r8": QuantConfig(rank=8),
    "classic-r16": QuantConfig(rank=16),
}
"""Named recipes. `q4` is the base of the classic ones without a sidecar."""


def recipe(name: str) -> QuantConfig:
    """The configuration that a recipe names; ValueError lists the known names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputMoment:
    """Sum over calibration tokens of x xᵀ for a linear's input x: f32 [K, K], or only its diagonal [K]; and
    how many tokens.

    Moments of disjoint tokens add: `a + b`.
    """

    total: jax.Array
    tokens: jax.Array

    def __add__(self, other: "InputMoment") -> "InputMoment":
        return InputMoment(total=self.total + other.total, tokens=self.tokens + other.tokens)

    @property
    def is_full(self) -> bool:
        """Whether the whole matrix is there, not just its diagonal."""
        return self.total.ndim == 2

    @property
    def mean(self) -> jax.Array:
        """H = E[x xᵀ], or its diagonal h = E[x²], f32."""
        return self.total / jnp.maximum(self.tokens.astype(jnp.float32), 1.0)

    @property
    def diagonal(self) -> jax.Array:
        """h = E[x²], f32 [K]."""
        return jnp.diagonal(self.mean) if self.is_full else self.mean
