"""Two real processes on this host, started as the README says: statistics within rounding of one device's,
and the same model to the byte."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import TINY, write_checkpoint

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.models import open_model
from svsk_jax.parallel import make_mesh
from svsk_jax.pipeline.plan import Plan, fixed_plans
from svsk_jax.quant.types import recipe
from svsk_jax.storage import SavedModel

CONFIG = dataclasses.replace(
    TINY, hidden_size=64, intermediate_size=520, num_heads=2, num_kv_heads=2, head_dim=32
)
"""Two layers, one for each process; gate and up have more rows than a tile."""
CALIBRATION = CalibrationConfig(
    calib=("documentation",), chunks=64, chunk_length=16, fisher_chunks=9, batch_tokens=64
)
CALIBRATE = ("--calib", "documentation", "--chunks", 64, "--chunk-length", 16, "--fisher-chunks", 9)
CALIBRATE += ("--batch-tokens", 64)
CHEAP = dataclasses.replace(
    recipe("svsk-r16"), bits=None, groups=(16,), rank=4, feedback="columns", beam_width=1, joint_rounds=0
)
"""The parts of the strong recipe that are soon compiled."""
MESH = ("--mesh", "data=2,model=2")


def launch(*command):
    """Two processes of two devices each."""
    arguments = ["--processes", "2", "--devices", "2", "--", *map(str, command)]
    return subprocess.run(
        [sys.executable, "-m", "svsk_jax.parallel.launch", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), 0, CONFIG)


@pytest.fixture(scope="module")
def statistics(checkpoint, tmp_path_factory):
    """Of one device."""
    folder = tmp_path_factory.mktemp("alone") / "stats"
    pipeline.calibrate(open_model(str(checkpoint)), folder, CALIBRATION, mesh=make_mesh(1, 1))
    return folder


def test_statistics_within_rounding(checkpoint, statistics, tmp_path):
    done = launch("calibrate", "--model", checkpoint, "--output", tmp_path / "stats", *MESH, *CALIBRATE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote") == 1
    names = sorted(path.name for path in statistics.glob("*.safetensors"))
    assert names == sorted(path.name for path in (tmp_path / "stats").glob("*.safetensors"))
    assert len(names) == 2 + 2 * CONFIG.num_layers
    for name in names:
        alone, found = load_file(statistics / name), load_file(tmp_path / "stats" / name)
        assert alone.keys() == found.keys()
        for key, value in alone.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
    first, second = (Statistics.open(folder).manifest for folder in (statistics, tmp_path / "stats"))
    assert first["text"] == second["text"]


def contents(folder):
    """Logical bytes, layer errors and the other metadata of a saved model."""
    model = SavedModel(folder)
    layers = [model.layer(index, jnp.float32) for index in range(model.config.num_layers)]
    values = jax.tree.map(np.asarray, (model.outer(jnp.float32), layers))
    of_layers = [model.layer_metadata(index) for index in range(len(layers))]
    errors = [each.pop("errors") for each in of_layers]
    return values, errors, [model.metadata, *of_layers]


def test_the_same_model_to_the_byte(checkpoint, statistics, tmp_path):
    plan = Plan(recipe="cheap", config=CHEAP, tensors=fixed_plans(CONFIG, CHEAP))
    plan.save(tmp_path / "plan.json")
    source, measured = open_model(str(checkpoint)), Statistics.open(statistics)
    pipeline.quantize(source, tmp_path / "alone", plan, recipe="cheap", statistics=measured)
    settings = ("--calib-stats", statistics, "--recipe", tmp_path / "plan.json")
    done = launch("quantize", "--model", checkpoint, "--output", tmp_path / "out", *settings, *MESH)
    assert done.returncode == 0, done.stderr
    alone, found = contents(tmp_path / "alone"), contents(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, alone[0], found[0])
    # Measured after the fact: their last bit was once seen to differ under load.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), alone[1], found[1])
    assert alone[2] == found[2]
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "alone", "out"}


def test_one_that_fails_ends_all(checkpoint, statistics):
    """Only the lead looks whether the output exists; the other waits for it."""
    done = launch("calibrate", "--model", checkpoint, "--output", statistics, *CALIBRATE)
    assert done.returncode == 2
    assert "error: output" in done.stderr
    assert "process 1: process 0 failed: output" in done.stderr
