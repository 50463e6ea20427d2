"""Statistics on disk: one safetensors file per decoder layer and a calibration.json, reusable across
recipes."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from svsk_jax.calibration.statistics import Moments
from svsk_jax.quant.types import InputMoment
from svsk_jax.storage.atomic import write_json

MANIFEST = "calibration.json"
FORMAT = 1


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def write_layer(folder: Path, index: int, moments: Mapping[str, InputMoment]) -> None:
    """Store one layer's moments: the f32 sum under the activation's name, the token count as
    `<name>.tokens`."""
    arrays = {}
    for name, moment in moments.items():
        arrays[name] = np.asarray(moment.total)
        arrays[f"{name}.tokens"] = np.asarray(moment.tokens).reshape(1)
    save_file(arrays, _layer_file(folder, index))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of a calibration run, read layer by layer."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Statistics":
        """Open what `svsk calibrate` wrote; ValueError when it is something else."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"--calib-stats {folder}: no {MANIFEST} there; make one with `svsk calibrate`")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"--calib-stats {folder}: {MANIFEST} is damaged ({error}); run `svsk calibrate` again"
            ) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(
                f"--calib-stats {folder}: {MANIFEST} has not format {FORMAT}; run `svsk calibrate` again"
            )
        return cls(folder=folder, manifest=manifest)

    def check_model(self, fingerprint: str, description: str) -> None:
        """Refuse statistics of another model."""
        if self.manifest["fingerprint"] != fingerprint:
            raise ValueError(
                f"--calib-stats {self.folder}: made from {self.manifest['model']}, not from "
                f"{description}; run `svsk calibrate` for this model"
            )

    def layer(self, index: int) -> Moments:
        """Moments of one layer."""
        path = _layer_file(self.folder, index)
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); run `svsk calibrate` again") from error
        return {
            name: InputMoment(total=jnp.asarray(value), tokens=jnp.asarray(arrays[f"{name}.tokens"][0]))
            for name, value in arrays.items()
            if not name.endswith(".tokens")
        }


def finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, last, so that a folder with one is whole."""
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest})
