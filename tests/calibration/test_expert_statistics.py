"""Statistics of experts against a plain computation that runs every expert on every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY

from svsk_jax.calibration.experts import (
    describe_starved,
    moments_by_expert,
    sensitivities_by_expert,
)
from svsk_jax.calibration.sensitivity import (
    TOKENS,
    add_up_blocks,
    layer_sensitivity,
    no_blocks,
    token_weights,
    weighted_moments,
)
from svsk_jax.calibration.statistics import add_up, layer_moments, no_moments
from svsk_jax.model import DecoderLayer, Mixture
from svsk_jax.model.parameters import layer_parameters, random_parameters
from svsk_jax.parallel import make_mesh
from svsk_jax.quant.half_moment import halved
from svsk_jax.quant.types import InputMoment, OutputSensitivity

EXPERTS, LENGTH, CHUNKS, PADDING = 4, 12, 16, 3
CONFIG = dataclasses.replace(
    TINY,
    architecture="qwen3_moe",
    qk_norm=True,
    num_layers=1,
    mixture=Mixture(num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=20),
)
NAMES = ("gate", "up", "down")


@pytest.fixture(scope="module")
def layer():
    return DecoderLayer(CONFIG, layer_parameters(random_parameters(CONFIG, 0), 0))


@pytest.fixture(scope="module")
def inputs():
    """Streams of 16 chunks of which the last three are padding, a gradient, and the mask."""
    x, upstream = np.random.default_rng(0).standard_normal((2, CHUNKS, LENGTH, 48)).astype(np.float32)
    mask = np.ones(CHUNKS, np.float32)
    mask[-PADDING:] = 0
    return x, upstream * mask[:, None, None], mask


@jax.jit
def plain(layer, x, probes):
    """The layer's output, the experts' inputs and hidden units, and how much each expert counts for each
    token, [b, t, experts, ...]."""
    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    x = x + layer.attention(layer.input_norm(x), positions)[0]
    read, mlp = layer.mlp_norm(x), layer.mlp
    p = jax.nn.softmax(read @ mlp.router.get_value().T, axis=-1)
    least = jnp.sort(p, axis=-1)[..., -2:-1]
    p = jnp.where(p >= least, p, 0.0)
    gate = jnp.einsum("btk,enk->bten", read, mlp.gate.get_value()) + probes["gate"]
    up = jnp.einsum("btk,enk->bten", read, mlp.up.get_value()) + probes["up"]
    hidden = jax.nn.silu(gate) * up
    down = jnp.einsum("btek,enk->bten", hidden, mlp.down.get_value()) + probes["down"]
    return x + jnp.einsum("bten,bte->btn", down, p), (read, hidden, p)


def probes():
    return {
        name: jnp.zeros((CHUNKS, LENGTH, EXPERTS, 48 if name == "down" else 20), jnp.float32)
        for name in NAMES
    }


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("full", [False, True])
def test_moments_are_those_of_routed_tokens(layer, inputs, full):
    x, _, mask = map(jnp.asarray, inputs)
    mesh = make_mesh(4, 2)
    sums = no_moments(layer, x, mask, mesh, full)
    y, sums = layer_moments(layer, x + 0, mask, sums, mesh, full)
    moments = add_up(sums, mesh, full)
    expected, (read, hidden, p) = plain(layer, x, probes())
    close(y, expected)
    routed = (np.asarray(p) > 0) & (mask > 0)[:, None, None]
    for e in range(EXPERTS):
        for name, value in (("input", read), ("hidden", hidden[:, :, e])):
            rows = np.asarray(value, np.float64)[routed[..., e]]
            second = rows.T @ rows if full else (rows**2).sum(0)
            moment = moments[f"mlp.experts.{name}"]
            close(moment.total[e], second)
            assert moment.tokens[e] == len(rows)
    assert int(jnp.sum(moments["mlp.experts.input"].tokens)) == 2 * (CHUNKS - PADDING) * LENGTH


def test_sensitivities_are_those_of_one_differentiation(layer, inputs):
    x, upstream, mask = map(jnp.asarray, inputs)
    mesh = make_mesh(4, 2)
    below, sums, by_token = layer_sensitivity(layer, x, upstream + 0, no_blocks(layer, x, mesh), mesh)
    sums = add_up_blocks(sums, mesh)
    tokens = jnp.int32((CHUNKS - PADDING) * LENGTH)
    found = {
        name: OutputSensitivity(blocks=sums[name], weights=each, tokens=sums.get(f"{name}{TOKENS}", tokens))
        for name, each in by_token.items()
    }
    _, pull, (read, hidden, p) = jax.vjp(lambda x, probes: plain(layer, x, probes), x, probes(), has_aux=True)
    expected, gradients = pull(upstream)
    close(below, expected)
    routed = np.asarray(p) > 0
    weights = {}
    for name in NAMES:
        sensitivity, g = found[f"mlp.experts.{name}"], np.asarray(gradients[name], np.float64)
        for e in range(EXPERTS):
            rows = g[:, :, e].reshape(CHUNKS * LENGTH, -1)
            close(sensitivity.blocks[e, 0], rows.T @ rows)
            assert sensitivity.tokens[e] == (routed[..., e] & (mask > 0)[:, None]).sum()
        squares = (g**2).mean(-1)
        weights[name] = squares / squares[routed & (mask > 0)[:, None, None]].mean()
        close(np.asarray(sensitivity.weights).sum(-1), squares.sum(-1))

    sums = no_moments(layer, x, mask, mesh, True)
    moments = add_up(weighted_moments(layer, x, token_weights(found), sums, mesh), mesh, True)
    both = np.minimum((weights["gate"] + weights["up"]) / 2, 10)
    for name, value, w in (
        ("input", np.repeat(np.asarray(read)[:, :, None], EXPERTS, axis=2), both),
        ("hidden", hidden, np.minimum(weights["down"], 10)),
    ):
        for e in range(EXPERTS):
            rows = np.asarray(value, np.float64)[:, :, e].reshape(CHUNKS * LENGTH, -1)
            close(moments[f"mlp.experts.{name}"].total[e], (rows * w[:, :, e].reshape(-1, 1)).T @ rows)


def test_an_expert_with_fewer_tokens_than_channels_takes_the_pool():
    rng = np.random.default_rng(0)
    totals = rng.standard_normal((3, 4, 4)).astype(np.float32)
    totals += totals.mT
    stack = halved(InputMoment(total=jnp.asarray(totals), tokens=jnp.asarray([4, 3, 0], jnp.int32)))
    other = halved(InputMoment(total=jnp.eye(2), tokens=jnp.int32(1)))
    named, starved = moments_by_expert({"attention.input": other, "mlp.experts.hidden": stack})
    assert starved == {"hidden": [1, 2]}
    assert named["attention.input"] is other
    np.testing.assert_array_equal(named["mlp.experts.0.hidden"].whole.total, totals[0])
    assert named["mlp.experts.0.hidden"].tokens == 4
    for number in (1, 2):
        np.testing.assert_allclose(named[f"mlp.experts.{number}.hidden"].whole.total, totals.sum(0))
        assert named[f"mlp.experts.{number}.hidden"].tokens == 7
    diagonal = InputMoment(total=jnp.ones((3, 4)), tokens=jnp.asarray([40, 32, 31], jnp.int32))
    assert moments_by_expert({"mlp.experts.input": diagonal})[1] == {"input": [2]}


def test_a_sensitivity_has_the_experts_share_of_the_tokens():
    blocks = np.stack([np.eye(2, dtype=np.float32) * scale for scale in (6.0, 3.0, 0.0)])[:, None]
    stack = OutputSensitivity(
        blocks=jnp.asarray(blocks), weights=jnp.ones((5, 4, 1)), tokens=jnp.asarray([8, 1, 0], jnp.int32)
    )
    dense = OutputSensitivity(blocks=jnp.zeros((1, 2, 2)), weights=jnp.ones((5, 4)), tokens=jnp.int32(20))
    named, starved = sensitivities_by_expert({"attention.q": dense, "mlp.experts.up": stack})
    assert starved == {"up": [1, 2]}
    # Own: 6 / 20. Pooled per routed token: 9 / 9, times one token of 20, also where there was none.
    for number, expected in ((0, 6 / 20), (1, 1 / 20), (2, 1 / 20)):
        mean = named[f"mlp.experts.{number}.up"].mean
        np.testing.assert_allclose(mean[0], expected * np.eye(2), rtol=1e-6)


def test_the_notice_names_layers_and_experts():
    text = describe_starved({f"layers.{n}": {"input": [3], "down": [3, 7]} for n in range(6)}, 8)
    assert "layers.0: 2 of 8 experts (input of 3; down of 3, 7)" in text
    assert "layers.4" not in text
    assert "in 2 more layers" in text
