"""A mixture of experts through the whole pipeline: experts that are starved of tokens, bytes, generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import TINY, write_checkpoint

from convert import load_decoder, load_parameters, open_checkpoint
from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.evaluation.divergence import token_divergence
from svsk_jax.model import Mixture
from svsk_jax.model.laid_out import lay_out_for_device, lay_out_parameters
from svsk_jax.model.parameters import parameter_shapes, quantized_paths
from svsk_jax.models import load_model
from svsk_jax.pipeline.sizes import model_sizes
from svsk_jax.quant.budget import predict
from svsk_jax.quant.types import recipe
from svsk_jax.runtime.generate import TextGenerator
from svsk_jax.storage import SavedModel

EXPERTS, STARVED = 12, 4
CONFIG = dataclasses.replace(
    TINY,
    architecture="qwen3_moe",
    qk_norm=True,
    intermediate_size=48,
    mixture=Mixture(
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
)
"""A dense layer, then one with experts; of few shapes, each of which is compiled for."""
CALIBRATION = CalibrationConfig(calib=("documentation",), chunks=64, chunk_length=32, fisher_chunks=32)
STRONG = dataclasses.replace(
    recipe("svsk-r16"), bits=5.5, groups=(16,), beam_width=1, joint_rounds=0, feedback="columns"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint one of whose experts gets few tokens: its logit is always 0."""
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), 0, CONFIG)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"] *= 3 * (np.arange(EXPERTS) != STARVED)[:, None]
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def statistics(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "stats"
    with pytest.warns(UserWarning, match=rf"layers\.1: .*input of {STARVED}[,;)].*more --chunks"):
        pipeline.calibrate(source, folder, CALIBRATION)
    return Statistics.open(folder)


def test_the_manifest_names_who_takes_the_pooled_statistics(source, statistics):
    assert list(statistics.manifest["text"]["pooled_experts"]) == ["layers.1"]
    pooled = statistics.manifest["text"]["pooled_experts"]["layers.1"]
    statistics.check_layers(CONFIG)
    moments, pairs = statistics.layer(1), 2 * 64 * 32
    for kind in ("input", "hidden"):
        starved = pooled[kind]
        assert STARVED in starved
        assert len(starved) < 5
        of = {number: moments[f"mlp.experts.{number}.{kind}"] for number in range(EXPERTS)}
        own = {number: moment for number, moment in of.items() if number not in starved}
        assert all(int(moment.tokens) >= 48 for moment in own.values())
        for number in starved:
            assert int(of[number].tokens) == pairs
        # What is in the pool beside the others' own is that of at most their few tokens.
        assert 0 <= pairs - sum(int(moment.tokens) for moment in own.values()) < 48 * len(starved)
        whole = np.asarray(of[STARVED].whole.total, np.float64)
        left = whole - sum(np.asarray(moment.whole.total, np.float64) for moment in own.values())
        assert np.linalg.eigvalsh(left)[0] > -1e-6 * np.trace(whole)
    tokens = statistics.manifest["text"]["fisher_chunks"] * 32
    sensitivities, weighted = statistics.sensitivities(1)
    assert STARVED in pooled["weighted.input"]
    assert STARVED in pooled["down"]
    some = next(number for number in range(EXPERTS) if number not in pooled["down"])
    for number in (STARVED, some):
        assert int(sensitivities[f"mlp.experts.{number}.down"].tokens) == tokens
        assert int(weighted[f"mlp.experts.{number}.input"].tokens) > 0
    traces = [np.trace(sensitivities[f"mlp.experts.{number}.down"].mean[0]) for number in (STARVED, some)]
    assert 0 < traces[0] < traces[1]


def test_bytes_quality_and_generation(source, statistics, tmp_path):
    result = pipeline.quantize(source, tmp_path / "out", STRONG, recipe="s", statistics=statistics)
    saved = SavedModel(tmp_path / "out")
    assert len(result.errors) == 7 + 4 + 3 * EXPERTS
    assert set(result.errors) == set(quantized_paths(CONFIG))
    budget = predict(parameter_shapes(CONFIG), quantized_paths(CONFIG), STRONG)
    assert 0 <= budget.total_bytes - result.budget.total_bytes < 100
    assert saved.metadata["bytes"]["whole_file"] == result.budget.total_bytes
    assert STARVED in saved.metadata["calibration"]["pooled_experts"]["layers.1"]["input"]
    router = saved.layer(1, jnp.float32)["mlp.router.weight"]
    np.testing.assert_array_equal(router, source.layer(1, np.float32)["mlp.router.weight"])

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 64)), jnp.int32)
    run = jax.jit(lambda model, ids: model(ids))
    quantized = load_decoder(saved, jnp.float32)
    found = token_divergence(run(load_decoder(source, jnp.float32), tokens), run(quantized, tokens), tokens)
    assert 0 < float(found.kld.mean()) < 0.02
    assert model_sizes(CONFIG, STRONG).budget.total_bytes - result.budget.total_bytes < 100

    packed = load_model(saved, dtype=jnp.float32)
    assert np.abs(run(packed, tokens) - run(quantized, tokens)).max() < 1e-3
    prompt = source.tokenizer()("The experts")["input_ids"]
    texts = [TextGenerator(model, source.tokenizer(), capacity=64) for model in (packed, quantized)]
    first, second = (each.generate(prompt, max_tokens=8) for each in texts)
    assert first.token_ids == second.token_ids


def test_sizes_without_allocation_are_exact(source, statistics, tmp_path):
    config = dataclasses.replace(recipe("classic-r8"), rank=3)
    sizes = model_sizes(CONFIG, config)
    result = pipeline.quantize(source, tmp_path / "out", config, recipe="c", statistics=statistics)
    assert sizes.exact
    assert sizes.budget == result.budget
    model = SavedModel(tmp_path / "out")
    on_cpu = lay_out_for_device(load_parameters(model, jnp.float32), jnp.float32)
    assert sizes.in_memory["CPU, packed"] == sum(leaf.nbytes for leaf in jax.tree.leaves(on_cpu))
    on_gpu = lay_out_parameters(load_parameters(model, jnp.bfloat16))
    assert sizes.in_memory["NVIDIA GPU, packed"] == sum(leaf.nbytes for leaf in jax.tree.leaves(on_gpu))


def test_polish_is_refused(source, statistics, tmp_path):
    config = dataclasses.replace(STRONG, polish=1)
    with pytest.raises(NotImplementedError, match="polish does not train mixtures"):
        pipeline.autotune(source, statistics, config, tmp_path / "work", recipe="strong")
    with pytest.raises(NotImplementedError, match="polish does not train mixtures"):
        pipeline.quantize(source, tmp_path / "out", config, recipe="x", statistics=statistics)
