"""Rows over several devices: the bytes of one device, and the options that it would measure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.pipeline.plan import Choices, drafted, measure_options
from svsk_jax.quant.joint import input_metric, output_metric, quantize_joint
from svsk_jax.quant.metric import nats
from svsk_jax.quant.row_parts import row_parts, total_nats
from svsk_jax.quant.types import InputMoment, OutputSensitivity, TensorPlan, TileShape, recipe

CONFIG = recipe("svsk-r16")
N, K = 1100, 48
"""Two blocks of the output metric and a ragged third."""
DEVICES = jax.devices()[:2]
TILE = TileShape(rows=256, columns=0)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, K)) @ (np.eye(K) + 0.4 * rng.standard_normal((K, K)))
    g = np.zeros((300, 3 * 512))
    g[:, :N] = rng.standard_normal((300, N)) + rng.standard_normal((300, 1))
    tiles = g.reshape(300, 3, 512)
    blocks = np.einsum("tia,tib->iab", tiles, tiles)
    W = jnp.asarray(rng.standard_normal((N, K)), jnp.float32)
    moment = InputMoment(total=jnp.asarray(x.T @ x, jnp.float32), tokens=jnp.int32(300))
    sensitivity = OutputSensitivity(
        blocks=jnp.asarray(blocks, jnp.float32), weights=jnp.ones((3, 100)), tokens=jnp.int32(300)
    )
    return W, input_metric(moment, None, CONFIG), output_metric(sensitivity, N, CONFIG)


@pytest.mark.parametrize(
    ("devices", "tiles", "rows"),
    [
        (0, [512], [1100]),
        (1, [512], [1100]),
        (2, [512], [512, 588]),
        (3, [256, 512], [512, 512, 76]),
        (8, [512], [512, 512, 76]),
        (3, [2048], [1100]),
    ],
)
def test_parts_are_whole_tiles(case, devices, tiles, rows):
    parts = row_parts(*case, tiles, jax.devices()[:devices])
    assert [len(part.W) for part in parts] == rows
    np.testing.assert_array_equal(np.concatenate([part.W for part in parts]), case[0])
    blocks = np.concatenate([part.outputs.G for part in parts])
    np.testing.assert_array_equal(blocks, case[2].G)
    if len(parts) > 1:
        for part, device in zip(parts, jax.devices(), strict=False):
            assert {device} == {*part.W.devices(), *part.inputs.H.devices(), *part.outputs.G.devices()}


def test_bytes_are_those_of_one_device(case):
    ranks = ((4,), (0,), (9,), (1,), (4,))
    plan = TensorPlan(group=16, coefficients=(0.008, 0.3), tile=TILE, ranks=ranks)
    config = dataclasses.replace(CONFIG, beam_width=1)
    alone = quantize_joint(*case, plan, config)
    several = quantize_joint(*case, plan, config, DEVICES)
    assert alone.weight.sidecar is not None
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(several), strict=True):
        np.testing.assert_array_equal(one, other)


def test_options_are_those_of_one_device(case):
    choices = Choices(groups=(16,), coefficients=(None,), tiles=(TILE, TileShape(rows=512, columns=20)))
    W, *metrics = case
    alone, several = (
        measure_options(W, tuple(metrics), drafted(CONFIG), choices, devices) for devices in ((), DEVICES)
    )
    for one, other in zip(alone, several, strict=True):
        assert (one.group, one.tile, one.nats) == (other.group, other.tile, other.nats)
        np.testing.assert_array_equal(one.gains, other.gains)


def test_nats_of_parts_are_those_of_the_whole(case):
    W, inputs, outputs = case
    parts = row_parts(*case, [512], DEVICES)
    found = total_nats(parts, [part.W for part in parts])
    np.testing.assert_allclose(found, nats(W, inputs.H, outputs.G), rtol=1e-5)
