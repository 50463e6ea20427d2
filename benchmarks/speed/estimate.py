"""What quantizing a larger model costs, extrapolated from single linears that are timed on this machine.

Of each class of linear (query, key, up, down) two sizes are quantized with random weights, moments and
sensitivities, as the driver does it; a first run, which compiles, is left out. A cost is fitted as a sum of
products of the sizes with coefficients of at least 0. The largest square is held out first, to see how
far the fit can be trusted a step beyond its shapes; the estimates use all of them.

Not in the estimates: compilation, reading, writing, calibration, polish.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.models import CONFIGS
from pallas_kernels.svsk_matmul.layout import tile_spans
from svsk_jax import CalibrationConfig, QuantConfig
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import LINEAR_INPUTS, layer_shapes
from svsk_jax.pipeline.calibrate import statistics_bytes
from svsk_jax.pipeline.plan import Choices, drafted, measure_options
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.joint import input_metric, output_metric, quantize_joint
from svsk_jax.quant.types import SENSITIVITY_TILE, InputMoment, OutputSensitivity, TensorPlan

MOST_RUNS, ENOUGH_SECONDS = 5, 2.0
"""A part is timed again until it has taken this many runs or seconds; the fastest run counts."""
RANK = 4
"""Of every sidecar tile."""
WORKING_COPIES = 12
"""f32 [N, K] arrays alive at once while a linear is rounded: W, its two best forms, and what the compiled
search, feedback and fit keep."""
FACTOR_COPIES = 5
"""f32 [K, K] arrays that inverting one H takes beside its input and result."""

Shape = tuple[int, int]


MODELS = {name: CONFIGS[name] for name in ("Qwen3-4B", "Qwen3-8B", "Qwen3-32B")}


def _height(n: int) -> int:
    return min(n, SENSITIVITY_TILE)


PARTS: dict[str, Callable[[int, int], tuple[float, ...]]] = {
    "input metric": lambda n, k: (k**3, k**2, 1),
    "output metric, plan": lambda n, k: (n * _height(n), 1),
    "output metric": lambda n, k: (n * _height(n) ** 2, n * _height(n), 1),
    # Products with H, with G and elementwise; steps that wait for one another; eigenvalues and factors.
    "options": lambda n, k: (n * k**2, n * k * _height(n), n * k, k, n * _height(n) ** 2, 1),
    "joint": lambda n, k: (n * k**2, n * k * _height(n), n * k, k * _height(n), k**3, 1),
}
"""Parts of the work, and the terms that the seconds of each are a sum of. Row tiles have `_height` rows."""


def measured_shapes(largest: int) -> list[Shape]:
    """(N, K) like those of keys, down, up and queries in two sizes, no side above `largest`; the largest
    square comes last."""
    shapes = []
    for side in (largest // 2, largest):
        third, eighth = (32 * math.ceil(side / part / 32) for part in (3, 8))
        shapes += [(eighth, side), (third, side), (side, third), (side, side)]
    return shapes


def _random_moment(rng: np.random.Generator, size: int) -> np.ndarray:
    """Second moment of correlated channels of unlike size, f32."""
    x = rng.standard_normal((2 * size, size), np.float32) * rng.lognormal(0, 1, size).astype(np.float32)
    x += rng.standard_normal((2 * size, 1), np.float32)
    return x.T @ x


def measure(shape: Shape, config: QuantConfig) -> dict[str, float]:
    """Seconds of each part for one linear."""
    n, k = shape
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(k))
    moment, weighted = (
        InputMoment(total=jnp.asarray(_random_moment(rng, k)), tokens=jnp.int32(2 * k)) for _ in range(2)
    )
    height = _height(n)
    blocks = np.zeros((math.ceil(n / height), height, height), np.float32)
    for block, (start, stop) in zip(blocks, tile_spans(n, height), strict=True):
        block[: stop - start, : stop - start] = _random_moment(rng, stop - start)
    sensitivity = OutputSensitivity(
        blocks=jnp.asarray(blocks), weights=jnp.ones((1, 1)), tokens=jnp.int32(2 * height)
    )
    tiles = len(tile_spans(n, config.tile.rows)), len(tile_spans(k, config.tile.columns))
    plan = TensorPlan(
        group=config.groups[0],
        coefficients=config.coefficients if config.codebook == "companded" else None,
        tile=config.tile,
        ranks=((RANK,) * tiles[1],) * tiles[0],
    )
    draft = drafted(config)
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        result = jax.block_until_ready(work())
        runs: list[float] = []
        while len(runs) < MOST_RUNS and sum(runs) < ENOUGH_SECONDS:
            start = time.perf_counter()
            jax.block_until_ready(work())
            runs.append(time.perf_counter() - start)
        seconds[part] = min(runs)
        return result

    inputs = timed("input metric", lambda: input_metric(moment, weighted, config))
    plain = timed("output metric, plan", lambda: output_metric(sensitivity, n, draft))
    outputs = timed("output metric", lambda: output_metric(sensitivity, n, config))
    timed(
        "options",
        lambda: [o.nats for o in measure_options(W, (inputs, plain), draft, Choices.of(config))],
    )

    def quantized() -> Any:
        result = quantize_joint(W, inputs, outputs, plan, config)
        return result.weight, layer_error(W, result.restored, moment)

    timed("joint", quantized)
    return seconds


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


def _linears(config: ModelConfig) -> dict[str, Shape]:
    shapes = layer_shapes(config)
    return {name: cast(Shape, shapes[f"{name}.weight"]) for name in LINEAR_INPUTS}


def device_bytes(config: ModelConfig) -> int:
    """Largest device memory at once: while the metrics of a layer are made, or while its largest linear is
    rounded beside them."""
    linears = _linears(config)
    squares = [k**2 for k in {LINEAR_INPUTS[name]: k for name, (_, k) in linears.items()}.values()]
    blocks = sum(math.ceil(n / _height(n)) * _height(n) ** 2 for n, _ in linears.values())
    # Moment, weighted moment, H and its factor; sensitivity, G and its factor.
    preparing = 4 * sum(squares) + FACTOR_COPIES * max(squares) + 3 * blocks
    rounding = 3 * sum(squares) + 2 * blocks + WORKING_COPIES * max(n * k for n, k in linears.values())
    return 4 * max(preparing, rounding)


def predict(config: ModelConfig, cost: Costs) -> dict[str, Any]:
    """Seconds and bytes of quantizing a model."""
    linears = list(_linears(config).values())
    widths = {LINEAR_INPUTS[name]: shape for name, shape in _linears(config).items()}
    shared = sum(cost("input metric", shape) for shape in widths.values())
    plan = shared + sum(cost("output metric, plan", shape) + cost("options", shape) for shape in linears)
    rounding = shared + sum(cost("output metric", shape) + cost("joint", shape) for shape in linears)
    return {
        "plan_seconds": config.num_layers * plan,
        "quantize_seconds": config.num_layers * rounding,
        "device_bytes": device_bytes(config),
        "statistics_bytes": statistics_bytes(config, CalibrationConfig()),
    }


def estimate(config: QuantConfig, largest: int) -> dict[str, Any]:
    """Measure, fit and extrapolate; prints as it goes, and returns the same as JSON data."""
    rows = []
    for shape in measured_shapes(largest):
        rows.append((shape, measure(shape, config)))
        listed = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in rows[-1][1].items())
        print(f"  measured {shape[0]} × {shape[1]}: {listed}", flush=True)
    (shape, seconds), cost = rows[-1], fitted(rows[:-1])
    held_out = {part: {"measured": seconds[part], "predicted": cost(part, shape)} for part in PARTS}
    print(f"  held out: {shape[0]} × {shape[1]}, predicted from the others")
    for part, pair in held_out.items():
        print(f"    {part:<20} measured {pair['measured']:8.3g} s, predicted {pair['predicted']:8.3g} s")
    models = {name: predict(model, fitted(rows)) for name, model in MODELS.items()}
    print(f"  extrapolated from linears of at most {largest} × {largest}, not measured:")
    for name, row in models.items():
        hours = [row[f"{stage}_seconds"] / 3600 for stage in ("plan", "quantize")]
        print(
            f"    {name:<10} plan {hours[0]:7.2f} h, quantize {hours[1]:7.2f} h, device memory "
            f"{row['device_bytes'] / 1e9:5.1f} GB, statistics {row['statistics_bytes'] / 1e9:6.1f} GB on disk"
        )
    return {
        "note": "extrapolated, not measured: the models' linears are larger than those that were timed",
        "largest_measured": list(shape),
        "measured": [{"shape": list(each), "seconds": parts} for each, parts in rows],
        "held_out": {"shape": list(shape), "seconds": held_out},
        "models": models,
    }
