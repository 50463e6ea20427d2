"""What quantizing a model costs, from single linears that were timed: the fit and what follows from it.

A cost is fitted as a sum of products of the sizes with coefficients of at least 0.

Not in the estimates: compilation, reading, writing, calibration, polish.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import layer_kinds, layer_linears, linear_inputs
from svsk_jax.pipeline.calibrate import statistics_bytes
from svsk_jax.pipeline.working_sets import device_bytes, height

Shape = tuple[int, int]


PARTS: dict[str, Callable[[int, int], tuple[float, ...]]] = {
    "input metric": lambda n, k: (k**3, k**2, 1),
    "output metric, plan": lambda n, k: (n * height(n), 1),
    "output metric": lambda n, k: (n * height(n) ** 2, n * height(n), 1),
    # Products with H, with G and elementwise; steps that wait for one another; eigenvalues and factors.
    "options": lambda n, k: (n * k**2, n * k * height(n), n * k, k, n * height(n) ** 2, 1),
    "joint": lambda n, k: (n * k**2, n * k * height(n), n * k, k * height(n), k**3, 1),
}
"""Parts of the work, and the terms that the seconds of each are a sum of. Row tiles have `height` rows."""


def fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients ≥ 0 [terms] with the least relative squared error over the rows: the best subset of terms
    whose ordinary least squares are all positive, which is the exact solution."""
    scaled = terms / seconds[:, None]
    unit = np.linalg.norm(scaled, axis=0)
    scaled = scaled / unit
    best, least = np.zeros(terms.shape[1]), np.inf
    for count in range(1, 1 + min(terms.shape)):
        for kept in map(list, itertools.combinations(range(terms.shape[1]), count)):
            found = np.linalg.lstsq(scaled[:, kept], np.ones(len(terms)), rcond=None)[0]
            error = float(np.sum((scaled[:, kept] @ found - 1) ** 2))
            if np.all(found > 0) and error < least:
                least, best = error, np.zeros(terms.shape[1])
                best[kept] = found
    return best / unit


Costs = Callable[[str, Shape], float]
"""Seconds of a part for a shape."""


def fitted(rows: Sequence[tuple[Shape, Mapping[str, float]]]) -> Costs:
    """Predicted seconds of a part for a shape."""
    coefficients = {
        part: fit(
            np.array([terms(*shape) for shape, _ in rows], np.float64),
            np.array([seconds[part] for _, seconds in rows]),
        )
        for part, terms in PARTS.items()
    }
    return lambda part, shape: float(np.dot(coefficients[part], PARTS[part](*shape)))


def predict(config: ModelConfig, cost: Costs) -> dict[str, Any]:
    """Seconds and bytes of quantizing a model."""
    plan = rounding = 0.0
    for index, count in layer_kinds(config).items():
        linears, reads = layer_linears(config, index), linear_inputs(config, index)
        widths = {reads[name]: shape for name, shape in linears.items()}
        shared = sum(cost("input metric", shape) for shape in widths.values())
        shapes = linears.values()
        options = sum(cost("output metric, plan", shape) + cost("options", shape) for shape in shapes)
        joint = sum(cost("output metric", shape) + cost("joint", shape) for shape in shapes)
        plan += count * (shared + options)
        rounding += count * (shared + joint)
    return {
        "plan_seconds": plan,
        "quantize_seconds": rounding,
        "device_bytes": device_bytes(config),
        "statistics_bytes": statistics_bytes(config, CalibrationConfig()),
    }
