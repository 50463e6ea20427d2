"""A layer comes out of the handover as it went in."""

import jax
import jax.numpy as jnp
import numpy as np
from weights import random_weight

from svsk_jax.storage.checkpoint import StoredLayer
from svsk_jax.storage.handover import Handover


def test_a_layer_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    layer = StoredLayer(
        parameters={
            "mlp.up.weight": random_weight(rng, 40, 48, ranks=(0, 5), tile=(16, 0)),
            "mlp.down.weight": random_weight(rng, 48, 40, flat=True, coefficients=None),
            "mlp_norm.scale": jnp.arange(48.0),
        },
        errors={"mlp.up": 0.25, "mlp.down": 1e-3},
        predicted_nats=0.125,
    )
    handover = Handover(tmp_path / "handover")
    assert handover.take(3) is None
    handover.put(3, layer)
    assert handover.has(3)
    found = handover.take(3)
    assert found is not None
    assert (found.errors, found.predicted_nats) == (layer.errors, layer.predicted_nats)
    jax.tree.map(np.testing.assert_array_equal, found.parameters, layer.parameters)
    handover.remove(3)
    assert not handover.has(3)


def test_a_damaged_layer_is_none(tmp_path):
    (tmp_path / "layer-00002.safetensors").write_bytes(b"short")
    assert Handover(tmp_path).take(2) is None
