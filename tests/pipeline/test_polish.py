"""Polishing a small model: nearer to the original on text that it was not trained on, in the same bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SQUARE, MemorySource

from convert.load import load_decoder
from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.calibration.text import read_texts, tokenize
from svsk_jax.evaluation.divergence import token_divergence
from svsk_jax.pipeline import polish as module
from svsk_jax.quant.types import TileShape, recipe
from svsk_jax.storage import SavedModel

CALIBRATION = CalibrationConfig(calib=("documentation",), chunks=64, chunk_length=32, fisher_chunks=8)
STRONG = dataclasses.replace(
    recipe("svsk-r16"),
    bits=5.5,
    groups=(16,),
    tile=TileShape(rows=16, columns=0),
    beam_width=1,
    joint_rounds=0,
)


@pytest.fixture(autouse=True)
def steps_of_one_shape(monkeypatch):
    """Steps of few tokens, which are compiled once for all tests here."""
    monkeypatch.setattr(module, "BATCH_TOKENS", 512)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    source = MemorySource(SQUARE)
    folder = tmp_path_factory.mktemp("stats") / "stats"
    pipeline.calibrate(source, folder, CALIBRATION)
    return source, Statistics.open(folder)


@pytest.fixture(scope="module")
def plain(measured, tmp_path_factory):
    """The model without polish: its folder and what quantizing it gave."""
    source, statistics = measured
    folder = tmp_path_factory.mktemp("plain") / "out"
    return folder, pipeline.quantize(source, folder, STRONG, recipe="plain", statistics=statistics)


def polished(measured, folder, steps):
    source, statistics = measured
    config = dataclasses.replace(STRONG, polish=steps)
    return pipeline.quantize(source, folder, config, recipe="polished", statistics=statistics)


def divergence(source, folder):
    ids = tokenize(source.tokenizer(), read_texts("documentation", "evaluation"))
    tokens = jnp.asarray(ids[: 32 * 32].reshape(32, 32))
    run = jax.jit(lambda model, ids: model(ids))
    reference, model = load_decoder(source, jnp.float32), load_decoder(SavedModel(folder), jnp.float32)
    return float(jnp.mean(token_divergence(run(reference, tokens), run(model, tokens), tokens).kld))


def test_polish_lowers_the_divergence_at_the_same_bytes(measured, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 3e-3)
    source, (folder, unpolished) = measured[0], plain
    result = polished(measured, tmp_path / "out", 48)
    assert result.budget == unpolished.budget
    assert result.errors != unpolished.errors
    assert divergence(source, tmp_path / "out") < 0.93 * divergence(source, folder)


def test_steps_that_do_harm_are_not_kept(measured, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 10.0)
    source = measured[0]
    polished(measured, tmp_path / "out", 2)
    assert divergence(source, tmp_path / "out") == pytest.approx(divergence(source, plain[0]), rel=0.02)


def test_one_chunk_is_too_few(measured):
    source, _ = measured
    with pytest.raises(ValueError, match="at least 2 chunks"):
        module.polish(source, [], np.zeros((1, 32), np.int32), 1, jnp.float32)
