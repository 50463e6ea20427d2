"""Layers that another process quantized are stored by the lead, and never quantized twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.pipeline.layers import quantize_layers
from svsk_jax.storage.checkpoint import ModelWriter, StoredLayer
from svsk_jax.storage.handover import Handover


def layer_of(index, devices=()):
    return StoredLayer(
        parameters={"input_norm.scale": jnp.full(4, float(index))}, errors={"mlp.up": index / 8}
    )


@pytest.fixture
def folders(tmp_path):
    return ModelWriter(tmp_path / "model"), Handover(tmp_path / "handover")


def test_the_lead_stores_what_others_left(folders):
    """Layers 1 and 3 are another process's; layer 0 was left by one when layers were dealt otherwise."""
    writer, handover = folders
    for index in (0, 1, 3):
        handover.put(index, layer_of(index))
    quantized = []

    def quantize(index, devices):
        quantized.append(index)
        return layer_of(index)

    groups = DeviceGroups(owners=(0, 1), local=((jax.devices()[0],),))
    found = list(quantize_layers(writer, handover, 4, quantize, groups))
    assert quantized == [2]
    assert [index for index, _ in found] == [0, 2, 1, 3]
    for index, layer in found:
        np.testing.assert_array_equal(layer.parameters["input_norm.scale"], np.full(4, index))
        assert layer.errors == writer.read(index).errors == {"mlp.up": index / 8}
        assert not handover.has(index)
    again = list(quantize_layers(writer, handover, 4, quantize, groups))
    assert quantized == [2]
    assert sorted(index for index, _ in again) == [0, 1, 2, 3]


def test_a_layer_that_nobody_left_is_named(folders):
    groups = DeviceGroups(owners=(0, 1), local=((jax.devices()[0],),))
    with pytest.raises(FileNotFoundError, match=r"layer 1 .*same file system"):
        list(quantize_layers(*folders, 2, layer_of, groups))
