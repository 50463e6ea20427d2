"""Exact stored bytes, from shapes alone."""

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, ceil_div, packed_int6_bytes, tile_spans
from pallas_kernels.svsk_matmul.types import INT8_GROUP, Codebook, ScaleKind
from svsk_jax.quant.types import EMBEDDING_GROUP, QuantConfig, TensorPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Stored size of a model."""

    linear_bytes: int
    """Bytes of the quantized decoder linears."""
    linear_weights: int
    """Their number of weights."""
    total_bytes: int
    """Bytes of every tensor, with embedding, head and norms."""
    total_weights: int
    """Number of parameters of the model."""

    @property
    def linear_bits(self) -> float:
        """Bits per weight over the decoder linears."""
        return 8 * self.linear_bytes / self.linear_weights

    @property
    def total_bits(self) -> float:
        """Bits per parameter over the whole file."""
        return 8 * self.total_bytes / self.total_weights


def base_bytes(shape: tuple[int, int], group: int, scales: ScaleKind, codebook: Codebook) -> int:
    """Bytes of codes, scales and codebook coefficients of an [N, K] matrix."""
    n, k = shape
    groups = ceil_div(k, group)
    row = 2 * groups if scales == "flat" else packed_int6_bytes(groups) + 2 * ceil_div(k, SUPER_GROUP)
    coefficients = 4 if codebook == "companded" else 0
    return n * (ceil_div(k, 2) + row) + coefficients


def sidecar_bytes(shape: tuple[int, int], config: QuantConfig) -> int:
    """Bytes of U, V and scales of an [N, K] matrix with the recipe's rank in every tile."""
    n, k = shape
    rows, columns = len(tile_spans(n, config.tile.rows)), len(tile_spans(k, config.tile.columns))
    return config.rank * (n * columns + k * rows + 2 * rows * columns)


def planned_bytes(shape: tuple[int, int], plan: TensorPlan, scales: ScaleKind) -> int:
    """Bytes of an [N, K] matrix as stored under a plan; no sidecar where every rank is 0."""
    base = base_bytes(shape, plan.group, scales, "linear" if plan.coefficients is None else "companded")
    rows, columns = tile_spans(shape[0], plan.tile.rows), tile_spans(shape[1], plan.tile.columns)
    return base + sum(
        rank * (below - above + right - left + 2)
        for (above, below), row in zip(rows, plan.ranks, strict=True)
        for (left, right), rank in zip(columns, row, strict=True)
    )


def linear_bytes(shape: tuple[int, int], config: QuantConfig) -> int:
    """Bytes of an [N, K] matrix as stored under a recipe. Where groups and ranks are allocated, its share of
    the budget by size; what it gets may be more or less."""
    if config.bits is not None:
        return int(config.bits * shape[0] * shape[1] / 8)
    base = base_bytes(shape, config.groups[0], config.scales, config.codebook)
    return base + sidecar_bytes(shape, config)


def embedding_bytes(shape: tuple[int, int], config: QuantConfig) -> int:
    """Bytes of an embedding or head [vocabulary, hidden] under a recipe."""
    n, k = shape
    if config.embedding == "q4":
        return base_bytes(shape, EMBEDDING_GROUP, config.scales, config.codebook)
    return n * (k + 2 * ceil_div(k, INT8_GROUP)) if config.embedding == "int8" else 2 * n * k


def predict(shapes: Mapping[str, tuple[int, ...]], linears: Collection[str], config: QuantConfig) -> Budget:
    """Stored size of a model with the given parameter shapes.

    Args:
        shapes: every parameter's shape by path.
        linears: paths, without `.weight`, of the matrices that the recipe quantizes. Matrices outside the
            layers are embedding or head; everything else (norms, biases, routers) is kept as f32.
        config: the recipe.
    """
    quantized = {f"{name}.weight": shapes[f"{name}.weight"] for name in linears}
    stored = 0
    for path, shape in shapes.items():
        if path in quantized:
            continue
        outer = len(shape) == 2 and not path.startswith("layers.")
        stored += embedding_bytes((shape[0], shape[1]), config) if outer else 4 * math.prod(shape)
    packed = sum(linear_bytes((shape[0], shape[1]), config) for shape in quantized.values())
    return Budget(
        linear_bytes=packed,
        linear_weights=sum(int(np.prod(shape)) for shape in quantized.values()),
        total_bytes=packed + stored,
        total_weights=sum(int(np.prod(shape)) for shape in shapes.values()),
    )
