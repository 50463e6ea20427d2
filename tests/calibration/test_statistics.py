"""Moments equal those of a plain computation, whatever the number of devices and the padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.calibration import store
from svsk_jax.calibration.statistics import add_up, device_moment, embed_batches, layer_moments, no_moments
from svsk_jax.model import DecoderLayer
from svsk_jax.model.parameters import HEAD_INPUT, LINEAR_INPUTS, layer_parameters, random_parameters
from svsk_jax.parallel import make_mesh, sharding


@pytest.fixture
def layer(tiny_config):
    return DecoderLayer(tiny_config, layer_parameters(random_parameters(tiny_config, 0), 0))


def run(layer, embedding, ids, mesh, full):
    streams, masks = map(list, zip(*embed_batches(embedding, ids, 32, mesh), strict=True))
    sums = no_moments(layer, streams[0], masks[0], mesh, full)
    for index, mask in enumerate(masks):
        streams[index], sums = layer_moments(layer, streams[index], mask, sums, mesh, full)
    return np.concatenate([np.asarray(stream) for stream in streams])[: len(ids)], add_up(sums, mesh, full)


def plain_inputs(layer, x):
    """Every tapped activation, from an untouched run of the layer on all chunks at once."""
    seen = {}

    def tap(name, value):
        seen[name] = value
        return value

    y, _ = layer(x, jnp.arange(x.shape[1], dtype=jnp.int32), tap=tap)
    return y, {name: value for name, value in seen.items() if name in LINEAR_INPUTS.values()}


@pytest.mark.parametrize("full", [False, True])
def test_moments_against_float64(layer, tiny_config, full):
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((97, tiny_config.hidden_size)).astype(np.float32)
    ids = rng.integers(0, 97, (11, 16)).astype(np.int32)
    stream, moments = run(layer, embedding, ids, make_mesh(), full)
    expected, inputs = plain_inputs(layer, jnp.asarray(embedding[ids]))
    np.testing.assert_allclose(stream, expected, rtol=1e-4, atol=1e-4)
    assert set(moments) == set(LINEAR_INPUTS.values())
    for name, value in inputs.items():
        x = np.asarray(value, np.float64).reshape(11 * 16, -1)
        second = x.T @ x / len(x)
        assert moments[name].tokens == 11 * 16
        scale = np.abs(second).max()
        np.testing.assert_allclose(
            moments[name].mean, second if full else np.diag(second), rtol=1e-4, atol=1e-5 * scale
        )


@pytest.mark.parametrize("full", [False, True])
def test_one_device_and_any_mesh_agree(layer, tiny_config, full):
    """Three devices do not divide the 88 rows of one of the moments."""
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((97, tiny_config.hidden_size)).astype(np.float32)
    ids = rng.integers(0, 97, (13, 16)).astype(np.int32)
    lone_stream, lone_moments = run(layer, embedding, ids, make_mesh(1, 1), full)
    for shape in ((8, 1), (2, 4), (2, 3)):
        mesh = make_mesh(*shape)
        stream, moments = run(layer, embedding, ids, mesh, full)
        np.testing.assert_allclose(stream, lone_stream, rtol=1e-5, atol=1e-5)
        for name, moment in moments.items():
            assert int(moment.tokens) == int(lone_moments[name].tokens) == 13 * 16
            alone_total = np.asarray(lone_moments[name].total)
            np.testing.assert_allclose(np.asarray(moment.total), alone_total, rtol=1e-5, atol=1e-3)
            if full and moment.total.shape[0] % shape[1] == 0:
                whole = moment.total.shape[0] % mesh.size == 0
                rows = "summed_rows" if whole else "moment_rows"
                assert moment.total.sharding.is_equivalent_to(sharding(mesh, rows, None), 2)


def test_stored_statistics_come_back(layer, tiny_config, tmp_path):
    embedding = np.random.default_rng(2).standard_normal((97, tiny_config.hidden_size)).astype(np.float32)
    _, moments = run(layer, embedding, np.zeros((8, 16), np.int32), make_mesh(), False)
    store.write_moments(tmp_path, 0, moments)
    store.write_head(tmp_path, {HEAD_INPUT: moments["attention.input"]})
    store.finish(
        tmp_path, {"fingerprint": "abc", "model": "m", "text": {"moments": "diagonal", "fisher_chunks": 0}}
    )
    statistics = store.Statistics.open(tmp_path)
    assert not statistics.has_full_moments
    assert statistics.sensitivities(0) == ({}, {})
    for name, moment in statistics.layer(0).items():
        np.testing.assert_array_equal(moment.total, moments[name].total)
        assert moment.tokens == moments[name].tokens
    np.testing.assert_array_equal(statistics.head().total, moments["attention.input"].total)
    with pytest.raises(ValueError, match="made from m, not from other"):
        statistics.check_model("def", "other")
    (tmp_path / "layer-00000.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"layer-00000.*svsk calibrate"):
        statistics.layer(0)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 99}'])
def test_statistics_that_are_not(tmp_path, content):
    if content is not None:
        (tmp_path / store.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"--calib-stats .*svsk calibrate"):
        store.Statistics.open(tmp_path)


def test_moments_of_half_precision_are_exact_sums():
    """Products of two bf16 are exact in f32: nothing is lost by not widening x first."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6)), jnp.bfloat16)
    mask = jnp.asarray([[1.0] * 8, [0.0] * 8])
    moment = device_moment(x, mask, True, 1, is_mask=True)
    rows = np.asarray(x[0], np.float64)
    np.testing.assert_allclose(moment.total[0], rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert moment.total.dtype == jnp.float32
    assert moment.tokens[0, 0] == 8
