"""Choose, for every linear, how it is stored: by predicted nats per byte over the whole model."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration.store import Statistics
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel.distributed import barrier
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.pipeline.allocator import give_back_freed_arrays
from svsk_jax.pipeline.checks import default_dtype, refuse_packed, refuse_polish
from svsk_jax.pipeline.layer_statistics import statistics_ahead
from svsk_jax.pipeline.memory import Machine, plan_quantization
from svsk_jax.pipeline.options import measured_options, options_file
from svsk_jax.pipeline.plan import Choices, Plan, drafted, layers_ahead, measuring, spend
from svsk_jax.pipeline.progress import OnProgress, Progress
from svsk_jax.pipeline.quantize import within
from svsk_jax.quant.allocation import Option
from svsk_jax.quant.types import QuantConfig, TileShape

SEARCH = Choices(
    groups=(16, 32),
    coefficients=((0.008, 0.3), (0.004, 0.3), (0.012, 0.3), (0.008, 0.15)),
    tiles=(TileShape(rows=512, columns=0),),
)
"""What is tried for each linear. What other tiles would gain is foretold too high, and is less than 1 % when
it is measured (docs/decisions/0003)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """A tuned plan beside what the recipe alone would choose at the same bytes."""

    plan: Plan
    default: Plan
    chosen: dict[str, dict[str, int]]
    """How many linears got each group, pair of coefficients and tile."""


def autotune(
    source: ModelSource,
    statistics: Statistics,
    config: QuantConfig,
    work: Path,
    *,
    recipe: str,
    choices: Choices = SEARCH,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress | None = None,
) -> Tuned:
    """Measure every option of every linear, and spend `config.bits` on the best.

    Args:
        source: the unquantized model.
        statistics: from `calibrate` on it.
        config: a recipe that allocates; its bits are the budget.
        work: folder for each layer's measurements, from which a run that was cut short goes on;
            `options.remove_options` clears it once they are of no more use.
        recipe: name for the plan.
        choices: what is tried beside the recipe's own choices.
        dtype: that weights are read in; default f32 on CPU, bf16 elsewhere.
        mesh: layers are divided over its `data` axis, a linear's rows over `model`; default as
            `DeviceGroups.of` has it.
        max_memory: bytes that may be held (`pipeline.memory`).
        on_progress: called after each layer.

    Raises:
        ValueError: a recipe that does not allocate, statistics of another model, too few bits, more memory
            needed than `max_memory`.
    """
    if config.bits is None:
        raise ValueError(f"--recipe {recipe}: has no budget to allocate; take svsk-r16 or svsk-r8, or --bits")
    refuse_polish(recipe, config, source.config)
    give_back_freed_arrays()
    dtype = default_dtype() if dtype is None else dtype
    plan_quantization(source.config, Machine.of(mesh, dtype), max_memory)
    statistics.check_model(source.fingerprint(), source.description)
    statistics.check_layers(source.config)
    refuse_packed(source, source.outer(dtype))
    config = within(config, statistics)
    own = Choices.of(config)
    choices = Choices(
        groups=_union(own.groups, choices.groups),
        coefficients=_union(own.coefficients, choices.coefficients),
        tiles=_union(own.tiles, choices.tiles),
    )
    key = _key(source, statistics, config, choices, dtype)
    layers = source.config.num_layers

    def report(done: int) -> None:
        if on_progress:
            on_progress(Progress(stage="autotune", layer=done, layers=layers))

    groups = DeviceGroups.of(mesh)
    with (
        layers_ahead(source, dtype, groups) as weights,
        statistics_ahead(statistics, source.config, drafted(config), groups) as ahead,
    ):
        options = measured_options(
            layers,
            lambda index: options_file(work, index, key),
            measuring(source, ahead, config, choices, weights),
            groups,
            report,
        )
    barrier()
    best = spend(options, config)
    plain = spend({name: [o for o in listed if _is_own(o, own)] for name, listed in options.items()}, config)
    # `allocate` is only nearly optimal: with more to choose from it may do a little worse.
    best = min(best, plain, key=lambda allocation: allocation.nats)
    return Tuned(
        plan=Plan(recipe=recipe, config=config, tensors=best.plans, predicted_nats=best.nats),
        default=Plan(recipe=recipe, config=config, tensors=plain.plans, predicted_nats=plain.nats),
        chosen={
            "group": dict(Counter(str(plan.group) for plan in best.plans.values())),
            "coefficients": dict(Counter(str(plan.coefficients) for plan in best.plans.values())),
            "tile": dict(
                Counter(f"{plan.tile.rows} × {plan.tile.columns or 'K'}" for plan in best.plans.values())
            ),
        },
    )


def _union(first: tuple, second: tuple) -> tuple:
    return tuple(dict.fromkeys((*first, *second)))


def _is_own(option: Option, own: Choices) -> bool:
    return option.group in own.groups and option.coefficients in own.coefficients and option.tile in own.tiles


def _key(
    source: ModelSource, statistics: Statistics, config: QuantConfig, choices: Choices, dtype: DTypeLike
) -> str:
    """Digest of everything that the measurements hang on. Neither the budget is part of it nor when the
    statistics were made: a run that calibrates anew on the same tokens goes on too."""
    parts = [
        source.fingerprint(),
        statistics.manifest["text"],
        hashlib.sha256(statistics.tokens().tobytes()).hexdigest(),
        jnp.dtype(dtype).name,
        dataclasses.asdict(dataclasses.replace(config, bits=None)),
        dataclasses.asdict(choices),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
