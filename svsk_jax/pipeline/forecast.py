"""Seconds of calibrating and quantizing a model, from its configuration and measured costs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.json_data import checked, read_json_object, shown
from svsk_jax.known_models import KNOWN
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import EXPERTS, input_widths, layer_kinds, layer_linears
from svsk_jax.pipeline.calibrate import statistics_bytes
from svsk_jax.pipeline.costs import PARTS, fitted, predict
from svsk_jax.pipeline.memory import chunk_length
from svsk_jax.pipeline.working_sets import height
from svsk_jax.quant.types import QuantConfig

MEASURED = Path(__file__).parent / "measured"
"""A file for each platform whose costs were measured."""
ADVICE = "make one with `python -m benchmarks.speed.quantize --estimate --json FILE`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run is estimated to take. None: nothing was measured that it could follow from."""

    calibrate_seconds: float | None
    plan_seconds: float | None
    quantize_seconds: float | None
    statistics_bytes: int
    """On disk."""
    costs_of: str | None
    """Machine and date of the measured costs."""


def measured_costs(platform: str, file: Path | None = None) -> dict[str, Any]:
    """Costs that were measured: those that come with svsk for a platform (`cpu`, `gpu`), empty where
    there are none, or those in a file that `benchmarks.speed.quantize --estimate` wrote.

    Raises:
        ValueError: the file is not such a file.
    """
    if file is None:
        path = MEASURED / f"{platform}.json"
        return read_json_object(path, ADVICE) if path.is_file() else {}
    data = read_json_object(file, ADVICE)
    rows = data.get("measured")
    try:
        if not isinstance(rows, list) or not rows:
            raise ValueError("no `measured`")
        for row in rows:
            checked(row["shape"], tuple[int, int], "shape")
            for part in PARTS:
                checked(row["seconds"][part], float, part)
        for key in ("machine", "date"):
            checked(data.get(key), str, key)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"--costs {file}: no measured costs ({shown(str(error))}); {ADVICE}") from error
    return {"linears": data}


def forecast(
    model: ModelConfig, config: QuantConfig, calibration: CalibrationConfig, costs: Mapping[str, Any]
) -> Forecast:
    """Seconds of `svsk quantize` with calibration in the same run.

    Seconds of planning and of quantizing are fitted to single linears (`costs`); those of the published
    recipes are in proportion to the weights. Seconds of calibration are its floating-point operations at the
    rate of one measured pass of second moments' diagonals. Self-written text, compilation, reading, writing
    and polish are left out.

    Args:
        model: its configuration.
        config: the recipe.
        calibration: how much text, and what is measured on it.
        costs: from `measured_costs`.
    """
    strong = config.scales == "two_level"
    linears, classic = costs.get("linears"), costs.get("classic")
    plan = quantize = calibrate = None
    if classic is not None:
        reference = KNOWN[classic["model"]]
        pass_ = CalibrationConfig(chunks=classic["chunks"], chunk_length=classic["chunk_length"])
        rate = _operations(reference, pass_, full=False, fisher=False) / classic["seconds"]["calibrate"]
        fisher = calibration.measures_sensitivity and config.needs_sensitivity
        full = config.needs_full_moments and calibration.moments == "full"
        calibrate = _operations(model, calibration, full=full, fisher=fisher) / rate
        if not strong:
            quantize = classic["seconds"]["quantize"] * _weights(model) / _weights(reference)
            plan = 0.0
    if linears is not None and strong:
        rows = [(tuple(row["shape"]), row["seconds"]) for row in linears["measured"]]
        found = predict(model, fitted(rows))
        quantize = found["quantize_seconds"]
        plan = found["plan_seconds"] if config.bits is not None else 0.0
    used = (linears if strong else None) or classic
    return Forecast(
        calibrate_seconds=calibrate,
        plan_seconds=plan,
        quantize_seconds=quantize,
        statistics_bytes=statistics_bytes(model, calibration.needed_by(config)),
        costs_of=None if used is None else f"{used['machine']}, {used['date']}",
    )


def _layer_weights(model: ModelConfig, index: int) -> int:
    return sum(n * k for n, k in layer_linears(model, index).values())


def _weights(model: ModelConfig) -> int:
    return sum(count * _layer_weights(model, index) for index, count in layer_kinds(model).items())


def _operations(model: ModelConfig, calibration: CalibrationConfig, *, full: bool, fisher: bool) -> float:
    """Floating-point operations of the forward pass and, for `fisher`, of the backward one."""
    length = chunk_length(model, calibration)
    tokens = calibration.chunks * length
    fisher_tokens = min(calibration.fisher_chunks, calibration.chunks) * length if fisher else 0
    total = 6 * fisher_tokens * model.vocab_size * model.hidden_size
    for index, count in layer_kinds(model).items():
        shapes, widths = layer_linears(model, index), input_widths(model, index)
        layer = sum(2 * n * k * _share(model, name) for name, (n, k) in shapes.items())
        layer += 4 * length * model.num_heads * model.head_dim
        moments = sum(2 * k * (k if full else 1) * _share(model, name) for name, k in widths.items())
        blocks = sum(2 * n * height(n) * _share(model, name) for name, (n, _) in shapes.items())
        total += count * tokens * (layer + moments)
        # A layer is run again before it is differentiated, which costs twice as much as running it.
        total += count * fisher_tokens * (3 * layer + moments + blocks)
    return float(total)


def _share(model: ModelConfig, name: str) -> float:
    """Of the tokens, those that reach a linear or an activation of a layer."""
    if model.mixture is None or not name.startswith(EXPERTS):
        return 1.0
    return model.mixture.num_experts_per_tok / model.mixture.num_experts
