"""The mesh of devices, `data` × `model`, and which of its axes each logical axis is divided over."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"

MESH_AXIS: dict[str, str | tuple[str, ...] | None] = {
    "batch": DATA,  # texts that are generated side by side
    "chunks": (DATA, MODEL),  # chunks of calibration text: the parameters of the layer at hand are everywhere
    "group_sums": DATA,  # what each `model` group added up of its chunks
    "moment_rows": MODEL,  # rows of a second moment H, while it is summed
    "summed_rows": (MODEL, DATA),  # and when all devices' sums have been added up
    "heads": MODEL,  # attention heads, and the columns of the output projection that read them
    "mlp": MODEL,  # hidden units between gate, up and down
    "vocabulary": MODEL,  # rows of embedding and head
    "hidden": None,  # the residual stream is whole everywhere
    "tokens": None,
}
"""Mesh axis of each logical axis; None: whole on every device. Anything that is sharded looks here."""


def make_mesh(data: int = 0, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` × `model` devices, those of one `model` group next to each other.

    Args:
        data: 0 takes what `model` leaves.
        model: devices that share one copy of the parameters.
        devices: default all, of every process.

    Raises:
        ValueError: not so many devices, `model` does not divide them, or processes would have unlike parts.
    """
    devices = jax.devices() if devices is None else devices
    if data < 0 or model < 1:
        raise ValueError(f"--mesh data={data},model={model}: expected at least one device along each axis")
    if data == 0:
        data, left = divmod(len(devices), model)
        if left or not data:
            raise ValueError(
                f"--mesh model={model}: does not divide the {len(devices)} devices that are here"
            )
    if data * model > len(devices):
        raise ValueError(
            f"--mesh data={data},model={model}: needs {data * model} devices, {len(devices)} are here; "
            "with --distributed the devices of all processes count"
        )
    taken = devices[: data * model]
    by_process = Counter(device.process_index for device in taken)
    idle = {device.process_index for device in devices} - by_process.keys()
    if idle or len(set(by_process.values())) > 1:
        raise ValueError(
            f"--mesh data={data},model={model}: leaves out devices of processes "
            f"{', '.join(map(str, sorted(idle or by_process)))}; it must have as many of each, so take all "
            f"{len(devices)} devices or start fewer processes"
        )
    grid = np.asarray(taken, dtype=object).reshape(data, model)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def parse_mesh(text: str) -> Mesh:
    """The mesh that `--mesh` names: `data=2,model=4`; an axis left out is 1, except that `data` takes all
    devices that `model` leaves.

    Raises:
        ValueError: not of that form, or not so many devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({DATA}|{MODEL})\s*=\s*([1-9]\d*)\s*", part, re.ASCII)
        if match is None or match[1] in sizes:
            raise ValueError(
                f"--mesh {text!r}: expected data=N,model=M with whole numbers, such as data=2,model=4"
            )
        sizes[match[1]] = int(match[2])
    return make_mesh(sizes.get(DATA, 0), sizes.get(MODEL, 1))


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """The sharding of an array whose axes have these logical names; None for an axis that stays whole."""
    return NamedSharding(mesh, PartitionSpec(*(name and MESH_AXIS[name] for name in logical)))
