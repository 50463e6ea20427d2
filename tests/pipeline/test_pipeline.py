"""The driver on a small model: bytes as predicted, statistics reusable, failures leave nothing."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SQUARE, TINY, MemorySource

from convert.load import load_decoder, load_parameters
from pallas_kernels.svsk_matmul import dequantize
from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.evaluation.divergence import token_divergence
from svsk_jax.model.laid_out import lay_out_for_device
from svsk_jax.model.parameters import QUANTIZED_LINEARS, parameter_shapes, quantized_paths
from svsk_jax.pipeline.layers import nbytes
from svsk_jax.pipeline.sizes import model_sizes
from svsk_jax.quant.budget import predict
from svsk_jax.quant.types import QuantConfig, TileShape, recipe
from svsk_jax.storage import SavedModel, verify

CALIBRATION = CalibrationConfig(calib=("documentation",), chunks=64, chunk_length=32, moments="diagonal")
FULL = dataclasses.replace(CALIBRATION, moments="full", fisher_chunks=32)
PLAIN = QuantConfig(
    codebook="companded", groups=(32,), scales="two_level", rank=0, feedback="columns", metric="full"
)
SMALL = QuantConfig(rank=4, tile=TileShape(rows=32, columns=32))


@pytest.fixture
def source(tiny_config):
    return MemorySource(tiny_config)


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    """What quantizing with calibration gave, and the progress that was reported."""
    events = []
    result = pipeline.quantize(
        MemorySource(TINY),
        tmp_path_factory.mktemp("direct") / "out",
        SMALL,
        recipe="small",
        calibration=CALIBRATION,
        on_progress=events.append,
    )
    return result, events


@pytest.fixture(scope="module")
def diagonals(tmp_path_factory):
    """Statistics that hold diagonals only."""
    folder = tmp_path_factory.mktemp("diagonals") / "stats"
    pipeline.calibrate(MemorySource(TINY), folder, CALIBRATION)
    return Statistics.open(folder)


def contents(folder):
    """Logical bytes of a saved model (files hold times and random names)."""
    model = SavedModel(folder)
    layers = [model.layer(index, jnp.float32) for index in range(model.config.num_layers)]
    return jax.tree.map(np.asarray, (model.outer(jnp.float32), layers))


def test_bytes_are_the_budget_and_errors_are_recorded(source, direct):
    result, events = direct
    assert result.budget == predict(parameter_shapes(source.config), quantized_paths(source.config), SMALL)
    metadata = SavedModel(result.output).metadata
    assert metadata["bytes"]["whole_file"] == result.budget.total_bytes
    assert metadata["bits"]["decoder_linears"] == result.budget.linear_bits
    assert metadata["calibration"] == {
        "calib": {"documentation": 64},
        "chunks": 64,
        "chunk_length": 32,
        "moments": "diagonal",
        "fisher_chunks": 0,
        "seed": 0,
    }
    assert metadata["quant_config"] == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert [(event.stage, event.layer) for event in events] == [
        ("calibrate", 1),
        ("calibrate", 2),
        ("quantize", 1),
        ("quantize", 2),
    ]
    assert len(result.errors) == 2 * len(QUANTIZED_LINEARS)
    assert all(0 < error < 0.02 for error in result.errors.values())
    assert json.dumps(result.to_dict())


def test_statistics_give_the_same_model_as_calibrating_now(source, direct, diagonals, tmp_path):
    reused = pipeline.quantize(source, tmp_path / "out", SMALL, recipe="small", statistics=diagonals)
    assert direct[0].errors == reused.errors
    jax.tree.map(np.testing.assert_array_equal, contents(direct[0].output), contents(tmp_path / "out"))


def test_more_rank_means_less_divergence(source, direct, diagonals, tmp_path):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 64)), jnp.int32)
    run = jax.jit(lambda model, ids: model(ids))
    reference = run(load_decoder(source, jnp.float32), tokens)
    divergences = []
    for rank in (0, SMALL.rank, 16):
        out = direct[0].output if rank == SMALL.rank else tmp_path / f"r{rank}"
        if rank != SMALL.rank:
            config = dataclasses.replace(SMALL, rank=rank)
            pipeline.quantize(source, out, config, recipe="small", statistics=diagonals)
        logits = run(load_decoder(SavedModel(out), jnp.float32), tokens)
        divergences.append(float(token_divergence(reference, logits, tokens).kld.mean()))
    assert 0 < divergences[2] < 0.5 * divergences[1] < 0.5 * divergences[0]


def test_unquantized_copy_is_exact(source, direct, tmp_path):
    pipeline.convert(source, tmp_path / "dense", dtype=jnp.float32)
    copy = SavedModel(tmp_path / "dense")
    for index in range(source.config.num_layers):
        jax.tree.map(
            np.testing.assert_array_equal, copy.layer(index, jnp.float32), source.layer(index, np.float32)
        )
    # A converted model is an unquantized one: it may be quantized.
    plain = dataclasses.replace(SMALL, rank=0)
    result = pipeline.quantize(copy, tmp_path / "out", plain, recipe="small", calibration=CALIBRATION)
    assert result.output == tmp_path / "out"
    for folder in (direct[0].output, tmp_path / "out"):
        with pytest.raises(ValueError, match="already quantized"):
            pipeline.quantize(
                SavedModel(folder), tmp_path / "twice", SMALL, recipe="small", calibration=CALIBRATION
            )


def test_bfloat16_embedding(source, tmp_path):
    config = dataclasses.replace(recipe("q4"), embedding="bfloat16")
    result = pipeline.quantize(source, tmp_path / "out", config, recipe="q4", calibration=CALIBRATION)
    assert result.budget == predict(parameter_shapes(source.config), quantized_paths(source.config), config)
    stored = SavedModel(tmp_path / "out").outer(jnp.float32)["embedding.weight"]
    np.testing.assert_allclose(stored, source.parameters["embedding.weight"], rtol=2**-8)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_in_4_bits(tiny_config, tied, tmp_path):
    source = MemorySource(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    config = dataclasses.replace(PLAIN, embedding="q4")
    plain = dataclasses.replace(FULL, fisher="off")
    result = pipeline.quantize(source, tmp_path / "out", config, recipe="plain", calibration=plain)
    sizes = model_sizes(source.config, config)
    assert result.budget == sizes.budget
    saved = SavedModel(tmp_path / "out")
    outer = saved.outer(jnp.float32)
    kinds = {path: tensor["kind"] for path, tensor in saved.metadata["tensors"].items()}
    matrices = {"embedding.weight"} if tied else {"embedding.weight", "head.weight"}
    assert {path for path, kind in kinds.items() if kind == "svsk"} == matrices
    for path in matrices:
        W = source.parameters[path]
        assert 0 < np.sum(np.square(dequantize(outer[path]) - W)) < 0.01 * np.sum(np.square(W))
    laid = lay_out_for_device(load_parameters(saved, jnp.float32), jnp.float32)
    assert sizes.in_memory["CPU, packed"] == nbytes(laid)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 16)), jnp.int32)
    reference, found = (
        jax.jit(lambda model, ids: model(ids))(load_decoder(model, jnp.float32), tokens)
        for model in (source, saved)
    )
    assert 0 < float(token_divergence(reference, found, tokens).kld.mean()) < 0.1


def test_relative_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline.quantize(source, Path("sub/out"), SMALL, recipe="small", calibration=CALIBRATION)
    assert SavedModel(Path("sub/out")).config == source.config
    assert verify(Path("sub/out")).damaged == {}
    assert verify(Path("sub/out")).tensors > 0


def test_statistics_of_another_model_are_refused(source, tiny_config, tmp_path):
    pipeline.calibrate(MemorySource(tiny_config, seed=1), tmp_path / "stats", CALIBRATION)
    with pytest.raises(ValueError, match="made from memory:1, not from memory:0"):
        pipeline.quantize(
            source, tmp_path / "out", SMALL, recipe="small", statistics=Statistics.open(tmp_path / "stats")
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_cut_short_in_its_first_layer_leaves_nothing(source, tmp_path, monkeypatch, error):
    def stop(index, dtype):
        raise error

    monkeypatch.setattr(source, "layer", stop)
    with pytest.raises(type(error)):
        pipeline.quantize(source, tmp_path / "out", SMALL, recipe="small", calibration=CALIBRATION)
    with pytest.raises(type(error)):
        pipeline.calibrate(source, tmp_path / "stats", CALIBRATION)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_any_work(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="out"):
            pipeline.quantize(source, tmp_path / "out", SMALL, recipe="small", overwrite=overwrite)
    assert os.listdir(tmp_path) == ["out"]


def test_too_small_a_disk_is_refused_with_the_number(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"needs 0 MB, the disk has 0 MB free"):
        pipeline.quantize(source, tmp_path / "out", SMALL, recipe="small", calibration=CALIBRATION)


STRONG = dataclasses.replace(
    recipe("svsk-r16"), bits=5.5, groups=(16,), tile=TileShape(rows=16, columns=0), joint_rounds=1
)
"""Of SQUARE."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model and its statistics with the Fisher pass."""
    source = MemorySource(SQUARE)
    folder = tmp_path_factory.mktemp("stats") / "stats"
    pipeline.calibrate(source, folder, FULL)
    return source, Statistics.open(folder)


@pytest.fixture(scope="module")
def strong(measured, tmp_path_factory):
    """What quantizing to a budget gave."""
    source, statistics = measured
    folder = tmp_path_factory.mktemp("strong") / "out"
    return pipeline.quantize(source, folder, STRONG, recipe="strong", statistics=statistics)


def test_the_budget_is_kept_and_mostly_spent(strong):
    assert 5.45 < strong.budget.linear_bits <= 5.5
    assert strong.predicted_nats > 0
    stored = SavedModel(strong.output)
    tensors = [t for index in range(2) for t in stored.layer_metadata(index)["tensors"].values()]
    linears = [tensor for tensor in tensors if tensor["kind"] == "svsk"]
    assert {tensor["codebook"] for tensor in linears} == {"companded"}
    assert len({str(tensor["sidecar"]) for tensor in linears}) > 2


def test_a_plan_gives_the_same_model_again(measured, strong, tmp_path):
    source, statistics = measured
    plan = pipeline.plan_model(source, statistics, STRONG, recipe="strong", dtype=jnp.float32)
    plan.save(tmp_path / "recipe.json")
    loaded = pipeline.Plan.load(tmp_path / "recipe.json")
    assert loaded == plan
    pipeline.quantize(source, tmp_path / "out", loaded, recipe="strong", statistics=statistics)
    jax.tree.map(np.testing.assert_array_equal, contents(strong.output), contents(tmp_path / "out"))


@pytest.mark.parametrize("content", ["{", '{"format": 9}', '{"format": 1, "recipe": "x"}'])
def test_a_damaged_recipe_file_is_named(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"--recipe .*recipe\.json.*svsk autotune"):
        pipeline.Plan.load(tmp_path / "recipe.json")


def test_diagonals_are_refused_for_a_recipe_that_needs_more(source, diagonals, tmp_path):
    with pytest.raises(ValueError, match=r"diagonals only.*--moments full"):
        pipeline.quantize(source, tmp_path / "out", STRONG, recipe="s", statistics=diagonals)


def test_without_sensitivities_the_plain_metric_serves(measured, tmp_path):
    source, _ = measured
    plain = dataclasses.replace(FULL, fisher="off")
    with pytest.warns(UserWarning, match="without the Fisher pass.*a quarter more"):
        result = pipeline.quantize(source, tmp_path / "out", STRONG, recipe="s", calibration=plain)
    assert result.predicted_nats is None
    assert result.budget.linear_bits <= 5.5
    assert SavedModel(tmp_path / "out").metadata["quant_config"]["metric"] == "full"


def test_too_few_bits_say_what_is_needed(measured, tmp_path):
    source, statistics = measured
    config = dataclasses.replace(STRONG, bits=4.0)
    with pytest.raises(ValueError, match=r"4\.0 bits/weight.*ask for more"):
        pipeline.quantize(source, tmp_path / "out", config, recipe="s", statistics=statistics)
