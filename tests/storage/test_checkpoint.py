"""Saved models come back byte for byte, on one device and on eight; nothing half-written looks whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MemorySource

from convert.load import load_decoder
from pallas_kernels.svsk_matmul import Sidecar
from svsk_jax.parallel import make_mesh
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import InputMoment, QuantConfig, SVSKWeight, TileShape
from svsk_jax.storage import SavedModel, writing
from svsk_jax.storage.arrays import differing
from svsk_jax.storage.atomic import output_folder, write_json
from svsk_jax.storage.checkpoint import MARKER
from svsk_jax.storage.packing import abstract, describe


def packed(matrix, config):
    moment = InputMoment(total=jnp.ones(matrix.shape[1]), tokens=jnp.int32(1))
    return quantize_linear(jnp.asarray(matrix), moment, config)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def whole_format():
    """A weight with every optional part: companded, two-level scales, ranks that differ by tile."""
    rng = np.random.default_rng(0)
    ranks = ((0, 2), (3, 1))
    sidecar = Sidecar(
        u=jnp.asarray(rng.integers(-127, 128, 16 * 2 + 4 * 4), jnp.int8),
        v=jnp.asarray(rng.integers(-127, 128, 2 * 8 + 3 * 32 + 8), jnp.int8),
        scale=jnp.asarray(rng.random(6), jnp.float16),
        shape=(20, 40),
        tile=(16, 32),
        ranks=ranks,
    )
    return SVSKWeight(
        codes=jnp.asarray(rng.integers(0, 256, (20, 20)), jnp.uint8),
        scales=jnp.asarray(rng.integers(0, 256, (20, 3)), jnp.uint8),
        super_scales=jnp.ones((20, 1), jnp.float16),
        coefficients=jnp.asarray([0.011, 0.3], jnp.float16),
        sidecar=sidecar,
        shape=(20, 40),
        group=16,
    )


@pytest.fixture
def source(tiny_config):
    return MemorySource(tiny_config)


@pytest.fixture
def saved(source, tmp_path):
    """A model with packed linears of rank 3 in small tiles, and what was written."""
    config = QuantConfig(rank=3, tile=TileShape(rows=16, columns=32))
    written = {}
    with writing(tmp_path / "out", overwrite=False) as writer:
        for index in range(source.config.num_layers):
            layer = source.layer(index, np.float32)
            stored = {
                path: packed(value, config) if value.ndim == 2 else jnp.asarray(value)
                for path, value in layer.items()
            }
            writer.layer(index, stored, {"attention.q": 0.5})
            written |= {f"layers.{index}.{path}": value for path, value in stored.items()}
        outer = source.outer(np.float32)
        outer["embedding.weight"] = quantize_int8(jnp.asarray(outer["embedding.weight"]))
        outer["final_norm.scale"] = jnp.asarray(outer["final_norm.scale"])
        writer.outer(outer, source, {"recipe": "test"})
        written |= outer
    return tmp_path / "out", written


def read_all(model):
    parameters = model.outer(jnp.float32)
    for index in range(model.config.num_layers):
        parameters |= {
            f"layers.{index}.{path}": value for path, value in model.layer(index, jnp.float32).items()
        }
    return parameters


def test_round_trip_on_one_and_on_eight_devices(saved):
    folder, written = saved
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 24)), jnp.int32)
    run = jax.jit(lambda model, ids: model(ids))
    logits = []
    for where in (None, mesh):
        model = SavedModel(folder, where)
        assert model.metadata["recipe"] == "test"
        assert model.layer_metadata(1)["errors"] == {"attention.q": 0.5}
        restored = read_all(model)
        assert restored.keys() == written.keys()
        for path, value in written.items():
            assert jax.tree.structure(restored[path]) == jax.tree.structure(value), path
            jax.tree.map(assert_same, restored[path], value)
        codes = restored["layers.0.attention.q.weight"].codes
        assert len(codes.sharding.device_set) == (1 if where is None else 8)
        logits.append(np.asarray(run(load_decoder(model, jnp.float32, where), tokens)))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5 * np.abs(logits[0]).max())


def test_from_one_mesh_onto_another(saved, source, tmp_path):
    folder, written = saved
    for data, model in ((2, 4), (4, 2)):
        stored = SavedModel(folder, make_mesh(data, model))
        restored = read_all(stored)
        assert restored.keys() == written.keys()
        for path, value in written.items():
            jax.tree.map(assert_same, restored[path], value)
        q, o = (restored[f"layers.1.attention.{name}.weight"].codes for name in "qo")
        assert q.sharding.shard_shape(q.shape) == (48 // model, 24)
        assert o.sharding.shard_shape(o.shape) == (48, 24 // model)
        folder = tmp_path / f"{data}x{model}"
        with writing(folder, overwrite=False) as writer:
            for index in range(source.config.num_layers):
                writer.layer(index, stored.layer(index, np.float32))
            writer.outer(stored.outer(np.float32), source, {"recipe": "test"})
    assert not [
        name
        for index in range(source.config.num_layers)
        for name in differing(
            SavedModel(folder).layer(index, np.float32), SavedModel(folder).layer_metadata(index)
        )
    ]


def test_every_optional_part_round_trips(tiny_config, tmp_path):
    weight = whole_format()
    config = dataclasses.replace(
        tiny_config, num_layers=1, hidden_size=40, num_heads=5, num_kv_heads=1, head_dim=4
    )
    source = MemorySource(config)
    with writing(tmp_path / "out", overwrite=False) as writer:
        writer.layer(
            0, jax.tree.map(jnp.asarray, source.layer(0, np.float32)) | {"attention.q.weight": weight}
        )
        writer.outer(jax.tree.map(jnp.asarray, source.outer(np.float32)), source, {})
    restored = SavedModel(tmp_path / "out").layer(0, jnp.float32)["attention.q.weight"]
    assert jax.tree.structure(restored) == jax.tree.structure(weight)
    jax.tree.map(assert_same, restored, weight)


def test_description_rebuilds_shapes():
    for value in (whole_format(), quantize_int8(jnp.ones((5, 70))), jnp.ones((3, 4), jnp.bfloat16)):
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), value)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract(describe(value))) == shapes
    with pytest.raises(ValueError, match="unknown kind of parameter 'trellis'"):
        abstract({"kind": "trellis", "shape": [1, 1]})


def test_files_beside_the_arrays(saved, source):
    model = SavedModel(saved[0])
    assert model.hf_config == source.hf_config
    assert model.generation_config == {"eos_token_id": 96}
    assert model.tokenizer()("ab")["input_ids"] == source.tokenizer()("ab")["input_ids"]


def test_damage_is_named(saved, tmp_path):
    folder, _ = saved
    for data in (folder / "svsk" / "layer_00001").rglob("d/*"):
        data.write_bytes(b"")
    with pytest.raises(ValueError, match=r"layer_00001: .* make it again"):
        SavedModel(folder).layer(1, jnp.float32)
    with pytest.raises(ValueError, match="not a model that svsk saved"):
        SavedModel(tmp_path)


def test_a_failed_write_leaves_nothing(source, tmp_path):
    def fail():
        with writing(tmp_path / "out", overwrite=False) as writer:
            writer.layer(0, {"a": jnp.ones(2)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_our_own(saved, source, tmp_path):
    folder, _ = saved
    with (
        pytest.raises(FileExistsError, match="--overwrite"),
        output_folder(folder, overwrite=False, marker=MARKER),
    ):
        pass
    with output_folder(folder, overwrite=True, marker=MARKER) as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["new"]
    with (
        pytest.raises(FileExistsError, match="not something svsk wrote"),
        output_folder(folder, overwrite=True, marker=MARKER),
    ):
        pass
    assert (folder / "new").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_overwrite_keeps_the_old(saved):
    folder, written = saved

    def fail():
        with writing(folder, overwrite=True):
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert read_all(SavedModel(folder)).keys() == written.keys()


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "sub" / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "sub" / "a.json", {"a": object()})
    assert (tmp_path / "sub" / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.json"]


def test_types_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole_format().group = 32
