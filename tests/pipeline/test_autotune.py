"""Autotune on a small model: no worse than the recipe at the same bytes, taken up where it was cut short."""

import dataclasses
import importlib
import json
from collections import Counter

import jax.numpy as jnp
import pytest
from support import SQUARE, MemorySource

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.model.parameters import QUANTIZED_LINEARS, linear_inputs
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.pipeline import plan as planning
from svsk_jax.pipeline.layer_statistics import statistics_ahead
from svsk_jax.pipeline.options import remove_options
from svsk_jax.pipeline.plan import Choices, Plan, spend
from svsk_jax.quant.types import SVSKWeight, TileShape, recipe
from svsk_jax.storage import SavedModel

# The package's attribute of this name is the function.
module = importlib.import_module("svsk_jax.pipeline.autotune")

CALIBRATION = CalibrationConfig(
    calib=("documentation",), chunks=64, chunk_length=32, moments="full", fisher_chunks=32
)
CONFIG = dataclasses.replace(
    recipe("svsk-r16"),
    bits=5.5,
    groups=(16,),
    tile=TileShape(rows=32, columns=0),
    feedback="none",
    beam_width=1,
    joint_rounds=0,
)
CHOICES = Choices(
    groups=(16, 32),
    coefficients=((0.008, 0.3), (0.004, 0.3)),
    tiles=(TileShape(rows=32, columns=0), TileShape(rows=16, columns=0)),
)
LAYERS = SQUARE.num_layers


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model and its statistics with the Fisher pass."""
    source = MemorySource(SQUARE)
    folder = tmp_path_factory.mktemp("stats") / "stats"
    pipeline.calibrate(source, folder, CALIBRATION)
    return source, Statistics.open(folder)


def tune(measured, work, **changes):
    source, statistics = measured
    arguments = {"config": CONFIG, "recipe": "tuned", "choices": CHOICES, **changes}
    return pipeline.autotune(source, statistics, arguments.pop("config"), work, **arguments)


@pytest.fixture(scope="module")
def options(measured):
    """What an uninterrupted run measures of each layer."""
    source, statistics = measured
    with statistics_ahead(statistics, source.config, CONFIG, DeviceGroups.of()) as ahead:
        return [
            planning.layer_options(
                source.layer(index, jnp.float32),
                linear_inputs(source.config, index),
                ahead,
                index,
                CONFIG,
                CHOICES,
            )
            for index in range(LAYERS)
        ]


@pytest.fixture
def calls(options, monkeypatch):
    """Layers that are measured from now on; `options` are what is found."""
    indices = []

    def record(weights, reads, ahead, index, *settings):
        indices.append(index)
        return options[index]

    monkeypatch.setattr(planning, "layer_options", record)
    return indices


def measure(measured, work, layers, **changes):
    """Tune, but stop when `layers` layers are measured."""

    def stop(event):
        if event.layer == layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(measured, work, on_progress=stop, **changes)


@pytest.fixture
def cut_short(measured, calls, tmp_path):
    """The work folder of a run that stopped after its first layer."""
    measure(measured, tmp_path / "work", 1)
    assert calls == [0]
    calls.clear()
    return tmp_path / "work"


@pytest.fixture(scope="module")
def best(options):
    """The plans that an uninterrupted run chooses."""
    return spend({name: listed for layer in options for name, listed in layer.items()}, CONFIG).plans


def stored_bytes(plan, options):
    """Bytes that a plan takes by the measured options."""
    total = 0
    for name, tensor in plan.tensors.items():
        (option,) = (
            each
            for layer in options
            for each in layer.get(name, [])
            if (each.group, each.coefficients, each.tile) == (tensor.group, tensor.coefficients, tensor.tile)
        )
        total += option.base_bytes + sum(
            rank * size
            for ranks, sizes in zip(tensor.ranks, option.rank_bytes(), strict=True)
            for rank, size in zip(ranks, sizes, strict=True)
        )
    return total


def test_it_measures_what_it_says_and_cleans_up(measured, options, calls, best, tmp_path):
    events = []
    tuned = tune(measured, tmp_path / "work", on_progress=events.append)
    assert calls == list(range(LAYERS))
    assert [(event.stage, event.layer, event.layers) for event in events] == [
        ("autotune", 1, LAYERS),
        ("autotune", 2, LAYERS),
    ]
    remove_options(tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
    assert {len(listed) for layer in options for listed in layer.values()} == {8}
    assert tuned.plan.tensors == best
    for counts in tuned.chosen.values():
        assert sum(counts.values()) == LAYERS * len(QUANTIZED_LINEARS)
    # Which tiles win hangs on the statistics, and those on the version of jax.
    assert tuned.chosen["tile"] == Counter(f"{plan.tile.rows} × K" for plan in best.values())


@pytest.mark.parametrize("bits", [5.1, 6.0])
def test_it_is_no_worse_than_the_recipe_at_the_same_bytes(measured, options, calls, tmp_path, bits):
    tuned = tune(measured, tmp_path / "work", config=dataclasses.replace(CONFIG, bits=bits))
    assert tuned.plan.predicted_nats is not None
    assert tuned.default.predicted_nats is not None
    assert 0 < tuned.plan.predicted_nats < tuned.default.predicted_nats
    own = {(16, CONFIG.coefficients, CONFIG.tile)}
    assert {(plan.group, plan.coefficients, plan.tile) for plan in tuned.default.tensors.values()} == own
    weights = sum(listed[0].shape[0] * listed[0].shape[1] for layer in options for listed in layer.values())
    for plan in (tuned.plan, tuned.default):
        assert 0.98 * bits < 8 * stored_bytes(plan, options) / weights <= bits


def test_where_the_wider_search_ends_worse_the_recipe_stands(measured, calls, tmp_path, monkeypatch):
    def poor(options, config):
        found = spend(options, config)
        wide = max(len(listed) for listed in options.values()) > 1
        return dataclasses.replace(found, nats=100.0) if wide else found

    monkeypatch.setattr(module, "spend", poor)
    tuned = tune(measured, tmp_path / "work")
    assert tuned.plan == tuned.default


def test_a_run_cut_short_goes_on(measured, calls, cut_short, best):
    resumed = tune(measured, cut_short)
    assert calls == [1]
    assert resumed.plan.tensors == best
    assert len(list(cut_short.iterdir())) == LAYERS


def test_statistics_made_again_from_the_same_tokens_serve(measured, calls, cut_short):
    source, statistics = measured
    again = dataclasses.replace(statistics, manifest={**statistics.manifest, "seconds": {"load": 1e3}})
    measure((source, again), cut_short, LAYERS, config=dataclasses.replace(CONFIG, bits=6.0))
    assert calls == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": dataclasses.replace(CHOICES, groups=(16,))},
        {"config": dataclasses.replace(CONFIG, damping=0.02)},
        {"dtype": jnp.bfloat16},
    ],
)
def test_measurements_under_other_settings_do_not_serve(measured, calls, cut_short, changes):
    measure(measured, cut_short, LAYERS, **changes)
    assert calls == [0, 1]


@pytest.mark.parametrize("kept", [lambda size: 0, lambda size: size // 2, lambda size: size - 1])
def test_a_damaged_measurement_is_made_again(measured, calls, cut_short, kept):
    (file,) = cut_short.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[: kept(len(data))])
    measure(measured, cut_short, LAYERS)
    assert calls == [0, 1]
    assert file.read_bytes() == data


def test_what_cannot_be_tuned_is_refused(measured, tmp_path):
    _, statistics = measured
    with pytest.raises(ValueError, match="--recipe classic-r16: has no budget"):
        tune(measured, tmp_path / "work", config=recipe("classic-r16"), recipe="classic-r16")
    with pytest.raises(ValueError, match="made from memory:0, not from memory:1"):
        tune((MemorySource(SQUARE, seed=1), statistics), tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


def test_too_few_bits_keep_the_measurements(measured, calls, tmp_path):
    with pytest.raises(ValueError, match=r"4\.0 bits/weight.*ask for more"):
        tune(measured, tmp_path / "work", config=dataclasses.replace(CONFIG, bits=4.0))
    assert calls == [0, 1]
    measure(measured, tmp_path / "work", LAYERS)
    assert calls == [0, 1]


def test_the_recipe_file_quantizes_within_the_budget(measured, calls, tmp_path):
    source, statistics = measured
    tuned = tune(measured, tmp_path / "work")
    tuned.plan.save(tmp_path / "recipe.json", {"chosen": tuned.chosen})
    assert json.loads((tmp_path / "recipe.json").read_text())["chosen"] == tuned.chosen
    plan = Plan.load(tmp_path / "recipe.json")
    assert plan == tuned.plan
    result = pipeline.quantize(source, tmp_path / "out", plan, recipe=plan.recipe, statistics=statistics)
    assert 5.4 < result.budget.linear_bits <= 5.5
    stored = SavedModel(tmp_path / "out")
    for index in range(LAYERS):
        layer = stored.layer(index, jnp.float32)
        for name in QUANTIZED_LINEARS:
            weight = layer[f"{name}.weight"]
            assert isinstance(weight, SVSKWeight)
            n, k = weight.shape
            assert weight.codes.dtype == jnp.uint8
            assert weight.codes.size * 2 == n * k
            chosen = plan.tensors[f"layers.{index}.{name}"]
            assert weight.group == chosen.group
            if weight.sidecar is not None:
                assert weight.sidecar.ranks == chosen.ranks
