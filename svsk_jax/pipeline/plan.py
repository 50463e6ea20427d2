"""Decide how each linear is stored: measure what every option costs the model, then spend the budget."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul.layout import tile_spans
from svsk_jax.calibration.store import Statistics
from svsk_jax.json_data import checked, from_json, parse_json, shown
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import layer_linears, linear_inputs
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.parallel.read_ahead import ReadAhead
from svsk_jax.pipeline.layer_statistics import (
    Metrics,
    StatisticsAhead,
    layer_statistics,
    statistics_ahead,
)
from svsk_jax.pipeline.options import measured_options, options_file
from svsk_jax.pipeline.progress import OnProgress, Progress
from svsk_jax.quant.allocation import Allocation, Option, allocate
from svsk_jax.quant.budget import base_bytes
from svsk_jax.quant.codebook import LINEAR
from svsk_jax.quant.joint import minus, quantize_base, tile_blocks
from svsk_jax.quant.row_parts import Devices, RowPart, row_parts, total_nats
from svsk_jax.quant.sidecar_fit import rank_gains
from svsk_jax.quant.types import MAX_RANK, QuantConfig, TensorPlan, TileShape
from svsk_jax.storage.atomic import write_json
from svsk_jax.storage.described import check_ranks

FORMAT = 1


def drafted(config: QuantConfig) -> QuantConfig:
    """The recipe as options are measured by it: feedback across rows and several beams cost time, and help
    all options about alike."""
    feedback = "columns" if config.feedback == "both" else config.feedback
    return dataclasses.replace(config, feedback=feedback, beam_width=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What may be chosen for a linear beside its ranks: every combination is an option."""

    groups: tuple[int, ...]
    """Columns that share a scale."""
    coefficients: tuple[tuple[float, float] | None, ...]
    """(a, δ) of the companded codebook; None for the linear one."""
    tiles: tuple[TileShape, ...]
    """Tiles of the sidecar."""

    @classmethod
    def of(cls, config: QuantConfig) -> "Choices":
        """What a recipe leaves open."""
        coefficients = config.coefficients if config.codebook == "companded" else None
        return cls(groups=config.groups, coefficients=(coefficients,), tiles=(config.tile,))


def measure_options(
    W: Array,
    metrics: Metrics,
    config: QuantConfig,
    choices: Choices,
    devices: Devices = (),
) -> list[Option]:
    """Round the base of one linear each way, and see what each rank of a sidecar would gain. W f32 [N, K];
    its rows are divided over `devices`, which changes nothing.

    The gains of the first base are measured; those of the others are taken to be as much larger or smaller
    as their errors are (docs/decisions/0003: within 7 % for 16 ranks).
    """
    shape = (W.shape[0], W.shape[1])
    options: list[Option] = []
    gains: dict[TileShape, np.ndarray] = {}
    parts = row_parts(W, *metrics, [tile.rows for tile in choices.tiles], devices)
    for group, coefficients in itertools.product(choices.groups, choices.coefficients):
        stored = jnp.asarray(LINEAR if coefficients is None else coefficients, jnp.float16)
        pair = stored.astype(jnp.float32)
        bases = [quantize_base(p.W, p.inputs, p.outputs, pair, group, config) for p in parts]
        residuals = [minus(p.W, base.dense) for p, base in zip(parts, bases, strict=True)]
        cost = total_nats(parts, residuals)
        for tile in choices.tiles:
            if tile not in gains:
                found = [_gains(p, E, tile) for p, E in zip(parts, residuals, strict=True)]
                gains[tile] = np.array(list(itertools.chain(*jax.device_get(found))))
            first = options[0].nats if options else cost
            options.append(
                Option(
                    group=group,
                    coefficients=coefficients,
                    tile=tile,
                    shape=shape,
                    base_bytes=base_bytes(
                        shape, group, config.scales, "linear" if coefficients is None else "companded"
                    ),
                    nats=cost,
                    gains=gains[tile] * (cost / first if first > 0 else 1.0),
                )
            )
    return options


def _gains(part: RowPart, residual: Array, tile: TileShape) -> list[list[Array]]:
    """What each rank of each tile would gain, in the unit of `nats`, whatever metric the sidecar will be
    fitted in."""
    G = tile_blocks(part.outputs.G, tile.rows, len(residual))
    narrowest = min(b - a for a, b in tile_spans(residual.shape[1], tile.columns))
    return rank_gains(residual, part.inputs.H, G, tile.columns, min(MAX_RANK, G.shape[1], narrowest))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How every decoder linear of a model is stored, by path, within a recipe's configuration."""

    recipe: str
    config: QuantConfig
    tensors: Mapping[str, TensorPlan]
    predicted_nats: float | None = None
    """Predicted KL divergence per token, to second order."""
    file: Path | None = dataclasses.field(default=None, compare=False)
    """Where it was read from."""

    def save(self, path: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write a recipe file for `svsk quantize --recipe FILE`."""
        data = {
            "format": FORMAT,
            "recipe": self.recipe,
            "config": dataclasses.asdict(self.config),
            "predicted_nats": self.predicted_nats,
            "tensors": {name: dataclasses.asdict(plan) for name, plan in self.tensors.items()},
        }
        write_json(path, {**data, **(extra or {})})

    def check_model(self, config: ModelConfig) -> None:
        """ValueError, which names the linear, unless this is a plan for all decoder linears of such a
        model."""
        shapes, where = linear_shapes(config), f"--recipe {self.file or self.recipe}"
        if self.tensors.keys() != shapes.keys():
            other = next(iter(self.tensors.keys() ^ shapes.keys()))
            raise ValueError(
                f"{where}: not made for this model ({shown(other)} is in one of them only); make one with "
                "`svsk autotune`"
            )
        if self.config.scales != "two_level":
            return
        for name, plan in self.tensors.items():
            tile = (plan.tile.rows, plan.tile.columns)
            check_ranks(plan.ranks, tile, shapes[name], f"{where}: {name}")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read what `save` wrote; ValueError says what is wrong with the file."""
        try:
            data = parse_json(path.read_bytes())
            if not isinstance(data, Mapping) or not isinstance(data.get("tensors"), Mapping):
                raise ValueError("expected an object with `tensors`")
            if data.get("format") != FORMAT:
                raise ValueError(f"format {shown(data.get('format'))}, this svsk-jax reads {FORMAT}")
            return cls(
                recipe=checked(data.get("recipe"), str, "recipe"),
                config=from_json(QuantConfig, data.get("config"), "config"),
                tensors={
                    name: from_json(TensorPlan, fields, name) for name, fields in data["tensors"].items()
                },
                predicted_nats=checked(data.get("predicted_nats"), float | None, "predicted_nats"),
                file=path,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--recipe {path}: not a recipe file that svsk wrote ({error}); make one with `svsk autotune`"
            ) from error


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of every decoder linear by path, layer by layer."""
    return {
        f"layers.{index}.{name}": shape
        for index in range(config.num_layers)
        for name, shape in layer_linears(config, index).items()
    }


def fixed_plans(model: ModelConfig, config: QuantConfig) -> dict[str, TensorPlan]:
    """The plan of each linear when nothing is allocated: the first group size, `rank` in every tile."""

    @functools.cache
    def plan(n: int, k: int) -> TensorPlan:
        rows, columns = tile_spans(n, config.tile.rows), tile_spans(k, config.tile.columns)
        return TensorPlan(
            group=config.groups[0],
            coefficients=config.coefficients if config.codebook == "companded" else None,
            tile=config.tile,
            ranks=tuple(tuple(min(config.rank, b - a, d - c) for c, d in columns) for a, b in rows),
        )

    return {name: plan(*shape) for name, shape in linear_shapes(model).items()}


def plan_model(
    source: ModelSource,
    statistics: Statistics,
    config: QuantConfig,
    *,
    recipe: str,
    dtype: DTypeLike,
    work: Path | None = None,
    groups: DeviceGroups | None = None,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Group size and ranks of every linear, by predicted nats per byte over the whole model.

    Args:
        source: the unquantized model.
        statistics: from `calibrate` on it.
        config: the recipe.
        recipe: its name, for the plan.
        dtype: that weights are read in.
        work: folder that keeps what is measured of each layer; what is there from an earlier run of the same
            source, statistics and recipe is not measured again. Without it nothing is kept.
        groups: devices to measure on; default those of no particular mesh.
        on_progress: called after each layer.

    Raises:
        ValueError: too few bits.
    """
    if config.bits is None:
        return Plan(recipe=recipe, config=config, tensors=fixed_plans(source.config, config))
    layers = source.config.num_layers

    groups = groups or DeviceGroups.of()

    def report(done: int) -> None:
        if on_progress:
            on_progress(Progress(stage="plan", layer=done, layers=layers))

    with (
        layers_ahead(source, dtype, groups) as weights,
        statistics_ahead(statistics, source.config, drafted(config), groups) as ahead,
    ):
        options = measured_options(
            layers,
            lambda index: None if work is None else _options_file(work, index),
            measuring(source, ahead, config, Choices.of(config), weights),
            groups,
            report,
        )
    chosen = spend(options, config)
    return Plan(recipe=recipe, config=config, tensors=chosen.plans, predicted_nats=chosen.nats)


def is_measured(work: Path, layers: Iterable[int]) -> bool:
    """Whether the options of these layers are in the folder `work` of `plan_model`."""
    return all(_options_file(work, index).is_file() for index in layers)


def _options_file(work: Path, index: int) -> Path:
    return options_file(work, index, "plan")


def layer_options(
    weights: Mapping[str, Any],
    reads: Mapping[str, str],
    ahead: StatisticsAhead,
    index: int,
    config: QuantConfig,
    choices: Choices,
    devices: Devices = (),
) -> dict[str, list[Option]]:
    """The options of each linear of a layer, by full path; arguments as of `layer_statistics`."""
    options = {}
    for name, _, metrics in layer_statistics(ahead, index, weights, reads, config):
        assert metrics is not None
        W = jnp.asarray(weights[f"{name}.weight"], jnp.float32)
        options[f"layers.{index}.{name}"] = measure_options(W, metrics, config, choices, devices)
    return options


def measuring(
    source: ModelSource,
    ahead: StatisticsAhead,
    config: QuantConfig,
    choices: Choices,
    weights: ReadAhead[int, dict[str, Any]],
) -> Callable[[int, Devices], dict[str, list[Option]]]:
    """`layer_options` of the drafted recipe for a layer by number, on some devices."""

    def measure(index: int, devices: Devices) -> dict[str, list[Option]]:
        reads = linear_inputs(source.config, index)
        return layer_options(weights.take(index), reads, ahead, index, drafted(config), choices, devices)

    return measure


def layers_ahead(
    source: ModelSource, dtype: DTypeLike, groups: DeviceGroups
) -> ReadAhead[int, dict[str, Any]]:
    """Each layer's parameters in this process's order, in host memory, whence each group takes them to its
    own devices; as many are read ahead as are at work at once."""

    def read(index: int) -> dict[str, Any]:
        return {path: np.asarray(value) for path, value in source.layer(index, dtype).items()}

    own = groups.own(source.config.num_layers)
    return ReadAhead(read, own, groups.at_once)


def spend(options: Mapping[str, list[Option]], config: QuantConfig) -> Allocation:
    """`allocate` with the recipe's bits per weight over all linears."""
    weights = sum(choices[0].shape[0] * choices[0].shape[1] for choices in options.values())
    assert config.bits is not None
    try:
        return allocate(options, int(config.bits * weights / 8))
    except ValueError as error:
        raise ValueError(f"{config.bits} bits/weight: {error}; ask for more bits") from error
