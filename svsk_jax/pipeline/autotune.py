"""Choose, for every linear, how it is stored: by predicted nats per byte over the whole model."""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from svsk_jax.calibration.store import Statistics
from svsk_jax.model.source import ModelSource
from svsk_jax.pipeline.checks import default_dtype, refuse_packed
from svsk_jax.pipeline.plan import Choices, Plan, drafted, layer_options, spend
from svsk_jax.pipeline.progress import OnProgress, Progress
from svsk_jax.pipeline.quantize import within
from svsk_jax.quant.allocation import Option
from svsk_jax.quant.types import QuantConfig, TileShape

SEARCH = Choices(
    groups=(16, 32),
    coefficients=((0.008, 0.3), (0.004, 0.3), (0.012, 0.3), (0.008, 0.15)),
    tiles=(TileShape(rows=512, columns=0), TileShape(rows=256, columns=0), TileShape(rows=512, columns=1024)),
)
"""What is tried for each linear."""


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
    on_progress: OnProgress | None = None,
) -> Tuned:
    """Measure every option of every linear, and spend `config.bits` on the best.

    Args:
        source: the unquantized model.
        statistics: from `calibrate` on it.
        config: a recipe that allocates; its bits are the budget.
        work: folder for each layer's measurements. A run that was cut short goes on from there; it is removed
            at the end.
        recipe: name for the plan.
        choices: what is tried beside the recipe's own choices.
        dtype: that weights are read in; default f32 on CPU, bf16 elsewhere.
        on_progress: called after each layer.

    Raises:
        ValueError: a recipe that does not allocate, statistics of another model, too few bits.
    """
    if config.bits is None:
        raise ValueError(f"--recipe {recipe}: has no budget to allocate; take svsk-r16 or svsk-r8, or --bits")
    dtype = default_dtype() if dtype is None else dtype
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
    options: dict[str, list[Option]] = {}
    layers = source.config.num_layers
    for index in range(layers):
        path = work / f"{key}-{index:05d}.safetensors"
        measured = _read_options(path)
        if measured is None:
            measured = layer_options(source, statistics, index, drafted(config), choices, dtype)
            _write_options(path, measured)
        options |= measured
        if on_progress:
            on_progress(Progress(stage="autotune", layer=index + 1, layers=layers))
    best = spend(options, config)
    plain = spend({name: [o for o in listed if _is_own(o, own)] for name, listed in options.items()}, config)
    # `allocate` is only nearly optimal: with more to choose from it may do a little worse.
    best = min(best, plain, key=lambda allocation: allocation.nats)
    _remove_measurements(work)
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


def _remove_measurements(work: Path) -> None:
    """Remove what `_write_options` wrote, and the folder if nothing else is in it."""
    for pattern in ("*.safetensors", "*.partial"):
        for path in work.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):
        work.rmdir()


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


def _write_options(path: Path, options: Mapping[str, list[Option]]) -> None:
    """Gains as tensors, everything else in the file's metadata; written aside, then renamed."""
    arrays: dict[str, np.ndarray] = {}
    records: list[dict[str, Any]] = []
    for name, listed in options.items():
        for option in listed:
            record = {
                field.name: getattr(option, field.name)
                for field in dataclasses.fields(option)
                if field.name != "gains"
            }
            arrays[str(len(records))] = np.ascontiguousarray(option.gains)
            records.append({**record, "tile": dataclasses.asdict(option.tile), "path": name})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(arrays, partial, metadata={"options": json.dumps(records)})
    partial.rename(path)


def _read_options(path: Path) -> dict[str, list[Option]] | None:
    """What `_write_options` wrote; None where nothing is, or where it is damaged, as after a power cut."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            records = json.loads(file.metadata()["options"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None
    options: dict[str, list[Option]] = {}
    for index, record in enumerate(records):
        name, pair = record.pop("path"), record.pop("coefficients")
        tile, shape = TileShape(**record.pop("tile")), record.pop("shape")
        option = Option(
            **record,
            coefficients=None if pair is None else (pair[0], pair[1]),
            tile=tile,
            shape=(shape[0], shape[1]),
            gains=arrays[str(index)],
        )
        options.setdefault(name, []).append(option)
    return options
