"""The walk backwards, a layer at a time, gives what one differentiation of the whole model gives."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, MemorySource

from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.calibration.passes import Walk
from svsk_jax.calibration.programs import of_walk
from svsk_jax.calibration.sensitivity import head_gradient, token_weights
from svsk_jax.calibration.statistics import chunks_of_batch
from svsk_jax.model import Decoder, Mixture
from svsk_jax.model.decoder import Tail
from svsk_jax.model.parameters import LINEAR_INPUTS, QUANTIZED_LINEARS
from svsk_jax.parallel import make_mesh
from svsk_jax.pipeline.compile_ahead import together
from svsk_jax.quant.types import OutputSensitivity

WIDE = dataclasses.replace(TINY, intermediate_size=520)
"""Outputs of more rows than a block of sensitivities has."""
EXPERTS = dataclasses.replace(
    TINY,
    architecture="qwen3_moe",
    qk_norm=True,
    mixture=Mixture(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
)
LENGTH, CHUNKS, SEED = 12, 11, 3


def walk_both_ways(config, ids, memory=1 << 30, folder=None, keep_chunks=CHUNKS, mesh=None):
    """The walk, and (sensitivities, weighted moments) of each layer by index."""
    source = MemorySource(config)
    with BlockInputs(memory, folder) as kept:
        walk = Walk(source, source.outer(jnp.float32), ids, LENGTH, jnp.float32, mesh)
        assert [index for index, _ in walk.forwards(True, kept, keep_chunks)] == [0, 1]
        walk.head(True)
        walk.start_backwards(SEED)
        backwards = list(walk.backwards(kept, config.num_layers))
    assert [index for index, *_ in backwards] == [1, 0]
    return walk, {index: found for index, *found in backwards}


def draw_ids(chunks=CHUNKS):
    return np.random.default_rng(0).integers(0, 97, (chunks, LENGTH)).astype(np.int32)


def labels_of(log_p):
    """The labels that the head samples: a key for each chunk."""
    keys = [jax.random.fold_in(jax.random.key(SEED), chunk) for chunk in range(len(log_p))]
    return jnp.stack([jax.random.categorical(key, row) for key, row in zip(keys, log_p, strict=True)])


def whole_model(config, ids):
    """A model's log-probabilities, and for given labels the loss's gradients at every linear's output and the
    inputs of every linear, by one differentiation."""
    model = Decoder(config, {k: jnp.asarray(v) for k, v in MemorySource(config).parameters.items()})
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)

    def outputs(probes):
        seen = {}
        x = model.embedding(jnp.asarray(ids), jnp.float32)
        for index, layer in enumerate(model.layers):

            def tap(name, value, index=index):
                seen[index, name] = value
                return value + probes[index, name] if (index, name) in probes else value

            x, _ = layer(x, positions, tap=tap)
        return jax.nn.log_softmax(model.logits(x)), seen

    def loss(probes, labels):
        log_p, seen = outputs(probes)
        return -jnp.sum(jnp.take_along_axis(log_p, labels[..., None], axis=-1)), seen

    like = jax.eval_shape(lambda: outputs({})[1])
    probes = {at: jnp.zeros(like[at].shape) for at in like if at[1] in QUANTIZED_LINEARS}
    log_p, _ = jax.jit(outputs)(probes)
    return log_p, lambda labels: jax.jit(jax.grad(loss, has_aux=True))(probes, jnp.asarray(labels))


def in_float64(arrays, at):
    """[tokens, size]."""
    value = np.asarray(arrays[at], np.float64)
    return value.reshape(-1, value.shape[-1])


def close(found, expected, tolerance=2e-4):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=tolerance * np.abs(expected).max())


def test_the_head_takes_a_chunk_in_pieces(monkeypatch):
    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    source, mesh = MemorySource(config), make_mesh(1, 1, jax.devices()[:1])
    tail = Tail(config, {path: jnp.asarray(value) for path, value in source.outer(jnp.float32).items()})
    rng = np.random.default_rng(0)
    x, mask = jnp.asarray(rng.standard_normal((2, LENGTH, config.hidden_size)), jnp.float32), jnp.ones(2)

    def gradient():
        return jax.jit(partial(head_gradient.__wrapped__, mesh=mesh))(tail, x, mask, SEED, 0)

    whole = gradient()
    monkeypatch.setattr("svsk_jax.calibration.sensitivity.HEAD_TOKENS", 5)
    close(gradient(), whole, 1e-6)
    for row in range(2):
        key = jax.random.fold_in(jax.random.key(SEED), row)
        log_p = jax.nn.log_softmax(tail.logits(x[row]))
        labels = jax.random.categorical(key, log_p)

        def loss(x, labels=labels):
            picked = jnp.take_along_axis(jax.nn.log_softmax(tail.logits(x)), labels[:, None], axis=-1)
            return -jnp.sum(picked)

        close(whole[row], jax.grad(loss)(x[row]), 1e-6)


def test_the_head_draws_in_f32_under_x64():
    source, mesh = MemorySource(TINY), make_mesh(1, 1, jax.devices()[:1])
    tail = Tail(TINY, {path: jnp.asarray(value) for path, value in source.outer(jnp.float32).items()})
    x, mask = jnp.zeros((1, LENGTH, TINY.hidden_size)), jnp.ones(1)
    with jax.enable_x64(True):
        traced = jax.make_jaxpr(partial(head_gradient.__wrapped__, mesh=mesh))(tail, x, mask, SEED, 0)
    assert f"f32[{LENGTH},{TINY.vocab_size}]" in str(traced)
    assert f"f64[{LENGTH},{TINY.vocab_size}]" not in str(traced)


@pytest.mark.parametrize("config", [TINY, EXPERTS], ids=["dense", "experts"])
def test_a_walk_runs_what_was_compiled_ahead(config, compiled):
    mesh, ids = make_mesh(1, 1, jax.devices()[:1]), draw_ids()
    # Whatever other tests have compiled.
    jax.clear_caches()
    batch = chunks_of_batch(CHUNKS, LENGTH, LENGTH, mesh), LENGTH
    with together(of_walk(config, mesh, jnp.float32, batch, True, True, SEED)):
        pass
    ahead = {"layer_moments", "head_moments", "layer_sensitivity", "weighted_moments", "head_gradient"}
    assert ahead == set(compiled)
    compiled.clear()
    walk_both_ways(config, ids, mesh=mesh)
    assert "add_up" in compiled
    assert not ahead & set(compiled)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 3)])
def test_what_the_head_reads(mesh):
    ids, source = draw_ids(), MemorySource(TINY)
    walk = Walk(source, source.outer(jnp.float32), ids, LENGTH, jnp.float32, make_mesh(*mesh))
    list(walk.forwards(True))
    found, again = (walk.head(True)["head.input"] for _ in range(2))
    model = Decoder(TINY, {k: jnp.asarray(v) for k, v in source.parameters.items()})
    x = np.asarray(model.final_norm(model.hidden_states(jnp.asarray(ids))), np.float64)
    x = x.reshape(-1, TINY.hidden_size)
    close(found.whole.total, x.T @ x)
    assert found.tokens == CHUNKS * LENGTH
    np.testing.assert_array_equal(again.total, found.total)


@pytest.mark.parametrize(("keep", "mesh"), [(CHUNKS, (8, 1)), (3, (2, 4))])
def test_against_one_differentiation_of_the_whole_model(keep, mesh):
    """Eleven chunks in batches of eight, the second padded; or three of the first batch alone."""
    ids = draw_ids()
    walk, layers = walk_both_ways(WIDE, ids, keep_chunks=keep, mesh=make_mesh(*mesh))
    assert walk.kept_chunks == keep
    log_p, gradients_with = whole_model(WIDE, ids[:keep])
    gradients, seen = gradients_with(labels_of(log_p))

    for index, (sensitivities, moments) in layers.items():
        assert set(sensitivities) == set(QUANTIZED_LINEARS)
        assert set(moments) == set(LINEAR_INPUTS.values())
        weights = {name: [] for name in moments}
        for name, found in sensitivities.items():
            g = in_float64(gradients, (index, name))
            n, height = g.shape[1], min(512, g.shape[1])
            assert found.tokens == keep * LENGTH
            assert found.blocks.shape == (-(-n // height), height, height)
            full = np.pad(g.T @ g, ((0, -n % height),) * 2)
            for tile, block in enumerate(found.blocks):
                rows = slice(tile * height, (tile + 1) * height)
                close(block, full[rows, rows])
            np.testing.assert_allclose(found.mean, found.blocks / (keep * LENGTH), rtol=1e-6)
            squares = (g**2).mean(1)
            assert found.weights.shape == (keep, LENGTH)
            close(found.weights.reshape(-1), squares)
            weights[LINEAR_INPUTS[name]].append(squares / squares.mean())
        for name, moment in moments.items():
            w = np.minimum(np.mean(weights[name], axis=0), 10)
            x = in_float64(seen, (index, name))
            close(moment.whole.total, (x * w[:, None]).T @ x)
            assert moment.tokens == keep * LENGTH


@pytest.mark.parametrize("shape", [(8, 1), (2, 3)])
def test_devices_padding_and_disk_change_nothing(shape, tmp_path):
    """Neither axis of the mesh, nor three devices that do not divide 88 rows, nor a limit within a batch."""
    ids = draw_ids()
    _, layers = walk_both_ways(TINY, ids, keep_chunks=10, mesh=make_mesh(*shape))
    walk, alone = walk_both_ways(TINY, ids, 5000, tmp_path, keep_chunks=10, mesh=make_mesh(1, 1))
    assert walk.batch_chunks == 1
    assert list(tmp_path.iterdir()) == []
    for index, (sensitivities, moments) in layers.items():
        for name, found in sensitivities.items():
            lone = alone[index][0][name]
            assert int(found.tokens) == int(lone.tokens) == 10 * LENGTH
            close(found.blocks, np.asarray(lone.blocks))
            close(found.weights, np.asarray(lone.weights))
        for name, found in moments.items():
            close(found.whole.total, np.asarray(alone[index][1][name].whole.total))
            assert int(found.tokens) == int(alone[index][1][name].tokens)


def test_same_seed_same_sensitivities():
    ids = draw_ids(3)
    (_, first), (_, second) = (walk_both_ways(TINY, ids) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sensitivities_of_disjoint_tokens_add():
    parts = [
        OutputSensitivity(
            blocks=jnp.full((1, 2, 2), value), weights=jnp.full((3, 4), value), tokens=jnp.int32(12)
        )
        for value in (1.0, 3.0)
    ]
    total = parts[0] + parts[1]
    np.testing.assert_allclose(total.mean, np.full((1, 2, 2), 4 / 24))
    np.testing.assert_array_equal(total.weights, np.repeat([1.0, 3.0], 3)[:, None] * np.ones(4))


def test_token_weights_average_linears_and_are_clipped():
    def sensitivity(weights, tokens):
        return OutputSensitivity(
            blocks=jnp.zeros((1, 1, 1)), weights=jnp.asarray(weights, jnp.float32), tokens=jnp.int32(tokens)
        )

    rng = np.random.default_rng(0)
    gate, up, down = rng.gamma(0.5, size=(2, 4, 25)), rng.gamma(0.5, size=(2, 4, 25)), np.zeros((4, 25))
    down[1, 2] = 5
    found = token_weights(
        {
            "mlp.gate": sensitivity(1e-6 * gate[0], 100),
            "mlp.up": sensitivity(1e3 * up[0], 100),
            "mlp.down": sensitivity(down, 100),
            "attention.o": sensitivity(np.zeros((4, 25)), 100),
        }
    )
    assert set(found) == {"mlp.input", "mlp.hidden", "attention.output"}
    expected = (gate[0] / gate[0].mean() + up[0] / up[0].mean()) / 2
    np.testing.assert_allclose(found["mlp.input"], np.minimum(expected, 10), rtol=1e-5)
    assert found["mlp.hidden"].max() == 10
    assert jnp.sum(found["mlp.hidden"]) == 10
    np.testing.assert_array_equal(found["attention.output"], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("memory", [0, 500, 1 << 20])
def test_block_inputs_come_back_and_leave_no_files(tmp_path, dtype, memory):
    values = {
        (layer, batch): jax.random.normal(jax.random.key(2 * layer + batch), (2, 3, 8)).astype(dtype)
        for layer in range(3)
        for batch in range(2)
    }
    size = values[0, 0].nbytes
    with BlockInputs(memory, tmp_path) as kept:
        for place, value in values.items():
            kept.put(*place, np.asarray(value))
        spilled = len(list(tmp_path.rglob("*.bin")))
        assert spilled == max(0, 6 - memory // size)
        for taken, place in enumerate(reversed(values)):
            value = kept.pop(*place)
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, values[place])
            assert len(list(tmp_path.rglob("*.bin"))) <= max(0, spilled - taken - 1)
    assert list(tmp_path.iterdir()) == []


def test_block_inputs_leave_no_files_after_a_failure(tmp_path):
    def fail():
        with BlockInputs(0, tmp_path) as kept:
            kept.put(0, 0, np.ones((1, 2, 3)))
            assert list(tmp_path.rglob("*.bin"))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_kept_input_outlives_the_donated_stream():
    """Layers donate their input; what was put aside must not change with it."""
    source = MemorySource(TINY)
    ids = draw_ids(3)
    with BlockInputs(1 << 30) as kept:
        walk = Walk(source, source.outer(jnp.float32), ids, LENGTH, jnp.float32)
        list(walk.forwards(False, kept, 3))
        first = kept.pop(0, 0)
    np.testing.assert_array_equal(first[:3], source.parameters["embedding.weight"][ids])
