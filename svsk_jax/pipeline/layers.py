"""Quantize the layers of a model over groups of devices, each onto the disk as soon as it is done."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import jax

from svsk_jax.parallel.distributed import barrier, is_lead
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.storage.checkpoint import ModelWriter, StoredLayer
from svsk_jax.storage.handover import Handover


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTotals:
    """What is counted of a stored layer."""

    errors: dict[str, float]
    """Layer error of each linear by full path."""
    predicted_nats: float
    linear_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, index: int, layer: StoredLayer) -> "LayerTotals":
        """Count layer `index`."""
        return cls(
            errors=named(index, layer.errors),
            predicted_nats=layer.predicted_nats,
            linear_bytes=sum(layer.parameters[f"{name}.weight"].nbytes for name in layer.errors),
            total_bytes=nbytes(layer.parameters),
        )


def quantize_layers(
    writer: ModelWriter,
    handover: Handover,
    layers: int,
    quantize: Callable[[int, Sequence[Any]], StoredLayer],
    groups: DeviceGroups,
) -> Iterator[tuple[int, StoredLayer]]:
    """(index, layer) of each layer, which is on the disk by then.

    A process quantizes its own layers, unless an earlier run has; in the lead those that are there come
    first, and those of the other processes last.

    Args:
        writer: where the lead stores layers.
        handover: where the other processes leave theirs for it.
        layers: how many.
        quantize: quantizes a layer on some devices.
        groups: the devices.
    """

    def store(index: int, layer: StoredLayer) -> None:
        writer.layer(index, layer.parameters, layer.errors, layer.predicted_nats)
        handover.remove(index)

    def stored(index: int) -> StoredLayer | None:
        layer = writer.read(index)
        if layer is None and (layer := handover.take(index)) is not None:
            store(index, layer)
        return layer

    own = groups.own(layers)
    missing = []
    for index in own:
        if is_lead() and (layer := stored(index)) is not None:
            yield index, layer
        elif is_lead() or not (handover.take(index) or writer.read(index)):
            missing.append(index)
    with closing(groups.each(missing, quantize)) as fresh:
        for index, layer in zip(missing, fresh, strict=True):
            if is_lead():
                store(index, layer)
            else:
                handover.put(index, layer)
            yield index, layer
    barrier()
    if not is_lead():
        return
    for index in sorted(set(range(layers)) - set(own)):
        layer = stored(index)
        if layer is None:
            raise FileNotFoundError(
                f"{writer.folder}: layer {index} is not there, though another process quantized it; with "
                "--distributed all processes need the same file system"
            )
        yield index, layer


def on_first_device(parameters: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters where polish takes them together with those of other groups."""
    first = jax.local_devices()[0]
    if all(leaf.devices() == {first} for leaf in jax.tree.leaves(parameters)):
        return parameters
    return jax.device_put(parameters, first)


def named(index: int, errors: Mapping[str, float]) -> dict[str, float]:
    """Layer errors by full path."""
    return {f"layers.{index}.{name}": error for name, error in errors.items()}


def nbytes(parameters: Mapping[str, Any]) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
