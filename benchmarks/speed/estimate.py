"""What quantizing a larger model costs, extrapolated from single linears that are timed on this machine.

Of each class of linear (query, key, up, down) two sizes are quantized with random weights, moments and
sensitivities, as the driver does it; a first run, which compiles, is left out. A cost is fitted as a sum of
products of the sizes (`svsk_jax.pipeline.costs`). The largest square is held out first, to see how
far the fit can be trusted a step beyond its shapes; the estimates use all of them.

Not in the estimates: compilation, reading, writing, calibration, polish.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul.layout import tile_spans
from svsk_jax import QuantConfig
from svsk_jax.known_models import KNOWN
from svsk_jax.pipeline.costs import PARTS, Shape, fitted, height, predict
from svsk_jax.pipeline.plan import Choices, drafted, measure_options
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.joint import input_metric, output_metric, quantize_joint
from svsk_jax.quant.types import InputMoment, OutputSensitivity, TensorPlan

MOST_RUNS, ENOUGH_SECONDS = 5, 2.0
"""A part is timed again until it has taken this many runs or seconds; the fastest run counts."""
RANK = 4
"""Of every sidecar tile."""

MODELS = {
    name: KNOWN[name] for name in ("Qwen3-4B", "Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B")
}


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
    rows = height(n)
    blocks = np.zeros((math.ceil(n / rows), rows, rows), np.float32)
    for block, (start, stop) in zip(blocks, tile_spans(n, rows), strict=True):
        block[: stop - start, : stop - start] = _random_moment(rng, stop - start)
    sensitivity = OutputSensitivity(
        blocks=jnp.asarray(blocks), weights=jnp.ones((1, 1)), tokens=jnp.int32(2 * rows)
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
            f"    {name:<15} plan {hours[0]:7.2f} h, quantize {hours[1]:7.2f} h, device memory "
            f"{row['device_bytes'] / 1e9:5.1f} GB, statistics {row['statistics_bytes'] / 1e9:6.1f} GB on disk"
        )
    return {
        "note": "extrapolated, not measured: the models' linears are larger than those that were timed",
        "largest_measured": list(shape),
        "measured": [{"shape": list(each), "seconds": parts} for each, parts in rows],
        "held_out": {"shape": list(shape), "seconds": held_out},
        "models": models,
    }
