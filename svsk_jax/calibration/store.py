"""Statistics on disk: two safetensors files per decoder layer, one for the head, the tokens and a
calibration.json, reusable across recipes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from svsk_jax.calibration.experts import Starved
from svsk_jax.calibration.forms import (
    check_file,
    check_tokens,
    head_forms,
    moment_forms,
    sensitivity_forms,
)
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.calibration.sensitivity import Sensitivities
from svsk_jax.calibration.statistics import StoredMoments
from svsk_jax.calibration.stored_arrays import AGAIN, StoredArrays, write_arrays
from svsk_jax.json_data import read_json_object
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import HEAD_INPUT
from svsk_jax.quant.half_moment import HalfMoment, StoredMoment, as_stored, diagonal_places
from svsk_jax.quant.types import OutputSensitivity
from svsk_jax.storage.atomic import write_json

MANIFEST = "calibration.json"
TOKENS = "tokens.safetensors"
HEAD = "head.safetensors"
FORMAT = 6
WEIGHTED = "weighted."
T = TypeVar("T")


def holds_statistics(folder: Path) -> bool:
    """Whether `folder` is one that `svsk calibrate` finished."""
    return (folder / MANIFEST).is_file()


def _moments_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _sensitivity_file(folder: Path, index: int) -> Path:
    return folder / f"fisher-{index:05d}.safetensors"


def write_tokens(folder: Path, ids: np.ndarray) -> None:
    """Store the chunks of tokens, int32 [chunks, length]."""
    write_arrays(folder / TOKENS, {"ids": np.asarray(ids, np.int32)})


def read_tokens(folder: Path) -> np.ndarray:
    """The chunks of tokens stored in a folder of statistics, int32 [chunks, length]."""
    return StoredArrays(folder / TOKENS)["ids"]


def kept_chunks(path: Path, make: Callable[[], Chunks]) -> Chunks:
    """The chunks that the file `path` keeps; where there is none, or it is damaged, those that `make` gives,
    which are kept there first."""
    if path.is_file():
        try:
            kept = StoredArrays(path)
            return Chunks(ids=kept["ids"], counts=kept.note["counts"])
        except ValueError:
            path.unlink()
    chunks = make()
    write_arrays(path, {"ids": chunks.ids}, counts=dict(chunks.counts))
    return chunks


def write_moments(folder: Path, index: int, moments: StoredMoments, starved: Starved | None = None) -> None:
    """Store one layer's moments: the f32 sum, of a matrix its lower half (`quant.half_moment`), under the
    activation's name, the token count as `<name>.tokens`; and beside them the experts that had too few
    tokens.

    Raises:
        ValueError: an activation that overflowed, by name: nothing can be made of its moment.
    """
    moments = jax.device_get(moments)
    write_arrays(_moments_file(folder, index), _finite(moments, f"layers.{index}."), starved=starved or {})


def write_head(folder: Path, moments: StoredMoments) -> None:
    """Store the moment of what the head reads, likewise."""
    write_arrays(folder / HEAD, _finite(jax.device_get(moments), ""))


def _finite(moments: StoredMoments, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of moments; ValueError, with their name behind a prefix, where one is not finite."""
    arrays = _plain_moments(moments)
    for name, moment in moments.items():
        # A sum of squares: where an entry of the matrix is not finite, its diagonal isn't either.
        squares = arrays[name]
        if isinstance(moment, HalfMoment):
            squares = squares[diagonal_places(moment.width)]
        broken = int(np.count_nonzero(~np.isfinite(squares)))
        if broken:
            raise ValueError(
                f"{prefix}{name}: {broken} of {len(squares)} channels are NaN or Inf on the "
                "calibration text; check that the model runs unquantized in this dtype"
            )
    return arrays


def write_sensitivities(
    folder: Path,
    index: int,
    sensitivities: Sensitivities,
    weighted: StoredMoments,
    starved: Starved | None = None,
) -> None:
    """Store one layer's sensitivities, as `<linear>.blocks`, `.weights` and `.tokens`, and its weighted
    moments, as `weighted.<activation>` (the lower half) and `.tokens`; and beside them the experts that had
    too few tokens."""
    sensitivities, weighted = jax.device_get((sensitivities, weighted))
    arrays = _plain_moments({f"{WEIGHTED}{name}": moment for name, moment in weighted.items()})
    for name, sensitivity in sensitivities.items():
        arrays[f"{name}.blocks"] = np.asarray(sensitivity.blocks)
        arrays[f"{name}.weights"] = np.asarray(sensitivity.weights)
        arrays[f"{name}.tokens"] = np.asarray(sensitivity.tokens).reshape(1)
    write_arrays(_sensitivity_file(folder, index), arrays, starved=starved or {})


def starved_experts(folder: Path, layers: Iterable[int], sensitive: Iterable[int]) -> dict[str, Starved]:
    """The experts that had too few tokens, by layer, as it is stored with the moments of some layers and the
    sensitivities of some."""
    starved: dict[str, Starved] = {
        f"layers.{i}": StoredArrays(_moments_file(folder, i)).note["starved"] for i in layers
    }
    for index in sensitive:
        starved[f"layers.{index}"] |= StoredArrays(_sensitivity_file(folder, index)).note["starved"]
    return starved


def _plain_moments(moments: StoredMoments) -> dict[str, np.ndarray]:
    arrays = {}
    for name, moment in moments.items():
        arrays[name] = np.asarray(moment.total)
        arrays[f"{name}.tokens"] = np.asarray(moment.tokens).reshape(1)
    return arrays


class _Stored(Mapping[str, T]):
    """Statistics of one kind in a file, by name."""

    def __init__(self, arrays: StoredArrays, names: Iterable[str]):
        self.arrays, self.names = arrays, dict.fromkeys(names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _MomentsOfFile(_Stored[StoredMoment]):
    def __init__(self, arrays: StoredArrays, full: bool, prefix: str = ""):
        stems = [name.removesuffix(".tokens") for name in arrays if name.endswith(".tokens")]
        named = [name for name in stems if name in arrays and name.startswith(prefix)]
        super().__init__(arrays, (name.removeprefix(prefix) for name in named))
        self.full, self.prefix = full, prefix

    def __getitem__(self, name: str) -> StoredMoment:
        stem = f"{self.prefix}{name}"
        total, tokens = self.arrays[stem], np.asarray(self.arrays[f"{stem}.tokens"][0])
        return as_stored(total, tokens, self.full)


class _SensitivitiesOfFile(_Stored[OutputSensitivity]):
    def __init__(self, arrays: StoredArrays):
        super().__init__(arrays, (n.removesuffix(".blocks") for n in arrays if n.endswith(".blocks")))

    def __getitem__(self, name: str) -> OutputSensitivity:
        blocks, weights, tokens = (self.arrays[f"{name}.{part}"] for part in ("blocks", "weights", "tokens"))
        return OutputSensitivity(blocks=blocks, weights=weights, tokens=np.asarray(tokens[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a calibration run measured, read layer by layer."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Statistics":
        """Open what `svsk calibrate` wrote; ValueError when it is something else."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"--calib-stats {folder}: no {MANIFEST} there; make one with `svsk calibrate`")
        try:
            manifest = read_json_object(path, AGAIN)
        except ValueError as error:
            raise ValueError(f"--calib-stats {error}") from error
        if manifest.get("format") != FORMAT:
            raise ValueError(f"--calib-stats {folder}: {MANIFEST} has not format {FORMAT}; {AGAIN}")
        text = manifest.get("text")
        if (
            not isinstance(text, dict)
            or text.get("moments") not in ("full", "diagonal")
            or type(text.get("fisher_chunks")) is not int
            or "fingerprint" not in manifest
        ):
            raise ValueError(f"--calib-stats {folder}: {MANIFEST} is damaged; {AGAIN}")
        return cls(folder=folder, manifest=manifest)

    def check_model(self, fingerprint: str, description: str) -> None:
        """Refuse statistics of another model."""
        if self.manifest["fingerprint"] != fingerprint:
            raise ValueError(
                f"--calib-stats {self.folder}: made from {self.manifest.get('model')}, not from "
                f"{description}; run `svsk calibrate` for this model"
            )

    def check_layers(self, config: ModelConfig) -> None:
        """Refuse files that are missing, or whose headers are not those of this model's statistics."""
        for index in range(config.num_layers):
            check_file(_moments_file(self.folder, index), moment_forms(config, index, self.has_full_moments))
            if self.has_sensitivity:
                check_file(_sensitivity_file(self.folder, index), sensitivity_forms(config, index, WEIGHTED))
        check_file(self.folder / HEAD, head_forms(config, self.has_full_moments))
        check_tokens(StoredArrays(self.folder / TOKENS).get("ids"), config, self.folder / TOKENS)

    @property
    def has_full_moments(self) -> bool:
        """Whether whole second moments were kept, not only their diagonals."""
        return self.manifest["text"]["moments"] == "full"

    @property
    def has_sensitivity(self) -> bool:
        """Whether the Fisher pass was run."""
        return self.manifest["text"]["fisher_chunks"] > 0

    def tokens(self) -> np.ndarray:
        """The chunks of tokens that were measured on, int32 [chunks, length]."""
        return read_tokens(self.folder)

    def layer(self, index: int) -> Mapping[str, StoredMoment]:
        """Moments of one layer as they are stored, each read when it is asked for."""
        return _MomentsOfFile(StoredArrays(_moments_file(self.folder, index)), self.has_full_moments)

    def head(self) -> StoredMoment:
        """Moment of what the head reads, as it is stored."""
        return _MomentsOfFile(StoredArrays(self.folder / HEAD), self.has_full_moments)[HEAD_INPUT]

    def sensitivities(self, index: int) -> tuple[Mapping[str, OutputSensitivity], Mapping[str, StoredMoment]]:
        """Output sensitivities and weighted moments of one layer, each read when it is asked for; empty
        without a Fisher pass."""
        if not self.has_sensitivity:
            return {}, {}
        arrays = StoredArrays(_sensitivity_file(self.folder, index))
        return _SensitivitiesOfFile(arrays), _MomentsOfFile(arrays, True, WEIGHTED)


def finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with the names of the files, last, so that a folder with one is whole."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files, **manifest})
