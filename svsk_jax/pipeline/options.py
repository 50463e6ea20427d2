"""The measured options of a layer's linears on disk, so that a run that was cut short measures them once."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from svsk_jax.parallel.distributed import barrier
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.quant.allocation import Option
from svsk_jax.quant.types import TileShape
from svsk_jax.storage.durable import durable_file


def options_file(folder: Path, index: int, key: str) -> Path:
    """Where the options of layer `index` lie; `key` tells apart what they hang on."""
    return folder / f"{key}-{index:05d}.safetensors"


def write_options(path: Path, options: Mapping[str, list[Option]]) -> None:
    """Store the options of each linear: gains as tensors, everything else in the file's metadata."""
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
    with durable_file(path) as partial:
        save_file(arrays, partial, metadata={"options": json.dumps(records)})


def read_options(path: Path) -> dict[str, list[Option]] | None:
    """What `write_options` stored; None where nothing is, or where it is damaged."""
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


def measured_options(
    layers: int,
    file_of: Callable[[int], Path | None],
    measure: Callable[[int, Sequence[Any]], dict[str, list[Option]]],
    groups: DeviceGroups,
    report: Callable[[int], None],
) -> dict[str, list[Option]]:
    """The options of every linear of a model, by full path, layer by layer.

    Args:
        layers: how many.
        file_of: where those of a layer are kept; None: nowhere, which takes a single process. What is there
            is not measured again.
        measure: measures a layer on some devices.
        groups: the devices; every process of them measures its own layers, and reads the others'.
        report: called with the number of layers done.
    """
    own = groups.own(layers)
    found = {index: _kept(file_of(index)) for index in own}
    missing = [index for index in own if found[index] is None]
    with closing(groups.each(missing, measure)) as fresh:
        for done, index in enumerate(own, start=1):
            if found[index] is None:
                found[index] = options = next(fresh)
                path = file_of(index)
                if path is not None:
                    write_options(path, options)
            report(done)
    barrier()
    options: dict[str, list[Option]] = {}
    for index in range(layers):
        of_layer = found[index] if index in found else _kept(file_of(index))
        if of_layer is None:
            raise FileNotFoundError(
                f"{file_of(index)}: not there, though another process measured it; with --distributed all "
                "processes need the same file system"
            )
        options |= of_layer
    if len(own) < layers:
        report(layers)
    return options


def _kept(path: Path | None) -> dict[str, list[Option]] | None:
    return None if path is None else read_options(path)


def remove_options(folder: Path) -> None:
    """Remove what `write_options` stored in a folder, and the folder if nothing else is in it."""
    for pattern in ("*.safetensors", "*.partial"):
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
