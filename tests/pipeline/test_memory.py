"""A limit on memory chooses batches, and places that change no number, and refuses what cannot fit before any
work."""

import dataclasses
import importlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, MemorySource, write_checkpoint

from svsk_jax import cli, pipeline
from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.sensitivity import layer_sensitivity, no_blocks
from svsk_jax.calibration.statistics import layer_moments, no_moments
from svsk_jax.known_models import KNOWN
from svsk_jax.model.decoder import DecoderLayer
from svsk_jax.model.parameters import layer_shapes
from svsk_jax.parallel import make_mesh
from svsk_jax.pipeline.memory import Machine, gigabytes, plan_calibration, plan_quantization
from svsk_jax.pipeline.working_sets import Widths
from svsk_jax.quant.types import recipe

CALIBRATION = CalibrationConfig(
    calib=("documentation",), chunks=64, chunk_length=32, fisher_chunks=40, batch_tokens=256
)
GPU = Machine(platform="gpu", devices=1, model=1, copies=1, itemsize=2)
CPU = Machine(platform="cpu", devices=1, model=1, copies=1, itemsize=4)


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    """Statistics of a walk whose streams stay on the devices."""
    return statistics(tmp_path_factory.mktemp("devices") / "out")


def statistics(folder):
    """Bytes of each file that calibration writes, but for the manifest, which has times."""
    pipeline.calibrate(MemorySource(TINY), folder, CALIBRATION, mesh=make_mesh(2, 1, jax.devices()[:2]))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.parametrize("store_bytes", [0, 250_000, 1 << 30])
def test_where_streams_lie_changes_no_byte(store_bytes, on_devices, tmp_path, monkeypatch):
    chosen = []

    def off_devices(*arguments, **keywords):
        plan = plan_calibration(*arguments, **keywords)
        chosen.append(dataclasses.replace(plan, streams="store", store_bytes=store_bytes))
        return chosen[-1]

    spilled = []
    keep = BlockInputs.put

    def put(self, what, batch, value):
        spilled.append(what)
        keep(self, what, batch, value)

    # By its name in the package it is the function.
    module = importlib.import_module("svsk_jax.pipeline.calibrate")
    monkeypatch.setattr(module, "plan_calibration", off_devices)
    monkeypatch.setattr(BlockInputs, "put", put)
    assert statistics(tmp_path / "out") == on_devices
    assert len(chosen) == 1
    assert {"streams", "gradients", 0, 1} == set(spilled)
    # Tokens, the head's moment, and two of each layer.
    assert len(on_devices) == 2 + 2 * TINY.num_layers
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_room_is_free_again_when_a_batch_is_taken_out(tmp_path):
    value = np.arange(6, dtype=np.float32)
    with BlockInputs(value.nbytes, tmp_path) as kept:
        kept.put("streams", 0, value)
        kept.put("streams", 1, value + 1)
        assert len(list(tmp_path.glob("*/*.bin"))) == 1
        np.testing.assert_array_equal(kept.get("streams", 1), value + 1)
        np.testing.assert_array_equal(kept.pop("streams", 1), value + 1)
        np.testing.assert_array_equal(kept.pop("streams", 0), value)
        kept.put("streams", 2, value)
        assert not list(tmp_path.glob("*/*.bin"))


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_less_memory_means_smaller_batches_then_refusal(machine):
    model = KNOWN["Qwen3-8B"]
    calibration = CalibrationConfig(calib=("documentation",), batch_tokens=8192)
    free = plan_calibration(model, calibration, machine)
    assert (free.batch_tokens, free.streams) == (8192, "devices")
    assert plan_calibration(model, calibration, machine, max(free.peaks.values())) == free
    batches, places = [], set()
    refusal = ""
    for limit in range(max(free.peaks.values()), 0, -(10**8)):
        try:
            plan = plan_calibration(model, calibration, machine, limit)
        except ValueError as error:
            refusal = str(error)
            break
        assert max(plan.peaks.values()) <= limit
        batches.append(plan.batch_tokens)
        places.add(plan.streams)
    assert batches == sorted(batches, reverse=True)
    assert set(batches) >= {8192, 4096, 2048}
    assert places == {"devices", "store"}
    found = re.search(r"--max-memory .* needs ([\d.]+) GB", refusal)
    assert found is not None
    plan_calibration(model, calibration, machine, gigabytes(float(found[1])))


def run_forwards(layer, mask, sums, mesh, x):
    return layer_moments(layer, x, mask, sums, mesh, True)


def test_what_a_batch_takes_is_what_xla_takes():
    config = dataclasses.replace(
        TINY, hidden_size=128, intermediate_size=384, num_heads=4, num_kv_heads=4, head_dim=32
    )
    mesh = make_mesh(1, 1, jax.devices()[:1])

    parameters = {path: jnp.ones(shape) for path, shape in layer_shapes(config, 0).items()}
    layer = DecoderLayer(config, parameters)
    widths = Widths.of(config)
    for batch, length in ((4, 512), (16, 64)):
        x, mask = jnp.ones((batch, length, 128)), jnp.ones(batch)
        sums, blocks = no_moments(layer, x, mask, mesh, True), no_blocks(layer, x, mesh)
        forwards = jax.jit(partial(run_forwards, layer, mask, sums, mesh)).lower(x)
        backwards = layer_sensitivity.lower(layer, x, x, blocks, mesh)
        for lowered, expected in (
            (forwards, widths.forwards(batch * length, length, 4)),
            (backwards, widths.backwards(batch * length, length, 4)),
        ):
            taken = lowered.compile().memory_analysis().temp_size_in_bytes
            assert 0.4 * expected < taken < 1.1 * expected


def test_devices_of_a_cpu_share_its_memory():
    assert Machine.of(make_mesh(2, 2, jax.devices()[:4])) == Machine(
        platform="cpu", devices=4, model=2, copies=4, itemsize=4
    )
    one, four = (dataclasses.replace(CPU, devices=count, copies=count) for count in (1, 4))
    model, calibration = KNOWN["Qwen3-0.6B"], CalibrationConfig(calib=("code",))
    assert max(plan_calibration(model, calibration, four).peaks.values()) > max(
        plan_calibration(model, calibration, one).peaks.values()
    )


def test_devices_share_moments_but_not_experts():
    calibration = CalibrationConfig(calib=("code",), batch_tokens=512)

    def planned(name, model):
        machine = dataclasses.replace(GPU, devices=8, model=model)
        return plan_calibration(KNOWN[name], calibration, machine).peaks["calibrate"]

    # Sums and a batch's beside them; their halves are divided over all devices whatever the mesh is.
    moments = 4 * (3 * 4096**2 + 12288**2)
    alone, shared = 2 * moments, 2 / 8 * moments
    saved = planned("Qwen3-8B", 1) - planned("Qwen3-8B", 8)
    assert 0.97 * (alone - shared) < saved < 1.03 * (alone - shared)
    # Several processes have whole moments and halves on each device, whoever sums what.
    of_hosts = dataclasses.replace(GPU, devices=8, processes=2)
    apart = plan_calibration(KNOWN["Qwen3-8B"], calibration, of_hosts).peaks["calibrate"]
    assert apart - planned("Qwen3-8B", 1) > 2 * (0.52 - 15 / 128) * moments
    assert planned("Qwen3-30B-A3B", 8) > 0.9 * planned("Qwen3-30B-A3B", 1)


def test_text_that_the_model_writes_takes_the_whole_model():
    model, own = KNOWN["Qwen3-8B"], CalibrationConfig(calib=("mixture",))
    assert plan_calibration(model, own, GPU).peaks["text"] > 2 * 8_190_735_360
    assert "text" not in plan_calibration(model, own, GPU, has_text=True).peaks
    with pytest.raises(ValueError, match="--calib documentation"):
        plan_calibration(model, own, GPU, 12 * 10**9)


def test_refused_before_any_work(tmp_path, capsys):
    source = MemorySource(TINY)
    with pytest.raises(ValueError, match=r"--max-memory 0\.1: the stage `plan` needs 0\.\d+ GB"):
        pipeline.quantize(source, tmp_path / "out", recipe("svsk-r16"), recipe="svsk-r16", max_memory=10**8)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    model = write_checkpoint(tmp_path / "model", 0)
    flags = ["--model", str(model), "--calib", "documentation"]
    for command in (["calibrate", "--output", str(tmp_path / "s")], ["plan"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, *flags, "--max-memory", "0.05"])
        assert "--max-memory 0.05" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_limits_that_are_no_sizes():
    assert gigabytes(None) is None
    assert gigabytes(1.5) == 1_500_000_000
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--max-memory"):
            gigabytes(limit)
    assert max(plan_quantization(KNOWN["Qwen3-8B"], GPU).values()) < 16 * 10**9
