"""What a run is a run of: two runs with the same identity make the same bytes."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration.chunks import text_identity
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.calibration.store import Statistics
from svsk_jax.model.source import ModelSource
from svsk_jax.pipeline.plan import Plan
from svsk_jax.quant.types import QuantConfig
from svsk_jax.storage.arrays import sha256

FORMAT = 4
"""Of unfinished runs: their files and what is in them."""


def run_identity(
    source: ModelSource,
    config: QuantConfig | Plan,
    calibration: CalibrationConfig | Statistics,
    *,
    recipe: str,
    dtype: DTypeLike,
) -> dict[str, Any]:
    """JSON data of everything that the result hangs on: model, recipe, calibration (its settings and digests
    of its files, or which statistics), dtype of the calibration passes, kind of device, versions. No paths.
    """
    settings = config.config if isinstance(config, Plan) else config
    identity = {
        "model": source.fingerprint(),
        "recipe": recipe,
        "quant_config": dataclasses.asdict(settings),
        "plan": _digest(dataclasses.asdict(config)["tensors"]) if isinstance(config, Plan) else None,
        "calibration": _calibration(calibration),
        **_machine(dtype),
    }
    return json.loads(json.dumps(identity))


def calibration_identity(
    source: ModelSource,
    calibration: CalibrationConfig,
    chunks: Chunks | None,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
) -> dict[str, Any]:
    """Likewise of a calibration by itself, on chunks of its text or on given ones; its sums are rounded as
    the devices of a mesh divide them."""
    given = {} if chunks is None else {"tokens": sha256(chunks.ids)}
    identity = {
        "model": source.fingerprint(),
        "calibration": _calibration(calibration) | given,
        "mesh": {**mesh.shape, "processes": jax.process_count()},
        **_machine(dtype),
    }
    return json.loads(json.dumps(identity))


def _machine(dtype: DTypeLike) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "dtype": jnp.dtype(dtype).name,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("svsk-jax", "jax", "jaxlib")},
    }


def _calibration(calibration: CalibrationConfig | Statistics) -> dict[str, Any]:
    if isinstance(calibration, Statistics):
        return {"calib-stats": _digest(dict(calibration.manifest))}
    settings = dataclasses.asdict(calibration)
    # Where layer inputs are held changes no number.
    del settings["fisher_memory"]
    return settings | {"calib": text_identity(calibration.calib)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each entry in which two identities differ, by dotted name, with both values."""
    old, new = _flat(before), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in names]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    """A value for people; of a digest its first digits."""
    if value is None:
        return "not given"
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
