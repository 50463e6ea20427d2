"""Sizes told before there is a model are those of the model; the estimates follow from what was measured."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, MemorySource

from convert import open_config
from convert.load import load_parameters
from svsk_jax import pipeline
from svsk_jax.calibration import store
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.known_models import KNOWN
from svsk_jax.model.laid_out import lay_out_for_device
from svsk_jax.model.parameters import HEAD_INPUT, input_widths, layer_shapes, parameter_shapes
from svsk_jax.pipeline.forecast import forecast, measured_costs
from svsk_jax.pipeline.plan import Plan, fixed_plans
from svsk_jax.pipeline.sizes import model_sizes
from svsk_jax.quant.budget import planned_bytes
from svsk_jax.quant.joint import input_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.types import InputMoment, TensorPlan, TileShape, recipe
from svsk_jax.storage import SavedModel

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL = dataclasses.replace(TINY, num_layers=1)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture
def statistics(tmp_path):
    """Diagonal moments of ones, as if they had been measured."""
    source, widths = MemorySource(SMALL), input_widths(SMALL, 0)
    moments = {
        name: InputMoment(total=jnp.ones(width), tokens=jnp.int32(1)) for name, width in widths.items()
    }
    store.write_tokens(tmp_path, np.zeros((1, 4)))
    store.write_moments(tmp_path, 0, moments)
    store.write_head(tmp_path, {HEAD_INPUT: moments["attention.input"]})
    text = {"moments": "diagonal", "fisher_chunks": 0}
    store.finish(tmp_path, {"model": "m", "fingerprint": source.fingerprint(), "text": text})
    return Statistics.open(tmp_path)


@pytest.mark.parametrize("embedding", ["int8", "bfloat16"])
def test_sizes_are_those_of_the_quantized_model(statistics, tmp_path, embedding):
    config = dataclasses.replace(recipe("classic-r8"), embedding=embedding)
    sizes = model_sizes(SMALL, config)
    made = pipeline.quantize(
        MemorySource(SMALL), tmp_path / "out", config, recipe="classic-r8", statistics=statistics
    )
    assert sizes.exact
    assert sizes.budget == made.budget
    saved = SavedModel(tmp_path / "out")
    stored = load_parameters(saved, jnp.float32)
    as_loaded = 4 * sum(value.size for value in stored.values() if isinstance(value, jax.Array))
    packed = nbytes([value for value in stored.values() if not isinstance(value, jax.Array)])
    if embedding == "int8":
        assert sizes.budget.total_bytes == packed + as_loaded  # vectors are f32 here and there
    assert sizes.in_memory["CPU, packed"] == nbytes(lay_out_for_device(stored, jnp.float32))


def test_a_plan_of_unequal_ranks_is_counted_to_the_byte():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(recipe("svsk-r16"), feedback="none", joint_rounds=0, beam_width=1)
    shape = (40, 48)
    W = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    inputs = input_metric(InputMoment(total=jnp.eye(48), tokens=jnp.int32(1)), None, config)
    plan = TensorPlan(
        group=32, coefficients=None, tile=TileShape(rows=16, columns=0), ranks=((0,), (3,), (5,))
    )
    weight = quantize_joint(W, inputs, plain_output_metric(W, inputs.H), plan, config).weight
    assert planned_bytes(shape, plan, "two_level") == weight.nbytes
    plans = fixed_plans(SMALL, config)
    plans["layers.0.attention.q"] = dataclasses.replace(plan, ranks=((0,), (3,), (5,)))
    base = model_sizes(SMALL, Plan(recipe="x", config=config, tensors=fixed_plans(SMALL, config)))
    mixed = model_sizes(SMALL, Plan(recipe="x", config=config, tensors=plans))
    query = layer_shapes(SMALL, 0)["attention.q.weight"]
    change = planned_bytes(query, plan, "two_level") - planned_bytes(
        query, fixed_plans(SMALL, config)["layers.0.attention.q"], "two_level"
    )
    assert mixed.budget.linear_bytes - base.budget.linear_bytes == change


def test_an_allocated_recipe_is_bounded_by_its_bits():
    sizes = model_sizes(KNOWN["Qwen3-4B"], recipe("svsk-r16"))
    assert not sizes.exact
    assert 0 <= 4.6 - sizes.budget.linear_bits < 1e-6
    memory = sizes.in_memory
    assert sizes.budget.total_bytes < memory["NVIDIA GPU, packed"] < memory["dense bfloat16"] / 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-32B", 32_762_123_264),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen3-235B-A22B", 235_093_634_560),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
    ],
)
def test_published_numbers_of_parameters(name, parameters):
    assert sum(int(np.prod(shape)) for shape in parameter_shapes(KNOWN[name]).values()) == parameters


def test_costs_that_come_along_are_those_of_the_results():
    costs = measured_costs("cpu")
    estimate = json.loads((RESULTS / "quantize-estimate-cpu.json").read_text())
    classic = json.loads((RESULTS / "quantize-smollm2-cpu.json").read_text())
    for key in ("machine", "date", "measured"):
        assert costs["linears"][key] == estimate[key]
    for stage in ("calibrate", "quantize"):
        assert costs["classic"]["seconds"][stage] == classic["seconds"][stage]
    for name, row in estimate["models"].items():
        found = forecast(KNOWN[name], recipe("svsk-r16"), CalibrationConfig(), costs)
        assert found.plan_seconds == pytest.approx(row["plan_seconds"], rel=1e-6)
        assert found.quantize_seconds == pytest.approx(row["quantize_seconds"], rel=1e-6)
        assert found.statistics_bytes == row["statistics_bytes"]
        assert found.costs_of == f"{estimate['machine']}, {estimate['date']}"


def test_the_measured_run_is_estimated_as_measured():
    costs = measured_costs("cpu")
    model = KNOWN["SmolLM2-135M"]
    pass_ = CalibrationConfig(chunks=128, chunk_length=448, moments="diagonal")
    found = forecast(model, recipe("classic-r16"), pass_, costs)
    assert found.calibrate_seconds == pytest.approx(costs["classic"]["seconds"]["calibrate"])
    assert found.quantize_seconds == pytest.approx(costs["classic"]["seconds"]["quantize"])
    more = forecast(model, recipe("classic-r16"), dataclasses.replace(pass_, chunks=256), costs)
    assert more.calibrate_seconds == pytest.approx(2 * costs["classic"]["seconds"]["calibrate"])


def test_without_costs_times_are_unknown(tmp_path):
    assert measured_costs("a platform without a file") == {}
    found = forecast(KNOWN["Qwen3-4B"], recipe("svsk-r16"), CalibrationConfig(), {})
    assert (found.calibrate_seconds, found.quantize_seconds, found.costs_of) == (None, None, None)
    for content in ("{", "{}", '{"measured": [{"shape": [1]}]}', '{"measured": [3]}'):
        (tmp_path / "costs.json").write_text(content)
        with pytest.raises(ValueError, match=r"costs\.json.*benchmarks\.speed\.quantize --estimate"):
            measured_costs("cpu", tmp_path / "costs.json")


def test_a_configuration_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    assert open_config(str(tmp_path)) == TINY
    assert open_config("Qwen3-8B") is KNOWN["Qwen3-8B"]
    other = {**TINY.to_hf(), "architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"unknown architecture .MixtralForCausalLM"):
        open_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**TINY.to_hf(), "num_hidden_layers": 2**40}))
    with pytest.raises(ValueError, match="num_layers must be 1 to 10,000"):
        open_config(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
        open_config("no such thing")
